"""What the packers hand over: tiles of nibbles with their scales.

Axes: N out_features, K in_features, G groups; N' and K' are N and K rounded up to whole tiles, G' the groups of K'.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PAD_TO = 64  # N' and K' are multiples of this; kernels walk K in steps of 64 and tiles are 64 columns wide

# Rows of N that a packer takes at a time, a multiple of PAD_TO: its steps meet in the cache, and no intermediate is as large
# as the linear. Against all rows at once, MARLIN tiles of 4096 x 4096 weights came out 1.7 times as fast, compressed-tensors
# words of 14336 x 4096 three times (Xeon, one core, torch 2.13, 2026-11-20).
SLAB = 256


def padded(size: int) -> int:
    """The multiple of PAD_TO that holds `size`."""
    return -(-size // PAD_TO) * PAD_TO


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """One linear in MARLIN tiles (tile.py has the maps). Padding multiplies by zero: code 0 everywhere, scale 0 where there is a slot.

    group_size counts true columns and divides in_features, so group_size == in_features is channel-wise: one scale per
    row of the weight, in channel order. Otherwise the order is the grouped one.
    """

    qweight: Tensor  # [K'/16, 2N'] int32
    scales: Tensor  # [G', N'] float16, in MARLIN order
    out_features: int  # N
    in_features: int  # K
    group_size: int

    def __post_init__(self) -> None:
        n, k, group_size = self.out_features, self.in_features, self.group_size
        if n < 1 or k < 1:
            raise ValueError(f"out_features and in_features must be positive, got N={n}, K={k}")
        if group_size < 1 or k % group_size:
            raise ValueError(f"group_size {group_size} does not divide K={k}")
        words = (padded(k) // 16, 2 * padded(n))
        if self.qweight.dtype != torch.int32 or tuple(self.qweight.shape) != words:
            raise ValueError(f"qweight of N={n}, K={k} must be int32 {list(words)}, got {self.qweight.dtype} {list(self.qweight.shape)}")
        steps = (self.padded_groups, padded(n))
        if self.scales.dtype != torch.float16 or tuple(self.scales.shape) != steps:
            raise ValueError(
                f"scales of N={n}, K={k}, group_size={group_size} must be float16 {list(steps)}, "
                f"got {self.scales.dtype} {list(self.scales.shape)}"
            )

    @property
    def channel_wise(self) -> bool:
        return self.group_size == self.in_features

    @property
    def groups(self) -> int:
        """G, the groups of the true K."""
        return self.in_features // self.group_size

    @property
    def padded_groups(self) -> int:
        """G': one scale per started group of K', and a single one when channel-wise."""
        return 1 if self.channel_wise else -(-padded(self.in_features) // self.group_size)


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
