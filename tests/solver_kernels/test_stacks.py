"""Stacks of problems, as the experts of a block are: the kernels on the software GPU, and whole solves, each against one problem alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from marlinctl.quantize.drift import DriftSettings, corrected_stack, corrected_target
from marlinctl.quantize.gptq import SEARCH_MARGIN, SEARCH_RATIOS, Solved, solve, solve_many
from marlinctl.quantize.grid import search_scales
from marlinctl.quantize.integer_fit import has_form
from marlinctl.quantize.solver import factor, factor_stack
from marlinctl.quantize.types import Hessian
from marlinctl.solver_kernels.steps import SolverKernels
from marlinctl.sparsify.mask import two_largest
from marlinctl.sparsify.masked_ls import improve_mask
from marlinctl.sparsify.sparsegpt import PruneSettings, prune, prune_and_quantize, prune_and_quantize_many, prune_many
from marlinctl.sparsify.types import check_mask
from tests.quantize.test_solver import hessian
from tests.solver_kernels.software import install
from tests.solver_kernels.test_steps import SETTINGS, check_sweep, noting

E, K, ROWS = 3, 204, 150  # K fills no block of columns or run of 32, and the rows of a problem no CTA
DAMPING = 0.01


def problems() -> tuple[Tensor, Tensor]:
    """Weights [E, K, R] and matrices [E, K, K], all different."""
    weights = torch.randn(E, K, ROWS, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 0.1, 3.0]).reshape(E, 1, 1)
    return weights, torch.stack([hessian(K, seed) for seed in range(E)])


@pytest.mark.parametrize("gathered", [128, 256, 1024])
def test_feedback_is_the_same_however_many_columns_are_gathered_at_once(
    gathered: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this failed, wide linears, whose columns are gathered in several steps, would lose or count twice the feedback of some of them."""
    k = 460
    w = torch.randn(2, k, 40, generator=torch.Generator().manual_seed(0))
    feedback, _, _ = factor_stack(torch.stack([hessian(k, seed) for seed in range(2)]), [DAMPING] * 2)
    monkeypatch.setattr("marlinctl.solver_kernels.steps._GATHERED", gathered)
    kernels = install(monkeypatch, tmp_path)
    group_of = torch.arange(k).expand(2, -1) // 115
    scales = torch.full((2, 4, 40), 0.3)
    for several in (True, False):
        parts = (slice(None),) if several else (0, 1)
        for part in parts:
            codes, errors = kernels.sweep(w[part], w[part], feedback[part], scales[part], group_of[part])
            for e in range(2) if several else (part,):
                one = (codes[e], errors[e]) if several else (codes, errors)
                check_sweep(w[e], w[e], feedback[e], scales[e], group_of[e], None, one)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("mask", ["none", "given", "chosen"])
@pytest.mark.parametrize("rounds", [False, True])
def test_each_problem_is_swept_with_its_own_feedback(
    rounds: bool, mask: str, backwards: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If an expert got the feedback, order, scales or mask of its neighbour, it would be rounded for other inputs than its own."""
    w, matrices = problems()
    feedback, pivots, good = factor_stack(matrices, [DAMPING] * len(matrices))
    assert bool(good.all())
    order = torch.stack([torch.randperm(K, generator=torch.Generator().manual_seed(e)) for e in range(E)])
    group_of = order // 68
    how: dict[str, Any] = {"group_size": 68, "both_signs": True, "bfloat16_exact": True, "ratios": (1.0,)}
    scales = torch.stack([search_scales(one.T.contiguous(), None, **how).T for one in w]).contiguous() if rounds else None
    kernels = install(monkeypatch, tmp_path, backwards=backwards)
    keep: Tensor | None
    if mask == "chosen":
        seen: dict[str, Tensor] = {}
        monkeypatch.setattr(SolverKernels, "_sweep", noting(SolverKernels._sweep, seen))
        codes, keep = kernels.sparsegpt_sweep(w, pivots, feedback, scales, group_of)
        errors, base = seen["errors"], w
        for kept in keep:
            check_mask(kept.T.contiguous())
    else:
        keep = torch.stack([two_largest(one.abs()) for one in w]) if mask == "given" else None
        base = w + 0.01 * w.flip(1)
        codes, errors = kernels.sweep(base, w, feedback, scales, group_of, keep)
    for e in range(E):
        kept, s = None if keep is None else keep[e], None if scales is None else scales[e]
        check_sweep(base[e], w[e], feedback[e], s, group_of[e], kept, (codes[e], errors[e]))
    if mask == "chosen":
        assert keep is not None
        for e in range(E):
            _, alone = kernels.sparsegpt_sweep(w[e], pivots[e], feedback[e], None if scales is None else scales[e], group_of[e])
            assert float((alone == keep[e]).float().mean()) > 0.99, e


@pytest.mark.parametrize("backwards", [False, True])
def test_each_mask_is_improved_with_its_own_matrix(backwards: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, masks of experts would be refined towards the outputs of other experts."""
    w, matrices = problems()
    matrices.diagonal(dim1=1, dim2=2).add_(0.01 * matrices.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True))
    keep = two_largest(w.abs())
    values, better = install(monkeypatch, tmp_path, backwards=backwards).improve_mask(w, w * keep, keep, matrices)
    for e in range(E):
        expected, mask = improve_mask(w[e], w[e] * keep[e], keep[e], matrices[e])
        check_mask(better[e].T.contiguous())
        same = (better[e] == mask).all(0)
        assert float(same.float().mean()) > 0.98, e
        assert torch.allclose(values[e][:, same], expected[:, same], atol=1e-3), e


