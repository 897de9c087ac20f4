"""One solve as the walk calls it: shapes, order, settings, what it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from marlinctl.quantize.gptq import SolveSettings, round_to_nearest, solve
from marlinctl.quantize.scheme import FP8, INT4, INT8
from marlinctl.quantize.types import Hessian, QuantizedLinear
from tests.quantize.test_solver import hessian

SETTINGS = SolveSettings(
    group_size=32, both_signs=True, bfloat16_exact=False, act_order="static", scale_search="hessian", damping=0.01, refine=1
)


def weight(rows: int = 20, k: int = 128, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(seed)) * 0.03


def output_error(w: torch.Tensor, q: QuantizedLinear, matrix: torch.Tensor) -> float:
    delta = w.double() - q.dequantize(torch.float64)
    return float((delta @ matrix.double() * delta).sum())


@pytest.mark.parametrize("act_order", ["static", "none"])
@pytest.mark.parametrize("group_size", [32, 64, -1])
@pytest.mark.parametrize("refine", [0, 1])
def test_solve_beats_rounding_and_reports_its_true_error(act_order: str, group_size: int, refine: int) -> None:
    """If codes came back in solve order, or scales of the wrong group, the dequantized weight would be far from the weight."""
    w, matrix = weight(), hessian(128, seed=9)
    settings = replace(SETTINGS, act_order=act_order, group_size=group_size, refine=refine)
    solved = solve(w, Hessian(matrix, 384), settings)
    assert solved.linear.group_size == (128 if group_size == -1 else group_size)
    true = output_error(w, solved.linear, matrix)
    assert float(solved.error.sum()) == pytest.approx(true, rel=1e-3)
    assert true < 0.8 * output_error(w, round_to_nearest(w, settings), matrix)
    assert float(solved.output_energy.sum()) == pytest.approx(float((w.double() @ matrix.double() * w.double()).sum()), rel=1e-4)


@pytest.mark.parametrize("refine", [0, 1])
def test_8_bits_lose_what_the_finer_grid_says(refine: int) -> None:
    """If 8-bit codes were clamped to four bits, or their scales were those of four bits, the error would be a hundred times larger."""
    w, matrix = weight(), hessian(128, seed=9)
    coarse, fine = (solve(w, Hessian(matrix, 384), replace(SETTINGS, refine=refine, grid=grid)) for grid in (INT4, INT8))
    assert fine.linear.grid == INT8 and int(fine.linear.codes.max()) > 100 and int(fine.linear.codes.min()) < -100
    true = output_error(w, fine.linear, matrix)
    assert float(fine.error.sum()) == pytest.approx(true, rel=1e-2)
    assert true < 2 * 16**-2 * output_error(w, coarse.linear, matrix), "16 times finer, so 256 times less squared error"


@pytest.mark.parametrize("refine", [0, 1])
def test_fp8_codes_come_from_error_feedback_too(refine: int) -> None:
    """If FP8 columns were rounded to the nearest number alone, the output would lose more than it has to; if the codes were the bits of
    other numbers than the solve used, the error that it reports would not be that of the weight."""
    w, matrix = weight(), hessian(128, seed=9)
    settings = replace(SETTINGS, refine=refine, grid=FP8, group_size=-1, both_signs=False)
    solved = solve(w, Hessian(matrix, 384), settings)
    assert solved.linear.grid == FP8 and bool((solved.linear.scales > 0).all())
    true = output_error(w, solved.linear, matrix)
    assert float(solved.error.sum()) == pytest.approx(true, rel=1e-2)
    assert true < 0.7 * output_error(w, round_to_nearest(w, settings), matrix)


def test_fp8_weights_without_a_hessian_are_the_nearest_ones() -> None:
    """If plain rounding of FP8 went to whole numbers, small weights would be lost."""
    w = weight()
    plain = round_to_nearest(w, replace(SETTINGS, grid=FP8, group_size=-1, both_signs=False))
    listed = [(8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)] + [m * 2.0**-9 for m in range(8)]
    numbers = torch.tensor(sorted({sign * number for number in listed for sign in (1, -1)}), dtype=torch.float64)
    steps = w.double() / plain.scales.double()
    nearest = (steps.unsqueeze(-1) - numbers).abs().amin(-1)
    ours = (plain.dequantize().double() / plain.scales.double() - steps).abs()
    assert float((ours - nearest).abs().max()) < 1e-4, "w / scale is rounded to float32 before"
    assert float(plain.scales.max()) == pytest.approx(float(w.abs().amax(1).max()) / 448, rel=2**-10)


def test_refinement_lowers_the_error() -> None:
    """If refinement did nothing, the recipe would sell time for nothing."""
    w, matrix = weight(rows=64), hessian(128, seed=10)
    plain = solve(w, Hessian(matrix, 384), replace(SETTINGS, refine=0))
    refined = solve(w, Hessian(matrix, 384), replace(SETTINGS, refine=2))
    assert float(refined.error.sum()) < 0.97 * float(plain.error.sum())


def test_stacked_rows_are_solved_as_if_alone() -> None:
    """If rows influenced each other, q, k and v could not share one solve."""
    w, matrix = weight(rows=30), hessian(128, seed=11)
    together = solve(w, Hessian(matrix, 384), SETTINGS).linear
    alone = [solve(part, Hessian(matrix, 384), SETTINGS).linear for part in w.split([7, 23])]
    same = (together.codes == torch.cat([a.codes for a in alone])).float().mean()
    assert same > 0.999  # matrix products of other shapes may round the last bit otherwise, which moves a tie


def test_codes_do_not_depend_on_the_run() -> None:
    """If a solve were not deterministic, a resumed job could not reproduce its files."""
    w, matrix = weight(rows=200), hessian(128, seed=12)
    first, second = (solve(w, Hessian(matrix, 384), SETTINGS).linear for _ in range(2))
    assert torch.equal(first.codes, second.codes) and torch.equal(first.scales, second.scales)


def test_dead_inputs_keep_their_weights_and_are_counted() -> None:
    """If weights of inputs that calibration never saw were zeroed, the model would be edited silently."""
    w, matrix = weight(), hessian(128, seed=13)
    matrix[5], matrix[:, 5] = 0.0, 0.0
    solved = solve(w, Hessian(matrix, 384), SETTINGS)
    assert solved.dead == 1
    assert (solved.linear.dequantize()[:, 5] - w[:, 5]).abs().max() <= solved.linear.scales[:, 0].abs().max() * 1.01


def test_a_kept_mask_is_kept_through_refinement() -> None:
    """If descent revived pruned weights, a 2:4 model would lose its pattern."""
    w, matrix = weight(), hessian(128, seed=14)
    keep = torch.rand(20, 128, generator=torch.Generator().manual_seed(1)) < 0.5
    solved = solve(w * keep, Hessian(matrix, 384), SETTINGS, keep)
    assert not solved.linear.codes[~keep].any()


def test_scales_are_exact_in_bfloat16_when_asked() -> None:
    """If re-fitting forgot the grid of scales, a bfloat16 runtime would compute with other weights."""
    solved = solve(weight(), Hessian(hessian(128, seed=15), 384), replace(SETTINGS, bfloat16_exact=True, refine=2))
    assert torch.equal(solved.linear.scales.to(torch.bfloat16).to(torch.float16), solved.linear.scales)


def test_positive_scales_stay_positive_through_refinement() -> None:
    """If re-fitting flipped a sign, runtimes that asked for positive scales would break."""
    solved = solve(weight(), Hessian(hessian(128, seed=16), 384), replace(SETTINGS, both_signs=False, refine=2))
    assert (solved.linear.scales > 0).all()


@pytest.mark.parametrize(
    ("change", "k", "text"),
    [({"group_size": 48}, 128, "not a multiple of group_size 48"), ({}, 96, "does not fit a Hessian")],
)
def test_shapes_that_do_not_fit_are_refused(change: dict[str, Any], k: int, text: str) -> None:
    """If a wrong group size were accepted, columns would share the scale of a neighbour's group."""
    with pytest.raises(ValueError, match=text):
        solve(weight(k=k), Hessian(hessian(128, seed=17), 384), replace(SETTINGS, **change))


def test_a_hessian_with_nan_is_refused() -> None:
    """If NaN reached the factorisation, the ladder would hide it behind a diagonal fallback."""
    matrix = hessian(128, seed=18)
    matrix[3, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        solve(weight(), Hessian(matrix, 384), SETTINGS)


def test_an_input_that_nothing_reached_is_rounded_and_reported() -> None:
    """If an expert without a token were solved with a zero Hessian, its scales would be arbitrary."""
    w = weight()
    solved = solve(w, Hessian(torch.zeros(128, 128), 0), SETTINGS)
    assert solved.fallback is not None and "plain rounding" in solved.fallback
    assert torch.equal(solved.linear.codes, round_to_nearest(w, SETTINGS).codes)
    assert (solved.linear.dequantize() - w).norm() / w.norm() < 0.15
