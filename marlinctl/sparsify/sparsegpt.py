"""2:4 pruning of linears that share an input, alone or together with int4.

    magnitude   the two largest |w| of each four                                      the baseline of baselines
    wanda       the two largest |w| sqrt(H_kk)             (Sun et al., arXiv 2306.11695)
    sparsegpt   the column sweep of GPTQ with another projection: the two largest |w'_k R_kk| of weights that already make up for what was
                pruned before them                         (Frantar and Alistarh, arXiv 2301.00774)
    refined     sparsegpt, then sweeps over the quads that change the mask, then least squares on the survivors (masked_ls.py)

With int4, `sparsegpt` decides and rounds in one pass, as its paper does; the others prune first and quantize the survivors afterwards:

    W ─► mask, V on the mask ─► scales of the survivors ─► masked GPTQ of V ─► descent and re-fit towards W, restricted to the mask

The second road costs two sweeps more and leaves a fraction of the error, because every step aims at W itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from marlinctl.quantize.gptq import Solved, SolveSettings, solve, static_scales
from marlinctl.quantize.refine import layer_error
from marlinctl.quantize.solver import Factor, factor
from marlinctl.quantize.types import Hessian
from marlinctl.sparsify.keep import best_of_quads
from marlinctl.sparsify.masked_ls import masked_least_squares
from marlinctl.sparsify.steps import TORCH, PruneSteps
from marlinctl.sparsify.types import QUAD, SparseQuantizedLinear

_ROWS = 8192  # solved together: least squares holds six matrices [K, rows]


@dataclass(frozen=True, slots=True)
class PruneSettings:
    """What decides the mask and the survivors. The recipe has the defaults (recipes/schema.py)."""

    method: str  # "magnitude", "wanda", "sparsegpt" or "refined"
    damping: float  # fraction of mean(diag H)
    mask_sweeps: int  # of `refined`
    iterations: int  # of least squares, of `refined`


@dataclass(frozen=True, slots=True)
class Pruned:
    """The stacked rows with two survivors in each four."""

    weight: Tensor  # [R, K] float32, zero where pruned
    keep: Tensor  # [R, K] bool
    error: Tensor  # [R] float64: δ H δᵀ of each row, with the undamped H
    energy: Tensor  # [R] float64: w H wᵀ of each row
    damping: float
    fallback: str | None
    dead: int  # columns whose input was zero in all of calibration; pruned first


def prune(weight: Tensor, hessian: Hessian, settings: PruneSettings, steps: PruneSteps = TORCH) -> Pruned:
    """Prune stacked rows [R, K] float32 that share one input. ValueError where K is no multiple of four or the Hessian is not finite."""
    _check(weight, hessian)
    matrix = hessian.matrix
    diagonal = matrix.diagonal().clone()
    factored = factor(matrix, settings.damping)
    damped = _damped(matrix, factored)
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for rows in torch.split(weight, _ROWS):
        w = rows.T.contiguous()  # [K, R]
        values, keep = _start(w, diagonal, factored, settings, steps)
        if settings.method == "refined" and factored.fallback is None:
            for _ in range(settings.mask_sweeps):
                values, keep = steps.improve_mask(w, values, keep, damped)
            values = masked_least_squares(w, values, keep, damped, settings.iterations)
        parts.append((values.T, keep.T, layer_error(w - values, matrix).double(), layer_error(w, matrix).double()))
    pruned, keep, error, energy = (torch.cat(column).contiguous() for column in zip(*parts, strict=True))
    return Pruned(pruned, keep, error, energy, factored.damping, factored.fallback, int((diagonal == 0).sum()))


def prune_and_quantize(
    weight: Tensor, hessian: Hessian, pruning: PruneSettings, settings: SolveSettings, steps: PruneSteps = TORCH
) -> tuple[Solved, Tensor]:
    """The joint 2:4 + int4 solve. Returns the solve, whose linear is a SparseQuantizedLinear, and keep [R, K]."""
    if pruning.method == "sparsegpt":
        return _one_pass(weight, hessian, pruning, settings, steps)
    pruned = prune(weight, hessian, pruning, steps)
    return solve_pruned(pruned.weight, pruned.keep, hessian, settings, original=weight, steps=steps)


def solve_pruned(
    weight: Tensor,
    keep: Tensor,
    hessian: Hessian,
    settings: SolveSettings,
    original: Tensor | None = None,
    steps: PruneSteps = TORCH,
) -> tuple[Solved, Tensor]:
    """Quantize rows that are pruned already: scales, rounding, descent and re-fit on the survivors. weight: [R, K], zero where not kept."""
    solved = solve(weight, hessian, settings, keep, original, steps)
    linear = solved.linear
    return replace(solved, linear=SparseQuantizedLinear(linear.codes, linear.scales, linear.group_size, keep)), keep


def fit_mask(weight: Tensor, keep: Tensor, hessian: Hessian, settings: PruneSettings) -> Tensor:
    """The weights on a given mask that come closest to `weight` [R, K] float32 in the Hessian's metric. Returns [R, K]."""
    factored = factor(hessian.matrix, settings.damping)
    if factored.fallback is not None:
        return weight * keep
    damped = _damped(hessian.matrix, factored)
    parts = []
    for rows, kept in zip(torch.split(weight, _ROWS), torch.split(keep, _ROWS), strict=True):
        w, mask = rows.T.contiguous(), kept.T.contiguous()
        parts.append(masked_least_squares(w, w * mask, mask, damped, settings.iterations).T)
    return torch.cat(parts).contiguous()


