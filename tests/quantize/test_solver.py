"""The column solver against GPTQ as its paper writes it, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from marlinctl.quantize.solver import COLUMN_BLOCK, COLUMN_RUN, factor, sweep
from marlinctl.quantize.types import CODE_MAX, CODE_MIN


def hessian(k: int, seed: int, tokens: int | None = None) -> Tensor:
    """[K, K] float32 of correlated inputs with a few loud channels, as language models have them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens or 3 * k, k, generator=generator, dtype=torch.float64)
    x = x + 0.7 * torch.randn(x.shape[0], 1, generator=generator, dtype=torch.float64)
    x[:, ::17] *= 8.0
    return (x.T @ x / x.shape[0]).float()


def paper_gptq(weight: Tensor, matrix: Tensor, damping: float, scales: Tensor, group_of: torch.Tensor) -> Tensor:
    """arXiv 2210.17323, algorithm 1, with the upper Cholesky factor of the inverse Hessian. weight [R, K] -> codes [R, K], all float64."""
    w, h = weight.double().clone(), matrix.double().clone()
    h.diagonal().add_(damping * h.diagonal().mean())
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    codes = torch.empty_like(w)
    for k in range(w.shape[1]):
        s = scales[group_of[k]].double()
        codes[:, k] = (w[:, k] / s).round().clamp(CODE_MIN, CODE_MAX)
        error = (w[:, k] - codes[:, k] * s) / u[k, k]
        w[:, k:] -= error.unsqueeze(1) * u[k, k:].unsqueeze(0)
    return codes


@pytest.mark.parametrize("k", [COLUMN_RUN - 3, COLUMN_BLOCK, COLUMN_BLOCK + COLUMN_RUN + 1, 3 * COLUMN_BLOCK + 40])
def test_one_factorisation_gives_the_codes_of_the_paper(k: int) -> None:
    """If feedback across runs or column blocks were wrong by one column, codes would differ from GPTQ's own formula."""
    rows, damping = 24, 0.02
    matrix = hessian(k, seed=k)
    weight = torch.randn(rows, k, generator=torch.Generator().manual_seed(1)) * 0.05
    groups = max(1, k // 16)
    group_of = torch.tensor([min(i // 16, groups - 1) for i in range(k)])
    scales = torch.rand(groups, rows, generator=torch.Generator().manual_seed(2)) * 0.01 + 0.01
    scales[::2] *= -1.0
    factored = factor(matrix, damping)
    codes, errors = sweep(weight.T.contiguous(), weight.T.contiguous(), factored.feedback, scales, group_of)
    expected = paper_gptq(weight, matrix, damping, scales, group_of)
    different = (codes.T.double() != expected).float().mean()
    assert different <= 2e-3, f"{different:.2%} of codes differ"  # a tie broken by the last bit of float32 moves a few codes behind it
    assert torch.allclose(errors, weight.T - codes * scales[group_of], atol=1e-7)


def test_factor_is_the_hessian() -> None:
    """If R were not a factor of the damped Hessian, every reported error would be of another problem."""
    matrix = hessian(200, seed=3)
    factored = factor(matrix, 0.01)
    r = factored.feedback.double() * factored.pivots.double()
    damped = matrix.double() + 0.01 * matrix.double().diagonal().mean() * torch.eye(200, dtype=torch.float64)
    assert torch.equal(factored.feedback, factored.feedback.triu())
    assert (r @ r.T - damped).norm() / damped.norm() < 1e-5
    assert factored.fallback is None and factored.damping == 0.01


def test_a_kept_mask_prunes_and_the_rest_makes_up_for_it() -> None:
    """If pruned columns did not feed their whole weight back, a sparse layer would lose what the solver could have saved."""
    matrix = hessian(96, seed=4)
    weight = torch.randn(96, 16, generator=torch.Generator().manual_seed(5)) * 0.05
    keep = torch.rand(96, 16, generator=torch.Generator().manual_seed(6)) < 0.5
    scales = torch.full((1, 16), 0.01)
    factored = factor(matrix, 0.01)
    codes, errors = sweep(weight, weight, factored.feedback, scales, torch.zeros(96, dtype=torch.int64), keep)
    plain = (weight / 0.01).round().clamp(CODE_MIN, CODE_MAX) * keep
    assert not codes[~keep].any()

    def loss(delta: Tensor) -> float:
        return float((delta * (matrix @ delta)).sum())

    assert loss(errors) < 0.85 * loss(weight - plain * 0.01)  # 0.76 here; without feedback it is 1


def test_damping_rises_until_the_matrix_can_be_factored() -> None:
    """If the ladder stopped at its first rung, one indefinite Hessian would end a ten-hour job."""
    matrix = torch.eye(64)
    matrix[0, 1] = matrix[1, 0] = 1.02  # the least eigenvalue is -0.02
    factored = factor(matrix, 0.01)
    assert factored.fallback is None
    assert factored.damping == pytest.approx(0.03)


def test_a_hopeless_matrix_falls_back_to_its_diagonal_and_says_so() -> None:
    """If the fallback were silent, users would ship a layer that was merely rounded."""
    matrix = torch.eye(64)
    matrix[0, 1] = matrix[1, 0] = 5.0
    factored = factor(matrix, 0.01)
    assert factored.fallback is not None and "not positive definite" in factored.fallback
    assert torch.equal(factored.feedback, torch.eye(64))


def test_inputs_that_are_all_zero_fall_back_and_say_so() -> None:
    """If a zero Hessian were factored, the damping would be zero as well and the codes NaN."""
    factored = factor(torch.zeros(32, 32), 0.01)
    assert factored.fallback is not None and "zero" in factored.fallback
    codes, _ = sweep(torch.ones(32, 4), torch.ones(32, 4), factored.feedback, torch.ones(1, 4), torch.zeros(32, dtype=torch.int64))
    assert torch.equal(codes, torch.ones(32, 4))
