"""Rounded activations in the order of the tiles: that a lane's weights meet the activations of their own k, and what is written where."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from marlinctl.kernels.activations import in_column_order, in_tile_order, round_activations_for_tiles
from marlinctl.pack.marlin import pack_marlin
from marlinctl.quantize.activations import rounded
from tests.pack.naive import random_linear


def permute(first: int, second: int, selector: int) -> int:
    """prmt.b32 without a mode (PTX ISA 9.7.9.7), for selectors below 8."""
    both = second << 32 | first
    return sum((both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i for i in range(4))


def fragment_of(first: int, second: int) -> list[list[int]]:
    """Registers a0..a3 of four int8 each, out of one word of two rows of qweight: `Int8` of benchmarks/w4a8_decoding.cuh."""
    x, y = permute(first, second, 0x6420), permute(first, second, 0x7531)
    registers = [(word & 0xF0F0F0F0) ^ 0x80808080 for word in (x << 4, y << 4, x, y)]
    return [[(register >> 8 * i & 255) - 256 * (register >> 8 * i + 7 & 1) for i in range(4)] for register in registers]


def test_a_lanes_weights_meet_the_activations_of_their_columns() -> None:
    """If this failed, 8-bit kernels would multiply weights with the activations of other columns of K."""
    q = random_linear(64, 32, 32, seed=5)
    words = [[word & 0xFFFFFFFF for word in row] for row in pack_marlin(q).qweight[:2].tolist()]  # K' is 64, the rest is padding
    activations = torch.randint(-127, 128, (5, 32), generator=torch.Generator().manual_seed(5)).to(torch.int8)
    lying = in_tile_order(activations)[:, :32].tolist()
    product = torch.zeros(5, 64, dtype=torch.int64)
    for lane in range(32):
        g, t = lane // 4, lane % 4
        for j in range(4):
            a = fragment_of(words[0][4 * lane + j], words[1][4 * lane + j])
            # PTX ISA, fragments of wgmma m64nNk32 and mma m16n8k32: a0 and a2 are of row g, a1 and a3 of row g + 8; columns of a0 and
            # a1 are 4t .. 4t + 3, those of a2 and a3 are 16 further on.
            for register, (row, column) in enumerate([(g, 4 * t), (g + 8, 4 * t), (g, 4 * t + 16), (g + 8, 4 * t + 16)]):
                for token in range(5):
                    for i in range(4):
                        product[token, 16 * j + row] += a[register][i] * lying[token][column + i]
    assert torch.equal(product, 16 * activations.long() @ q.codes.long().T)


def test_the_order_is_the_one_in_the_drawing() -> None:
    """If this failed, map and drawing (pack/tile.py) would be of two orders."""
    wanted = [0, 1, 16, 17, 2, 3, 18, 19, 4, 5, 20, 21, 6, 7, 22, 23, 8, 9, 24, 25, 10, 11, 26, 27, 12, 13, 28, 29, 14, 15, 30, 31]
    assert in_tile_order(torch.arange(64)[None]).tolist() == [wanted + [32 + k for k in wanted]]


def test_the_order_for_sparse_tiles_is_the_one_in_the_drawing() -> None:
    """If this failed, map and drawing (csrc/sparse_marlin_a8_factored_sm90.cu) would be of two orders."""
    quads = [0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15]
    wanted = [4 * quad + i for quad in quads for i in range(4)]
    codes = torch.arange(64)[None]
    assert in_tile_order(codes, sparse=True).tolist() == [wanted]
    assert torch.equal(in_column_order(in_tile_order(codes, sparse=True), 60, sparse=True), codes[:, :60].to(torch.int8))


@pytest.mark.parametrize("k", [8, 24, 40, 64, 200])
def test_columns_come_back_and_padding_is_zero(k: int) -> None:
    """If this failed, what lies behind the last column would be multiplied, or a check in plain order would look at other columns."""
    codes = torch.randint(-127, 128, (3, k), generator=torch.Generator().manual_seed(k))
    codes[codes == 0] = 1
    lying = in_tile_order(codes)
    assert lying.dtype == torch.int8 and lying.shape == (3, -(-k // 64) * 64) and lying.is_contiguous()
    assert torch.equal(in_column_order(lying, k), codes.to(torch.int8))
    assert int(lying.count_nonzero()) == 3 * k


@pytest.mark.parametrize("group", [None, 128])
@pytest.mark.parametrize(("m", "k"), [(1, 8), (3, 128), (4, 200), (5, 320)])
def test_codes_and_scales_are_those_of_the_solver(m: int, k: int, group: int | None) -> None:
    """If this failed, a kernel would be compared with other numbers than an evaluation sees."""
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(torch.bfloat16)
    codes, scales = rounded(x, "int8", group)
    made = round_activations_for_tiles(x, group)
    assert torch.equal(in_column_order(made.codes, k).float(), codes)
    assert made.scales.dtype == torch.float32 and made.scales.is_contiguous()
    assert made.scales.shape == (1 if group is None else -(-k // 128), -(-m // 4) * 4)
    assert torch.equal(made.scales[:, :m].T, scales) and not made.scales[:, m:].any()


@pytest.mark.parametrize("group", [None, 128])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_stays_not_finite(value: float, group: int | None) -> None:
    """If this failed, a model that overflows would answer with plausible numbers."""
    x = torch.ones(3, 264)
    x[1, 130] = value
    made = round_activations_for_tiles(x, group)
    finite = torch.ones(1 if group is None else 3, 4, dtype=torch.bool)
    finite[-2 if group else 0, 1] = False
    assert torch.equal(made.scales.isfinite(), finite) and bool(made.scales[~finite].isnan().all())
    codes = torch.full((3, 264), 127)
    codes[1, 128 if group else 0 : 256 if group else 264] = 0
    assert torch.equal(in_column_order(made.codes, 264).long(), codes)


def test_what_does_not_fit_is_refused() -> None:
    """If this failed, a wrong call would give scales that no kernel reads."""
    with pytest.raises(ValueError, match=r"each 128 of its K, not for each 64"):
        round_activations_for_tiles(torch.ones(2, 64), 64)
    wrong: list[Tensor] = [torch.ones(64), torch.ones(0, 64), torch.ones(2, 0), torch.ones(2, 2, 64)]
    for x in wrong:
        with pytest.raises(ValueError, match=r"activations must be \[M, K\]"):
            round_activations_for_tiles(x, None)
