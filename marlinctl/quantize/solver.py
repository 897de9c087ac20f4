"""The column solver: one factorisation, one sweep over the columns.

GPTQ (Frantar et al., arXiv 2210.17323) rounds column after column and spreads each column's error over the columns that are still free.
With H = R Rᵀ, R upper triangular, and e = w - q, the layer error of a row is

    e H eᵀ = Σ_k R_kk² (e_k + Σ_{i<k} e_i R_ik / R_kk)²

so with the unit upper triangular A = R / diag(R), the rule "round w_k + Σ_{i<k} e_i A_ik" is GPTQ exactly, from a single Cholesky
factorisation and no inverse (the Babai view, arXiv 2507.18553). Coordinate descent after the solve is the same sweep with other inputs
(refine.py), which is why `sweep` takes base, anchor and feedback instead of a weight and a Hessian.

Everything is kept transposed, [K, R]: a column of the weight is then one contiguous row, and a step is vector arithmetic over R outputs.
Sweeps look back: before a column block the errors so far are gathered by one matrix product, so nothing ahead is ever rewritten.

Pruning is the same sweep with another projection: a column that is not kept becomes zero, and without scales the others stay as they are
(SparseGPT, arXiv 2301.00774). Who is kept may be decided on the way (`choose`), from weights that make up for everything before them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from marlinctl.quantize.grid import round_steps_
from marlinctl.quantize.memory import FLOAT64_ABOVE
from marlinctl.quantize.scheme import INT4, Grid
from marlinctl.quantize.stacks import diagonal as diagonal_of

COLUMN_BLOCK = 128  # columns gathered by one product over everything before them
COLUMN_RUN = (
    16  # columns updated among themselves one by one; 16 x R floats stay in the cache. A multiple of 4: a group of four lies in one run
)

_DAMPING_CEILING = 0.3


@dataclass(frozen=True, slots=True)
class Factor:
    """feedback [K, K] float32: unit upper triangular A, columns in solve order. pivots [K] float32: R_kk."""

    feedback: Tensor
    pivots: Tensor
    damping: float  # the fraction of mean(diag H) that was added in the end
    fallback: str | None  # None, or what the solver had to fall back to, for the report


def factor(matrix: Tensor, damping: float) -> Factor:
    """Factor a symmetric matrix [K, K] float32 (in solve order) as R Rᵀ, with a rising damping where it is not positive definite.

    The ladder is damping x 1, 3, 10 (at most 0.3); if no rung holds, the matrix is replaced by its diagonal, which makes the solve
    importance-weighted rounding. The result says which happened. Needs two more K x K matrices in the precision of the factorisation,
    which is float64 where the condition number may pass what float32 pivots bear.
    """
    diagonal = matrix.diagonal()
    mean = float(diagonal.mean())
    if not mean > 0.0:
        return _diagonal_factor(diagonal.clone(), damping, "all inputs are zero")
    for rung in dict.fromkeys(min(damping * step, max(damping, _DAMPING_CEILING)) for step in (1.0, 3.0, 10.0)):
        lower, pivots, good = _cholesky(matrix, rung, rung * mean)
        if bool(good):
            feedback = lower.div_(pivots).float()
            del lower
            return Factor(feedback.flip(0, 1), pivots.flip(0).float(), rung, None)
    return _diagonal_factor(diagonal + damping * mean, damping, "not positive definite")


def factor_stack(matrices: Tensor, dampings: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """The first rung of `factor` for matrices [E, K, K] at once, with a damping for each.

    Returns feedback [E, K, K], pivots [E, K], and for which of them it holds, [E] bool. Those of the others (not positive definite, zero,
    not finite) are arbitrary; `factor` is for them.
    """
    ridge = ridges(diagonal_of(matrices), dampings)
    lower, pivots, good = _cholesky(matrices, min(dampings), ridge)
    feedback = lower.div_(pivots.unsqueeze(-2)).float()
    del lower
    return feedback.flip(-2, -1), pivots.flip(-1).float(), good & (ridge.squeeze(-1) > 0.0)


def ridges(diagonals: Tensor, dampings: Sequence[float]) -> Tensor:
    """What is added to diagonals [E, K] of a stack of matrices, [E, 1] float64. dampings: E fractions of the mean."""
    return torch.tensor(dampings, dtype=torch.float64, device=diagonals.device).unsqueeze(-1) * diagonals.mean(-1, keepdim=True).double()


def _cholesky(matrix: Tensor, damping: float, ridge: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of [..., K, K] plus the ridge, flipped: the triangle, its pivots [..., K], last column first, and whether they are good, [...].

    damping: the smallest that the ridge was made with.
    """
    k = matrix.shape[-1]
    work = matrix.flip(-2, -1).to(torch.float64 if k / damping > FLOAT64_ABOVE else torch.float32)
    diagonal_of(work).add_(ridge)
    lower, info = torch.linalg.cholesky_ex(work)
    pivots = diagonal_of(lower).clone()
    return lower, pivots, (info == 0) & torch.isfinite(pivots).all(-1)


