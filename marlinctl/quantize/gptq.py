"""GPTQ for linears that share an input: one Hessian, one factorisation, their rows stacked into one solve.

stacked weights [R, K] ─► static scales per group of original columns ─► columns by falling diag(H) ─► sweep ─► (descent, re-fit) x n
                                                                         └── static activation order ──┘        codes in original order
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from marlinctl.quantize.affine import search_ranges
from marlinctl.quantize.damping import Damping, damping_of
from marlinctl.quantize.grid import round_steps_
from marlinctl.quantize.integer_fit import fit_to_weights
from marlinctl.quantize.refine import descend, layer_error, refit_scales
from marlinctl.quantize.scheme import INT4, Grid
from marlinctl.quantize.solver import factor, factor_stack, ridges
from marlinctl.quantize.stacks import apart, choose, take_both, take_rows
from marlinctl.quantize.stacks import diagonal as diagonal_of
from marlinctl.quantize.steps import TORCH, SolverSteps
from marlinctl.quantize.types import Hessian, QuantizedLinear, codes_of_values


@dataclass(frozen=True, slots=True)
class SolveSettings:
    """What decides the codes. The recipe has the defaults (recipes/schema.py)."""

    group_size: int  # -1: one group for the whole row
    both_signs: bool  # scales of either sign
    bfloat16_exact: bool  # scales that bfloat16 holds exactly as well
    act_order: str  # "static" or "none"
    scale_search: str  # "hessian", "mse" or "none"
    damping: Damping  # fraction of mean(diag H); None: by the tokens per input
    refine: int  # rounds of two descents and one re-fit
    grid: Grid = INT4
    integer_scales: bool = False  # those of a row are small integers times one number (integer_scales.py); of symmetric int4


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

    diagonal, damping = hessian.matrix.diagonal().clone(), damping_of(settings.damping, hessian)
    if not bool(diagonal.any()):
        nothing = torch.zeros(rows, dtype=torch.float64, device=weight.device)
        reason = "plain rounding: no calibration token reached this input, or all of them were zero"
        return Solved(round_to_nearest(weight, settings, steps), nothing, nothing, damping, reason, k)
    order = _order(diagonal, settings)
    matrix = take_both(hessian.matrix, order)
    factored = factor(matrix, damping)
    ridge = factored.damping * float(diagonal.mean())
    rounds = settings.refine if factored.fallback is None else 0
    codes, scales, zeros, error, energy = _round(
        weight, mask, original, diagonal, order, matrix, factored.feedback, ridge, rounds, settings, steps
    )
    return Solved(
        linear=QuantizedLinear(codes, scales, group_size, grid=settings.grid, zeros=zeros),
        error=error,
        output_energy=energy,
        damping=factored.damping,
        fallback=factored.fallback,
        dead=int((diagonal == 0).sum()),
    )


def solve_many(
    weights: Tensor,
    hessians: Sequence[Hessian],
    settings: SolveSettings,
    masks: Tensor | None = None,
    originals: Tensor | None = None,
    steps: SolverSteps = TORCH,
) -> list[Solved]:
    """`solve` of many stacks of rows, each with a Hessian of its own: the same but for rounding.

    weights: [E, R, K] float32; masks and originals: [E, R, K] or None. With `steps` that take stacks of problems all are solved at once,
    but for those whose Hessian is zero, not finite or not positive definite with the first damping: each of these is solved alone, and
    changes no other. Otherwise one after another. Raises what `solve` raises for any of them.
    """

    def alone(e: int) -> Solved:
        mask, original = (None if all_ is None else all_[e] for all_ in (masks, originals))
        return solve(weights[e], hessians[e], settings, mask, original, steps)

    count, _, k = weights.shape
    if not steps.stacks or count == 1:
        return [alone(e) for e in range(count)]
    group_size = k if settings.group_size == -1 else settings.group_size
    if k % group_size:
        raise ValueError(f"K={k} is not a multiple of group_size {group_size}")
    matrices = torch.stack([hessian.matrix for hessian in hessians])
    diagonals = diagonal_of(matrices).clone()
    order = _order(diagonals, settings)
    matrices = take_both(matrices, order)
    dampings = [damping_of(settings.damping, hessian) for hessian in hessians]
    ridge_of = ridges(diagonals, dampings)
    feedback, _, good = factor_stack(matrices, dampings)
    dead = (diagonals == 0).sum(-1).tolist()

    def together(chosen: Sequence[int]) -> list[Solved]:
        mask, original = (None if all_ is None else choose(all_, chosen) for all_ in (masks, originals))
        weight, diagonal, places, matrix, fed_back, ridge = (
            choose(all_, chosen) for all_ in (weights, diagonals, order, matrices, feedback, ridge_of)
        )
        # None has zeros: the steps that take stacks have none.
        codes_of, scales_of, _, *errors = _round(
            weight, mask, original, diagonal, places, matrix, fed_back, ridge, settings.refine, settings, steps
        )
        return [
            Solved(QuantizedLinear(codes, scales, group_size, grid=settings.grid), error, energy, dampings[e], None, dead[e])
            for e, codes, scales, error, energy in zip(chosen, codes_of, scales_of, *errors, strict=True)
        ]

    return apart(good.tolist(), together, alone)


def _order(diagonal: Tensor, settings: SolveSettings) -> Tensor:
    """The order of columns during the solve, [..., K] int64."""
    if settings.act_order == "static":
        return torch.argsort(diagonal, dim=-1, descending=True, stable=True)
    return torch.arange(diagonal.shape[-1], device=diagonal.device).expand(diagonal.shape)


def _round(
    weight: Tensor, mask: Tensor | None, original: Tensor | None, diagonal: Tensor, order: Tensor, matrix: Tensor, feedback: Tensor,
    ridge: float | Tensor, rounds: int, settings: SolveSettings, steps: SolverSteps,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:  # fmt: skip
    """Scales, sweep and refinement; codes [R, K] int8, scales [R, G] float16, zeros [R, G] int8 of asymmetric codes, error and output
    energy of each row [R] float64.

    weight, mask, original: [R, K]. diagonal: [K]. order: [K], and in it matrix and feedback [K, K]. ridge: what is added to the diagonal
    while codes and scales are refined, `rounds` times. Or stacks [E, ...] of all tensors, ridge [E, 1] then.
    """
    group_size = weight.shape[-1] if settings.group_size == -1 else settings.group_size
    scales, zeros = static_scales(weight, diagonal, settings, steps)  # [R, G]
    group_of = order // group_size
    w = take_rows(
        weight.mT, order
    ).contiguous()  # [K, R], columns as rows: an indexed transposed view keeps its strides, and the sweep would crawl
    s = scales.mT.contiguous()  # [G, R]
    z = None if zeros is None else zeros.mT.contiguous()
    kept = None if mask is None else take_rows(mask.mT, order).contiguous()
    target = w if original is None else take_rows(original.mT, order).contiguous()
    codes, _ = steps.sweep(w, w, feedback, s, group_of, kept, grid=settings.grid, zeros=z)
    if rounds:
        positive = not settings.both_signs or z is not None
        integer = settings.integer_scales and s.shape[-2] > 1
        diagonal_of(matrix).add_(ridge)
        for _ in range(rounds):
            for _ in range(2):
                codes = descend(target, codes, s, matrix, group_of, kept, sweep=steps.sweep, grid=settings.grid, zeros=z)
            s = refit_scales(target, codes, s, matrix, group_of, positive=positive, bfloat16_exact=settings.bfloat16_exact, integer=integer)
        diagonal_of(matrix).sub_(ridge)
    in_place = codes_of_values(take_rows(codes, torch.argsort(order, dim=-1)), settings.grid)  # scattering columns is slow on a GPU
    in_place = in_place.mT.contiguous()
    error = layer_error(target - codes * take_rows(s, group_of), matrix).double()
    if zeros is not None:
        zeros = zeros.to(torch.int8)
        in_place += zeros.repeat_interleave(group_size, dim=-1)
    return in_place, s.mT.to(torch.float16).contiguous(), zeros, error, layer_error(target, matrix).double()


def static_scales(weight: Tensor, importance: Tensor, settings: SolveSettings, steps: SolverSteps = TORCH) -> tuple[Tensor, Tensor | None]:
    """Scales [R, G] float32 of the original columns, before any column is rounded; and zeros [R, G] float32 of asymmetric codes.

    importance: [K], the diagonal of the Hessian, which weighs the errors of the search. Or stacks [E, ...] of all. The scale that covers
    the largest weight stands unless another one promises SEARCH_MARGIN less: small gains come from clipping, and cost more later than the
    search can see (docs/log/2026-11-21-drift.md). Integer scales are fitted to what was found.
    """
    ratios = (1.0,) if settings.scale_search == "none" else SEARCH_RATIOS
    weights = importance if settings.scale_search == "hessian" else None
    group_size = weight.shape[-1] if settings.group_size == -1 else settings.group_size
    if not settings.grid.symmetric:
        return search_ranges(
            weight, weights, group_size=group_size, bfloat16_exact=settings.bfloat16_exact, ratios=ratios, margin=SEARCH_MARGIN,
            grid=settings.grid,
        )  # fmt: skip
    found = steps.search_scales(
        weight,
        weights,
        group_size=group_size,
        both_signs=settings.both_signs,
        bfloat16_exact=settings.bfloat16_exact,
        ratios=ratios,
        margin=SEARCH_MARGIN,
        grid=settings.grid,
    )
    if settings.integer_scales and group_size < weight.shape[-1]:  # one group has the form with whatever scale
        found = fit_to_weights(weight, weights, found, group_size=group_size, bfloat16_exact=settings.bfloat16_exact)
    return found, None


def round_to_nearest(weight: Tensor, settings: SolveSettings, steps: SolverSteps = TORCH) -> QuantizedLinear:
    """Plain rounding of [R, K] float32 with searched scales: for an input that no calibration token reached."""
    rows, k = weight.shape
    group_size = k if settings.group_size == -1 else settings.group_size
    scales, zeros = static_scales(weight, torch.ones(k, device=weight.device), settings, steps)
    steps_of = weight.reshape(rows, -1, group_size) / scales.unsqueeze(-1)
    if zeros is not None:
        steps_of = steps_of.round_() + zeros.unsqueeze(-1)
        zeros = zeros.to(torch.int8)
    codes = codes_of_values(round_steps_(steps_of, settings.grid).reshape(rows, k), settings.grid)
    return QuantizedLinear(codes, scales.to(torch.float16), group_size, grid=settings.grid, zeros=zeros)
