"""Where each weight lives: the packed layouts as functions of (k, n), and back.

A layout is a bijection between weights and nibbles. `k` runs over in_features and `n` over out_features; a `Place`
names an int32 word by row and column and one of its eight nibbles, 0 being the lowest four bits. A nibble holds
code + 8. Every function takes plain ints or index tensors, which broadcast, and only uses `+ * // %`, so that it
can be read as the formula it is: the packers are tested against these functions, the reference reads through them,
and the drawings in docs/formats come out of them. A layout is stated here and nowhere else.

MARLIN stores the weight as the tensor core wants to eat it. One tile is 16 (k) x 64 (n) weights = 128 words: lane t
of a warp owns words 4t..4t+3 and fetches them with a single 16-byte load. For mma.m16n8k16 that lane must hold the
four k = 2(t % 4) + {0, 1, 8, 9} of column t // 4; word j carries those for two columns, 16j + t // 4 and its
neighbour 8 further on. Inside a word the order is such that `w & 0x000f000f`, `w & 0x00f000f0` and the same two
masks on `w >> 8` each give a ready pair of neighbours in k, one in each half of the register.

Sparse-MARLIN stores the survivors of 2:4 alone: survivor c of a row is the (c % 2)-th of quad c // 2, the aligned four
k = 4 (c // 2) .. + 3. The weight is now the A operand of mma.sp.m16n8k32, so k of the tile counts survivors and rows of
the fragment are columns of MARLIN: word j of lane t holds survivors 2(t % 4) + {0, 1, 8, 9} of the outputs 8(t // 4) + j
and 4 further on, in the same order of nibbles. Which two of a quad survived lies in `meta`, in the order in which one
ldmatrix hands it to the warp.
"""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

from torch import Tensor

Index = TypeVar("Index", int, Tensor)  # one place, or a tensor of places

NIBBLES = 8  # 4-bit values in an int32 word
OFFSET = 8  # a nibble holds code + OFFSET, so that -8..7 becomes 0..15
TILE_K, TILE_N = 16, 64  # weights of one MARLIN tile: 32 lanes x 4 words x 8 nibbles; in a 2:4 tile k counts survivors


class Place(NamedTuple, Generic[Index]):
    """One nibble of a packed int32 matrix."""

    row: Index
    column: Index
    nibble: Index  # 0..7, 0 = bits 0..3


# MARLIN: qweight [K/16, 2N]


def marlin_lane(k: Index, n: Index) -> Index:
    """The thread of the warp, 0..31, that loads weight (k, n)."""
    return 4 * (n % 8) + (k % 8) // 2


