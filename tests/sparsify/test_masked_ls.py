"""Least squares on the kept weights and the search for better kept weights, against exact solutions in float64."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from marlinctl.sparsify.mask import two_largest
from marlinctl.sparsify.masked_ls import improve_mask, masked_least_squares
from marlinctl.sparsify.types import check_mask
from tests.quantize.test_solver import hessian


def problem(k: int = 64, rows: int = 12, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """weight [K, R], damped matrix, magnitude mask [K, R]."""
    matrix = hessian(k, seed)
    matrix.diagonal().add_(0.01 * matrix.diagonal().mean())
    weight = torch.randn(k, rows, generator=torch.Generator().manual_seed(seed + 1))
    return weight, matrix, two_largest(weight.abs())


def losses(weight: Tensor, values: Tensor, matrix: Tensor) -> Tensor:
    delta = (weight - values).double()
    return (delta * (matrix.double() @ delta)).sum(0)


def exact(weight: Tensor, keep: Tensor, matrix: Tensor) -> Tensor:
    """Each row's least-squares solution on its kept weights, by solving its own system in float64."""
    out = torch.zeros_like(weight, dtype=torch.float64)
    h = matrix.double()
    for r in range(weight.shape[1]):
        s = keep[:, r].nonzero().squeeze(1)
        out[s, r] = torch.linalg.solve(h[s][:, s], h[s] @ weight[:, r].double())
    return out


def test_conjugate_gradients_reach_the_exact_solution() -> None:
    """If the iteration left the mask or stopped short, the kept weights would not make up for what was pruned."""
    weight, matrix, keep = problem()
    values = masked_least_squares(weight, weight * keep, keep, matrix, 200)
    assert not values[~keep].any()
    assert torch.allclose(values.double(), exact(weight, keep, matrix), atol=2e-4)


def test_each_iteration_lowers_the_error_and_twenty_are_nearly_enough() -> None:
    weight, matrix, keep = problem(seed=3)
    best = losses(weight, exact(weight, keep, matrix), matrix).sum()
    found = [
        float(losses(weight, masked_least_squares(weight, weight * keep, keep, matrix, n), matrix).sum() / best) for n in (0, 2, 5, 20)
    ]
    assert found == sorted(found, reverse=True)
    assert found[-1] < 1.01


def test_rows_without_an_error_stay_as_they_are() -> None:
    """0/0 in a converged row would fill it with NaN."""
    weight, matrix, keep = problem(seed=4)
    weight[:, 3] = weight[:, 3] * keep[:, 3]
    weight[:, 5] = 0.0
    values = masked_least_squares(weight, weight * keep, keep, matrix, 50)
    assert bool(values.isfinite().all())
    assert torch.allclose(values[:, 3], weight[:, 3], atol=1e-6)
    assert not values[:, 5].any()


def test_a_sweep_never_raises_the_error_and_keeps_two_of_four() -> None:
    weight, matrix, keep = problem(k=160, rows=40, seed=5)
    values, before = weight * keep, losses(weight, weight * keep, matrix)
    for _ in range(3):
        values, keep = improve_mask(weight, values, keep, matrix)
        after = losses(weight, values, matrix)
        check_mask(keep.T.contiguous())
        assert not values[~keep].any()
        assert bool((after <= before * (1 + 1e-5)).all())
        before = after


def test_a_quad_takes_the_best_of_its_six_pairs() -> None:
    """With a single quad there is nothing else to optimise: the result must be the best of six small least squares."""
    weight, matrix, _ = problem(k=4, rows=50, seed=6)
    start = torch.tensor([False, False, True, True]).unsqueeze(1).expand(4, 50)
    values, keep = improve_mask(weight, weight * start, start, matrix)
    candidates = []
    for pair in combinations(range(4), 2):
        mask = torch.zeros(4, 50, dtype=torch.bool)
        mask[list(pair)] = True
        candidates.append(losses(weight, exact(weight, mask, matrix), matrix))
    best = torch.stack(candidates).amin(0)
    assert torch.allclose(losses(weight, values, matrix), best, rtol=1e-4, atol=1e-7)
    assert bool((keep.sum(0) == 2).all())


def test_a_pair_that_is_as_good_stays() -> None:
    """If ties moved the mask, two machines would publish different ones, and sweeps would never settle."""
    keep = torch.tensor([False, True, False, True]).repeat(4).unsqueeze(1).expand(16, 3)
    weight = torch.zeros(16, 3)
    _, after = improve_mask(weight, weight, keep, torch.eye(16))
    assert torch.equal(after, keep)


@pytest.mark.parametrize("seed", range(3))
def test_sweeps_find_a_better_mask_than_magnitude_with_exact_values(seed: int) -> None:
    """If the mask never changed, sweeps would be least squares only."""
    weight, matrix, keep = problem(k=96, rows=32, seed=10 + seed)
    values, better = weight * keep, keep
    for _ in range(4):
        values, better = improve_mask(weight, values, better, matrix)
    assert losses(weight, values, matrix).sum() < 0.9 * losses(weight, exact(weight, keep, matrix), matrix).sum()
    assert not torch.equal(keep, better)
