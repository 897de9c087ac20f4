"""`marlin_24`: the tiles of marlinctl's 2:4 INT4 kernels, which hold kept weights only. N', K' are N, K padded to multiples of 64, G' the
groups of K'.

    P.B_24          [K'/32, 2N']    int32    the weights that the mask keeps
    P.B_meta        [K'/32, 2N']    int16    where in their groups of four they are: the metadata is the mask
    P.s             [G', N']        fp16     in Sparse-MARLIN order
    P.weight_shape  [2] = [N, K]    int64    the true sizes

docs/formats/marlin_24.md has the bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from marlinctl.checkpoint.formats.base import CODES, METADATA
from marlinctl.checkpoint.formats.native import Words, make_format

if TYPE_CHECKING:
    from torch import Tensor

    from marlinctl.pack.types import PackedSparseLinear
    from marlinctl.quantize.types import QuantizedLinear


def _tiles(**fields: Any) -> PackedSparseLinear:
    from marlinctl.pack.types import PackedSparseLinear

    return PackedSparseLinear(**fields)


def _pack(layer: str, q: QuantizedLinear) -> PackedSparseLinear:
    from marlinctl.pack.sparse_marlin import pack_sparse_marlin
    from marlinctl.sparsify.types import SparseQuantizedLinear

    if not isinstance(q, SparseQuantizedLinear):
        raise ValueError(f"{layer} has no mask, so it cannot be written as {FORMAT.name}")
    return pack_sparse_marlin(q)


def _unpack(p: PackedSparseLinear) -> QuantizedLinear:
    from marlinctl.pack.sparse_marlin import unpack_sparse_marlin

    return unpack_sparse_marlin(p)


def _second_reading(p: PackedSparseLinear) -> Tensor:
    """Through the maps of pack/tile.py."""
    from marlinctl.kernels.reference import dequantize_sparse

    return dequantize_sparse(p)


FORMAT = make_format(
    "marlin_24",
    label="Sparse-MARLIN tiles",
    title="4-bit weights, 2:4, native Sparse-MARLIN tiles of marlinctl",
    words={"B_24": Words("qweight", CODES, "I32", step=32), "B_meta": Words("meta", METADATA, "I16", step=32)},
    tiles=_tiles,
    pack=_pack,
    unpack=_unpack,
    second_reading=_second_reading,
    needs_mask=True,
)
