"""The instructions in software against the PTX ISA: one lane, one element, one bit at a time, in plain Python."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from marlinctl.kernels import warp
from marlinctl.kernels.warp import Fragment, fma, fma_x2, ldmatrix, lop3, mma_m16n8k16, mma_m16n8k32, mma_sp_m16n8k32, mul, prmt

DTYPES = [torch.float16, torch.bfloat16]


def integers(*shape: int, seed: int, low: int = -7, high: int = 8) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def registers(matrix: list[list[float]], places: list[list[tuple[int, int]]], dtype: torch.dtype) -> Tensor:
    """int32 [32, registers] with the element of the matrix that each lane is to hold, two to a register."""
    return torch.tensor([[matrix[row][column] for row, column in lane] for lane in places], dtype=dtype).view(torch.int32)


# ---- the tables, in the words of the manual ------------------------------------------------------------------------------------------


def places_of_a() -> list[list[tuple[int, int]]]:
    """9.7.14.5.8: row = groupID for 0 <= i < 2 || 4 <= i < 6, else groupID + 8; col = threadID_in_group * 2 + (i & 1), + 8 for i >= 4."""
    return [
        [(lane >> 2 if 0 <= i < 2 or 4 <= i < 6 else (lane >> 2) + 8, (lane % 4) * 2 + (i & 1) + (8 if i >= 4 else 0)) for i in range(8)]
        for lane in range(32)
    ]


def places_of_b(elements: int) -> list[list[tuple[int, int]]]:
    """9.7.14.5.8: row = threadID_in_group * 2 + (i & 1), + 8 for i >= 2; col = groupID. Figure 121: 16 and 24 for the further elements."""
    return [[((lane % 4) * 2 + (i & 1) + 8 * (i >> 1), lane >> 2) for i in range(elements)] for lane in range(32)]


def places_of_a_int8() -> list[list[tuple[int, int]]]:
    """9.7.14.5.10: row = groupID for i < 4 || 8 <= i < 12, else groupID + 8; col = threadID_in_group * 4 + (i & 3), + 16 for i >= 8."""
    return [
        [(lane >> 2 if i < 4 or 8 <= i < 12 else (lane >> 2) + 8, (lane % 4) * 4 + (i & 3) + (16 if i >= 8 else 0)) for i in range(16)]
        for lane in range(32)
    ]


def places_of_b_int8() -> list[list[tuple[int, int]]]:
    """9.7.14.5.10: row = threadID_in_group * 4 + (i & 3), + 16 for i >= 4; col = groupID."""
    return [[((lane % 4) * 4 + (i & 3) + (16 if i >= 4 else 0), lane >> 2) for i in range(8)] for lane in range(32)]


def places_of_d() -> list[list[tuple[int, int]]]:
    """9.7.14.5.8: row = groupID for i < 2, else groupID + 8; col = threadID_in_group * 2 + (i & 1)."""
    return [[(lane >> 2 if i < 2 else (lane >> 2) + 8, (lane % 4) * 2 + (i & 1)) for i in range(4)] for lane in range(32)]


@pytest.mark.parametrize(
    ("fragment", "places", "shape"),
    [
        (warp.A_16X16, places_of_a(), (16, 16)),
        (warp.B_16X8, places_of_b(4), (16, 8)),
        (warp.B_32X8, places_of_b(8), (32, 8)),
        (warp.D_16X8, places_of_d(), (16, 8)),
        (warp.A_16X32, places_of_a_int8(), (16, 32)),
        (warp.B_32X8_INT8, places_of_b_int8(), (32, 8)),
    ],
    ids=["A", "B of 16 rows", "B of 32 rows", "D", "A of int8", "B of int8"],
)
def test_fragments_are_spread_as_the_manual_says(fragment: Fragment, places: list[list[tuple[int, int]]], shape: tuple[int, int]) -> None:
    """If this failed, every emulated product would multiply the wrong pairs."""
    assert fragment.shape == shape
    matrix = torch.arange(shape[0] * shape[1]).reshape(shape)
    held = torch.tensor([[int(matrix[place]) for place in lane] for lane in places])
    assert torch.equal(fragment.values(matrix), held)
    two = torch.stack((held, -held))  # two warps
    assert torch.equal(fragment.matrix(two), torch.stack((matrix, -matrix)))


def test_ldmatrix_hands_out_rows() -> None:
    """If this failed, lanes would hold activations or metadata of other lanes."""
    shared = torch.arange(3 * 40 * 8, dtype=torch.int16).reshape(3, 40, 8)
    pointers = [int(i) for i in torch.randperm(40, generator=torch.Generator().manual_seed(0))[:32]]
    loaded = ldmatrix(shared, pointers)
    assert loaded.shape == (3, 32, 4)
    for lane in range(32):
        for matrix in range(4):
            row = shared[1, pointers[8 * matrix + lane // 4]]
            assert int(loaded[1, lane, matrix]) == int(row[2 * (lane % 4)]) | int(row[2 * (lane % 4) + 1]) << 16
    assert torch.equal(ldmatrix(shared, pointers[:16]), loaded[..., :2])


@pytest.mark.parametrize(
    "function",
    [lambda a, b, c: a & b | c, lambda a, b, c: a ^ b ^ c, lambda a, b, c: a & b & ~c, lambda a, b, c: (a & b | c) ^ a],
    ids=["a & b | c", "a ^ b ^ c", "a & b & ~c", "(a & b | c) ^ a"],
)
def test_lop3_applies_the_function_that_made_its_table(function: Callable[[int, int, int], int]) -> None:
    """If this failed, dequantization would pick other bits than the kernel's masks say. Three of the functions are the manual's."""
    words = integers(64, seed=1, low=-(1 << 31), high=1 << 31).to(torch.int32)
    b, c = 0x00F000F0, 0x64006400
    want = torch.tensor([function(int(word), b, c) for word in words], dtype=torch.int64).to(torch.int32)
    assert torch.equal(lop3(words, b, c, function(0xF0, 0xCC, 0xAA) & 0xFF), want)


@pytest.mark.parametrize("selector", [0x6420, 0x7531, 0x5410, 0x0040, 0xFEDC, 0x9A2B])
def test_prmt_takes_the_bytes_that_the_selector_names(selector: int) -> None:
    """If this failed, int8 operands would hold other weights than the hardware's. Bit 3 of a nibble spreads the sign of its byte."""
    a, b = (
        integers(64, seed=1, low=-(1 << 31), high=1 << 31).to(torch.int32),
        integers(64, seed=2, low=-(1 << 31), high=1 << 31).to(torch.int32),
    )
    taken = prmt(a, b, selector).view(torch.uint8).view(64, 4).tolist()
    both = torch.stack((a, b), -1).view(torch.uint8).view(64, 8).tolist()
    for lane in range(64):
        for place in range(4):
            choice = selector >> 4 * place & 15
            byte = both[lane][choice & 7]
            assert taken[lane][place] == (byte if choice < 8 else 255 if byte & 128 else 0)