def marlin_place(k: Index, n: Index) -> Place[Index]:
    column = 128 * (n // 64) + 4 * marlin_lane(k, n) + (n % 64) // 16
    nibble = 4 * (k % 2) + 2 * ((n % 16) // 8) + (k % 16) // 8
    return Place(k // 16, column, nibble)


def marlin_weight(row: Index, column: Index, nibble: Index) -> tuple[Index, Index]:
    """The (k, n) that a nibble stands for: the inverse of marlin_place."""
    lane = (column % 128) // 4
    k = 16 * row + 8 * (nibble % 2) + 2 * (lane % 4) + nibble // 4
    n = 64 * (column // 128) + 16 * (column % 4) + 8 * ((nibble // 2) % 2) + lane // 4
    return k, n


# Activations of 8 bits for MARLIN tiles: int8 [M, K'], inside of each 32 of k in the order in which the words have their weights. The A
# operand of an 8-bit product (mma.m16n8k32, wgmma m64nNk32) gives a lane of a row four neighbours in k, twice. What two words of
# neighbouring rows of qweight hold at the same height of their bytes are four weights of one output: k = 2(t % 4) + {0, 1, 16, 17}, and
# in the other nibbles 8 more. So 0 1 16 17 2 3 18 19 .. 22 23 lie in the first half of the 32 places, 8 9 24 25 .. 30 31 in the second.


def activation_place(k: Index) -> Index:
    """Where the activation of column k lies in its row."""
    return 32 * (k // 32) + 16 * (k % 16 // 8) + 4 * (k % 8 // 2) + 2 * (k % 32 // 16) + k % 2


def activation_column(place: Index) -> Index:
    """The k that lies in a place: the inverse of activation_place."""
    return 32 * (place // 32) + 16 * (place % 4 // 2) + 8 * (place % 32 // 16) + 2 * (place % 16 // 4) + place % 2


# The same for Sparse-MARLIN tiles, inside of each 64 of k, with the compressed A operand of a sparse 8-bit product (mma.sp.m16n8k64,
# wgmma.sp m64nNk64). At the same height of the bytes of two words of neighbouring rows of qweight are two survivors of each: quads t % 4 of
# both, and in the other nibbles 4 + t % 4. So quads of activations lie as 0 8 1 9 2 10 3 11 | 4 12 5 13 6 14 7 15.


def sparse_activation_place(k: Index) -> Index:
    """Where the activation of column k lies in its row."""
    return 64 * (k // 64) + 32 * (k % 32 // 16) + 8 * (k % 16 // 4) + 4 * (k % 64 // 32) + k % 4


def sparse_activation_column(place: Index) -> Index:
    """The k that lies in a place: the inverse of sparse_activation_place."""
    return 64 * (place // 64) + 32 * (place % 8 // 4) + 16 * (place % 64 // 32) + 4 * (place % 32 // 8) + place % 4


# MARLIN scales: [G, N] with the columns in another order. Both orders transpose small blocks and are therefore their
# own inverse: the slot in which column n lies, and equally the column that lies in slot n.


def grouped_slot(n: Index) -> Index:
    """More than one group: the 8 columns that a lane needs (same n % 8) lie together, one 16-byte load."""
    return 64 * (n // 64) + 8 * (n % 8) + (n % 64) // 8


def channel_slot(n: Index) -> Index:
    """One group: the scales multiply the finished sums, of which a lane holds the pairs 0 1, 8 9, 16 17, 24 25."""
    return 32 * (n // 32) + 8 * ((n % 8) // 2) + 2 * ((n % 32) // 8) + n % 2


# Sparse-MARLIN: qweight [K/32, 2N] of survivors


def sparse_lane(c: Index, n: Index) -> Index:
    """The thread of the warp, 0..31, that loads survivor c of output n."""
    return 4 * ((n % 64) // 8) + (c % 8) // 2


def sparse_place(c: Index, n: Index) -> Place[Index]:
    column = 128 * (n // 64) + 4 * sparse_lane(c, n) + n % 4
    nibble = 4 * (c % 2) + 2 * ((n % 8) // 4) + (c % 16) // 8
    return Place(c // 16, column, nibble)


def sparse_survivor(row: Index, column: Index, nibble: Index) -> tuple[Index, Index]:
    """The (c, n) that a nibble stands for: the inverse of sparse_place."""
    lane = (column % 128) // 4
    c = 16 * row + 8 * (nibble % 2) + 2 * (lane % 4) + nibble // 4
    n = 64 * (column // 128) + 8 * (lane // 4) + 4 * ((nibble // 2) % 2) + column % 4
    return c, n


# Sparse-MARLIN metadata: meta [K/32, 2N] of int16, a nibble for each quad. A word covers 16 k of one output. The 128 words
# of 32 k x 64 n are two 8 x 8 matrices of ldmatrix, the first for outputs with n % 4 = 0, 1, the second for 2, 3.


def meta_place(quad: Index, n: Index) -> Place[Index]:
    """`nibble` is 0..3 here, since a word has 16 bits."""
    column = 128 * (n // 64) + 64 * ((n % 4) // 2) + 8 * ((n % 64) // 8) + 4 * (n % 2) + 2 * ((quad % 8) // 4) + (n % 8) // 4
    return Place(quad // 8, column, quad % 4)


def meta_quad(row: Index, column: Index, nibble: Index) -> tuple[Index, Index]:
    """The (quad, n) that a nibble of meta stands for: the inverse of meta_place."""
    quad = 8 * row + 4 * ((column % 4) // 2) + nibble
    n = 64 * (column // 128) + 8 * ((column % 64) // 8) + 4 * (column % 2) + 2 * ((column % 128) // 64) + (column % 8) // 4
    return quad, n


# The same metadata for sparse 8-bit products: [K/32, 2N] of int16 too, and made of `meta` when weights are loaded. One product of 64 of k
# and a word takes 32 bits of each lane: of lane t those of row t // 4 + 8 (t % 2) of its fragment, 32 (t % 4 // 2) of k and up in the order
# of activations (CUTLASS has it as ELayout_64x64; benchmarks/probe_wgmma_sp.py asks a GPU). So a row is two registers of every lane, those
# of words j = 0, 1 in even rows and of 2, 3 in odd ones.


def int8_meta_place(quad: Index, n: Index) -> Place[Index]:
    lane = 4 * (n % 64 // 8) + 2 * (quad % 8 // 4) + n % 8 // 4
    column = 128 * (n // 64) + 4 * lane + 2 * (n % 2) + quad % 4 // 2
    return Place(2 * (quad // 16) + n % 4 // 2, column, 2 * (quad % 2) + quad % 16 // 8)


def meta_nibble(first: Index, second: Index) -> Index:
    """Survivors in columns first < second of their quad, each 0..3: one of 0x4 0x8 0x9 0xC 0xD 0xE."""
    return first + 4 * second


def meta_columns(nibble: Index) -> tuple[Index, Index]:
    """The (first, second) that a nibble stands for: the inverse of meta_nibble."""
    return nibble % 4, nibble // 4


# Sparse-MARLIN scales: [G, N]. With one group the columns keep their order. This order is not its own inverse.


def sparse_grouped_slot(n: Index) -> Index:
    """More than one group: the outputs n and n + 4 of a word lie side by side."""
    return 8 * (n // 8) + 2 * (n % 4) + (n % 8) // 4


def sparse_grouped_column(slot: Index) -> Index:
    """The column that lies in a slot: the inverse of sparse_grouped_slot."""
    return 8 * (slot // 8) + 4 * (slot % 2) + (slot % 8) // 2


# compressed-tensors pack-quantized: weight_packed [N, ceil(K/8)]


def ct_place(k: Index, n: Index) -> Place[Index]:
    return Place(n, k // 8, k % 8)


def ct_weight(row: Index, column: Index, nibble: Index) -> tuple[Index, Index]:
    return 8 * column + nibble, row


# GPTQ: qweight [K/8, N], and qzeros [G, N/8], which alone is packed along n


def gptq_place(k: Index, n: Index) -> Place[Index]:
    return Place(k // 8, n, k % 8)


def gptq_weight(row: Index, column: Index, nibble: Index) -> tuple[Index, Index]:
    return 8 * row + nibble, column


def gptq_zero_place(group: Index, n: Index) -> Place[Index]:
    return Place(group, n // 8, n % 8)


def gptq_zero(row: Index, column: Index, nibble: Index) -> tuple[Index, Index]:
    """The (group, n) that a nibble of qzeros stands for."""
    return row, 8 * column + nibble
