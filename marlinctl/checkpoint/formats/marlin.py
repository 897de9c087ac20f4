"""`marlin`: the tiles of marlinctl's dense INT4 kernels. N', K' are N, K padded to multiples of 64, G' the groups of K'.

    P.B             [K'/16, 2N']    int32
    P.s             [G', N']        fp16     in MARLIN order
    P.weight_shape  [2] = [N, K]    int64    the true sizes

docs/formats/marlin.md has the bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from marlinctl.checkpoint.formats.base import CODES
from marlinctl.checkpoint.formats.native import Words, make_format

if TYPE_CHECKING:
    from torch import Tensor

    from marlinctl.pack.types import PackedLinear
    from marlinctl.quantize.types import QuantizedLinear


def _tiles(**fields: Any) -> PackedLinear:
    from marlinctl.pack.types import PackedLinear

    return PackedLinear(**fields)


def _pack(layer: str, q: QuantizedLinear) -> PackedLinear:
    from marlinctl.pack.marlin import pack_marlin

    return pack_marlin(q)


def _unpack(p: PackedLinear) -> QuantizedLinear:
    from marlinctl.pack.marlin import unpack_marlin

    return unpack_marlin(p)


def _second_reading(p: PackedLinear) -> Tensor:
    """Through the maps of pack/tile.py."""
    from marlinctl.kernels.reference import dequantize

    return dequantize(p)


FORMAT = make_format(
    "marlin",
    label="MARLIN tiles",
    title="4-bit weights, native MARLIN tiles of marlinctl",
    words={"B": Words("qweight", CODES, "I32", step=16)},
    tiles=_tiles,
    pack=_pack,
    unpack=_unpack,
    second_reading=_second_reading,
    rounds=True,
)
