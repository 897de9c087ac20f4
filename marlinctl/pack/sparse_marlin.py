"""Sparse-MARLIN tiles from codes and their survivors, and back, at the speed of memory; new survivors while a model runs.

The two survivors of a quad move together, and metadata says where they were. tile.py has the maps; here, as in marlin.py,
whole neighbourhoods move. A quad of codes is the four bytes of an int32, so one shift by 8 times its metadata brings a
survivor to where it is wanted. The bits of n and of survivor c, lowest last:

    survivors  [n: block, octet, pair, j]  [c: row, half, quad, odd]                       one byte each
    words      [row, block, octet, quad, j] of 32 bits = bytes [odd, pair] of nibbles [half]
    nibbles    [n: block, octet, pair, j]  [row, half] of 4 quads                          one byte each
    meta       [row, block, j high, octet, j low, half, pair] of 16 bits = nibbles of 4 quads

Who survived is data and comes from `keep`, never from the codes. The first packer of Sparse-MARLIN looked for nonzero nibbles
and lost survivors with code -8; that of compressed-tensors looked for nonzero codes and moved survivors with code 0.
"""

from __future__ import annotations

import torch
from torch import Tensor, split
from torch.nn.functional import pad

from marlinctl.pack.marlin import fold, gather, unfold
from marlinctl.pack.tile import OFFSET, TILE_K, TILE_N, meta_quad, sparse_grouped_column, sparse_grouped_slot
from marlinctl.pack.types import SLAB, PackedSparseLinear, padded, padded_codes, scales_from_tiles, scales_in_tiles, transposed
from marlinctl.quantize.types import QuantizedLinear
from marlinctl.sparsify.types import QUAD, SURVIVORS, SparseQuantizedLinear

ROW_K = TILE_K * QUAD // SURVIVORS  # columns of K in one row of words
WEIGHTS_AT_ONCE = 1 << 26  # in `remask` on a GPU, where every step is a launch: few large ones, and still below a gigabyte of them
PLACES_AT_ONCE = 1 << 20  # words in `check_metadata`
ZEROS = 0x08080808  # code 0 in each byte of a quad


