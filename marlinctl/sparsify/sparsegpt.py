"""2:4 pruning of linears that share an input, alone or together with int4.

    magnitude   the two largest |w| of each four                                      the simplest baseline
    wanda       the two largest |w| sqrt(H_kk)             (Sun et al., arXiv 2306.11695)
    sparsegpt   the column sweep of GPTQ with another projection: the two largest |w'_k R_kk| of weights that already compensate for those
                pruned before them                         (Frantar and Alistarh, arXiv 2301.00774)
    iterative   sparsegpt, then sweeps over the groups of four that change the mask, then least squares on the kept weights (masked_ls.py)

With int4, `sparsegpt` decides and rounds in one pass, as its paper does; the others prune first and quantize the kept weights afterwards:

    W ─► mask, V on the mask ─► scales of the kept weights ─► masked GPTQ of V ─► descent and re-fit toward W, restricted to the mask

The second way costs two more sweeps and leaves a fraction of the error, because the target of every step is W itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from marlinctl.quantize.damping import Damping, damping_of
from marlinctl.quantize.gptq import Solved, SolveSettings, solve_many, static_scales
from marlinctl.quantize.refine import layer_error
from marlinctl.quantize.solver import factor, factor_stack, ridges
from marlinctl.quantize.stacks import apart, choose, stacked, take_rows
from marlinctl.quantize.stacks import diagonal as diagonal_of
from marlinctl.quantize.types import Hessian
from marlinctl.sparsify.mask import two_largest
from marlinctl.sparsify.masked_ls import masked_least_squares
from marlinctl.sparsify.memory import ROWS_TOGETHER
from marlinctl.sparsify.steps import TORCH, PruneSteps
from marlinctl.sparsify.types import QUAD, SparseQuantizedLinear


@dataclass(frozen=True, slots=True)
class PruneSettings:
    """Settings of the mask search and of the kept weights. The recipe has the defaults (recipes/schema.py)."""

    method: str  # "magnitude", "wanda", "sparsegpt" or "iterative"
    damping: Damping  # fraction of mean(diag H); None: by the tokens per input
    mask_sweeps: int  # of `iterative`
    iterations: int  # of least squares, of `iterative`


@dataclass(frozen=True, slots=True)
class Pruned:
    """The stacked rows with two weights kept in each four."""

    weight: Tensor  # [R, K] float32, zero where pruned
    mask: Tensor  # [R, K] bool
    error: Tensor  # [R] float64: δ H δᵀ of each row, with the undamped H
    output_energy: Tensor  # [R] float64: w H wᵀ of each row
    damping: float
    fallback: str | None
    dead: int  # columns whose input was zero in all of calibration; pruned first


def prune(weight: Tensor, hessian: Hessian, settings: PruneSettings, steps: PruneSteps = TORCH) -> Pruned:
    """Prune stacked rows [R, K] float32 that share one input. ValueError where K is not a multiple of four or the Hessian is not finite."""
    _check(weight, hessian)
    matrix = hessian.matrix
    diagonal = matrix.diagonal().clone()
    factored = factor(matrix, damping_of(settings.damping, hessian))
    ridge = factored.damping * float(matrix.diagonal().mean())
    found = _prune(weight, matrix, diagonal, factored.feedback, factored.pivots, ridge, settings, steps, improves=factored.fallback is None)
    return Pruned(*found, factored.damping, factored.fallback, int((diagonal == 0).sum()))


def prune_many(weights: Tensor, hessians: Sequence[Hessian], settings: PruneSettings, steps: PruneSteps = TORCH) -> list[Pruned]:
    """`prune` of stacks [E, R, K], each with a Hessian of its own; at once where `quantize.gptq.solve_many` does so."""

    def alone(e: int) -> Pruned:
        return prune(weights[e], hessians[e], settings, steps)

    if not steps.stacks or len(hessians) == 1:
        return [alone(e) for e in range(len(hessians))]
    _check(weights[0], hessians[0])
    matrices = torch.stack([hessian.matrix for hessian in hessians])
    diagonals = diagonal_of(matrices).clone()
    dampings = [damping_of(settings.damping, hessian) for hessian in hessians]
    ridge_of = ridges(diagonals, dampings)
    feedback, pivots, good = factor_stack(matrices, dampings)
    dead = (diagonals == 0).sum(-1).tolist()

    def together(chosen: Sequence[int]) -> list[Pruned]:
        weight, matrix, diagonal, fed_back, pivot, ridge = (
            choose(all_, chosen) for all_ in (weights, matrices, diagonals, feedback, pivots, ridge_of)
        )
        found = _prune(weight, matrix, diagonal, fed_back, pivot, ridge, settings, steps, improves=True)
        return [
            Pruned(pruned, mask, error, energy, dampings[e], None, dead[e])
            for e, pruned, mask, error, energy in zip(chosen, *found, strict=True)
        ]

    return apart(good.tolist(), together, alone)


def prune_and_quantize(
    weight: Tensor, hessian: Hessian, pruning: PruneSettings, settings: SolveSettings, steps: PruneSteps = TORCH
) -> tuple[Solved, Tensor]:
    """The joint 2:4 + int4 solve. Returns the solve, whose linear is a SparseQuantizedLinear, and the mask [R, K]."""
    return prune_and_quantize_many(weight.unsqueeze(0), [hessian], pruning, settings, steps)[0]


def prune_and_quantize_many(
    weights: Tensor, hessians: Sequence[Hessian], pruning: PruneSettings, settings: SolveSettings, steps: PruneSteps = TORCH
) -> list[tuple[Solved, Tensor]]:
    """`prune_and_quantize` of stacks [E, R, K], each with a Hessian of its own; at once where `quantize.gptq.solve_many` does so."""
    if pruning.method == "sparsegpt":
        return _one_pass_many(weights, hessians, pruning, settings, steps)
    pruned = prune_many(weights, hessians, pruning, steps)
    values, masks = (stacked([getattr(one, what) for one in pruned]) for what in ("weight", "mask"))
    return solve_pruned_many(values, masks, hessians, settings, originals=weights, steps=steps)


def solve_pruned_many(
    weights: Tensor,
    masks: Tensor,
    hessians: Sequence[Hessian],
    settings: SolveSettings,
    originals: Tensor | None = None,
    steps: PruneSteps = TORCH,
) -> list[tuple[Solved, Tensor]]:
    """Quantize pruned rows: scales, rounding, descent and re-fit on the kept weights. weights: [E, R, K], zero where pruned."""
    solved = solve_many(weights, hessians, settings, masks, originals, steps)
    return [(_with_mask(one, mask), mask) for one, mask in zip(solved, masks, strict=True)]


def fit_mask(weight: Tensor, mask: Tensor, hessian: Hessian, settings: PruneSettings) -> Tensor:
    """The weights on a given mask that come closest to `weight` [R, K] float32 in the Hessian's metric. Returns [R, K]."""
    factored = factor(hessian.matrix, damping_of(settings.damping, hessian))
    if factored.fallback is not None:
        return weight * mask
    damped = _damped(hessian.matrix, factored.damping * float(hessian.matrix.diagonal().mean()))
    parts = []
    for rows, kept in zip(torch.split(weight, ROWS_TOGETHER), torch.split(mask, ROWS_TOGETHER), strict=True):
        w, on = rows.T.contiguous(), kept.T.contiguous()
        parts.append(masked_least_squares(w, w * on, on, damped, settings.iterations).T)
    return torch.cat(parts).contiguous()


