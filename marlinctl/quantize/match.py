"""Weights that make up for what went wrong before them.

After a few compressed blocks the inputs x of a linear are no longer the x' of the original model. What the linear should produce is W x', and,
where its output is added to the residual stream r, also the difference r' - r. Both are linear regressions on x:

    W* = W + share · (W E[(x' - x) xᵀ] + E[(r' - r) xᵀ]) (H + ridge)⁻¹        minimises  E |W x' + (r' - r) - W* x|²  at share = 1

and for any V,  E |W x' + (r' - r) - V x|² = (W* - V) H (W* - V)ᵀ + what no V can reach. So a solver that is given W* in place of W matches the
original model's outputs, with the same Hessian. (GPTAQ, arXiv 2504.02692, and QEP correct for x' - x; the residual term is the same idea
one step on.) A share below 1 trusts the calibration tokens less.
"""

from __future__ import annotations

import torch
from torch import Tensor

from marlinctl.quantize.types import Hessian


def matched(weight: Tensor, hessian: Hessian, *, share: float, damping: float, residual: bool) -> Tensor:
    """W* [R, K] float32 of weight [R, K]."""
    if hessian.drift is None or share == 0.0:
        return weight
    wanted = torch.mm(weight, hessian.drift.T)  # [R, K]
    if residual and hessian.residual is not None:
        wanted += hessian.residual.T
    matrix = hessian.matrix.double()
    matrix.diagonal().add_(damping * matrix.diagonal().mean())
    lower, info = torch.linalg.cholesky_ex(matrix)
    if int(info):
        return weight
    return weight + share * torch.cholesky_solve(wanted.T.double(), lower).T.float()
