"""Asymmetric codes: ranges and zeros are the best of their candidates, and a solve gives what its codes mean."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from marlinctl.quantize.affine import search_ranges
from marlinctl.quantize.gptq import round_to_nearest, solve
from marlinctl.quantize.grid import round_scales
from marlinctl.quantize.scheme import INT4, UINT4
from marlinctl.quantize.types import Hessian, QuantizedLinear
from tests.quantize.test_gptq import SETTINGS, output_error, weight
from tests.quantize.test_solver import hessian

ASYMMETRIC = replace(SETTINGS, grid=UINT4)


def test_the_search_finds_the_best_candidate() -> None:
    """If the search kept a worse range than one it tried, or another zero than the nearest, the error of every layer would rise."""
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(7, 96, generator=generator) + torch.randn(7, 1, generator=generator)
    importance = torch.rand(96, generator=generator) * 5
    ratios = (1.0, 0.9, 0.7)
    scales, zeros = search_ranges(w, importance, group_size=32, bfloat16_exact=False, ratios=ratios, margin=0.0, grid=UINT4)

    def error(values: torch.Tensor, h: torch.Tensor, scale: float, zero: float) -> float:
        codes = ((values / scale).round() + zero).clamp(-8, 7)
        return float(((values - (codes - zero) * scale) ** 2 * h).sum())

    for row in range(7):
        for group in range(3):
            part = slice(32 * group, 32 * group + 32)
            values, h = w[row, part].double(), importance[part].double()
            low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
            candidates = []
            for ratio in ratios:
                scale = float(torch.tensor((high - low) * ratio / 15).half())
                candidates.append((scale, min(max(round(-8 - low * ratio / scale), -8), 7)))
            best = min(error(values, h, *candidate) for candidate in candidates)
            assert error(values, h, float(scales[row, group]), float(zeros[row, group])) <= best * 1.001


@pytest.mark.parametrize("values", [torch.zeros(1, 32), torch.linspace(0.1, 0.2, 32)[None], -torch.linspace(0.1, 0.2, 32)[None]])
def test_one_sided_and_empty_groups_have_a_grid(values: torch.Tensor) -> None:
    """If a group of zeros divided by zero, or a one-sided one had a zero outside of its codes, dequantizing would give NaN or noise."""
    linear = round_to_nearest(values, ASYMMETRIC)
    assert torch.equal(linear.scales.float(), round_scales(linear.scales.float(), False))
    assert (linear.dequantize() - values).abs().max() <= 0.5 * float(linear.scales.abs().max()) + 1e-6
    assert int(linear.zeros.min()) >= -8 and int(linear.zeros.max()) <= 7  # type: ignore[union-attr]


@pytest.mark.parametrize("act_order", ["static", "none"])
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("refine", [0, 2])
def test_a_solve_reports_the_error_of_its_codes(act_order: str, group_size: int, refine: int) -> None:
    """If zeros were those of another group, were taken off twice or rounded away, the dequantized weight would be far from the weight."""
    w, matrix = weight() + 0.02, hessian(128, seed=9)
    settings = replace(ASYMMETRIC, act_order=act_order, group_size=group_size, refine=refine)
    solved = solve(w, Hessian(matrix, 384), settings)
    true = output_error(w, solved.linear, matrix)
    assert float(solved.error.sum()) == pytest.approx(true, rel=1e-3)
    assert true < 0.8 * output_error(w, round_to_nearest(w, settings), matrix)
    one_sided = output_error(w, solve(w, Hessian(matrix, 384), replace(settings, grid=INT4)).linear, matrix)
    assert true < 0.9 * one_sided, "the weights lean to one side"
    assert bool((solved.linear.scales > 0).all()), "a negative scale would turn the range around"


def test_zeros_are_part_of_the_grid() -> None:
    """If zeros could be left out, or lie outside of the codes, a format could not store them."""
    codes, scales = torch.zeros(4, 32, dtype=torch.int8), torch.ones(4, 1, dtype=torch.float16)
    for zeros, grid, says in (
        (None, UINT4, "asymmetric 4-bit codes have zeros"),
        (torch.zeros(4, 1, dtype=torch.int8), INT4, "4-bit codes have no zeros"),
        (torch.full((4, 1), 8, dtype=torch.int8), UINT4, "zeros lie in 8..8"),
        (torch.zeros(4, 2, dtype=torch.int8), UINT4, "zeros must be int8"),
    ):
        with pytest.raises(ValueError, match=says):
            QuantizedLinear(codes, scales, 32, grid=grid, zeros=zeros)