@pytest.mark.parametrize("weighed", [False, True])
def test_each_group_is_searched_with_its_own_importance(weighed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, scales of an expert would follow the inputs of another one."""
    w = problems()[0].mT.contiguous()
    importance = torch.rand(E, K, generator=torch.Generator().manual_seed(4)) ** 4 if weighed else None
    how: dict[str, Any] = {"group_size": 68, "both_signs": True, "bfloat16_exact": True, "ratios": SEARCH_RATIOS, "margin": SEARCH_MARGIN}
    found = install(monkeypatch, tmp_path).search_scales(w, importance, **how)
    for e in range(E):
        expected = search_scales(w[e], None if importance is None else importance[e], **how)
        assert float((found[e] == expected).float().mean()) > 0.995, e


def uneven() -> tuple[Tensor, list[Hessian]]:
    """Weights [5, R, K], and Hessians: good, not positive definite with the first damping, with a dead input, of zeros, good."""
    k = 192
    weights = torch.randn(5, ROWS, k, generator=torch.Generator().manual_seed(1))
    matrices = [hessian(k, seed) for seed in range(5)]
    matrices[1] = hessian(k, 7, tokens=k // 2)
    matrices[1].diagonal().sub_(1.5 * DAMPING * matrices[1].diagonal().mean())
    matrices[2][5], matrices[2][:, 5] = 0.0, 0.0
    matrices[3].zero_()
    return weights, [Hessian(matrix, 100 + e) for e, matrix in enumerate(matrices)]


def check_equal(found: Solved, expected: Solved, e: int) -> None:
    assert (found.damping, found.fallback, found.dead) == (expected.damping, expected.fallback, expected.dead), e
    assert float((found.linear.scales == expected.linear.scales).float().mean()) > 0.98, e
    assert float((found.linear.codes == expected.linear.codes).float().mean()) > 0.98, e
    assert float(found.error.sum()) == pytest.approx(float(expected.error.sum()), rel=2e-3), e
    assert torch.allclose(found.output_energy, expected.output_energy, rtol=1e-5), e


@pytest.mark.parametrize(
    ("refine", "act_order", "integer"),
    [
        pytest.param(0, "static", False, marks=pytest.mark.slow),
        (2, "static", False),
        (0, "none", False),
        pytest.param(2, "none", False, marks=pytest.mark.slow),
        pytest.param(2, "static", True),
    ],
)
def test_solving_many_is_solving_each(refine: int, act_order: str, integer: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If one expert's damping, dead inputs or error came to another one, the report would be wrong and codes with it."""
    weights, hessians = uneven()
    settings = replace(SETTINGS, refine=refine, act_order=act_order, integer_scales=integer)
    kernels = install(monkeypatch, tmp_path).steps()
    many = solve_many(weights, hessians, settings, steps=kernels)
    alone = [solve(weight, one, settings, steps=kernels) for weight, one in zip(weights, hessians, strict=True)]
    assert [solved.damping for solved in alone] == [DAMPING, 3 * DAMPING, DAMPING, DAMPING, DAMPING], "the second one needs more damping"
    assert alone[3].fallback is not None and alone[2].dead == 1
    for e in range(len(alone)):
        check_equal(many[e], alone[e], e)
        assert not integer or has_form(many[e].linear.scales), e
    others = solve_many(weights[[0, 2, 4]], [hessians[e] for e in (0, 2, 4)], settings, steps=kernels)
    for e, solved in zip((0, 2, 4), others, strict=True):
        assert torch.equal(solved.linear.codes, many[e].linear.codes), "the others are as if the singular one were not there"


def test_without_kernels_each_is_solved_by_itself() -> None:
    """If a CPU solved experts in another way than before, published bytes would change."""
    weights, hessians = uneven()
    for found, weight, one in zip(solve_many(weights, hessians, SETTINGS), weights, hessians, strict=True):
        expected = solve(weight, one, SETTINGS)
        assert torch.equal(found.linear.codes, expected.linear.codes) and torch.equal(found.error, expected.error)


@pytest.mark.parametrize("method", ["wanda", pytest.param("sparsegpt", marks=pytest.mark.slow), "iterative"])  # which starts with it
def test_pruning_many_is_pruning_each(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, experts would be pruned worse on a GPU than other linears."""
    weights, hessians = uneven()
    pruning = PruneSettings(method=method, damping=DAMPING, mask_sweeps=1, iterations=5)
    kernels = install(monkeypatch, tmp_path).steps()
    for e, (found, weight, one) in enumerate(zip(prune_many(weights, hessians, pruning, kernels), weights, hessians, strict=True)):
        expected = prune(weight, one, pruning, kernels)
        check_mask(found.mask)
        assert (found.damping, found.fallback, found.dead) == (expected.damping, expected.fallback, expected.dead), e
        assert float((found.mask == expected.mask).float().mean()) > 0.98, e
        assert float(found.error.sum()) == pytest.approx(float(expected.error.sum()), rel=2e-3), e
    joint = prune_and_quantize_many(weights, hessians, pruning, SETTINGS, kernels)
    for e, ((solved, keep), weight, one) in enumerate(zip(joint, weights, hessians, strict=True)):
        reference, _ = prune_and_quantize(weight, one, pruning, SETTINGS, kernels)
        check_mask(keep)
        assert (solved.damping, solved.fallback, solved.dead) == (reference.damping, reference.fallback, reference.dead), e
        assert float(solved.error.sum()) == pytest.approx(float(reference.error.sum()), rel=5e-3), e


def test_a_stack_is_factored_as_each_matrix() -> None:
    """If this failed, experts would be solved with another damping than the report says."""
    _, hessians = uneven()
    feedback, pivots, good = factor_stack(torch.stack([one.matrix for one in hessians]), [DAMPING] * len(hessians))
    assert good.tolist() == [True, False, True, False, True]
    for e in (0, 2, 4):
        expected = factor(hessians[e].matrix, DAMPING)
        assert torch.allclose(torch.triu(feedback[e]), torch.triu(expected.feedback), atol=1e-5)
        assert torch.allclose(pivots[e], expected.pivots, rtol=1e-5)


def test_a_stack_of_targets_is_that_of_each() -> None:
    """If this failed, drift of experts would be corrected otherwise than that of other linears."""
    weights, hessians = uneven()
    k = weights.shape[2]
    drifts = 0.1 * torch.randn(len(weights), k, k, generator=torch.Generator().manual_seed(2))
    hessians = [replace(one, drift=drift) for one, drift in zip(hessians, drifts, strict=True)]
    found = corrected_stack(weights, hessians, DriftSettings(0.5, DAMPING))
    for e, (weight, one) in enumerate(zip(weights, hessians, strict=True)):
        expected = corrected_target(weight, one, DriftSettings(0.5, DAMPING))
        assert torch.allclose(found[e], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())), e
    assert torch.equal(found[3], weights[3]), "a Hessian of zeros corrects nothing"


@pytest.mark.parametrize(
    "line",
    [
        "    target += place_in.problem * target_columns * rows;\n",
        "    anchor += before * rows;\n",
        "    feedback += before * k_total;\n",
        "        scales += place_in.problem * groups * rows;\n",
        "        group_of += before;\n",
        "    if (MASK != 0) keep += before * rows;\n",
    ],
)
def test_the_software_gpu_sees_a_neighbours_array(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, the test of the sweep could not fail."""
    w, matrices = problems()
    feedback, _, _ = factor_stack(matrices, [DAMPING] * len(matrices))
    group_of = torch.stack([torch.randperm(K, generator=torch.Generator().manual_seed(e)) for e in range(E)]) // 68
    how: dict[str, Any] = {"group_size": 68, "both_signs": True, "bfloat16_exact": True, "ratios": (1.0,)}
    scales = torch.stack([search_scales(one.T.contiguous(), None, **how).T for one in w]).contiguous()
    keep = torch.stack([two_largest(one.abs()) for one in w])
    hits: list[int] = []

    def edit(text: str) -> str:
        hits.append(text.count(line))
        return text.replace(line, "")

    codes, errors = install(monkeypatch, tmp_path, edit=edit).sweep(w, w, feedback, scales, group_of, keep)
    assert sum(hits) == 1
    check_sweep(w[0], w[0], feedback[0], scales[0], group_of[0], keep[0], (codes[0], errors[0]))  # nothing is before the first
    with pytest.raises(AssertionError):
        check_sweep(w[1], w[1], feedback[1], scales[1], group_of[1], keep[1], (codes[1], errors[1]))
