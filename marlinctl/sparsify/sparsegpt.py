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

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from marlinctl.quantize.gptq import Solved, SolveSettings, solve, static_scales
from marlinctl.quantize.refine import layer_error
from marlinctl.quantize.solver import Factor, factor
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
    damping: float  # fraction of mean(diag H)
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
    factored = factor(matrix, settings.damping)
    damped = _damped(matrix, factored)
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for rows in torch.split(weight, ROWS_TOGETHER):
        w = rows.T.contiguous()  # [K, R]
        values, mask = _start(w, diagonal, factored, settings, steps)
        if settings.method == "iterative" and factored.fallback is None:
            for _ in range(settings.mask_sweeps):
                values, mask = steps.improve_mask(w, values, mask, damped)
            values = masked_least_squares(w, values, mask, damped, settings.iterations)
        parts.append((values.T, mask.T, layer_error(w - values, matrix).double(), layer_error(w, matrix).double()))
    pruned, mask, error, energy = (torch.cat(column).contiguous() for column in zip(*parts, strict=True))
    return Pruned(pruned, mask, error, energy, factored.damping, factored.fallback, int((diagonal == 0).sum()))


def prune_and_quantize(
    weight: Tensor, hessian: Hessian, pruning: PruneSettings, settings: SolveSettings, steps: PruneSteps = TORCH
) -> tuple[Solved, Tensor]:
    """The joint 2:4 + int4 solve. Returns the solve, whose linear is a SparseQuantizedLinear, and the mask [R, K]."""
    if pruning.method == "sparsegpt":
        return _one_pass(weight, hessian, pruning, settings, steps)
    pruned = prune(weight, hessian, pruning, steps)
    return solve_pruned(pruned.weight, pruned.mask, hessian, settings, original=weight, steps=steps)


def solve_pruned(
    weight: Tensor,
    mask: Tensor,
    hessian: Hessian,
    settings: SolveSettings,
    original: Tensor | None = None,
    steps: PruneSteps = TORCH,
) -> tuple[Solved, Tensor]:
    """Quantize pruned rows: scales, rounding, descent and re-fit on the kept weights. weight: [R, K], zero where pruned."""
    solved = solve(weight, hessian, settings, mask, original, steps)
    linear = solved.linear
    return replace(solved, linear=SparseQuantizedLinear(linear.codes, linear.scales, linear.group_size, mask)), mask


def fit_mask(weight: Tensor, mask: Tensor, hessian: Hessian, settings: PruneSettings) -> Tensor:
    """The weights on a given mask that come closest to `weight` [R, K] float32 in the Hessian's metric. Returns [R, K]."""
    factored = factor(hessian.matrix, settings.damping)
    if factored.fallback is not None:
        return weight * mask
    damped = _damped(hessian.matrix, factored)
    parts = []
    for rows, kept in zip(torch.split(weight, ROWS_TOGETHER), torch.split(mask, ROWS_TOGETHER), strict=True):
        w, on = rows.T.contiguous(), kept.T.contiguous()
        parts.append(masked_least_squares(w, w * on, on, damped, settings.iterations).T)
    return torch.cat(parts).contiguous()


def _start(w: Tensor, diagonal: Tensor, factored: Factor, settings: PruneSettings, steps: PruneSteps) -> tuple[Tensor, Tensor]:
    """The first mask and the kept weights under it, [K, R] each."""
    if settings.method in ("magnitude", "wanda"):
        score = w.abs() if settings.method == "magnitude" else w.abs() * diagonal.sqrt().unsqueeze(1)
        mask = two_largest(score)
        return w * mask, mask
    no_groups = torch.zeros(len(w), dtype=torch.int64, device=w.device)
    return steps.sparsegpt_sweep(w, _earned(factored, diagonal), factored.feedback, None, no_groups)


def _one_pass(
    weight: Tensor, hessian: Hessian, pruning: PruneSettings, settings: SolveSettings, steps: PruneSteps
) -> tuple[Solved, Tensor]:
    """SparseGPT and GPTQ in one sweep: scales are those of the weights that would be kept without any feedback."""
    _check(weight, hessian)
    k = weight.shape[1]
    matrix, diagonal = hessian.matrix, hessian.matrix.diagonal().clone()
    factored = factor(matrix, pruning.damping)
    group_size = k if settings.group_size == -1 else settings.group_size
    group_of = torch.arange(k, device=weight.device) // group_size
    codes, kept, scales, errors, energies = [], [], [], [], []
    for rows in torch.split(weight, ROWS_TOGETHER):
        w = rows.T.contiguous()
        provisional = two_largest(w.abs() * factored.pivots.unsqueeze(1))
        s = static_scales((w * provisional).T.contiguous(), diagonal, settings, steps).T.contiguous()  # [G, R]
        part, mask = steps.sparsegpt_sweep(w, _earned(factored, diagonal), factored.feedback, s, group_of)
        delta = w - part * s[group_of]
        codes.append(part.T.to(torch.int8))
        kept.append(mask.T)
        scales.append(s.T.to(torch.float16))
        errors.append(layer_error(delta, matrix).double())
        energies.append(layer_error(w, matrix).double())
    mask = torch.cat(kept).contiguous()
    linear = SparseQuantizedLinear(torch.cat(codes).contiguous(), torch.cat(scales).contiguous(), group_size, mask)
    dead = int((diagonal == 0).sum())
    return Solved(linear, torch.cat(errors), torch.cat(energies), factored.damping, factored.fallback, dead), mask


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