def test_arithmetic_rounds_once() -> None:
    """If this failed, emulated weights would differ from the kernel's in the last bit."""
    scale = torch.tensor([1 + 2**-8 + 2**-10], dtype=torch.float16)  # bfloat16 would round it to 1 + 2**-7, and 7 times that to 7.0625
    assert float(mul(torch.tensor([7.0], dtype=torch.bfloat16), scale)) == 7.03125
    pair = torch.tensor([1024.0 + 16 * 13, 1024.0], dtype=torch.float16).view(torch.int32)
    assert fma_x2(pair, 1 / 16, -72.0, torch.float16).view(torch.float16).tolist() == [5.0, -8.0]
    third = torch.tensor([1 + 2**-23])  # times 3 it is 3 + 3 * 2**-23, which float32 cannot hold
    assert float(fma(third, torch.tensor([3.0], dtype=torch.float16), torch.tensor([-3.0]))) == 3 * 2**-23


# ---- products ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_mma_multiplies_the_matrices(dtype: torch.dtype) -> None:
    """If this failed, the dense emulator would compute something else than A B + C. Integers, so that every sum is exact."""
    a, b, c = integers(16, 16, seed=1), integers(16, 8, seed=2), integers(16, 8, seed=3)
    held = torch.tensor([[float(c[place]) for place in lane] for lane in places_of_d()])
    d = mma_m16n8k16(registers(a.tolist(), places_of_a(), dtype), registers(b.tolist(), places_of_b(4), dtype), held, dtype)
    want = a @ b + c
    assert d.dtype == torch.float32
    assert d.tolist() == [[float(want[place]) for place in lane] for lane in places_of_d()]


