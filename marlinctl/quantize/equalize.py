"""Powers of two that bring the columns of a weight closer to one another.

All columns of a group share one step in a row, so a few columns with large weights make it coarse for all. Where the input comes from a
norm, column k may be multiplied by 2^e_k and the norm's weight at k by 2^-e_k (oneshot/equalization.py): every product of an input and a
weight stays as it was, bit for bit, and the other columns have finer steps.

    e_k = -round(STRENGTH (log2 |W_k| - mean of log2 |W|))        |W_k|: norm of column k over all rows that read the input

is where a search begins. What it looks for is estimated. With steps that follow the largest weight of a group, and errors that are alike in
all of its columns, a linear's output would have the error

    E(e) = Σ over rows and groups of max_k(|W_rk| 2^e_k)² · Σ_k h_k 4^-e_k        h_k = E[x_k²]

A solve makes up for most of what columns with large inputs lose. With the root of h_k in its place the estimate follows what solves
measure: -52, -46, -6, -5 and +29 % where they gave -54, -47, -8, -7 and +37 %; with h_k itself -28, -33, +19, +9 and +109. It rises where
large columns are many, as in the first block of SmolLM2: they lose what the others do not gain.

Linears behind one norm must have the same exponents and need different ones. So that none decides by the size of its outputs, each counts
relative to its own error without exponents: the search looks for the least mean of E(e) / E(0), one column after another, by steps of one
to either side. Squared relative errors of Qwen2.5-Coder-0.5B's 24 blocks together, q, k and v, against none: exponents from the sum of all
squares -14, -19 and -1 %, searched -14, -29 and -14 %. With these linears alone in 4 bits either takes 15 %
off the divergence from the original: the difference is below the noise of the solves, 2 %.

This is cross-layer equalization (Nagel et al., arXiv 1906.04721) with powers of two, between a norm and the linears behind it. Scales
that follow the activations (AWQ, arXiv 2306.00978) are no better than none under GPTQ, which knows them already
(docs/log/2026-12-01-accuracy.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

STRENGTH = 0.5  # 0.25 to 1 are within 5 % of each other in the error of Qwen2.5-0.5B's q, k and v, which this halves
WORTH = 0.99  # share of the estimated error that may be left
LEAST, MOST = -3, 8  # an input grows with a negative exponent, and must stay within float16
SWEEPS = 8  # at most; 4 leave 0.05 % more of the estimate of Qwen2.5-0.5B's q, k and v
_FALLS = 1 - 1e-6  # what a step must leave of the estimate at most, so that rounding does not decide
_LONGEST = 256  # columns of a group that are searched: one after another, so a scale for each row of an 8B would take a GPU minutes
_AT_ONCE = 2**26  # weights in float32 whose columns are searched together


@dataclass(frozen=True, slots=True)
class NormFed:
    """A linear behind a norm."""

    weight: Tensor  # [N, K]
    group_size: int  # divides K, or is -1 for the whole row

    @property
    def size(self) -> int:
        return int(self.weight.shape[1]) if self.group_size == -1 else self.group_size


def relative_squares(weights: Iterable[Tensor]) -> Tensor:
    """[K] float32: what each column has of the sum of squares of a weight [N, K], added over weights that are not zero."""
    squares = [weight.float().square().sum(0) for weight in weights]
    return torch.stack([square / square.sum().clamp(min=torch.finfo(square.dtype).tiny) for square in squares]).sum(0)


def column_exponents(squares: Tensor) -> Tensor:
    """[K] int32 of the sums of squares of the columns, [K] float32. Columns that are zero, or not finite, keep theirs."""
    usable = (squares > 0) & torch.isfinite(squares)
    if not bool(usable.any()):
        return torch.zeros_like(squares, dtype=torch.int32)
    norms = torch.where(usable, squares, 1.0).log2() / 2
    apart = torch.where(usable, norms - norms[usable].mean(), 0.0)
    return (-STRENGTH * apart).round().clamp(LEAST, MOST).to(torch.int32)


def estimated_error(linear: NormFed, energies: Tensor, exponents: Tensor) -> float:
    """E, to be compared with that of other exponents. energies: [K], mean squares h of the input as the original has it; exponents: [K]
    int32."""
    weight, size = linear.weight, linear.size
    factors = exponents.to(weight.device).float().exp2()
    steps = (weight.float().abs() * factors).reshape(len(weight), -1, size).amax(-1).square().sum(0, dtype=torch.float64)
    losses = (energies.to(weight.device).double().sqrt() / factors.double().square()).reshape(-1, size).sum(-1)
    return float((steps * losses).sum())


def relative_error(linears: Sequence[NormFed], energies: Tensor, exponents: Tensor) -> float:
    """Mean of E(exponents) / E(0) over linears behind one norm. 1 where no linear has an error; NaN where one is not finite."""
    nothing = torch.zeros_like(exponents)
    errors = [(estimated_error(linear, energies, exponents), estimated_error(linear, energies, nothing)) for linear in linears]
    changes = [changed / error for changed, error in errors if error]
    return sum(changes) / len(changes) if changes else 1.0


def fitted_exponents(linears: Sequence[NormFed], energies: Tensor, start: Tensor) -> Tensor:
    """[K] int32: the exponents that a search for the least `relative_error` ends with.

    energies: [K]. start: [K] int32, within LEAST and MOST; it is returned where a group has more than _LONGEST columns. Groups do not
    depend on one another: columns at the same place of all groups are searched at once.
    """
    nothing = torch.zeros_like(start)
    errors = [estimated_error(linear, energies, nothing) for linear in linears]
    used = [(linear, error) for linear, error in zip(linears, errors, strict=True) if error]
    if not used:
        return start
    k, device = len(start), used[0][0].weight.device
    unit = math.lcm(*(linear.size for linear, _ in used))
    if unit > _LONGEST:
        return start
    units = max(1, _AT_ONCE // (unit * sum(len(linear.weight) for linear, _ in used)))
    roots, found = energies.to(device).double().sqrt(), start.to(device)
    pieces = []
    for first in range(0, k, units * unit):
        columns = slice(first, first + units * unit)
        stacks: dict[int, list[Tensor]] = {}
        for linear, error in used:
            part = linear.weight[:, columns].float().abs() / error**0.5  # so that its estimate is E(e) / E(0)
            stacks.setdefault(linear.size, []).append(part.reshape(len(part), -1, unit).permute(2, 0, 1))
        magnitudes = {size: torch.cat(parts, 1) for size, parts in stacks.items()}
        by_place = found[columns].reshape(-1, unit).T.clone(memory_format=torch.contiguous_format)
        pieces.append(_descended(magnitudes, roots[columns].reshape(-1, unit).T.contiguous(), by_place).T.reshape(-1))
    return torch.cat(pieces).to(start.device)


def _descended(magnitudes: Mapping[int, Tensor], roots: Tensor, exponents: Tensor) -> Tensor:
    """[unit, U] int32: what `exponents` become, in place, while a step lowers the estimate.

    magnitudes: group size -> [unit, rows, U] float32. roots: [unit, U] float64.
    """
    steps = torch.tensor([-1, 0, 1], device=exponents.device, dtype=exponents.dtype).unsqueeze(-1)
    for _ in range(SWEEPS):
        before = exponents.clone()
        behind = {size: _largest_behind(stack, exponents, size) for size, stack in magnitudes.items()}
        ahead = {size: torch.zeros_like(stack[0]) for size, stack in magnitudes.items()}  # the largest of the group's columns before j
        for j in range(len(exponents)):
            tried = exponents[j] + steps  # [3, U]
            errors = torch.zeros(tried.shape, dtype=torch.float64, device=roots.device)
            for size, stack in magnitudes.items():
                first = j - j % size
                if j == first:
                    ahead[size].zero_()
                others = torch.maximum(ahead[size], behind[size][j])
                largest = torch.maximum(others, stack[j] * tried.float().exp2().unsqueeze(1))  # [3, rows, U]
                group = slice(first, first + size)
                losses = (roots[group] * (-2.0 * exponents[group].double()).exp2()).sum(0)
                own = roots[j] * ((-2.0 * tried.double()).exp2() - (-2.0 * exponents[j].double()).exp2())
                errors += largest.square().sum(1, dtype=torch.float64) * (losses + own)
            errors = torch.where((tried < LEAST) | (tried > MOST), torch.inf, errors)
            least, best = errors.min(0)
            exponents[j] = torch.where(least < _FALLS * errors[1], tried.gather(0, best.unsqueeze(0))[0], exponents[j])
            for size, stack in magnitudes.items():
                ahead[size] = torch.maximum(ahead[size], stack[j] * exponents[j].float().exp2())
        if torch.equal(before, exponents):
            break
    return exponents


def _largest_behind(stack: Tensor, exponents: Tensor, size: int) -> Tensor:
    """[unit, rows, U]: of each column the largest of those behind it in its group."""
    found = torch.zeros_like(stack)
    for j in reversed(range(len(stack) - 1)):
        if (j + 1) % size:
            found[j] = torch.maximum(found[j + 1], stack[j + 1] * exponents[j + 1].float().exp2())
    return found
