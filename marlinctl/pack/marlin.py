"""Native MARLIN tiles from codes, and back, at the speed of memory.

tile.py says where each weight goes. Doing it one weight at a time through those maps would move 8-byte indices for
half-byte weights; here whole neighbourhoods move. The bits of k and n, lowest last, in the codes and in the words:

    codes   [n: block, j, pair, column]  [k: row, half, quad, odd]        one byte each
    words   [row, block, column, quad, j] of 32 bits = bytes [odd, pair] of nibbles [half]

The way from one to the other:

    half    the two halves of 16 neighbours in K share bytes: 8 bytes | 8 bytes << 4           int64
    pair    columns n and n + 8 take turns in the bytes of a word: spread | spread << 8        int32
    rest    whole words change places, one strided copy                                        int32

No step writes more than a byte per weight.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, split

from marlinctl.pack.tile import OFFSET, TILE_K, TILE_N, channel_slot, grouped_slot
from marlinctl.pack.types import SLAB, PackedLinear, padded, padded_codes, scales_from_tiles, scales_in_tiles
from marlinctl.quantize.types import QuantizedLinear

LOW_NIBBLES = 0x0F0F_0F0F_0F0F_0F0F
WEIGHTS_AT_ONCE = 1 << 25  # in `repack`, where each step is a launch on a GPU: 16 MiB of words, whose temporaries stay in a large L2 cache


def pack_marlin(q: QuantizedLinear) -> PackedLinear:
    """Codes and scales in MARLIN order. N and K are padded to multiples of 64 with code 0 and scale 0."""
    n, k = q.out_features, q.in_features
    codes = padded_codes(q)
    qweight = codes.new_empty(padded(k) // TILE_K, padded(n) // TILE_N, 8, 4, 4, dtype=torch.int32)  # [row, block, column, quad, j]
    for blocks, slab in zip(split(qweight, SLAB // TILE_N, 1), split(codes, SLAB), strict=True):
        blocks.copy_(_words(slab))
    return PackedLinear(
        qweight.view(padded(k) // TILE_K, 2 * padded(n)), scales_in_tiles(q, _scale_order(q.group_size == k)), n, k, q.group_size
    )


def unpack_marlin(p: PackedLinear) -> QuantizedLinear:
    """The inverse of pack_marlin, bit for bit."""
    n, k = p.out_features, p.in_features
    words = p.qweight.reshape(padded(k) // TILE_K, padded(n) // TILE_N, 8, 4, 4)  # [row, block, column, quad, j]
    codes = torch.empty(padded(n), padded(k), dtype=torch.int8, device=p.qweight.device)
    for slab, blocks in zip(split(codes, SLAB), split(words, SLAB // TILE_N, 1), strict=True):
        _codes(blocks, out=slab)
    return QuantizedLinear(codes[:n, :k].contiguous(), scales_from_tiles(p, _scale_order(p.channel_wise)), p.group_size)


def repack(words: Tensor) -> Tensor:
    """qweight int32 [K/16, 2N] out of the words of GPTQ, int32 [K/8, N], or of compressed-tensors, transposed. K and N: multiples of 64.

    Any strides, any device. All three formats have code + 8 in a nibble, so bits change places and no code is decoded. In a word, nibbles
    are [quad, odd]; four words, [half, pair], become four, [quad]. Temporaries are four times WEIGHTS_AT_ONCE / 2 bytes.
    """
    check_words(words)
    rows, n = words.shape[0] // 2, words.shape[1]
    qweight = torch.empty(rows, n // TILE_N, 8, 4, 4, dtype=torch.int32, device=words.device)  # [row, block, column, quad, j]
    at_once = max(1, WEIGHTS_AT_ONCE // (TILE_K * n))
    for tiles, part in zip(split(qweight, at_once), split(words, 2 * at_once), strict=True):
        halves = part.view(-1, 2, n // TILE_N, 4, 2, 8)  # [row, half, block, j, pair, column]
        low, high = halves[:, 0], halves[:, 1]
        # bytes [quad] of nibbles [half], for both values of odd
        for odd, of_halves in enumerate((low & _NIBBLES | (high & _NIBBLES) << 4, low >> 4 & _NIBBLES | high & ~_NIBBLES)):
            first, second = of_halves[:, :, :, 0], of_halves[:, :, :, 1]  # pair; [row, block, j, column]
            even_quads = first & _BYTES | (second & _BYTES) << 8  # bytes [quad high, pair]
            odd_quads = first >> 8 & _BYTES | second & ~_BYTES
            for quad, pairs in ((0, even_quads), (1, odd_quads), (2, even_quads >> 16), (3, odd_quads >> 16)):
                target = tiles[:, :, :, quad].transpose(2, 3)  # [row, block, j, column]
                if odd:
                    target |= pairs << 16
                else:
                    target.copy_(pairs & 0xFFFF)
    return qweight.view(rows, 2 * n)


def check_words(words: Tensor) -> None:
    """ValueError where `repack` cannot take them."""
    if words.ndim != 2 or words.dtype != torch.int32 or not words.numel() or words.shape[0] % 8 or words.shape[1] % TILE_N:
        raise ValueError(f"words must be int32 [K/8, N] with N and K multiples of {TILE_N}, got {words.dtype} {list(words.shape)}")


_NIBBLES, _BYTES = 0x0F0F0F0F, 0x00FF00FF  # every other one of an int32


def order_scales(scales: Tensor, *, channel_wise: bool) -> Tensor:
    """scales [G, N] in the order of the outputs -> the same in MARLIN order, contiguous."""
    column = _scale_order(channel_wise)(torch.arange(scales.shape[1], device=scales.device))
    return scales[:, column].contiguous()


def one_group(scales: Tensor) -> Tensor:
    """scales [1, N] in the order of more groups -> the order of one: what is left where K is cut down to a single group."""
    plain = scales[:, grouped_slot(torch.arange(scales.shape[1], device=scales.device))]
    return order_scales(plain, channel_wise=True)


def _words(codes: Tensor) -> Tensor:
    """int8 [64 blocks, K'] -> int32 [row, block, column, quad, j], a permuted view."""
    columns = fold(codes + OFFSET, len(codes))  # [n, row quad] x bytes [odd, 0]
    columns = columns.view(-1, 4, 2, 8, columns.shape[1] // 4, 4)  # [block, j, pair, column, row, quad]
    words = columns[:, :, 0] | columns[:, :, 1] << 8  # [block, j, column, row, quad] x bytes [odd, pair]
    return words.permute(3, 0, 2, 4, 1)


def _codes(words: Tensor, out: Tensor) -> None:
    """int32 [row, block, column, quad, j] -> int8 [64 blocks, K'], the steps of _words backwards."""
    words = words.permute(1, 4, 2, 0, 3).contiguous()  # [block, j, column, row, quad] x bytes [odd, pair]
    unfold(torch.stack((gather(words), gather(words >> 8)), dim=2), out)  # int16 [block, j, pair, column, row, quad] x bytes [odd]
    out.sub_(OFFSET)


def fold(nibbles: Tensor, rows: int) -> Tensor:
    """A nibble in each byte, [n: rows] [row, half, quad, odd] -> int32 [n, row quad] x bytes [odd, 0] of nibbles [half]."""
    halves = nibbles.reshape(-1).view(torch.int64).view(rows, -1, 2)  # [n, row, half] x 8 bytes [quad, odd]
    both_halves = halves[..., 0] | halves[..., 1] << 4  # [n, row] x 8 bytes [quad, odd] of nibbles [half]
    return _spread(both_halves.view(torch.int16).to(torch.int32))


def unfold(columns: Tensor, out: Tensor) -> None:
    """int16 [n.., row, quad] x bytes [odd] of nibbles [half] -> int8 [n, K'], a nibble in each byte: the inverse of fold."""
    both_halves = columns.view(out.shape[0], -1).view(torch.int64)  # [n, row] x 8 bytes [quad, odd] of nibbles [half]
    halves = out.view(torch.int64).view(out.shape[0], -1, 2)  # [n, row, half] x 8 bytes [quad, odd]
    halves[..., 0] = both_halves & LOW_NIBBLES
    halves[..., 1] = both_halves >> 4 & LOW_NIBBLES


def _spread(pairs: Tensor) -> Tensor:
    """int32 0x....AABB -> 0x00AA00BB"""
    return pairs & 0xFF | (pairs & 0xFF00) << 8


def gather(spread: Tensor) -> Tensor:
    """int32 0x..AA..BB -> int16 0xAABB"""
    return (spread & 0xFF | spread >> 8 & 0xFF00).to(torch.int16)


def _scale_order(channel_wise: bool) -> Callable[[Tensor], Tensor]:
    """Column in a slot; it is its own inverse."""
    return channel_slot if channel_wise else grouped_slot
