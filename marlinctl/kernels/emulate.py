"""The lane-exact emulator: what the CUDA kernels do with MARLIN and Sparse-MARLIN tiles, on a CPU, one warp at a time.

Where reference.py asks the maps of pack/tile.py for every weight, this module never knows which weight it holds. A lane loads the
words at its address, takes them apart with the masks of the kernels, and hands the registers to the tensor core; which weight met
which activation comes out of the instruction tables in warp.py. It shares no step with the packers or the maps, so that tiles on
which emulator and reference agree are tiles that the hardware reads as documented. Bits alone decide: with the identity as
activations the result is the decoded weight.

For each k-step of the loop, block by block of 64 outputs (g = lane // 4, t = lane % 4):

    MARLIN, mma.m16n8k16, a step is 16 of K               Sparse-MARLIN, mma.sp.m16n8k32, a step is 32 of K
      A   16 rows of activations, ldmatrix.x4               A   16 outputs: word j of the lane, four registers
      B   8 outputs: half of word j, two registers          B   8 rows of activations, ldmatrix.x4
      D   rows of activations x outputs                     E   metadata, ldmatrix.x2: register j // 2, selector j % 2
          n = 64 block + 16 j + 8 half + column of D        D   outputs x rows of activations, the product transposed
                                                                n = 64 block + 8 (row of D % 8) + 4 (row of D // 8) + j

      words      qweight[step, 128 block + 4 lane + 0..3], one 16-byte load, for both
      scales     of a group, 16 bytes where the lane reads eight in a row from 64 block + ..

        to scale B      .. 8 g                              to scale A or D      .. 8 g
                        n8 block i of the lane: i                 word j, row g or g + 8: 2 j + 0 or 1
        to scale D      .. 16 t and .. 16 t + 8
                        even and odd column, n8 block i: i
        channel-wise D  .. 8 t and .. 32 + 8 t              channel-wise D       .. 8 g
                        n8 block i, odd: 2 i + odd                word j, row g or g + 8: j + 0 or 4

Where groups are scaled is a choice of the kernel, so both are here: `sums` multiplies the float32 sum of each group and adds it
to the total, `weights` multiplies the weights before the tensor core sees them, rounded to the type of the activations. Channel-wise
scales always multiply the finished sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from marlinctl.kernels.warp import D_16X8, LANES, fma, fma_x2, ldmatrix, lop3, mma_m16n8k16, mma_sp_m16n8k32, mul
from marlinctl.pack.types import PackedLinear, PackedSparseLinear

Scaling = Literal["sums", "weights"]

BLOCK = 64  # outputs that a warp covers: 32 lanes x 4 words of eight nibbles
STEP, SPARSE_STEP = 16, 32  # columns of K that a row of words and one mma or mma.sp cover

LANE = torch.arange(LANES).unsqueeze(1)
AND_OR = 0xF0 & 0xCC | 0xAA  # the truth table of (a & b) | c


def gemm(activations: Tensor, p: PackedLinear | PackedSparseLinear, *, scaling: Scaling = "sums") -> Tensor:
    """activations [M, K] float16 or bfloat16 -> [M, N] float32, before a kernel rounds it to the type of its output."""
    blocks = p.qweight.shape[1] // (2 * BLOCK)
    return gemm_blocks(activations, p, range(blocks), scaling=scaling)[:, : p.out_features]


def gemm_blocks(
    activations: Tensor,  # [M, K] float16 or bfloat16
    p: PackedLinear | PackedSparseLinear,
    blocks: Sequence[int],  # block b is outputs 64 b .. 64 b + 63
    *,
    scaling: Scaling = "sums",
) -> Tensor:  # [M, 64 len(blocks)] float32, outputs beyond N included
    """gemm for some blocks of outputs, in the order in which they are named.

    Raises ValueError for activations of another shape or type, for no block or one that does not exist, for groups that do not end
    where a k-step ends, and for metadata that the hardware leaves undefined.
    """
    step = SPARSE_STEP if isinstance(p, PackedSparseLinear) else STEP
    if activations.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"activations must be float16 or bfloat16, got {activations.dtype}")
    if activations.ndim != 2 or activations.shape[1] != p.in_features or not len(activations):
        raise ValueError(f"activations must be [M, {p.in_features}] with M > 0, got {list(activations.shape)}")
    if not p.channel_wise and p.group_size % step:
        raise ValueError(f"group_size {p.group_size} is not a multiple of {step}, so one instruction would straddle two groups")
    there = p.qweight.shape[1] // (2 * BLOCK)
    if not blocks or not all(0 <= block < there for block in blocks):
        raise ValueError(f"blocks of {BLOCK} outputs are 0..{there - 1}, got {list(blocks)}")
    rows = len(activations)
    padded = pad(activations, (0, p.qweight.shape[0] * step - p.in_features, 0, -rows % 16))  # [M', K'], as predicated loads fill up
    first = torch.tensor(blocks, dtype=torch.int64)
    if isinstance(p, PackedSparseLinear):
        return _sparse(padded, p, first, scaling)[:rows]
    return _dense(padded, p, first, scaling)[:rows]


def _dense(activations: Tensor, p: PackedLinear, blocks: Tensor, scaling: Scaling) -> Tensor:
    dtype = activations.dtype
    words_at = 2 * BLOCK * blocks[:, None, None] + 4 * LANE + torch.arange(4)  # [block, 32, j]
    shared = activations.view(len(activations) // 16, 16, activations.shape[1] // 8, 8)  # [tile, row, 16 bytes, 8]
    pointers = [2 * (lane % 16) + lane // 16 for lane in range(LANES)]  # into rows of 2 x 16 bytes: the quarters of A in its own order
    early = scaling == "weights" and not p.channel_wise

    def multiply(step: int, sums: Tensor) -> Tensor:
        a = ldmatrix(shared[:, :, 2 * step : 2 * step + 2].flatten(1, 2), pointers)  # [tile, 32, 4]
        q = p.qweight[step][words_at].transpose(-1, -2).contiguous()  # [block, j, 32]
        k0, k8, k0_next, k8_next = dequantize(q, dtype)  # rows of B 2t, 2t + 1 and 8 below, and both for the 8 outputs beside
        b = torch.stack((torch.stack((k0, k8), -1), torch.stack((k0_next, k8_next), -1)), 2)  # [block, j, half, 32, 2]
        if early:
            b = mul(b.view(dtype), _scales_of_b(p, step * STEP // p.group_size, blocks)).view(torch.int32)
        return mma_m16n8k16(a[:, None, None, None], b, sums, dtype)

    zeros = torch.zeros(len(shared), len(blocks), 4, 2, LANES, 4)
    total = _over_k(p, STEP, multiply, None if early else lambda group: _scales_of_d(p, group, blocks), zeros)
    d = D_16X8.matrix(total)  # [tile, block, j, half, 16 rows, 8 outputs]
    return d.permute(0, 4, 1, 2, 3, 5).reshape(len(activations), BLOCK * len(blocks))


def _scales_of_b(p: PackedLinear, group: int, blocks: Tensor) -> Tensor:
    """[block, j, half, 32, 1]: a lane's eight columns of B, g of each n8 block."""
    slots = BLOCK * blocks[:, None, None] + 8 * (LANE // 4) + torch.arange(8)  # [block, 32, n8 block]
    return p.scales[group][slots].transpose(-1, -2).reshape(len(blocks), 4, 2, LANES, 1)


def _scales_of_d(p: PackedLinear, group: int, blocks: Tensor) -> Tensor:
    """[block, j, half, 32, 4]: a lane's sixteen columns of D, 2t and 2t + 1 of each n8 block."""
    n8, odd = torch.arange(8)[:, None, None], torch.arange(4) % 2  # odd: of the column of each element of D
    if p.channel_wise:
        inside = 32 * (n8 // 4) + 8 * (LANE % 4) + 2 * (n8 % 4) + odd
    else:
        inside = 16 * (LANE % 4) + 8 * odd + n8
    return p.scales[group][BLOCK * blocks[:, None, None, None] + inside].reshape(len(blocks), 4, 2, LANES, 4)


def _sparse(activations: Tensor, p: PackedSparseLinear, blocks: Tensor, scaling: Scaling) -> Tensor:
    dtype = activations.dtype
    words_at = 2 * BLOCK * blocks[:, None, None] + 4 * LANE + torch.arange(4)  # [block, 32, j]
    meta_at = 2 * BLOCK * blocks[:, None, None] + 8 * torch.arange(16)[:, None] + torch.arange(8)  # [block, row of 16 bytes, 8]
    shared = activations.view(len(activations) // 8, 8, activations.shape[1] // 8, 8)  # [tile, row, 16 bytes, 8]
    pointers = [4 * (lane % 8) + lane // 8 for lane in range(LANES)]  # into rows of 4 x 16 bytes: B from top to bottom
    early = scaling == "weights" and not p.channel_wise
    below_in_a, below_in_d = torch.arange(8) // 2 % 2, torch.arange(4) // 2  # 1 for elements in row g + 8

    def multiply(step: int, sums: Tensor) -> Tensor:
        b = ldmatrix(shared[:, :, 4 * step : 4 * step + 4].flatten(1, 2), pointers)  # [tile, 32, 4]
        e = ldmatrix(p.meta[step][meta_at], range(16))  # [block, 32, 2]
        q = p.qweight[step][words_at].transpose(-1, -2).contiguous()  # [block, j, 32]
        k0, k8, k0_below, k8_below = dequantize(q, dtype)
        a = torch.stack((k0, k0_below, k8, k8_below), -1)  # [block, j, 32, 4]
        if early:
            a = mul(a.view(dtype), scales_of_rows(step * SPARSE_STEP // p.group_size, below_in_a)).view(torch.int32)
        products = [mma_sp_m16n8k32(a[:, j], b[:, None], sums[:, :, j], e[..., j // 2], j % 2, dtype) for j in range(4)]
        return torch.stack(products, 2)

    def scales_of_rows(group: int, below: Tensor) -> Tensor:
        """[block, j, 32, elements]: a lane's eight rows of A or D, g and g + 8 of each word."""
        j = torch.arange(4)[:, None, None]
        inside = j + 4 * below if p.channel_wise else 2 * j + below
        return p.scales[group][BLOCK * blocks[:, None, None, None] + 8 * (LANE // 4) + inside]

    zeros = torch.zeros(len(shared), len(blocks), 4, LANES, 4)
    total = _over_k(p, SPARSE_STEP, multiply, None if early else lambda group: scales_of_rows(group, below_in_d), zeros)
    d = D_16X8.matrix(total).reshape(*total.shape[:3], 2, 8, 8)  # [tile, block, j, row // 8, row % 8, 8 rows of activations]
    return d.permute(0, 5, 1, 4, 3, 2).reshape(len(activations), BLOCK * len(blocks))


def _over_k(
    p: PackedLinear | PackedSparseLinear,
    step_k: int,
    multiply: Callable[[int, Tensor], Tensor],  # (step, sums so far) -> sums
    scales: Callable[[int], Tensor] | None,  # group -> scales of the sums; None where the weights are scaled already
    zeros: Tensor,
) -> Tensor:
    """The loop over K. Sums start anew with each group, and are scaled when it is over."""
    steps = p.qweight.shape[0]
    steps_of_group = steps if scales is None or p.channel_wise else p.group_size // step_k
    total = sums = zeros
    for step in range(steps):
        sums = multiply(step, sums)
        if scales is not None and ((step + 1) % steps_of_group == 0 or step + 1 == steps):
            total, sums = fma(sums, scales(step // steps_of_group), total), zeros
    return sums if scales is None else total


def dequantize(words: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """int32 words -> four int32 registers of two `dtype` codes each, from nibbles (0, 4), (1, 5), (2, 6), (3, 7), low half first.

    A nibble that is ORed into the mantissa of a power of two adds itself to it; a subtraction leaves nibble - 8. float16 has ten bits
    of mantissa: 1024 + nibble, and without a shift 1024 + 16 nibble. bfloat16 has seven, so every nibble is shifted: 128 + nibble.
    """
    if dtype == torch.float16:
        low = [lop3(word, 0x000F000F, 0x64006400, AND_OR) for word in (words, words >> 8)]
        high = [lop3(word, 0x00F000F0, 0x64006400, AND_OR) for word in (words, words >> 8)]
        k0, k0_next = (fma_x2(register, 1.0, -1032.0, dtype) for register in low)
        k8, k8_next = (fma_x2(register, 1 / 16, -72.0, dtype) for register in high)
    else:
        nibbles = [lop3(words >> shift, 0x000F000F, 0x43004300, AND_OR) for shift in (0, 4, 8, 12)]
        k0, k8, k0_next, k8_next = (fma_x2(register, 1.0, -136.0, dtype) for register in nibbles)
    return k0, k8, k0_next, k8_next
