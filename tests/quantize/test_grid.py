"""Scales: what they may be, and that the search finds the best of its candidates."""

from __future__ import annotations

import pytest
import torch

from marlinctl.quantize.grid import SMALLEST_SCALE, round_scales, search_scales
from marlinctl.quantize.scheme import INT4, INT8, Grid


def test_scales_survive_float16_and_bfloat16() -> None:
    """If a scale were not exact in both, a runtime that computes in bfloat16 would use other weights than were solved for."""
    scales = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 4, 10_000)
    rounded = round_scales(scales, bfloat16_exact=True)
    assert torch.equal(rounded.to(torch.float16).float(), rounded)
    assert torch.equal(rounded.to(torch.bfloat16).float(), rounded)
    usual = rounded.abs() > SMALLEST_SCALE
    assert ((rounded - scales).abs()[usual] <= scales.abs()[usual] * 2**-8).all()


def test_float16_scales_keep_all_their_digits() -> None:
    """If float16 models got bfloat16 scales, three digits of every scale would be lost for nothing."""
    scales = torch.linspace(0.001, 0.1, 999)
    assert torch.equal(round_scales(scales, bfloat16_exact=False), scales.to(torch.float16).float())


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-9, -1e-9, 1e9, -1e9])
def test_extreme_scales_stay_finite_and_usable(value: float) -> None:
    """If a group of zeros got scale 0, or a huge group infinity, dequantizing would give NaN."""
    for exact in (False, True):
        rounded = float(round_scales(torch.tensor([value]), exact))
        assert SMALLEST_SCALE <= abs(rounded) <= 65504.0
        assert (rounded < 0) == (value < 0 or str(value) == "-0.0")


@pytest.mark.parametrize("grid", [INT4, INT8], ids=str)
@pytest.mark.parametrize("both_signs", [True, False])
def test_search_finds_the_best_candidate(both_signs: bool, grid: Grid) -> None:
    """If the search kept a worse scale than one it tried, the error of every layer would rise."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(7, 96, generator=generator)
    importance = torch.rand(96, generator=generator) * 5
    ratios = (1.0, 0.9, 0.7)
    found = search_scales(weight, importance, group_size=32, both_signs=both_signs, bfloat16_exact=False, ratios=ratios, grid=grid)
    lowest, highest = -(2 ** (grid.bits - 1)), 2 ** (grid.bits - 1) - 1

    def error(row: int, group: int, scale: float) -> float:
        part = slice(32 * group, 32 * group + 32)
        w = weight[row, part].double()
        q = (w / scale).round().clamp(lowest, highest) * scale
        return float(((w - q) ** 2 * importance[part].double()).sum())

    for row in range(7):
        for group in range(3):
            w = weight[row, 32 * group : 32 * group + 32]
            peak = float(w[w.abs().argmax()])
            starts = [peak / lowest, peak / (highest + 0.5)] if both_signs else [abs(peak) / (highest + 0.5)]
            candidates = [float(torch.tensor(s * r).half()) for s in starts for r in ratios]
            best = min(error(row, group, c) for c in candidates)
            assert error(row, group, float(found[row, group])) <= best * 1.001


def test_positive_scales_are_positive() -> None:
    """If --scale-sign positive let one negative scale through, the runtimes that need it would compute nonsense."""
    weight = -torch.rand(5, 64)
    found = search_scales(weight, None, group_size=64, both_signs=False, bfloat16_exact=False, ratios=(1.0, 0.8))
    assert (found > 0).all()


def test_another_scale_must_promise_more_than_the_margin() -> None:
    """If any small gain counted, scales would clip weights for errors that later columns make up for (docs/log/2026-11-21-drift.md)."""
    weight = torch.randn(50, 64, generator=torch.Generator().manual_seed(4))

    def errors(s: torch.Tensor) -> torch.Tensor:
        return ((weight / s).round().clamp(-8, 7) * s - weight).square().sum(1)

    def search(margin: float) -> torch.Tensor:
        ratios = (0.9, 0.8, 0.7)
        return search_scales(weight, None, group_size=64, both_signs=False, bfloat16_exact=False, ratios=ratios, margin=margin)

    covering, free, strict = search(0.999), search(0.0), search(0.2)
    assert torch.allclose(covering[:, 0], weight.abs().amax(1) / 7.5, rtol=1e-3)
    moved = strict != covering
    assert bool(moved.any()) and bool((free != covering).sum() > moved.sum())
    assert bool((errors(strict)[moved[:, 0]] < 0.8 * errors(covering)[moved[:, 0]] * 1.001).all())
