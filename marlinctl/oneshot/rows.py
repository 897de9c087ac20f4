"""Solves over several processes: the rows of one, or the stacks of many. Rows are independent given the Hessian, which is the same
everywhere, and stacks are independent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from marlinctl.oneshot.solve import StackedSolver, StackOutcome, pruned, quantized
from marlinctl.quantize.gptq import Solved
from marlinctl.quantize.types import Hessian, QuantizedLinear
from marlinctl.sparsify.sparsegpt import Pruned
from marlinctl.sparsify.types import SparseQuantizedLinear
from marlinctl.system.processes import Processes


def own_rows(rows: int, processes: Processes) -> tuple[slice, int]:
    """The rows that this process solves, and how many rows each sends.

    Where they do not divide, the last processes have fewer. One without rows of its own solves the last one too, which is not used.
    """
    each = -(-rows // processes.count)
    first = min(processes.index * each, rows - 1)
    return slice(first, max(min((processes.index + 1) * each, rows), first + 1)), each


def together(part: Tensor, each: int, rows: int, processes: Processes) -> Tensor:
    """[rows, ...] for all, of which each process has solved its `own_rows`."""
    if len(part) < each:
        part = torch.cat([part, part.new_zeros(each - len(part), *part.shape[1:])])
    return processes.concatenate(part)[:rows]


def solve_stacks(
    solver: StackedSolver, stacks: Tensor, masks: Tensor | None, hessians: Sequence[Hessian], group_size: int, processes: Processes
) -> list[StackOutcome]:
    """StackedSolver.solve_many, of which each process solves its stacks, or its rows where there is one stack. All have the whole result.

    A ValueError is that of one process: it must end, and the others with it.
    """
    if processes.count == 1:
        return solver.solve_many(stacks, masks, hessians, group_size)
    if len(hessians) == 1:
        return [_solve_rows(solver, stacks[0], None if masks is None else masks[0], hessians[0], group_size, processes)]
    count = len(hessians)
    mine, each = own_rows(count, processes)
    solved = solver.solve_many(stacks[mine], None if masks is None else masks[mine], hessians[mine], group_size)
    facts = processes.gather([(outcome.damping, outcome.fallback, outcome.dead) for outcome, _, _ in solved])

    def whole(parts: Sequence[Tensor]) -> Tensor:
        return together(torch.stack(list(parts)), each, count, processes)

    outcomes, kept = [outcome for outcome, _, _ in solved], [mask for _, _, mask in solved if mask is not None]
    keep = whole(kept) if kept else None
    errors, energies = (whole([getattr(outcome, what) for outcome in outcomes]) for what in ("error", "output_energy"))
    linears = [outcome.linear for outcome in outcomes if isinstance(outcome, Solved)]
    if linears:
        codes, scales = whole([linear.codes for linear in linears]), whole([linear.scales for linear in linears])
        zeros = [linear.zeros for linear in linears if linear.zeros is not None]
        zeros_of = whole(zeros) if zeros else None
    else:
        weights = whole([outcome.weight for outcome in outcomes if isinstance(outcome, Pruned)])
    joined: list[StackOutcome] = []
    for e in range(count):
        damping, fallback, dead = facts[e // each][e % each]
        mask = None if keep is None else keep[e]
        if linears:
            linear = joined_linear(codes[e], scales[e], None if zeros_of is None else zeros_of[e], linears[0], mask)
            joined.append(quantized(Solved(linear, errors[e], energies[e], damping, fallback, dead), mask))
        else:
            assert mask is not None
            joined.append(pruned(Pruned(weights[e], mask, errors[e], energies[e], damping, fallback, dead)))
    return joined


def joined_linear(codes: Tensor, scales: Tensor, zeros: Tensor | None, part: QuantizedLinear, mask: Tensor | None) -> QuantizedLinear:
    """part: one of those that are joined."""
    if mask is None:
        return QuantizedLinear(codes, scales, part.group_size, grid=part.grid, zeros=zeros)
    return SparseQuantizedLinear(codes, scales, part.group_size, mask, grid=part.grid)


def _solve_rows(
    solver: StackedSolver, stack: Tensor, mask: Tensor | None, hessian: Hessian, group_size: int, processes: Processes
) -> StackOutcome:
    rows = len(stack)
    mine, each = own_rows(rows, processes)
    residual = None if hessian.residual is None else hessian.residual[:, mine].contiguous()
    outcome, _, kept = solver.solve(stack[mine], None if mask is None else mask[mine], replace(hessian, residual=residual), group_size)

    def whole(part: Tensor) -> Tensor:
        return together(part, each, rows, processes)

    mask = None if kept is None else whole(kept)
    error, energy = whole(outcome.error), whole(outcome.output_energy)
    if isinstance(outcome, Solved):
        part = outcome.linear
        zeros = None if part.zeros is None else whole(part.zeros)
        linear = joined_linear(whole(part.codes), whole(part.scales), zeros, part, mask)
        return quantized(replace(outcome, linear=linear, error=error, output_energy=energy), mask)
    assert isinstance(outcome, Pruned) and mask is not None
    return pruned(replace(outcome, weight=whole(outcome.weight), mask=mask, error=error, output_energy=energy))