def _start(w: Tensor, diagonal: Tensor, factored: Factor, settings: PruneSettings, steps: PruneSteps) -> tuple[Tensor, Tensor]:
    """The first mask and what the survivors are under it, [K, R] each."""
    if settings.method in ("magnitude", "wanda"):
        score = w.abs() if settings.method == "magnitude" else w.abs() * diagonal.sqrt().unsqueeze(1)
        keep = best_of_quads(score)
        return w * keep, keep
    no_groups = torch.zeros(len(w), dtype=torch.int64, device=w.device)
    return steps.sparsegpt_sweep(w, _earned(factored, diagonal), factored.feedback, None, no_groups)


def _one_pass(
    weight: Tensor, hessian: Hessian, pruning: PruneSettings, settings: SolveSettings, steps: PruneSteps
) -> tuple[Solved, Tensor]:
    """SparseGPT and GPTQ in one sweep: scales are those of the weights that would survive without any feedback."""
    _check(weight, hessian)
    k = weight.shape[1]
    matrix, diagonal = hessian.matrix, hessian.matrix.diagonal().clone()
    factored = factor(matrix, pruning.damping)
    group_size = k if settings.group_size == -1 else settings.group_size
    group_of = torch.arange(k, device=weight.device) // group_size
    codes, kept, scales, errors, energies = [], [], [], [], []
    for rows in torch.split(weight, _ROWS):
        w = rows.T.contiguous()
        provisional = best_of_quads(w.abs() * factored.pivots.unsqueeze(1))
        s = static_scales((w * provisional).T.contiguous(), diagonal, settings, steps).T.contiguous()  # [G, R]
        part, keep = steps.sparsegpt_sweep(w, _earned(factored, diagonal), factored.feedback, s, group_of)
        delta = w - part * s[group_of]
        codes.append(part.T.to(torch.int8))
        kept.append(keep.T)
        scales.append(s.T.to(torch.float16))
        errors.append(layer_error(delta, matrix).double())
        energies.append(layer_error(w, matrix).double())
    keep = torch.cat(kept).contiguous()
    linear = SparseQuantizedLinear(torch.cat(codes).contiguous(), torch.cat(scales).contiguous(), group_size, keep)
    dead = int((diagonal == 0).sum())
    return Solved(linear, torch.cat(errors), torch.cat(energies), factored.damping, factored.fallback, dead), keep


def _earned(factored: Factor, diagonal: Tensor) -> Tensor:
    """[K]: the pivots, 0 for a dead input: damping gives it one that it has not earned."""
    return factored.pivots * (diagonal > 0)


def _check(weight: Tensor, hessian: Hessian) -> None:
    k = weight.shape[1]
    if k % QUAD:
        raise ValueError(f"K={k} is not a multiple of {QUAD}, so it has no 2:4 pattern")
    if tuple(hessian.matrix.shape) != (k, k):
        raise ValueError(f"weight {list(weight.shape)} does not fit a Hessian {list(hessian.matrix.shape)}")
    if not bool(torch.isfinite(hessian.matrix).all()):
        raise ValueError(f"the Hessian of {hessian.tokens} tokens holds NaN or infinity")


def _damped(matrix: Tensor, factored: Factor) -> Tensor:
    """H with the ridge that made it factorable: bounded from below, so that least squares cannot run away along directions never seen."""
    damped = matrix.clone()
    damped.diagonal().add_(factored.damping * float(matrix.diagonal().mean()))
    return damped
