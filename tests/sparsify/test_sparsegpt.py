"""2:4 pruning against SparseGPT as its paper writes it, and the promises of the joint solve."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from marlinctl.quantize.gptq import SolveSettings
from marlinctl.quantize.types import Hessian
from marlinctl.sparsify.mask import two_of_four
from marlinctl.sparsify.sparsegpt import PruneSettings, prune, prune_and_quantize, solve_pruned_many
from marlinctl.sparsify.types import SparseQuantizedLinear, check_mask
from tests.quantize.test_solver import hessian

PRUNING = PruneSettings(method="iterative", damping=0.01, mask_sweeps=3, iterations=20)
SETTINGS = SolveSettings(
    group_size=32, both_signs=True, bfloat16_exact=False, act_order="static", scale_search="hessian", damping=0.01, refine=2
)
METHODS = ("magnitude", "wanda", "sparsegpt", "iterative")


def weight(rows: int = 24, k: int = 160, seed: int = 0) -> Tensor:
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(seed)) * 0.03


def paper_sparsegpt(w: Tensor, matrix: Tensor, damping: float) -> Tensor:
    """arXiv 2301.00774, algorithm 1 for 2:4, with the upper Cholesky factor of the inverse Hessian, float64. [R, K] -> [R, K]."""
    w, h = w.double().clone(), matrix.double().clone()
    h.diagonal().add_(damping * h.diagonal().mean())
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    keep = torch.zeros_like(w, dtype=torch.bool)
    for k in range(w.shape[1]):
        if k % 4 == 0:
            score = (w[:, k : k + 4] / u.diagonal()[k : k + 4]) ** 2
            keep[:, k : k + 4] = torch.zeros_like(score, dtype=torch.bool).scatter(1, score.topk(2, dim=1).indices, True)
        error = torch.where(keep[:, k], 0.0, w[:, k]) / u[k, k]
        w[:, k:] -= error.unsqueeze(1) * u[k, k:].unsqueeze(0)
    return w * keep


def loss(w: Tensor, v: Tensor, matrix: Tensor) -> float:
    delta = (w - v).double()
    return float((delta @ matrix.double() * delta).sum())


def test_the_sweep_prunes_as_the_paper_does() -> None:
    """If the mask were chosen from weights that miss some feedback, it would not be SparseGPT's."""
    w, matrix = weight(rows=40, k=300), hessian(300, seed=1)
    pruned = prune(w, Hessian(matrix, 900), replace(PRUNING, method="sparsegpt", damping=0.02))
    expected = paper_sparsegpt(w, matrix, 0.02)
    assert ((expected != 0) == (pruned.weight != 0)).float().mean() > 0.999  # a near tie moves a pair and what follows it
    assert (pruned.weight - expected).norm() / expected.norm() < 2e-2


@pytest.mark.parametrize("method", METHODS)
def test_exactly_two_of_four_survive_and_the_error_is_the_true_one(method: str) -> None:
    """If a quad kept three, or the reported error were of another weight, nothing downstream could be trusted."""
    w, matrix = weight(), hessian(160, seed=2)
    pruned = prune(w, Hessian(matrix, 480), replace(PRUNING, method=method))
    check_mask(pruned.mask)
    assert not pruned.weight[~pruned.mask].any()
    assert float(pruned.error.sum()) == pytest.approx(loss(w, pruned.weight, matrix), rel=1e-3)
    assert float(pruned.output_energy.sum()) == pytest.approx(loss(w, torch.zeros_like(w), matrix), rel=1e-3)


def test_each_method_is_better_than_the_one_before() -> None:
    """If refinement did not pay, the default would sell time for nothing."""
    w, matrix = weight(rows=64), hessian(160, seed=3)
    losses = [loss(w, prune(w, Hessian(matrix, 480), replace(PRUNING, method=m)).weight, matrix) for m in METHODS]
    assert losses == sorted(losses, reverse=True)


def test_magnitude_and_wanda_keep_their_weights_as_they_are() -> None:
    """If a baseline were quietly improved, comparisons with it would lie."""
    w, matrix = weight(), hessian(160, seed=4)
    for method in ("magnitude", "wanda"):
        pruned = prune(w, Hessian(matrix, 480), replace(PRUNING, method=method))
        assert torch.equal(pruned.weight[pruned.mask], w[pruned.mask])
    diagonal = matrix.diagonal().sqrt()
    quads = (w.abs() * diagonal).reshape(w.shape[0], -1, 4)
    assert torch.equal(pruned.mask.reshape(quads.shape).sort(-1).values, torch.tensor([False, False, True, True]).expand(quads.shape))
    lowest_kept = quads.masked_fill(~pruned.mask.reshape(quads.shape), torch.inf).amin(-1)
    assert (lowest_kept >= quads.masked_fill(pruned.mask.reshape(quads.shape), 0.0).amax(-1)).all()


