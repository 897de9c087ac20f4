"""Descent and re-fit: each lowers the layer error, and each agrees with the textbook."""

from __future__ import annotations

import torch

from marlinctl.quantize.refine import descend, layer_error, refit_scales
from marlinctl.quantize.solver import factor, sweep
from tests.quantize.test_solver import hessian


def start(k: int = 160, rows: int = 12, group: int = 32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    matrix = hessian(k, seed=8)
    weight = torch.randn(k, rows, generator=generator) * 0.05
    scales = weight.abs().reshape(k // group, group, rows).amax(1) / 7.5
    group_of = torch.randperm(k, generator=generator) // group
    codes, _ = sweep(weight, weight, factor(matrix, 0.01).feedback, scales, group_of)
    return weight, codes, scales, matrix, group_of


def error(weight: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, matrix: torch.Tensor, group_of: torch.Tensor) -> torch.Tensor:
    return layer_error((weight - codes * scales[group_of]).double(), matrix.double())


def test_descent_never_raises_the_error() -> None:
    """If a sweep used stale products, it would move codes away from their best values."""
    weight, codes, scales, matrix, group_of = start()
    before = error(weight, codes, scales, matrix, group_of)
    for _ in range(4):
        codes = descend(weight, codes, scales, matrix, group_of)
        after = error(weight, codes, scales, matrix, group_of)
        assert (after <= before * (1 + 1e-5)).all()
        before = after


def test_descent_ends_where_no_single_code_can_improve() -> None:
    """If feedback within a sweep were wrong, the fixed point would not be a minimum of the layer error."""
    weight, codes, scales, matrix, group_of = start(k=64, rows=3)
    for _ in range(60):
        codes = descend(weight, codes, scales, matrix, group_of)
    best = error(weight, codes, scales, matrix, group_of)
    for k in range(64):
        for step in (-1.0, 1.0):
            moved = codes.clone()
            moved[k] = (moved[k] + step).clamp(-8, 7)
            assert (error(weight, moved, scales, matrix, group_of) >= best * (1 - 1e-4)).all(), k


def test_refit_is_least_squares() -> None:
    """If the normal equations mixed up groups, re-fitted scales would not be those of a float64 least-squares fit."""
    weight, codes, scales, matrix, group_of = start()
    root = torch.linalg.cholesky(matrix.double()).T  # H = rootᵀ root
    fitted = refit_scales(weight, codes, scales, matrix, group_of, positive=False, bfloat16_exact=False)
    for row in range(weight.shape[1]):
        columns = [root @ (codes[:, row].double() * (group_of == g)) for g in range(scales.shape[0])]
        expected = torch.linalg.lstsq(torch.stack(columns, 1), (root @ weight[:, row].double()).unsqueeze(1)).solution.squeeze(1)
        assert torch.allclose(fitted[:, row].double(), expected, rtol=2e-3), row


def test_refit_never_raises_the_error() -> None:
    """If rows whose rounded scales are worse were taken all the same, refinement could make a layer worse."""
    weight, codes, scales, matrix, group_of = start()
    before = error(weight, codes, scales, matrix, group_of)
    for positive in (False, True):
        fitted = refit_scales(weight, codes, scales, matrix, group_of, positive=positive, bfloat16_exact=True)
        assert (error(weight, codes, fitted, matrix, group_of) <= before * (1 + 1e-5)).all()
        assert not positive or (fitted > 0).all()


def test_a_group_of_zero_codes_keeps_a_usable_scale() -> None:
    """If a group whose codes are all zero made the system singular, its row would get NaN scales."""
    weight, codes, scales, matrix, group_of = start()
    codes[group_of == 2] = 0.0
    fitted = refit_scales(weight, codes, scales, matrix, group_of, positive=False, bfloat16_exact=False)
    assert torch.isfinite(fitted).all() and (fitted != 0).all()
