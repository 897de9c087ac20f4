"""`dense`: 16-bit weights, P.weight [N, K]. What models come as, what `sparsify` writes, and a copy of a packed model for everything else.

A packed linear becomes fp16(code * scale), which rounds: the product has up to 14 significant bits and float16 holds 11.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from marlinctl.checkpoint.formats.base import FLOATS, MARLINCTL, SGLANG, TRANSFORMERS, VLLM, WEIGHTS, Format, LinearParts, Shapes
from marlinctl.errors import NumericalProblem
from marlinctl.quantize.scheme import INT4, Grid

if TYPE_CHECKING:
    from torch import Tensor


def _shapes(n: int, k: int, group_size: int, grid: Grid = INT4) -> Shapes:
    return {"weight": (FLOATS, (n, k))}


def _pack(layer: str, parts: LinearParts) -> dict[str, Tensor]:
    """NumericalProblem E604 for a weight beyond float16."""
    import torch

    weight = parts.weight().to(torch.float16)
    if not bool(torch.isfinite(weight).all()):
        raise NumericalProblem(
            "E604",
            f"{layer}: dequantized weights exceed what float16 holds (65504)",
            where=layer,
            fix="keep a packed format: ct, gptq, marlin or marlin_24",
        )
    return {"weight": weight}


def _unpack(tensors: Mapping[str, Tensor], group_size: int, variant: str, grid: Grid) -> LinearParts:
    raise ValueError("a 16-bit weight has no codes")


FORMAT = Format(
    name="dense",
    label="16-bit weights",
    title="16-bit copy of a {} model",
    tensors={"weight": WEIGHTS},
    shapes=_shapes,
    loaders=(TRANSFORMERS, VLLM, SGLANG, MARLINCTL),
    kernels=(MARLINCTL,),
    pack=_pack,
    unpack=_unpack,
    note="Every linear holds float16(code * scale). The product is rounded to 11 significant bits, so logits are close to those of the "
    "packed model and not equal to them.\n",
    trains="weights",
)
