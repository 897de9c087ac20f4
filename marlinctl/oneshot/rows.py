"""The rows of one solve over several processes. Rows are independent given the Hessian, which is the same everywhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from marlinctl.oneshot.solve import Outcome, StackedSolver, rows_of_linear
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


def solve_rows(
    solver: StackedSolver, stack: Tensor, mask: Tensor | None, hessian: Hessian, group_size: int, processes: Processes
) -> tuple[Outcome, Callable[[slice], Tensor | QuantizedLinear], Tensor | None]:
    """StackedSolver.solve, of which each process solves its rows. All have the whole result."""
    if processes.count == 1:
        return solver.solve(stack, mask, hessian, group_size)
    rows = len(stack)
    mine, each = own_rows(rows, processes)
    residual = None if hessian.residual is None else hessian.residual[:, mine].contiguous()
    outcome, _, kept = solver.solve(stack[mine], None if mask is None else mask[mine], replace(hessian, residual=residual), group_size)

    def whole(part: Tensor) -> Tensor:
        return together(part, each, rows, processes)

    mask = None if kept is None else whole(kept)
    error, energy = whole(outcome.error), whole(outcome.output_energy)
    if isinstance(outcome, Solved):
        linear = outcome.linear
        parts = (whole(linear.codes), whole(linear.scales), linear.group_size)
        joined = QuantizedLinear(*parts) if mask is None else SparseQuantizedLinear(*parts, mask)
        return replace(outcome, linear=joined, error=error, output_energy=energy), lambda part: rows_of_linear(joined, mask, part), mask
    assert isinstance(outcome, Pruned) and mask is not None
    weight = whole(outcome.weight)
    return replace(outcome, weight=weight, mask=mask, error=error, output_energy=energy), lambda part: weight[part], mask