def _prune(
    weight: Tensor, matrix: Tensor, diagonal: Tensor, feedback: Tensor, pivots: Tensor, ridge: float | Tensor,
    settings: PruneSettings, steps: PruneSteps, *, improves: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Pruned weights and mask [R, K], error and output energy of each row [R] float64. Or stacks [E, ...] of all tensors, ridge [E, 1].

    improves: whether `iterative` may; not where the solver had to fall back to a diagonal Hessian.
    """
    damped = _damped(matrix, ridge)
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for rows in torch.split(weight, ROWS_TOGETHER, dim=-2):
        w = rows.mT.contiguous()  # [K, R]
        values, mask = _start(w, diagonal, feedback, pivots, settings, steps)
        if settings.method == "iterative" and improves:
            for _ in range(settings.mask_sweeps):
                values, mask = steps.improve_mask(w, values, mask, damped)
            values = masked_least_squares(w, values, mask, damped, settings.iterations)
        parts.append((values.mT, mask.mT, layer_error(w - values, matrix).double(), layer_error(w, matrix).double()))
    pruned, kept, error, energy = (
        torch.cat(column, dim=dim).contiguous() for column, dim in zip(zip(*parts, strict=True), (-2, -2, -1, -1), strict=True)
    )
    return pruned, kept, error, energy


def _start(
    w: Tensor, diagonal: Tensor, feedback: Tensor, pivots: Tensor, settings: PruneSettings, steps: PruneSteps
) -> tuple[Tensor, Tensor]:
    """The first mask and the kept weights under it, [K, R] each."""
    if settings.method in ("magnitude", "wanda"):
        score = w.abs() if settings.method == "magnitude" else w.abs() * diagonal.sqrt().unsqueeze(-1)
        mask = two_largest(score)
        return w * mask, mask
    no_groups = torch.zeros(w.shape[:-1], dtype=torch.int64, device=w.device)
    return steps.sparsegpt_sweep(w, _earned(pivots, diagonal), feedback, None, no_groups)


def _one_pass_many(
    weights: Tensor, hessians: Sequence[Hessian], pruning: PruneSettings, settings: SolveSettings, steps: PruneSteps
) -> list[tuple[Solved, Tensor]]:
    """SparseGPT and GPTQ in one sweep: scales are those of the weights that would be kept without any feedback."""

    def alone(e: int) -> tuple[Solved, Tensor]:
        _check(weights[e], hessians[e])
        matrix = hessians[e].matrix
        factored, diagonal = factor(matrix, damping_of(pruning.damping, hessians[e])), matrix.diagonal().clone()
        found = _one_pass(weights[e], matrix, diagonal, factored.feedback, factored.pivots, settings, steps)
        return result(found, factored.damping, factored.fallback, int((diagonal == 0).sum()))

    def result(found: Sequence[Tensor], damping: float, fallback: str | None, dead: int) -> tuple[Solved, Tensor]:
        codes, scales, mask, error, energy = found
        linear = SparseQuantizedLinear(codes, scales, codes.shape[1] // scales.shape[1], mask, grid=settings.grid)
        return Solved(linear, error, energy, damping, fallback, dead), mask

    if not steps.stacks or len(hessians) == 1:
        return [alone(e) for e in range(len(hessians))]
    _check(weights[0], hessians[0])
    matrices = torch.stack([hessian.matrix for hessian in hessians])
    diagonals = diagonal_of(matrices).clone()
    dampings = [damping_of(pruning.damping, hessian) for hessian in hessians]
    feedback, pivots, good = factor_stack(matrices, dampings)
    dead = (diagonals == 0).sum(-1).tolist()

    def together(chosen: Sequence[int]) -> list[tuple[Solved, Tensor]]:
        weight, matrix, diagonal, fed_back, pivot = (choose(all_, chosen) for all_ in (weights, matrices, diagonals, feedback, pivots))
        found = _one_pass(weight, matrix, diagonal, fed_back, pivot, settings, steps)
        return [result(one, dampings[e], None, dead[e]) for e, *one in zip(chosen, *found, strict=True)]

    return apart(good.tolist(), together, alone)


def _one_pass(
    weight: Tensor, matrix: Tensor, diagonal: Tensor, feedback: Tensor, pivots: Tensor, settings: SolveSettings, steps: PruneSteps
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Codes [R, K] int8, scales [R, G] float16, mask [R, K], error and output energy [R] float64. Or stacks [E, ...] of all tensors."""
    k = weight.shape[-1]
    group_size = k if settings.group_size == -1 else settings.group_size
    group_of = (torch.arange(k, device=weight.device) // group_size).expand(diagonal.shape)
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = []
    for rows in torch.split(weight, ROWS_TOGETHER, dim=-2):
        w = rows.mT.contiguous()
        provisional = two_largest(w.abs() * pivots.unsqueeze(-1))
        s = static_scales((w * provisional).mT.contiguous(), diagonal, settings, steps)[0].mT.contiguous()  # [G, R]
        part, mask = steps.sparsegpt_sweep(w, _earned(pivots, diagonal), feedback, s, group_of, grid=settings.grid)
        delta = w - part * take_rows(s, group_of)
        errors = (layer_error(delta, matrix).double(), layer_error(w, matrix).double())
        parts.append((part.mT.to(torch.int8), s.mT.to(torch.float16), mask.mT, *errors))
    codes, scales, kept, error, energy = (
        torch.cat(column, dim=dim).contiguous() for column, dim in zip(zip(*parts, strict=True), (-2, -2, -2, -1, -1), strict=True)
    )
    return codes, scales, kept, error, energy


def _with_mask(solved: Solved, mask: Tensor) -> Solved:
    linear = solved.linear
    return replace(solved, linear=SparseQuantizedLinear(linear.codes, linear.scales, linear.group_size, mask, grid=linear.grid))


def _earned(pivots: Tensor, diagonal: Tensor) -> Tensor:
    """[..., K]: the pivots, 0 for a dead input: damping gives it one that it has not earned."""
    return pivots * (diagonal > 0)


def _check(weight: Tensor, hessian: Hessian) -> None:
    k = weight.shape[1]
    if k % QUAD:
        raise ValueError(f"K={k} is not a multiple of {QUAD}, so it has no 2:4 pattern")
    if tuple(hessian.matrix.shape) != (k, k):
        raise ValueError(f"weight {list(weight.shape)} does not fit a Hessian {list(hessian.matrix.shape)}")
    if not bool(torch.isfinite(hessian.matrix).all()):
        raise ValueError(f"the Hessian of {hessian.tokens} tokens holds NaN or infinity")


def _damped(matrix: Tensor, ridge: float | Tensor) -> Tensor:
    """H with the ridge that made it factorable: bounded from below, so that least squares cannot run away along directions never seen."""
    damped = matrix.clone()
    diagonal_of(damped).add_(ridge)
    return damped