def test_ties_go_to_the_lower_columns() -> None:
    """If ties fell as the machine likes, two runs could publish different masks."""
    pruned = prune(torch.ones(3, 16), Hessian(torch.eye(16), 100), replace(PRUNING, method="sparsegpt"))
    assert torch.equal(pruned.mask, torch.tensor([True, True, False, False]).repeat(3, 4))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("group_size", [32, -1])
def test_the_joint_solve_gives_codes_with_their_mask(method: str, group_size: int) -> None:
    """If a pruned weight got a code, or the error were not that of the codes, packing would lose weights or the report would lie."""
    w, matrix = weight(), hessian(160, seed=5)
    pruning, settings = replace(PRUNING, method=method), replace(SETTINGS, group_size=group_size)
    solved, keep = prune_and_quantize(w, Hessian(matrix, 480), pruning, settings)
    assert isinstance(solved.linear, SparseQuantizedLinear)
    assert torch.equal(solved.linear.keep, keep)
    assert float(solved.error.sum()) == pytest.approx(loss(w, solved.linear.dequantize(), matrix), rel=1e-3)


def test_aiming_at_the_original_leaves_half_the_error_of_one_pass() -> None:
    """If descent aimed at the pruned weights, it could not repair what pruning did."""
    w, matrix = weight(rows=64), hessian(160, seed=6, tokens=200)
    one_pass, _ = prune_and_quantize(w, Hessian(matrix, 200), replace(PRUNING, method="sparsegpt"), SETTINGS)
    refined, _ = prune_and_quantize(w, Hessian(matrix, 200), PRUNING, SETTINGS)
    assert float(refined.error.sum()) < 0.85 * float(one_pass.error.sum())


def test_a_survivor_that_rounds_to_zero_stays_a_survivor() -> None:
    """If the mask were taken from the codes, a tiny survivor would lose its place to another column."""
    w, matrix = weight(), hessian(160, seed=7)
    keep = torch.tensor([True, True, False, False]).repeat(24, 40)
    tiny = (w * keep).clone()
    tiny[:, 0::4] *= 1e-6
    ((solved, kept),) = solve_pruned_many(tiny.unsqueeze(0), keep.unsqueeze(0), [Hessian(matrix, 480)], replace(SETTINGS, refine=0))
    assert isinstance(solved.linear, SparseQuantizedLinear)
    zero_kept = (solved.linear.codes == 0) & solved.linear.keep
    assert bool(zero_kept.any())
    assert torch.equal(kept, keep)
    refound = two_of_four(solved.linear.codes)
    assert refound is not None  # the zeros still fit 2:4, so only the mask that travels says which of them survived


def test_code_minus_eight_survives() -> None:
    """-8 is nibble 0: packers that look for zeros after adding 8 lose it."""
    w, matrix = weight(rows=200), hessian(160, seed=8)
    solved, _ = prune_and_quantize(w, Hessian(matrix, 480), PRUNING, SETTINGS)
    assert isinstance(solved.linear, SparseQuantizedLinear)
    at_the_end = solved.linear.codes == -8
    assert bool(at_the_end.any())
    assert bool(solved.linear.keep[at_the_end].all())


def test_rows_are_solved_as_if_alone() -> None:
    """If rows influenced each other, stacking linears that share an input would change them."""
    w, matrix = weight(rows=30), hessian(160, seed=9)
    together = prune(w, Hessian(matrix, 480), PRUNING)
    alone = [prune(part, Hessian(matrix, 480), PRUNING) for part in w.split([11, 19])]
    assert (together.mask == torch.cat([a.mask for a in alone])).float().mean() > 0.998


def test_inputs_that_were_never_seen_are_pruned_first() -> None:
    """If a dead input kept its weight, a live one would be pruned for it."""
    w, matrix = weight(), hessian(160, seed=10)
    matrix[5], matrix[:, 5] = 0.0, 0.0
    pruned = prune(w, Hessian(matrix, 480), replace(PRUNING, method="sparsegpt"))
    assert pruned.dead == 1
    assert not pruned.mask[:, 5].any()


def test_a_hopeless_hessian_falls_back_and_says_so() -> None:
    """If least squares ran on an indefinite matrix, weights would explode without a word."""
    matrix = torch.eye(160)
    matrix[0, 1] = matrix[1, 0] = 5.0
    pruned = prune(weight(), Hessian(matrix, 10), PRUNING)
    assert pruned.fallback is not None
    check_mask(pruned.mask)
    assert pruned.weight.abs().max() <= weight().abs().max()


@pytest.mark.parametrize(
    ("k", "matrix", "message"),
    [(158, hessian(158, 1), "multiple of 4"), (160, hessian(96, 1), "does not fit"), (160, torch.full((160, 160), torch.nan), "NaN")],
)
def test_what_cannot_be_pruned_is_refused(k: int, matrix: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prune(weight(k=k), Hessian(matrix, 10), PRUNING)