def pack_sparse_marlin(q: SparseQuantizedLinear) -> PackedSparseLinear:
    """Survivors, their places and scales in Sparse-MARLIN order. Padded to multiples of 64: code 0, scale 0, metadata 0x4."""
    n, k = q.out_features, q.in_features
    shape = (padded(k) // ROW_K, 2 * padded(n))
    qweight, meta = q.codes.new_empty(shape, dtype=torch.int32), q.codes.new_empty(shape, dtype=torch.int16)
    codes, keep = padded_codes(q), q.keep
    if codes is not q.codes:
        keep = (torch.arange(padded(k), device=codes.device) % QUAD < SURVIVORS).repeat(padded(n), 1)
        keep[:n, :k] = q.keep
    for words, places, slab, kept in zip(*_split(qweight, meta, SLAB), split(codes, SLAB), split(keep, SLAB), strict=True):
        _write(words, places, slab, _nibbles(kept))
    # K = 2 group_size has two groups, although survivors alone would fill one
    scales = scales_in_tiles(q, _channel_order if q.group_size == k else sparse_grouped_column)
    return PackedSparseLinear(qweight, meta, scales, n, k, q.group_size)


def unpack_sparse_marlin(p: PackedSparseLinear) -> SparseQuantizedLinear:
    """The inverse of pack_sparse_marlin, bit for bit. Metadata that no packer writes is refused (check_metadata)."""
    n, k = p.out_features, p.in_features
    codes = torch.empty(padded(n), padded(k), dtype=torch.int8, device=p.qweight.device)
    keep = torch.empty_like(codes, dtype=torch.bool)
    tiles = _split(p.qweight.contiguous(), p.meta.contiguous(), SLAB)
    check_metadata(p.meta)
    for words, places, slab, kept in zip(*tiles, split(codes, SLAB), split(keep, SLAB), strict=True):
        nibbles = _read_nibbles(places)
        first, second = (nibbles & 3) << 3, (nibbles & 12) << 1  # bit of the quad where each survivor's byte begins
        pairs = torch.empty(len(slab), 2 * nibbles.shape[1], dtype=torch.int8, device=codes.device)
        _read_words(words, out=pairs)
        pairs32 = pairs.view(torch.int16).to(torch.int32) ^ 0x0808  # so that a pruned code is no bits at all
        quads = (pairs32 & 15) << first | (pairs32 >> 8) << second
        torch.sub((quads ^ ZEROS).view(torch.int8), OFFSET, out=slab)
        one = torch.ones_like(first)
        kept.copy_((one << first | one << second).view(torch.bool))
    scales = scales_from_tiles(p, _channel_order if p.channel_wise else sparse_grouped_slot)
    return SparseQuantizedLinear(codes[:n, :k].contiguous(), scales, p.group_size, keep[:n, :k].contiguous())


def _channel_order(n: Tensor) -> Tensor:
    """One group: the scales keep the order of the outputs."""
    return n


def one_group(scales: Tensor) -> Tensor:
    """scales [1, N] in the order of more groups -> the order of one, that of the outputs: K was cut down to a single group."""
    return scales[:, sparse_grouped_slot(torch.arange(scales.shape[1], device=scales.device))].contiguous()


def remask(packed: PackedSparseLinear, q: QuantizedLinear, importance: Tensor | None = None) -> None:
    """Choose the survivors anew and write them over qweight and meta of `packed`, while a model runs.

    `q` holds all codes of the linear, pruned or not, and `importance` [K], if there is one, how much each input matters now,
    for example its mean square over the last tokens. The two of a quad with the largest |code * scale| * sqrt(importance)
    survive; of equal ones the lowest columns. A quad has one scale (group_size must be a multiple of 4), so scales cannot
    change the order and are not read; those of `packed` stay, and must be those of `q`.

    Only tensor operations: on a GPU nothing waits for the device, and a CUDA graph can capture the call. That is why values are
    not looked at: importance must be finite and not negative (NaN counts as 0, infinity as the largest float32).
    """
    n, k = q.out_features, q.in_features
    if (packed.out_features, packed.in_features, packed.group_size) != (n, k, q.group_size):
        raise ValueError(
            f"packed is [{packed.out_features}, {packed.in_features}] with group_size {packed.group_size}, "
            f"the codes are [{n}, {k}] with group_size {q.group_size}"
        )
    if q.group_size % QUAD:
        raise ValueError(f"group_size {q.group_size} is not a multiple of {QUAD}, so quads have more than one scale")
    if importance is not None and (tuple(importance.shape) != (k,) or not importance.is_floating_point()):
        raise ValueError(f"importance must be float [{k}], got {importance.dtype} {list(importance.shape)}")
    if not (packed.qweight.is_contiguous() and packed.meta.is_contiguous()):
        raise ValueError("qweight and meta are written in place, so they must be contiguous")
    by_column = None if importance is None else _by_column(importance, padded(k))
    codes = padded_codes(q)
    slab_rows = SLAB if codes.device.type == "cpu" else max(TILE_N, WEIGHTS_AT_ONCE // codes.shape[1] // TILE_N * TILE_N)
    for words, places, slab in zip(*_split(packed.qweight, packed.meta, slab_rows), split(codes, slab_rows), strict=True):
        _write(words, places, slab, _best(slab, by_column))


def check_metadata(meta: Tensor) -> None:
    """ValueError for metadata int16 [K'/32, 2N'] with a quad whose first survivor does not lie before its second; it names the first one.

    Hardware leaves undefined what such metadata means (PTX ISA, mma.sp::ordered_metadata), so nothing may multiply with it. Works on the
    device of `meta`, which it reads once, in parts: a few temporaries of PLACES_AT_ONCE words, and one answer that is waited for.
    """
    flat = meta.reshape(-1)
    unordered = [_unordered(part).any() for part in split(flat, PLACES_AT_ONCE)]
    if not bool(torch.stack(unordered).any()):
        return
    start = PLACES_AT_ONCE * int(torch.stack(unordered).nonzero()[0])
    place = start + int(_unordered(flat[start : start + PLACES_AT_ONCE]).nonzero()[0])
    word = int(flat[place]) & 0xFFFF
    nibbles = [word >> 4 * i & 15 for i in range(4)]
    wrong = next(i for i, nibble in enumerate(nibbles) if nibble & 3 >= nibble >> 2)
    quad, row = meta_quad(*divmod(place, meta.shape[1]), wrong)
    raise ValueError(
        f"metadata of row {row}, columns {QUAD * quad}..{QUAD * quad + QUAD - 1} is {nibbles[wrong]:#x}, "
        f"which names no two survivors in order"
    )


def _unordered(words: Tensor) -> Tensor:
    """bool, True where int16 metadata holds a quad whose second survivor does not lie behind the first. Four quads are compared at once."""
    second = words >> 2  # the low two bits of each nibble; `words` has the first survivor there. What lies in the high two is cut off below
    more, less = second & ~words, words & ~second  # the bits in which they differ, by which of them has it
    behind = more >> 1 | more & ~(less >> 1)  # the high bit decides, and where both have the same, the low one
    return behind & 0x1111 != 0x1111


# ---- both matrices, slab by slab -----------------------------------------------------------------------------------------------------


def _split(qweight: Tensor, meta: Tensor, rows: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Views of qweight [row, block, octet, quad, j] and meta [row, block, j high, octet, j low, half, pair], `rows` outputs in each."""
    words = qweight.view(len(qweight), -1, 8, 4, 4)
    places = meta.view(len(meta), -1, 2, 8, 2, 2, 2)
    return split(words, rows // TILE_N, 1), split(places, rows // TILE_N, 1)


def _write(words: Tensor, places: Tensor, codes: Tensor, nibbles: Tensor) -> None:
    """The survivors of codes int8 [64 blocks, K'] that nibbles int32 [64 blocks, K'/4] name, and the nibbles, into their places."""
    rows = len(words)
    columns = fold(_survivors(codes, nibbles), len(codes)).view(-1, 8, 2, 4, rows, 4)  # [block, octet, pair, j, row, quad]
    both_pairs = columns[:, :, 0] | columns[:, :, 1] << 8  # [block, octet, j, row, quad] x bytes [odd, pair]
    words.copy_(both_pairs.permute(3, 0, 1, 4, 2))
    four = nibbles.to(torch.uint8).view(torch.int32)  # four quads, a nibble in each byte
    four = (four | four >> 4) & 0x00FF00FF
    four = (four | four >> 8).to(torch.int16)  # the low half
    places.copy_(four.view(-1, 8, 2, 2, 2, rows, 2).permute(5, 0, 3, 1, 4, 6, 2))


def _read_words(words: Tensor, out: Tensor) -> None:
    """[row, block, octet, quad, j] -> nibbles of the survivors, int8 [64 blocks, K'/2]."""
    words = words.permute(1, 2, 4, 0, 3).contiguous()  # [block, octet, j, row, quad] x bytes [odd, pair]
    unfold(torch.stack((gather(words), gather(words >> 8)), dim=2), out)  # int16 [block, octet, pair, j, row, quad] x bytes [odd]


def _read_nibbles(places: Tensor) -> Tensor:
    """[row, block, j high, octet, j low, half, pair] -> int32 [64 blocks, K'/4]."""
    rows, blocks = places.shape[:2]
    four = places.permute(1, 3, 6, 2, 4, 0, 5).reshape(blocks * TILE_N, 2 * rows).to(torch.int32) & 0xFFFF  # [n, row half]
    four = (four | four << 8) & 0x00FF00FF
    four = (four | four << 4) & 0x0F0F0F0F
    return four.view(torch.uint8).to(torch.int32)


# ---- one quad ------------------------------------------------------------------------------------------------------------------------


def _survivors(codes: Tensor, nibbles: Tensor) -> Tensor:
    """int8 [n, K'] -> int16 [n, K'/4] x bytes [odd]: code + 8 of the two survivors."""
    quads = (codes + OFFSET).reshape(-1).view(torch.int32).view(nibbles.shape)
    first = (nibbles & 3).bitwise_left_shift_(3)  # shifts a quad until its first survivor is the lowest byte
    second = (nibbles & 12).sub_(4).bitwise_left_shift_(1)  # and the second one the next; it is never in column 0
    torch.bitwise_right_shift(quads, first, out=first).bitwise_and_(0x000F)
    torch.bitwise_right_shift(quads, second, out=second).bitwise_and_(0x0F00)
    return first.bitwise_or_(second).to(torch.int16)


def _nibbles(keep: Tensor) -> Tensor:
    """bool [n, K'] -> metadata nibbles int32 [n, K'/4]."""
    flags = keep.to(torch.uint8).reshape(-1).view(torch.int32).view(len(keep), -1)  # bytes 0 or 1, two of the four are 1
    first = (-flags).bitwise_and_(flags)  # the lower one alone
    both = (flags << 2).sub_(first, alpha=3)  # 1 in the byte of the first survivor, 4 in that of the second
    return both.mul_(0x00010203).bitwise_right_shift_(24)  # the top byte sums each byte times its column


def _best(codes: Tensor, by_column: Tensor | None) -> Tensor:
    """Nibbles int32 [n, K'/4] of the two of each quad with the largest code² · importance; by_column: [4, K'/4] or None."""
    squares = codes.mul(codes).reshape(-1).view(torch.int32).view(len(codes), -1)  # at most 64 in each byte
    scores = [squares.bitwise_right_shift(8 * i).bitwise_and_(0xFF) for i in range(QUAD)]  # [n, K'/4] each
    if by_column is not None:
        scores = [score.to(torch.float32).mul_(column) for score, column in zip(scores, by_column, strict=True)]
    s0, s1, s2, s3 = scores
    b01, b02, b03, b12, b13, b23 = s1 > s0, s2 > s0, s3 > s0, s2 > s1, s3 > s1, s3 > s2  # bij: j beats i; of equals, i beats j
    out0 = _majority(b01, b02, b03)  # beaten by two
    out1 = _majority(~b01, b12, b13)
    in2 = _majority(b02, b12, ~b23)  # beats two
    in3 = _majority(b03, b13, b23)
    first = out0.view(torch.int8) * (1 + out1.view(torch.int8))  # 0, or 1, or 2 where neither 0 nor 1 survives
    second = 3 - ~in3 * (2 - in2.view(torch.int8))  # 3, or 2, or 1 where neither 3 nor 2 survives
    return (first + 4 * second).to(torch.int32)


def _majority(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return a & b | c & (a | b)


def _by_column(importance: Tensor, padded_k: int) -> Tensor:
    """[K] -> [4, K'/4] float32, by column of the quad."""
    plain = pad(importance.to(torch.float32).nan_to_num(), (0, padded_k - len(importance)))
    return transposed(plain.view(-1, QUAD))