def _diagonal_factor(diagonal: Tensor, damping: float, reason: str) -> Factor:
    k = diagonal.shape[0]
    pivots = diagonal.clamp_min(torch.finfo(torch.float32).tiny).sqrt()
    return Factor(torch.eye(k, dtype=torch.float32, device=diagonal.device), pivots.float(), damping, f"diagonal Hessian: {reason}")


# Called before column k is visited, with the targets of its run from t_k on, [columns, R]: base plus the feedback of the columns before k.
Choose = Callable[[int, Tensor], None]


def sweep(
    base: Tensor,
    anchor: Tensor,
    feedback: Tensor,
    scales: Tensor | None,
    group_of: Tensor,
    mask: Tensor | None = None,
    choose: Choose | None = None,
    grid: Grid = INT4,
    zeros: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Project all columns in order, each with the feedback of those before it.

    For k = 0..K-1:  t_k = base_k + Σ_{i<k} (anchor_i - q_i) feedback_ik ;  code_k = clamp(round(t_k / s_k)) ;  q_k = code_k s_k
    where `round` is to the nearest value of the grid, an integer or a float8_e4m3fn number.

    base, anchor: [K, R] float32. feedback: [K, K] float32, read above the diagonal only. scales: [G, R] float32, none zero;
    group_of: [K] int64, the row of `scales` for each column. Without scales nothing is rounded: q_k = t_k.
    zeros: [G, R] float32, of asymmetric codes; codes are then steps from the zero, so that q_k = code_k s_k holds for them too.
    mask: [K, R] bool or None; where it is False, q is 0. choose: may fill mask[k:] before column k is visited.
    Returns codes (or q, without scales) [K, R] float32 and errors anchor - q, [K, R] float32.
    """
    k_total, rows = base.shape
    if not (base.is_contiguous() and anchor.is_contiguous()):
        raise ValueError("base and anchor must be contiguous [K, R]: a step reads one column as one row")
    codes = torch.empty_like(base)
    errors = torch.empty_like(base)
    target = torch.empty(COLUMN_BLOCK, rows, dtype=base.dtype, device=base.device)
    # Views are made once: a step is a few microseconds of arithmetic, and indexing a tensor costs one each time.
    code_of, error_of, target_of, anchor_of = codes.unbind(0), errors.unbind(0), target.unbind(0), anchor.unbind(0)
    mask_of = None if mask is None else mask.unbind(0)
    steps = None if scales is None else (scales.unbind(0), scales.reciprocal().unbind(0))
    ranges = None if zeros is None else ((grid.lowest - zeros).unbind(0), (grid.highest - zeros).unbind(0))
    group: list[int] = group_of.tolist()
    for start in range(0, k_total, COLUMN_BLOCK):
        stop = min(start + COLUMN_BLOCK, k_total)
        block = target[: stop - start]
        torch.addmm(base[start:stop], feedback[:start, start:stop].T, errors[:start], out=block) if start else block.copy_(base[start:stop])
        for run in range(start, stop, COLUMN_RUN):
            end = min(run + COLUMN_RUN, stop)
            if run > start:
                target[run - start : end - start].addmm_(feedback[start:run, run:end].T, errors[start:run])
            for k in range(run, end):
                if choose is not None:
                    choose(k, target[k - start : end - start])
                code, error = code_of[k], error_of[k]
                if steps is None:
                    code.copy_(target_of[k - start])
                else:
                    torch.mul(target_of[k - start], steps[1][group[k]], out=code)
                    if ranges is None:
                        round_steps_(code, grid)
                    else:
                        torch.clamp(code.round_(), ranges[0][group[k]], ranges[1][group[k]], out=code)
                if mask_of is not None:
                    code.mul_(mask_of[k])
                if steps is None:
                    torch.sub(anchor_of[k], code, out=error)
                else:
                    torch.addcmul(anchor_of[k], code, steps[0][group[k]], value=-1.0, out=error)
                if k + 1 < end:
                    target[k + 1 - start : end - start].addr_(feedback[k, k + 1 : end], error)
    return codes, errors
