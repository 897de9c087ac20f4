"""The lane-exact emulator of products with int8 activations: what emulate.py is for 16-bit ones.

A step is 32 of K, two rows of words, which meet in one A operand: word j of a lane in both rows holds outputs g and g + 8 of the
sixteen from 64 block + 16 j on (g = lane // 4, t = lane % 4).

    MARLIN, mma.m16n8k32 of int8; one warp of wgmma m64nNk32 has the same fragments
      A   16 outputs: the words of both rows, four registers of 16 times the code
      B   8 tokens: rows of 32 bytes of rounded activations, ldmatrix.x2
      D   outputs x tokens, the product transposed, int32

      words      qweight[2 step and 2 step + 1, 128 block + 4 lane + 0..3], 16-byte loads
      scales     of the lane's rows, grouped: 64 block + 8 g + .. 2 j + 0 or 1        channel-wise: at 16 j + g and 8 further on in
                 pairs of neighbours, 64 block + 32 (j // 2) + 8 (g // 2) + 4 (j % 2) + g % 2 + .. 0 or 2
      activation scales     of the lane's columns, [group, 8 tile + 2 t + 0 or 1]

Sums are integers, and exact, until a group of weights or of activations ends; then they are scaled and added up in float32.

Factored weights (factored.py): the registers of A hold the code times the factor of its row and group, and sums go over all of K.

Of 2:4 weights there are these alone. A step is 64 of K, two rows of words of survivors; word j of a lane holds outputs 8 g + j and 4
further on.

    Sparse-MARLIN, mma.sp.m16n8k64 of int8; one warp of wgmma.sp m64nNk64 has the same fragments
      A   16 outputs: the words of both rows, four registers of code times factor
      B   8 tokens: rows of 64 bytes of rounded activations, ldmatrix.x4
      E   metadata: word j % 2 of 64 block + 2 lane + .. in row 2 step + j // 2 of int8_metadata.metadata_for_int8, seen as int32

      factors    as scales of groups above; of groups of 32 each word has those of its own row of words
      channel    at 64 block + 8 g + j and 4 further on
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from marlinctl.kernels.emulate import BLOCK, LANE
from marlinctl.kernels.warp import D_16X8, LANES, ldmatrix, lop3, mma_m16n8k32, mma_sp_m16n8k64, prmt
from marlinctl.pack.types import PackedLinear, PackedSparseLinear

STEP, SPARSE_STEP = 32, 64  # of K
TOKENS = 8  # of a tile: the columns of one product
AND_XOR = 0xF0 & 0xCC ^ 0xAA  # the truth table of (a & b) ^ c
HIGH, SIGNS = 0xF0F0F0F0 - (1 << 32), 0x80808080 - (1 << 32)


def gemm_int8(codes: Tensor, scales: Tensor, p: PackedLinear, group: int | None) -> Tensor:
    """codes [M, K'] int8 in the order of the tiles and scales [G, M'] float32 -> [M, N] float32.

    group: of K that shares a scale of activations; None: a whole token.

    ValueError for tensors of another shape or type, and for groups that do not end where a step ends.
    """
    k_padded = 16 * p.qweight.shape[0]
    groups = 1 if group is None else -(-p.in_features // group)
    if codes.dtype != torch.int8 or codes.ndim != 2 or codes.shape[1] != k_padded or not len(codes):
        raise ValueError(f"codes must be int8 [M, {k_padded}] with M > 0, got {codes.dtype} {list(codes.shape)}")
    if scales.dtype != torch.float32 or len(scales) != groups or scales.shape[1] < len(codes):
        raise ValueError(f"scales must be float32 [{groups}, {len(codes)} or more], got {scales.dtype} {list(scales.shape)}")
    of_weights = k_padded if p.channel_wise else p.group_size  # K of a group
    of_tokens = k_padded if group is None else group
    if of_weights % STEP or of_tokens % STEP:
        raise ValueError(f"groups of {of_weights} and {of_tokens} are no multiples of {STEP}, so one instruction would straddle two groups")
    m = len(codes)
    tokens = pad(codes, (0, 0, 0, -m % TOKENS))
    token_scales = pad(scales[:, :m], (0, -m % TOKENS))
    shared = tokens.view(torch.int16).view(len(tokens) // TOKENS, TOKENS, k_padded // 16, 8)  # [tile, token, 16 bytes, 8 pairs]
    pointers = [2 * (lane % 8) + lane // 8 for lane in range(2 * TOKENS)]  # into rows of 2 x 16 bytes
    sums = torch.zeros(len(shared), p.qweight.shape[1] // (2 * BLOCK), 4, LANES, 4, dtype=torch.int32)  # [tile, block, j, 32, 4]
    total = torch.zeros(sums.shape)
    for step in range(k_padded // STEP):
        b = ldmatrix(shared[:, :, 2 * step : 2 * step + 2].flatten(1, 2), pointers)  # [tile, 32, 2]
        sums = mma_m16n8k32(operand(p.qweight[2 * step : 2 * step + 2]), b[:, None, None], sums)
        k, end = STEP * step, STEP * (step + 1)
        if end % of_weights == 0 or end % of_tokens == 0 or end == k_padded:
            scale = _scales_of_rows(p, k // of_weights) * _scales_of_columns(token_scales[k // of_tokens])[:, None, None]
            total, sums = (total.double() + sums.double() / 16 * scale).float(), torch.zeros_like(sums)
    d = D_16X8.matrix(total)  # [tile, block, j, 16 outputs, 8 tokens]
    return d.permute(0, 4, 1, 2, 3).reshape(len(tokens), -1)[:m, : p.out_features]


def gemm_factored(codes: Tensor, scales: Tensor, p: PackedLinear, factored: Tensor) -> Tensor:
    """codes [M, K'] int8 in the order of the tiles, scales [1, M'] float32, one for each token -> [M, N] float32.

    factored: int16 [G' + 1, N'] of `p`, or [1, N'] channel-wise. ValueError for tensors of another shape or type.
    """
    k_padded = 16 * p.qweight.shape[0]
    rows = 1 if p.channel_wise else p.padded_groups + 1
    if factored.dtype != torch.int16 or tuple(factored.shape) != (rows, p.scales.shape[1]):
        raise ValueError(f"factored must be int16 [{rows}, {p.scales.shape[1]}], got {factored.dtype} {list(factored.shape)}")
    m = len(codes)
    tokens = pad(codes, (0, 0, 0, -m % TOKENS))
    shared = tokens.view(torch.int16).view(len(tokens) // TOKENS, TOKENS, k_padded // 16, 8)
    pointers = [2 * (lane % 8) + lane // 8 for lane in range(2 * TOKENS)]
    sums = torch.zeros(len(shared), p.qweight.shape[1] // (2 * BLOCK), 4, LANES, 4, dtype=torch.int32)
    for step in range(k_padded // STEP):
        words = p.qweight[2 * step : 2 * step + 2]
        a = operand(words) if p.channel_wise else operand_factored(words, factored[STEP * step // p.group_size])
        b = ldmatrix(shared[:, :, 2 * step : 2 * step + 2].flatten(1, 2), pointers)
        sums = mma_m16n8k32(a, b[:, None, None], sums)
    of_rows = factored[-1].view(torch.float16)[_columns_of_rows(p.qweight.shape[1] // (2 * BLOCK), channel_wise=True)].double()
    scale = of_rows * _scales_of_columns(pad(scales[:, :m], (0, -m % TOKENS))[0])[:, None, None]
    total = (sums.float().double() * (scale / 16 if p.channel_wise else scale)).float()
    d = D_16X8.matrix(total)
    return d.permute(0, 4, 1, 2, 3).reshape(len(tokens), -1)[:m, : p.out_features]


def gemm_sparse_factored(codes: Tensor, scales: Tensor, p: PackedSparseLinear, factored: Tensor, int8_meta: Tensor) -> Tensor:
    """The same of 2:4 weights: codes in the order of their tiles, and int8_meta int16 [K'/32, 2N'] as metadata_for_int8 makes it of p.meta.

    ValueError for tensors of another shape or type, and for metadata that the hardware leaves undefined.
    """
    k_padded = 32 * p.qweight.shape[0]
    rows = 1 if p.channel_wise else p.padded_groups + 1
    for name, tensor, shape in (("factored", factored, (rows, p.scales.shape[1])), ("int8_meta", int8_meta, p.meta.shape)):
        if tensor.dtype != torch.int16 or tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{name} must be int16 {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")
    m, blocks = len(codes), p.qweight.shape[1] // (2 * BLOCK)
    tokens = pad(codes, (0, 0, 0, -m % TOKENS))
    shared = tokens.view(torch.int16).view(len(tokens) // TOKENS, TOKENS, k_padded // 16, 8)
    pointers = [4 * (lane % 8) + lane // 8 for lane in range(LANES)]  # into rows of 4 x 16 bytes
    sums = torch.zeros(len(shared), blocks, 4, LANES, 4, dtype=torch.int32)
    for step in range(k_padded // SPARSE_STEP):
        words = p.qweight[2 * step : 2 * step + 2]
        group, second = (SPARSE_STEP * step + k for k in (0, SPARSE_STEP // 2))
        a = operand(words) if p.channel_wise else operand_factored(words, *(factored[k // p.group_size] for k in (group, second)))
        pairs = int8_meta[2 * step : 2 * step + 2].contiguous().view(torch.int32).view(2, blocks, LANES, 2)
        e = pairs.permute(1, 0, 3, 2).reshape(blocks, 4, LANES)
        b = ldmatrix(shared[:, :, 4 * step : 4 * step + 4].flatten(1, 2), pointers)
        sums = mma_sp_m16n8k64(a, b[:, None, None], sums, e)
    block, j, below = torch.arange(blocks)[:, None, None, None], torch.arange(4)[:, None, None], torch.arange(4) // 2
    of_rows = factored[-1].view(torch.float16)[BLOCK * block + 8 * (LANE // 4) + 4 * below + j].double()
    scale = of_rows * _scales_of_columns(pad(scales[:, :m], (0, -m % TOKENS))[0])[:, None, None]
    total = (sums.float().double() * (scale / 16 if p.channel_wise else scale)).float()
    d = D_16X8.matrix(total).reshape(*total.shape[:3], 2, 8, TOKENS)  # [tile, block, j, row // 8, row % 8, 8 tokens]
    return d.permute(0, 5, 1, 4, 3, 2).reshape(len(tokens), -1)[:m, : p.out_features]


def operand_factored(words: Tensor, factors: Tensor, second_factors: Tensor | None = None) -> Tensor:
    """Two rows of qweight, [2, 2N'], and the factors of their group, [N'] -> A [block, j, 32, 4], code times factor in each byte.

    second_factors: of the second row, where it is of another group.
    """
    first, second = words.view(2, -1, LANES, 4).transpose(-1, -2).contiguous()
    row, below = prmt(first, second, 0x6420), prmt(first, second, 0x7531)
    rows = _columns_of_rows(words.shape[1] // (2 * BLOCK), channel_wise=False)  # [block, j, 32, 4], of rows g g g+8 g+8
    both = [of.long()[rows] for of in (factors, factors if second_factors is None else second_factors)]

    def times(nibbles: Tensor, place: int) -> Tensor:
        """(nibbles * factor + (128 - 8 factor) in each byte) ^ 0x80 in each byte, as 32-bit integers; upper bytes are the second row's."""
        sums = torch.full_like(both[0][..., 0], 0x80808080)
        for of, mask in zip(both, (0x00000F0F, 0x0F0F0000), strict=True):
            sums += ((nibbles.long() & mask) - (mask & 0x08080808)) * of[..., place]
        return (sums ^ 0x80808080).to(torch.int32)

    registers = [times(row, 0), times(below, 2), times(row >> 4, 0), times(below >> 4, 2)]
    return torch.stack(registers, -1)


def operand(words: Tensor) -> Tensor:
    """Two rows of qweight, [2, 2N'] -> A [block, j, 32, 4], 16 times the code in each byte (benchmarks/w4a8_decoding.cuh, Int8)."""
    first, second = words.view(2, -1, LANES, 4).transpose(-1, -2).contiguous()  # [block, j, 32] each
    row, below = prmt(first, second, 0x6420), prmt(first, second, 0x7531)
    return torch.stack([lop3(word, HIGH, SIGNS, AND_XOR) for word in (row << 4, below << 4, row, below)], -1)


def _scales_of_rows(p: PackedLinear, group: int) -> Tensor:
    """[block, j, 32, 4] float64: of a lane's rows g and g + 8 of each word."""
    return p.scales[group][_columns_of_rows(p.qweight.shape[1] // (2 * BLOCK), channel_wise=p.channel_wise)].double()


def _columns_of_rows(blocks: int, *, channel_wise: bool) -> Tensor:
    """[block, j, 32, 4] int64: in a row of scales the places of a lane's rows g, g, g + 8 and g + 8 of each word."""
    block = torch.arange(blocks)[:, None, None, None]
    j, below = torch.arange(4)[:, None, None], torch.arange(4) // 2
    g = LANE // 4
    inside = 32 * (j // 2) + 8 * (g // 2) + 4 * (j % 2) + g % 2 + 2 * below if channel_wise else 8 * g + 2 * j + below
    return BLOCK * block + inside


def _scales_of_columns(scales: Tensor) -> Tensor:
    """scales [M'] -> [tile, 32, 4] float64: of a lane's columns 2t and 2t + 1."""
    return scales.view(-1, TOKENS)[:, 2 * (LANE % 4) + torch.arange(4) % 2].double()
