"""`marlin_24`: the tiles of marlinctl's 2:4 INT4 kernels, which hold kept weights only. N', K' are N, K padded to multiples of 64, G' the
groups of K'.

    P.B_24          [K'/32, 2N']    int32    the weights that the mask keeps
    P.B_meta        [K'/32, 2N']    int16    where in their groups of four they are: the metadata is the mask
    P.s             [G', N']        fp16     in Sparse-MARLIN order
    P.weight_shape  [2] = [N, K]    int64    the true sizes

docs/formats/marlin_24.md has the bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from marlinctl.checkpoint.formats import native
from marlinctl.checkpoint.formats.base import (
    CODES,
    INDICES,
    MARLINCTL,
    METADATA,
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

    from marlinctl.pack.types import PackedSparseLinear


def _detect(block: Mapping[str, Any], names: Sequence[str]) -> FormatInfo | None:
    return native.detect(block, names, FORMAT)


def _config_block(chosen: Chosen) -> dict[str, Any]:
    return native.config_block(chosen, FORMAT)


def _shapes(n: int, k: int, group_size: int) -> Shapes:
    padded_n, padded_k, common = native.padded_shapes(n, k, group_size)
    return {"B_24": (("I32",), (padded_k // 32, 2 * padded_n)), "B_meta": (("I16",), (padded_k // 32, 2 * padded_n)), **common}


def _pack(layer: str, parts: LinearParts) -> dict[str, Tensor]:
    import torch

    from marlinctl.pack.sparse_marlin import pack_sparse_marlin
    from marlinctl.sparsify.types import SparseQuantizedLinear

    exact = parts.quantized(layer)
    if not isinstance(exact, SparseQuantizedLinear):
        raise ValueError(f"{layer} has no mask, so it cannot be written as {FORMAT.name}")
    packed = pack_sparse_marlin(exact)
    shape = torch.tensor(parts.codes.shape, dtype=torch.int64)
    return {"B_24": packed.qweight, "B_meta": packed.meta, "s": packed.scales, "weight_shape": shape}


def _tiles(tensors: Mapping[str, Tensor], n: int, k: int, group_size: int) -> PackedSparseLinear:
    from marlinctl.pack.types import PackedSparseLinear

    return PackedSparseLinear(tensors["B_24"], tensors["B_meta"], tensors["s"], n, k, k if group_size == -1 else group_size)


def _unpack(tensors: Mapping[str, Tensor], group_size: int, variant: str) -> LinearParts:
    from marlinctl.pack.sparse_marlin import unpack_sparse_marlin

    q = unpack_sparse_marlin(_tiles(tensors, *native.true_sizes(FORMAT, tensors, group_size)))
    return LinearParts(q.codes, q.scales, q.group_size, q.keep)


def _second_reading(tensors: Mapping[str, Tensor], n: int, k: int, group_size: int) -> Tensor:
    """Through the maps of pack/tile.py."""
    from marlinctl.kernels.reference import dequantize_sparse

    return dequantize_sparse(_tiles(tensors, n, k, group_size))


FORMAT = Format(
    name="marlin_24",
    label="Sparse-MARLIN tiles",
    title="4-bit weights, 2:4, native Sparse-MARLIN tiles of marlinctl",
    tensors={"B_24": CODES, "B_meta": METADATA, "s": SCALES, "weight_shape": INDICES},
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
    needs_mask=True,
)
