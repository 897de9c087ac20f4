"""A warp in software: the few instructions that the kernels are made of, as the PTX ISA defines them.

Nothing of our layouts is known here, and nothing here is ours to choose. Sections are numbered as in PTX ISA 9.2.

A register file is an int32 tensor [..., 32 lanes, registers]; what its bits mean is for the instruction to say. Leading axes are
warps that do the same thing, and broadcast. Accumulators are float32 [..., 32, 4]. A 32-bit register holds two 16-bit values, the
low half first, so that a file of R registers seen as float16 or bfloat16 is [..., 32, 2R] values, numbered as the ISA numbers the
elements of a fragment. With g = lane // 4 (groupID) and t = lane % 4 (threadID_in_group) lane and element hold

    A, 16 x 16    elements 0 1: row g,     columns 2t, 2t + 1          elements 4 5: row g,     columns 2t + 8, 2t + 9
                           2 3: row g + 8, columns 2t, 2t + 1                   6 7: row g + 8, columns 2t + 8, 2t + 9
    B, 16 x 8     elements 0 1: rows 2t, 2t + 1 of column g            elements 2 3: rows 2t + 8, 2t + 9 of column g
    B, 32 x 8     the same, and elements 4 5, 6 7: 16 rows further down
    C, D, 16 x 8  elements 0 1: row g,     columns 2t, 2t + 1          elements 2 3: row g + 8, columns 2t, 2t + 1

or four values of 8 bits, the lowest first, [..., 32, 4R] seen as int8, with int32 accumulators

    A, 16 x 32    elements 0 .. 3: row g,  columns 4t .. 4t + 3        elements 4 .. 7: row g + 8; 8 .. 15: the same, 16 columns further on
    B, 32 x 8     elements 0 .. 3: rows 4t .. 4t + 3 of column g       elements 4 .. 7: rows 16 further down
    B, 64 x 8     the same, and elements 8 .. 11, 12 .. 15: 32 and 48 rows further down

A product of two 16-bit values is exact. In which order an mma adds them, and how it rounds, the ISA leaves open (9.7.14.5.14: at
least single precision); here all are added to C in float64 and rounded to float32 once, so that the order does not show. Hardware
cuts off low bits of the smaller products (Fasi et al., PeerJ CS 7:e330), and is at best as close.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LANES = 32


@dataclass(frozen=True, slots=True)
class Fragment:
    """How a matrix is spread over the lanes: the row and column of each element of each lane."""

    row: Tensor  # [32, elements] int64
    column: Tensor  # [32, elements] int64

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.row.max()) + 1, int(self.column.max()) + 1

    def matrix(self, values: Tensor) -> Tensor:
        """values [..., 32, elements] -> [..., rows, columns]"""
        place = (self.row * self.shape[1] + self.column).flatten()
        return values.flatten(-2).index_select(-1, place.argsort()).reshape(*values.shape[:-2], *self.shape)

    def values(self, matrix: Tensor) -> Tensor:
        """matrix [..., rows, columns] -> [..., 32, elements]"""
        place = (self.row * self.shape[1] + self.column).flatten()
        return matrix.flatten(-2).index_select(-1, place).reshape(*matrix.shape[:-2], *self.row.shape)


def _fragment(row: Tensor, column: Tensor) -> Fragment:
    elements = row + column
    return Fragment(row.expand_as(elements), column.expand_as(elements))


_g, _t = torch.arange(LANES).unsqueeze(1) // 4, torch.arange(LANES).unsqueeze(1) % 4  # groupID, threadID_in_group
_i4, _i8, _i16 = torch.arange(4), torch.arange(8), torch.arange(16)  # elements of a lane

A_16X16 = _fragment(_g + 8 * (_i8 // 2 % 2), 2 * _t + _i8 % 2 + 8 * (_i8 // 4))  # 9.7.14.5.8
B_16X8 = _fragment(2 * _t + _i4 % 2 + 8 * (_i4 // 2), _g)  # 9.7.14.5.8
B_32X8 = _fragment(2 * _t + _i8 % 2 + 8 * (_i8 // 2), _g)  # 9.7.14.6.2.2, figure 121
A_16X32 = _fragment(_g + 8 * (_i16 // 4 % 2), 4 * _t + _i16 % 4 + 16 * (_i16 // 8))  # 9.7.14.5.10, of 8 bits
B_32X8_INT8 = _fragment(4 * _t + _i8 % 4 + 16 * (_i8 // 4), _g)  # 9.7.14.5.10, of 8 bits
B_64X8_INT8 = _fragment(4 * _t + _i16 % 4 + 16 * (_i16 // 4), _g)  # 9.7.14.6.2.6
D_16X8 = _fragment(_g + 8 * (_i4 // 2), 2 * _t + _i4 % 2)  # 9.7.14.5.8; for mma.sp too, 9.7.14.6.2.2


def lop3(a: Tensor, b: int, c: int, table: int) -> Tensor:
    """lop3.b32 (9.7.8.6): bit by bit, entry 4a + 2b + c of an 8-bit truth table, which is the function applied to 0xF0, 0xCC, 0xAA."""
    result = torch.zeros_like(a)
    for entry in range(8):
        if table >> entry & 1:
            result |= (a if entry & 4 else ~a) & (b if entry & 2 else ~b) & (c if entry & 1 else ~c)
    return result


def prmt(a: Tensor, b: Tensor, selector: int) -> Tensor:
    """prmt.b32 without a mode (9.7.9.7): each nibble of the selector names one of the eight bytes of a and b, or with bit 3 its sign."""
    result = torch.zeros_like(a)
    for place in range(4):
        choice = selector >> 4 * place & 15
        byte = (a if choice & 4 == 0 else b) >> 8 * (choice & 3) & 0xFF
        if choice & 8:
            byte = (byte >> 7) * 0xFF
        result |= byte << 8 * place
    return result


def fma_x2(registers: Tensor, factor: float, addend: float, dtype: torch.dtype) -> Tensor:
    """fma.rn.f16x2 / fma.rn.bf16x2 (9.7.4.4) with constants: both halves of each register, rounded to `dtype`.

    It passes through float32 and rounds twice where that is not exact. Codes are: integers below 2048 times 1 or 1/16.
    """
    return (registers.view(dtype).to(torch.float32) * factor + addend).to(dtype).view(torch.int32)


def mul(values: Tensor, factors: Tensor) -> Tensor:
    """mul.rn.f16x2 (9.7.4.3), and for bfloat16 mul.rn.f32 and cvt.rn.bf16.f32: 16-bit values times float16 factors, rounded once."""
    return (values.to(torch.float32) * factors.to(torch.float32)).to(values.dtype)


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """fma.rn.f32 (9.7.3.6) of float32 a and c and float16 b, whose product is exact in float64."""
    return (a.to(torch.float64) * b.to(torch.float64) + c.to(torch.float64)).to(torch.float32)


def ldmatrix(shared: Tensor, rows: Sequence[int]) -> Tensor:
    """ldmatrix.sync.aligned.m8n8.x1/.x2/.x4.shared.b16 (9.7.14.5.15): int32 [..., 32, matrices].

    shared: [..., R, 8] of any 16-bit dtype, rows of 16 bytes. rows: the row of shared memory that lane i points to, for 8 lanes per
    matrix; lanes 0..7 point to the rows of the first. Of each matrix lane i gets elements 2 (i % 4) and the next, of row i // 4.
    """
    pointed_to = shared[..., list(rows), :].contiguous().view(torch.int32)  # [..., 8 matrices, 4 pairs]
    pairs = pointed_to.reshape(*shared.shape[:-2], len(rows) // 8, LANES)  # [..., matrix, (row, pair)], and lane = 4 row + pair
    return pairs.transpose(-1, -2).contiguous()


def mma_m16n8k16(a: Tensor, b: Tensor, c: Tensor, dtype: torch.dtype) -> Tensor:
    """mma.sync.aligned.m16n8k16.row.col.f32.{f16, bf16}.{f16, bf16}.f32 (9.7.14.5.14): D = A B + C, float32 [..., 32, 4].

    a: [..., 32, 4] and b: [..., 32, 2], int32 registers of `dtype` pairs. c: [..., 32, 4] float32.
    """
    return _multiply(A_16X16.matrix(a.view(dtype)), B_16X8.matrix(b.view(dtype)), c)


def mma_m16n8k32(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 (9.7.14.5.14): D = A B + C, int32 [..., 32, 4]; sums wrap around.

    a: [..., 32, 4] and b: [..., 32, 2], int32 registers of four int8. c: [..., 32, 4] int32.
    """
    product = A_16X32.matrix(a.view(torch.int8)).double() @ B_32X8_INT8.matrix(b.view(torch.int8)).double()  # exact
    return (D_16X8.values(product).to(torch.int64) + c).to(torch.int32)


