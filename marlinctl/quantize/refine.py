"""After the solve: coordinate descent on the codes and a closed-form re-fit of the scales.

Both lower tr((W - Q) H (W - Q)ᵀ), the layer error itself, and neither can raise it except by the rounding of a scale, which is checked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from marlinctl.quantize.grid import round_scales
from marlinctl.quantize.integer_fit import fit_to_codes
from marlinctl.quantize.products import mm
from marlinctl.quantize.scheme import INT4, Grid
from marlinctl.quantize.stacks import diagonal as diagonal_of
from marlinctl.quantize.stacks import take_both, take_rows
from marlinctl.quantize.steps import TORCH, Sweep


def layer_error(delta: Tensor, matrix: Tensor) -> Tensor:
    """The error δ H δᵀ of each row. delta: [K, R] float32, matrix: [K, K] float32 -> [R] float32. Or stacks [E, ...] of them."""
    return (mm(matrix, delta) * delta).sum(-2)


def descend(
    weight: Tensor,
    codes: Tensor,
    scales: Tensor,
    matrix: Tensor,
    group_of: Tensor,
    mask: Tensor | None = None,
    *,
    sweep: Sweep = TORCH.sweep,
    grid: Grid = INT4,
    zeros: Tensor | None = None,
) -> Tensor:
    """One sweep of coordinate descent: every code in turn takes its best value given all others. Of asymmetric codes their steps do.

    weight, codes: [K, R] float32; scales: [G, R] float32; matrix: [K, K] float32 with a positive diagonal; group_of: [K] int64.
    Returns codes [K, R]. With a `sweep` that takes them, stacks [E, ...] of all these.
    With P = (W - Q) H the best value of column k is q_k + P_k / H_kk, and a change d_i = q_i(old) - q_i(new) of an earlier column adds
    d_i H_ik to P_k: the solver's sweep with anchor q and feedback H / diag(H).
    """
    current = codes * take_rows(scales, group_of)
    diagonal = diagonal_of(matrix)
    base = mm(matrix, weight - current).div_(diagonal.unsqueeze(-1)).add_(current)
    codes, _ = sweep(base, current, matrix / diagonal.unsqueeze(-2), scales, group_of, mask, grid=grid, zeros=zeros)
    return codes


def refit_scales(
    weight: Tensor,
    codes: Tensor,
    scales: Tensor,
    matrix: Tensor,
    group_of: Tensor,
    *,
    positive: bool,
    bfloat16_exact: bool,
    integer: bool = False,
) -> Tensor:
    """The scales that minimise the layer error for fixed codes, row by row: a G x G least-squares system, G = number of groups.

    Σ_h (c_g H_gh c_hᵀ) s_h = c_g H_g: wᵀ. Rows whose rounded solution is not better keep their scales.
    integer: scales are small integers times one number for each row (integer_scales.py), before and after.
    weight, codes: [K, R]; scales: [G, R]; matrix: [K, K]; all float32. Returns scales [G, R]. Or stacks [E, ...] of all these.
    """
    *stack, groups, rows = scales.shape
    order = torch.argsort(group_of, dim=-1, stable=True)
    c, h = take_rows(codes, order), take_both(matrix, order)
    size = c.shape[-2] // groups
    right = mm(h, take_rows(weight, order)).mul_(c).reshape(*stack, groups, size, rows).sum(-2)  # [G, R]
    normal = torch.empty(*stack, rows, groups, groups, dtype=torch.float32, device=codes.device)
    for g in range(groups):
        part = slice(g * size, (g + 1) * size)
        product = mm(h[..., part], c[..., part, :], short=True).mul_(c).reshape(*stack, groups, size, rows).sum(-2)  # [G, R]: c_h H_hg c_g
        normal[..., g] = product.mT

    def error(s: Tensor) -> Tensor:
        """[R]: the layer error of scales [G, R] up to w H wᵀ, which does not depend on them."""
        column = s.mT.unsqueeze(-1)  # [R, G, 1]
        return (column.mT @ (normal @ column)).reshape(*stack, rows) - 2.0 * (right * s).sum(-2)

    before = error(scales)
    ridge = 1e-6 * diagonal_of(normal).mean(-1, keepdim=True) + torch.finfo(torch.float32).tiny
    damped = normal + torch.diag_embed(ridge.expand(*stack, rows, groups))  # a group of zero codes has no scale of its own
    lower, info = torch.linalg.cholesky_ex(damped)
    solved = torch.cholesky_solve(right.mT.unsqueeze(-1), lower).squeeze(-1).mT  # [G, R]
    usable = (info == 0) & torch.isfinite(solved).all(-2)
    if positive and not integer:  # whose signs stay
        usable &= (solved > 0).all(-2)
    free = torch.where(usable.unsqueeze(-2), solved, scales)
    if integer:
        candidate = fit_to_codes(normal, right.mT, free.mT, scales.mT, bfloat16_exact).mT
    else:
        candidate = round_scales(free, bfloat16_exact)
    return torch.where((usable & (error(candidate) < before)).unsqueeze(-2), candidate, scales)