def test_mma_of_int8_multiplies_the_matrices() -> None:
    """If this failed, the emulator would compute something else than A B + C, or sums that stop where the hardware's wrap around."""
    a, b, c = integers(16, 32, seed=1, low=-128, high=128), integers(32, 8, seed=2, low=-128, high=128), integers(16, 8, seed=3)
    a[0], b[:, 0], c[0, 0] = -128, -128, 2**31 - 1

    def packed(matrix: Tensor, places: list[list[tuple[int, int]]]) -> Tensor:
        return torch.tensor([[int(matrix[place]) for place in lane] for lane in places], dtype=torch.int8).view(torch.int32)

    held = torch.tensor([[int(c[place]) for place in lane] for lane in places_of_d()], dtype=torch.int32)
    d = mma_m16n8k32(packed(a, places_of_a_int8()), packed(b, places_of_b_int8()), held)
    want = (a @ b + c).to(torch.int32)
    assert d.dtype == torch.int32 and int(want[0, 0]) < 0
    assert d.tolist() == [[int(want[place]) for place in lane] for lane in places_of_d()]


RISING = [0b0100, 0b1000, 0b1001, 0b1100, 0b1101, 0b1110]  # 9.7.14.6.1


def dense_of(stored: Tensor, metadata: list[int], selector: int) -> Tensor:
    """[16, 16] stored values where metadata puts them in [16, 32], quad by quad."""
    dense = torch.zeros(16, 32, dtype=stored.dtype)
    for group in range(8):
        for half in range(2):
            register = metadata[4 * group + 2 * selector + half]
            for below in range(2):
                bits = register >> 16 * below & 0xFFFF
                for quad in range(4):
                    first, second = bits >> 4 * quad & 3, bits >> 4 * quad + 2 & 3
                    row, quad_of_row = group + 8 * below, 4 * half + quad
                    dense[row, 4 * quad_of_row + first] = stored[row, 2 * quad_of_row]
                    dense[row, 4 * quad_of_row + second] = stored[row, 2 * quad_of_row + 1]
    return dense


def signed(words: list[int]) -> Tensor:
    return torch.tensor([word - (word >> 31 << 32) for word in words], dtype=torch.int32)


@pytest.mark.parametrize("selector", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mma_sp_multiplies_what_the_metadata_says(dtype: torch.dtype, selector: int) -> None:
    """If this failed, survivors would meet the activations of their neighbours. The lanes that are not selected hold nonsense."""
    stored, b, c = integers(16, 16, seed=4), integers(32, 8, seed=5), integers(16, 8, seed=6)
    nibbles = integers(32, 8, seed=7 + selector, low=0, high=6).tolist()
    metadata = [sum(RISING[choice] << 4 * i for i, choice in enumerate(lane)) for lane in nibbles]
    for lane in range(32):
        if lane % 4 // 2 != selector:
            metadata[lane] = 0xFFFFFFFF
    held = torch.tensor([[float(c[place]) for place in lane] for lane in places_of_d()])
    a_registers, b_registers = registers(stored.tolist(), places_of_a(), dtype), registers(b.tolist(), places_of_b(8), dtype)
    d = mma_sp_m16n8k32(a_registers, b_registers, held, signed(metadata), selector, dtype)
    want = dense_of(stored, metadata, selector) @ b + c
    assert d.tolist() == [[float(want[place]) for place in lane] for lane in places_of_d()]


@pytest.mark.parametrize("nibble", [n for n in range(16) if n not in RISING])
def test_undefined_metadata_is_refused(nibble: int) -> None:
    """If this failed, the emulator would find a meaning where the device does as it likes."""
    metadata = [0x44444444] * 32
    metadata[13] = 0x44444444 & ~(15 << 20) | nibble << 20
    zeros = torch.zeros(32, 4)
    with pytest.raises(ValueError, match="columns do not rise"):
        mma_sp_m16n8k32(zeros.to(torch.int32), zeros.to(torch.int32), zeros, signed(metadata), 0, torch.float16)
    mma_sp_m16n8k32(zeros.to(torch.int32), zeros.to(torch.int32), zeros, signed(metadata), 1, torch.float16)


def test_sums_are_rounded_to_float32_at_every_instruction() -> None:
    """If this failed, emulated sums would be those of float64, and long ones closer to the truth than any kernel's."""
    a = registers([[1.0] + [0.0] * 15] * 16, places_of_a(), torch.float16)
    b = registers([[-1.0] * 8] * 16, places_of_b(4), torch.float16)
    sums = torch.full((32, 4), -(2.0**24))
    for _ in range(3):
        sums = mma_m16n8k16(a, b, sums, torch.float16)
    assert bool((sums == -(2.0**24)).all())  # each -1 is half of a last bit, and lost to the even side
