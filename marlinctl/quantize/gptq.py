"""GPTQ for linears that share an input: one Hessian, one factorisation, their rows stacked into one solve.

stacked weights [R, K] ─► static scales per group of original columns ─► columns by falling diag(H) ─► sweep ─► (descent, re-fit) x n
                                                                         └── static activation order ──┘        codes in original order
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from marlinctl.quantize.refine import descend, layer_error, refit_scales
from marlinctl.quantize.solver import factor
from marlinctl.quantize.steps import TORCH, SolverSteps
from marlinctl.quantize.types import CODE_MAX, CODE_MIN, Hessian, QuantizedLinear


@dataclass(frozen=True, slots=True)
class SolveSettings:
    """What decides the codes. The recipe has the defaults (recipes/schema.py)."""

    group_size: int  # -1: one group for the whole row
    both_signs: bool  # scales of either sign
    bfloat16_exact: bool  # scales that bfloat16 holds exactly as well
    act_order: str  # "static" or "none"
    scale_search: str  # "hessian", "mse" or "none"
    damping: float  # fraction of mean(diag H)
    refine: int  # rounds of two descents and one re-fit


@dataclass(frozen=True, slots=True)
class Solved:
    """The result for the stacked rows."""

    linear: QuantizedLinear  # codes [R, K], scales [R, G]
    error: Tensor  # [R] float64: δ H δᵀ of each row, with the undamped H
    output_energy: Tensor  # [R] float64: w H wᵀ of each row
    damping: float
    fallback: str | None
    dead: int  # columns whose input was zero in all of calibration; their weights are rounded and kept


# Fractions of the covering scale, and what another one must promise: docs/log/2026-11-21-drift.md.
SEARCH_RATIOS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55)
SEARCH_MARGIN = 0.35


def solve(
    weight: Tensor,
    hessian: Hessian,
    settings: SolveSettings,
    mask: Tensor | None = None,
    original: Tensor | None = None,
    steps: SolverSteps = TORCH,
) -> Solved:
    """Quantize stacked rows that share one input.

    weight: [R, K] float32, finite. hessian.matrix: [K, K]. mask: [R, K] bool, or None; where it is False the code is 0.
    original: [R, K] float32, where `weight` is already a pruned stand-in for it: what refinement aims at and errors are measured against.
    Raises ValueError for shapes that do not fit, for a group size that does not divide K and for a Hessian that is not finite.
    """
    rows, k = weight.shape
    group_size = k if settings.group_size == -1 else settings.group_size
    if tuple(hessian.matrix.shape) != (k, k):
        raise ValueError(f"weight [{rows}, {k}] does not fit a Hessian {tuple(hessian.matrix.shape)}")
    if k % group_size:
        raise ValueError(f"K={k} is not a multiple of group_size {group_size}")
    if not bool(torch.isfinite(hessian.matrix).all()):
        raise ValueError(f"the Hessian of {hessian.tokens} tokens holds NaN or infinity")

    diagonal = hessian.matrix.diagonal().clone()
    if not bool(diagonal.any()):
        nothing = torch.zeros(rows, dtype=torch.float64, device=weight.device)
        reason = "plain rounding: no calibration token reached this input, or all of them were zero"
        return Solved(round_to_nearest(weight, settings, steps), nothing, nothing, settings.damping, reason, k)
    scales = static_scales(weight, diagonal, settings, steps)  # [R, G]
    order = (
        torch.argsort(diagonal, descending=True, stable=True) if settings.act_order == "static" else torch.arange(k, device=weight.device)
    )
    group_of = order // group_size
    matrix = hessian.matrix[order[:, None], order]
    factored = factor(matrix, settings.damping)

    w = weight.T[order].contiguous()  # [K, R], columns as rows: indexing a transposed view keeps its strides, and the sweep would crawl
    s = scales.T.contiguous()  # [G, R]
    kept = None if mask is None else mask.T[order].contiguous()
    target = w if original is None else original.T[order].contiguous()
    codes, _ = steps.sweep(w, w, factored.feedback, s, group_of, kept)
    ridge = factored.damping * float(diagonal.mean())
    if settings.refine and factored.fallback is None:
        matrix.diagonal().add_(ridge)
        for _ in range(settings.refine):
            for _ in range(2):
                codes = descend(target, codes, s, matrix, group_of, kept, sweep=steps.sweep)
            s = refit_scales(target, codes, s, matrix, group_of, positive=not settings.both_signs, bfloat16_exact=settings.bfloat16_exact)
        matrix.diagonal().sub_(ridge)

    in_place = codes[torch.argsort(order)].to(torch.int8).T.contiguous()  # rows are gathered: scattering columns is slow on a GPU
    return Solved(
        linear=QuantizedLinear(in_place, s.T.to(torch.float16).contiguous(), group_size),
        error=layer_error(target - codes * s[group_of], matrix).double(),
        output_energy=layer_error(target, matrix).double(),
        damping=factored.damping,
        fallback=factored.fallback,
        dead=int((diagonal == 0).sum()),
    )


def static_scales(weight: Tensor, importance: Tensor, settings: SolveSettings, steps: SolverSteps = TORCH) -> Tensor:
    """Scales [R, G] float32 of the original columns, before any column is rounded.

    importance: [K], the diagonal of the Hessian, which weighs the errors of the search. The scale that covers the largest weight stands
    unless another one promises SEARCH_MARGIN less: small gains come from clipping, and cost more later than the search can see
    (docs/log/2026-11-21-drift.md).
    """
    ratios = (1.0,) if settings.scale_search == "none" else SEARCH_RATIOS
    weights = importance if settings.scale_search == "hessian" else None
    group_size = weight.shape[1] if settings.group_size == -1 else settings.group_size
    return steps.search_scales(
        weight,
        weights,
        group_size=group_size,
        both_signs=settings.both_signs,
        bfloat16_exact=settings.bfloat16_exact,
        ratios=ratios,
        margin=SEARCH_MARGIN,
    )


def round_to_nearest(weight: Tensor, settings: SolveSettings, steps: SolverSteps = TORCH) -> QuantizedLinear:
    """Plain rounding of [R, K] float32 with searched scales: for an input that no calibration token reached."""
    rows, k = weight.shape
    group_size = k if settings.group_size == -1 else settings.group_size
    scales = static_scales(weight, torch.ones(k, device=weight.device), settings, steps)
    codes = (weight.reshape(rows, -1, group_size) / scales.unsqueeze(-1)).round().clamp(CODE_MIN, CODE_MAX)
    return QuantizedLinear(codes.reshape(rows, k).to(torch.int8), scales.to(torch.float16), group_size)
