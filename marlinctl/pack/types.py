"""What the packers hand over: tiles of nibbles with their scales, and for 2:4 the places of the survivors.

Axes: N out_features, K in_features, G groups; N' and K' are N and K rounded up to whole tiles, G' the groups of K'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from marlinctl.quantize.scheme import INT4
from marlinctl.quantize.types import QuantizedLinear
from marlinctl.sparsify.types import QUAD

PAD_TO = 64  # N' and K' are multiples of this; kernels walk K in steps of 64 and tiles are 64 columns wide

# Rows of N that a packer takes at a time, a multiple of PAD_TO: its steps meet in the cache, and no intermediate is as large
# as the linear. Against all rows at once, MARLIN tiles of 4096 x 4096 weights came out 1.7 times as fast, compressed-tensors
# words of 14336 x 4096 three times (Xeon, one core, torch 2.13, 2026-11-20).
SLAB = 256


def padded(size: int) -> int:
    """The multiple of PAD_TO that holds `size`."""
    return -(-size // PAD_TO) * PAD_TO


def padded_groups(k: int, group_size: int) -> int:
    """G': one scale per started group of K', and a single one when channel-wise."""
    return 1 if group_size == k else -(-padded(k) // group_size)


class _Tiles:
    """What both kinds of tiles know of their linear, and check of it.

    group_size counts true columns and divides in_features, so group_size == in_features is channel-wise: one scale per
    row of the weight, in channel order. Otherwise the order is the grouped one.
    """

    __slots__ = ()
    scales: Tensor  # [G', N'] float16
    out_features: int  # N
    in_features: int  # K
    group_size: int

    @property
    def channel_wise(self) -> bool:
        return self.group_size == self.in_features

    @property
    def groups(self) -> int:
        """G, the groups of the true K."""
        return self.in_features // self.group_size

    @property
    def padded_groups(self) -> int:
        """G'"""
        return padded_groups(self.in_features, self.group_size)

    def _check_sizes(self) -> None:
        n, k, group_size = self.out_features, self.in_features, self.group_size
        if n < 1 or k < 1:
            raise ValueError(f"out_features and in_features must be positive, got N={n}, K={k}")
        if group_size < 1 or k % group_size:
            raise ValueError(f"group_size {group_size} does not divide K={k}")
        steps = (self.padded_groups, padded(n))
        if self.scales.dtype != torch.float16 or tuple(self.scales.shape) != steps:
            raise ValueError(
                f"scales of N={n}, K={k}, group_size={group_size} must be float16 {list(steps)}, "
                f"got {self.scales.dtype} {list(self.scales.shape)}"
            )

    def _check_words(self, name: str, words: Tensor, dtype: torch.dtype, columns_per_row: int) -> None:
        n, k = self.out_features, self.in_features
        shape = (padded(k) // columns_per_row, 2 * padded(n))
        if words.dtype != dtype or tuple(words.shape) != shape:
            wanted = f"{str(dtype).removeprefix('torch.')} {list(shape)}"
            raise ValueError(f"{name} of N={n}, K={k} must be {wanted}, got {words.dtype} {list(words.shape)}")


@dataclass(frozen=True, slots=True)
class PackedLinear(_Tiles):
    """One linear in MARLIN tiles (tile.py has the maps). Padding multiplies by zero: code 0 everywhere, scale 0 where there is a slot."""

    qweight: Tensor  # [K'/16, 2N'] int32
    scales: Tensor  # [G', N'] float16, in MARLIN order
    out_features: int  # N
    in_features: int  # K
    group_size: int

    def __post_init__(self) -> None:
        self._check_sizes()
        self._check_words("qweight", self.qweight, torch.int32, 16)


@dataclass(frozen=True, slots=True)
class PackedSparseLinear(_Tiles):
    """One 2:4 linear in Sparse-MARLIN tiles. Padding multiplies by zero, as in MARLIN; its quads keep their first two columns (0x4).

    Padded quads need metadata too: the hardware defines only first < second, and 0x4 is the smallest such nibble. It is also what
    filling up a quad of zeros, lowest column first, gives, so a padded and a wholly pruned quad look alike.
    """

    qweight: Tensor  # [K'/32, 2N'] int32, survivors only
    meta: Tensor  # [K'/32, 2N'] int16, a nibble for each quad
    scales: Tensor  # [G', N'] float16, in Sparse-MARLIN order
    out_features: int  # N
    in_features: int  # K, a multiple of 4
    group_size: int

    def __post_init__(self) -> None:
        self._check_sizes()
        if self.in_features % QUAD:
            raise ValueError(f"K={self.in_features} is not a multiple of {QUAD}, so 2:4 cannot cover it")
        self._check_words("qweight", self.qweight, torch.int32, 32)
        self._check_words("meta", self.meta, torch.int16, 32)


def side_by_side(parts: Sequence[PackedLinear | PackedSparseLinear]) -> PackedLinear | PackedSparseLinear:
    """Linears with the same inputs as one, whose outputs are theirs one after the other. Copies: tiles are 64 outputs wide, whole columns.

    ValueError where K, group size or kind differ, or where outputs of one but the last end inside of a tile.
    """
    first = parts[0]
    k, group_size = first.in_features, first.group_size
    if any(type(one) is not type(first) or (one.in_features, one.group_size) != (k, group_size) for one in parts):
        raise ValueError("linears side by side must be of one kind, with the same K and group size")
    if any(one.out_features % PAD_TO for one in parts[:-1]):
        raise ValueError(f"outputs of all but the last must be multiples of {PAD_TO}, got {[one.out_features for one in parts]}")
    n = sum(one.out_features for one in parts)
    words, scales = (torch.cat([getattr(one, name) for one in parts], dim=1) for name in ("qweight", "scales"))
    if isinstance(first, PackedLinear):
        return PackedLinear(words, scales, n, k, group_size)
    meta = torch.cat([one.meta for one in parts if isinstance(one, PackedSparseLinear)], dim=1)
    return PackedSparseLinear(words, meta, scales, n, k, group_size)


def padded_codes(q: QuantizedLinear) -> Tensor:
    """codes [N, K] -> [N', K'] with code 0 beyond N and K; `q.codes` itself where that is the same. ValueError for other codes than INT4:
    tiles are made of nibbles."""
    if q.grid != INT4:
        raise ValueError(f"tiles hold {INT4} codes, and these are {q.grid}")
    codes = q.codes
    n, k = codes.shape
    return codes if (padded(n), padded(k)) == (n, k) else pad(codes, (0, padded(k) - k, 0, padded(n) - n))


def scales_in_tiles(q: QuantizedLinear, column: Callable[[Tensor], Tensor]) -> Tensor:
    """scales [N, G] -> [G', N'] float16 with 0 beyond N and G. column: which output's scale lies in a slot."""
    n, groups = q.scales.shape
    plain = pad(as_float16(q.scales).T, (0, padded(n) - n, 0, padded_groups(q.in_features, q.group_size) - groups))
    return plain[:, column(torch.arange(padded(n), device=plain.device))]


def scales_from_tiles(p: PackedLinear | PackedSparseLinear, slot: Callable[[Tensor], Tensor]) -> Tensor:
    """The inverse of scales_in_tiles, [N, G]. slot: where an output's scale lies."""
    plain = p.scales[:, slot(torch.arange(p.scales.shape[1], device=p.scales.device))]
    return transposed(plain[: p.groups, : p.out_features])


def transposed(matrix: Tensor) -> Tensor:
    """A transposed copy with plain strides. contiguous() would keep those of a single row or column, which view(dtype) then refuses."""
    return matrix.T.clone(memory_format=torch.contiguous_format)


def as_float16(scales: Tensor) -> Tensor:
    """The same numbers in float16, the one dtype of packed scales. Foreign bfloat16 that float16 cannot hold exactly is refused."""
    half = scales.to(torch.float16)
    changed = half.to(torch.float32) != scales.to(torch.float32)
    if bool(changed.any()):
        place = changed.nonzero()[0].tolist()
        raise ValueError(
            f"{int(changed.sum())} of {changed.numel()} scales {list(scales.shape)} are not exact in float16, "
            f"the first at {place}: {float(scales[tuple(place)])!r} in {scales.dtype}"
        )
    return half