def mma_sp_m16n8k32(a: Tensor, b: Tensor, c: Tensor, e: Tensor, selector: int, dtype: torch.dtype) -> Tensor:
    """mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{f16, bf16}.{f16, bf16}.f32 (9.7.14.6.3): float32 [..., 32, 4].

    a: [..., 32, 4], the 16 x 16 stored of the 16 x 32 of A, and b: [..., 32, 4], int32 registers of `dtype` pairs. e: [..., 32]
    int32, metadata, with the leading axes of a. selector: 0 or 1. ValueError for metadata that the ISA leaves undefined.
    """
    stored = A_16X16.matrix(a.view(dtype))
    expanded = stored.new_zeros(*stored.shape[:-1], 32).scatter_(-1, _metadata_columns(e, selector), stored)
    return _multiply(expanded, B_32X8.matrix(b.view(dtype)), c)


def mma_sp_m16n8k64(a: Tensor, b: Tensor, c: Tensor, e: Tensor) -> Tensor:
    """mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32 (9.7.14.6.3): int32 [..., 32, 4]; sums wrap around.

    a: [..., 32, 4], the 16 x 32 stored of the 16 x 64 of A, and b: [..., 32, 4], int32 registers of four int8. e: [..., 32] int32,
    metadata, with the leading axes of a; its selector is always 0. ValueError for metadata that the ISA leaves undefined.

    Of each group of four lanes the first holds the metadata of row g for columns 0..31 of A, the second that of row g + 8; the third and
    the fourth are the same for columns 32..63. Each four bits are one quad of columns, as in mma_sp_m16n8k32.
    """
    stored = A_16X32.matrix(a.view(torch.int8)).double()
    lanes = e.reshape(*e.shape[:-1], 8, 2, 2).movedim(-1, -3)  # [..., g or g + 8, g, half of the columns]
    places = lanes.unsqueeze(-1) >> 2 * torch.arange(16) & 3  # [.., (quad, stored)]
    columns = _rising(places.reshape(*e.shape[:-1], 16, 32)) + 4 * (torch.arange(32) // 2)
    expanded = stored.new_zeros(*stored.shape[:-1], 64).scatter_(-1, columns, stored)
    product = expanded @ B_64X8_INT8.matrix(b.view(torch.int8)).double()  # exact
    return (D_16X8.values(product).to(torch.int64) + c).to(torch.int32)


def _metadata_columns(e: Tensor, selector: int) -> Tensor:
    """[..., 32] metadata -> [..., 16, 16] int64: the column, 0..31, of each stored value of A (9.7.14.6.1 and 9.7.14.6.2.2).

    Of each group of four lanes the selector names a pair: lanes 0, 1 or 2, 3. The first holds what belongs to columns 0..15 of A, the
    second to 16..31. Their low 16 bits are for row g, the high ones for row g + 8 (figure 122). Each four bits are one quad of
    columns: two bits for the place of its first stored value, two for that of its second.
    """
    pairs = e.reshape(*e.shape[:-1], 8, 4)[..., 2 * selector : 2 * selector + 2]  # [..., g, half of the columns]
    places = pairs.unsqueeze(-1) >> 2 * torch.arange(16) & 3  # [..., g, half, (g or g + 8, quad, stored)]
    places = places.reshape(*e.shape[:-1], 8, 2, 2, 8).movedim(-2, -4)  # [..., g or g + 8, g, half, (quad, stored)]
    return _rising(places.reshape(*e.shape[:-1], 16, 16)) + 4 * (torch.arange(16) // 2)


def _rising(places: Tensor) -> Tensor:
    """places [..., (quad, stored)] int64, as they are."""
    if bool((places[..., 0::2] >= places[..., 1::2]).any()):
        raise ValueError("metadata holds a quad whose two columns do not rise, which mma.sp::ordered_metadata leaves undefined")
    return places.to(torch.int64)


def _multiply(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return (D_16X8.values(a.to(torch.float64) @ b.to(torch.float64)) + c).to(torch.float32)
