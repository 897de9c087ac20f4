"""`marlin`: the tiles of marlinctl's dense INT4 kernels. N', K' are N, K padded to multiples of 64, G' the groups of K'.

    P.B             [K'/16, 2N']    int32
    P.s             [G', N']        fp16     in MARLIN order
    P.weight_shape  [2] = [N, K]    int64    the true sizes

docs/formats/marlin.md has the bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from marlinctl.checkpoint.formats import native
from marlinctl.checkpoint.formats.base import (
    CODES,
    INDICES,
    MARLINCTL,
    NATIVE_FILES,
    SCALES,
    Chosen,
    Format,
    FormatInfo,
    LinearParts,
    Shapes,
)  # fmt: skip

if TYPE_CHECKING:
    from torch import Tensor

    from marlinctl.pack.types import PackedLinear


def _detect(block: Mapping[str, Any], names: Sequence[str]) -> FormatInfo | None:
    return native.detect(block, names, FORMAT)


def _config_block(chosen: Chosen) -> dict[str, Any]:
    return native.config_block(chosen, FORMAT)


def _shapes(n: int, k: int, group_size: int) -> Shapes:
    padded_n, padded_k, common = native.padded_shapes(n, k, group_size)
    return {"B": (("I32",), (padded_k // 16, 2 * padded_n)), **common}


def _pack(layer: str, parts: LinearParts) -> dict[str, Tensor]:
    import torch

    from marlinctl.pack.marlin import pack_marlin

    packed = pack_marlin(parts.quantized(layer))
    return {"B": packed.qweight, "s": packed.scales, "weight_shape": torch.tensor(parts.codes.shape, dtype=torch.int64)}


def _tiles(tensors: Mapping[str, Tensor], n: int, k: int, group_size: int) -> PackedLinear:
    from marlinctl.pack.types import PackedLinear

    return PackedLinear(tensors["B"], tensors["s"], n, k, k if group_size == -1 else group_size)


def _unpack(tensors: Mapping[str, Tensor], group_size: int, variant: str) -> LinearParts:
    from marlinctl.pack.marlin import unpack_marlin

    q = unpack_marlin(_tiles(tensors, *native.true_sizes(FORMAT, tensors, group_size)))
    return LinearParts(q.codes, q.scales, q.group_size)


def _second_reading(tensors: Mapping[str, Tensor], n: int, k: int, group_size: int) -> Tensor:
    """Through the maps of pack/tile.py."""
    from marlinctl.kernels.reference import dequantize

    return dequantize(_tiles(tensors, n, k, group_size))


FORMAT = Format(
    name="marlin",
    label="MARLIN tiles",
    title="4-bit weights, native MARLIN tiles of marlinctl",
    tensors={"B": CODES, "s": SCALES, "weight_shape": INDICES},
    shapes=_shapes,
    loaders=(MARLINCTL,),
    kernels=(MARLINCTL,),
    methods=(native.METHOD,),
    detect=_detect,
    config_block=_config_block,
    pack=_pack,
    unpack=_unpack,
    second_reading=_second_reading,
    tiles=_tiles,
    tags=("marlin", "int4"),
    note=native.NOTE,
    files=NATIVE_FILES,
)
