"""Targets with drift correction, against the regression they stand for, solved in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from marlinctl.quantize.drift import DriftSettings, corrected_target
from marlinctl.quantize.types import Hessian


def drifted(tokens: int = 3000, k: int = 40, n: int = 24) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [T, K] of the compressed model, x' of the original, r' - r [T, N], weight [N, K]; all float64."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    original = normal(tokens, k) @ normal(k, k)
    x = 0.9 * original + 0.3 * normal(tokens, k)
    return x, original, 0.5 * normal(tokens, n) + x @ normal(k, n) * 0.1, normal(n, k)


def statistics(x: Tensor, original: Tensor, residual: Tensor | None) -> Hessian:
    count = x.shape[0]
    r = None if residual is None else (x.T @ residual / count).float()
    return Hessian((x.T @ x / count).float(), count, (x.T @ (original - x) / count).float(), r)


@pytest.mark.parametrize("with_residual", [True, False])
def test_share_one_is_the_least_squares_fit_of_the_original_output(with_residual: bool) -> None:
    """If drift were transposed or added with the wrong sign, every block would push the model further away."""
    x, original, residual, weight = drifted()
    target = original @ weight.T + (residual if with_residual else 0.0)
    expected = torch.linalg.lstsq(x, target).solution.T
    found = corrected_target(weight.float(), statistics(x, original, residual if with_residual else None), DriftSettings(1.0, 1e-8))
    assert (found.double() - expected).norm() / expected.norm() < 1e-3


def test_a_share_goes_that_part_of_the_way() -> None:
    x, original, residual, weight = drifted()
    hessian = statistics(x, original, residual)
    whole, half = (corrected_target(weight.float(), hessian, DriftSettings(share, 0.01)) for share in (1.0, 0.5))
    assert torch.allclose(half, (weight.float() + whole) / 2, atol=1e-5)


def test_the_error_against_the_target_is_the_hessian_form() -> None:
    """If E|W x' + (r' - r) - V x|² were not (W* - V) H (W* - V)ᵀ plus a constant, solving for W* would have another optimum."""
    x, original, residual, weight = drifted()
    hessian = statistics(x, original, residual)
    best = corrected_target(weight.float(), hessian, DriftSettings(1.0, 1e-8)).double()
    target = original @ weight.T + residual

    def true(v: Tensor) -> float:
        return float((target - x @ v.T).square().sum() / len(x))

    for scale in (0.0, 0.1, 1.0):
        v = weight + scale * torch.randn(weight.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        form = float(((best - v) @ hessian.matrix.double() * (best - v)).sum())
        assert true(v) - true(best) == pytest.approx(form, rel=1e-2)


def test_without_drift_the_weight_is_untouched() -> None:
    weight = torch.randn(8, 16)
    assert corrected_target(weight, Hessian(torch.eye(16), 10), DriftSettings(1.0, 0.01)) is weight
    assert torch.allclose(corrected_target(weight, Hessian(torch.eye(16), 10, torch.zeros(16, 16)), DriftSettings(1.0, 0.01)), weight)


def test_a_hessian_that_cannot_be_factored_leaves_the_weight() -> None:
    """Half a solve would write NaN into a layer."""
    weight = torch.randn(8, 16)
    assert corrected_target(weight, Hessian(torch.zeros(16, 16), 10, torch.ones(16, 16)), DriftSettings(1.0, 0.01)) is weight


def test_a_residual_of_other_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        corrected_target(torch.randn(8, 16), Hessian(torch.eye(16), 10, torch.zeros(16, 16), torch.zeros(16, 9)), DriftSettings(0.5, 0.01))
