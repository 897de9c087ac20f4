"""Drift correction: the target of a linear, moved toward what the unquantized model computes.

After a few compressed blocks the inputs x of a linear are no longer the x' of the unquantized model. The linear should produce W x', and,
where its output is added to the residual stream r, also the difference r' - r. Both are linear regressions on x:

    W* = W + share · (W E[(x' - x) xᵀ] + E[(r' - r) xᵀ]) (H + ridge)⁻¹        minimises  E |W x' + (r' - r) - W* x|²  at share = 1

and for any V,  E |W x' + (r' - r) - V x|² = (W* - V) H (W* - V)ᵀ + a constant. So a solver that is given W* in place of W approximates
the unquantized model's outputs, with the same Hessian. GPTAQ (arXiv 2504.02692) corrects for x' - x; the residual term lets every branch
also correct the error of all blocks before it.

Separate shares for the two terms (LoaQ, arXiv 2509.06297) and a ridge that follows the tokens per input gain nothing here
(docs/log/2026-11-30-accuracy.md).

The regression sees calibration tokens only. With share 1 it also fits their noise, and each block adds to it: SmolLM2-135M at 2:4 gets
worse than without correction (docs/log/2026-11-21-drift.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from marlinctl.quantize.products import mm
from marlinctl.quantize.solver import ridges
from marlinctl.quantize.stacks import diagonal
from marlinctl.quantize.types import Hessian


@dataclass(frozen=True, slots=True)
class DriftSettings:
    """How much of the drift is corrected. The recipe has the defaults (recipes/schema.py)."""

    share: float  # 0..1
    damping: float  # ridge as a fraction of mean(diag H)


def corrected_target(weight: Tensor, hessian: Hessian, settings: DriftSettings) -> Tensor:
    """W* [R, K] float32 of weight [R, K] float32. Without drift, or where H cannot be factored, the weight itself.

    ValueError where the residual is not of these rows.
    """
    if hessian.drift is None or settings.share == 0.0:
        return weight
    wanted = mm(weight, hessian.drift.T)  # [R, K]
    if hessian.residual is not None:
        if tuple(hessian.residual.shape) != (weight.shape[1], weight.shape[0]):
            raise ValueError(f"the residual drift {list(hessian.residual.shape)} does not fit a weight {list(weight.shape)}")
        wanted += hessian.residual.T
    matrix = _damped(hessian.matrix.unsqueeze(0), [settings.damping])[0]
    lower, info = torch.linalg.cholesky_ex(matrix)
    if int(info):
        return weight
    return weight + settings.share * torch.cholesky_solve(wanted.T.double(), lower).T.float()


def corrected_stack(weights: Tensor, hessians: Sequence[Hessian], settings: DriftSettings) -> Tensor:
    """`corrected_target` of weights [E, R, K], each with its Hessian, at once: [E, R, K].

    No Hessian has a residual, and all have a drift or none has.
    """
    drifts = [hessian.drift for hessian in hessians if hessian.drift is not None]
    if not drifts or settings.share == 0.0:
        return weights
    wanted = mm(weights, torch.stack(drifts).mT)
    lower, info = torch.linalg.cholesky_ex(
        _damped(torch.stack([hessian.matrix for hessian in hessians]), [settings.damping] * len(hessians))
    )
    solved = [torch.cholesky_solve(right.T.double(), one).T.float() for right, one in zip(wanted, lower, strict=True)]
    return torch.where((info == 0)[:, None, None], weights + settings.share * torch.stack(solved), weights)


def _damped(matrices: Tensor, dampings: Sequence[float]) -> Tensor:
    """[E, K, K] with the ridge of each, float64."""
    matrices = matrices.double()
    diagonal(matrices).add_(ridges(diagonal(matrices), dampings))
    return matrices
