"""The inner loops of a solve. They may be torch operators or CUDA kernels (marlinctl/solver_kernels); what they compute is the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from marlinctl.quantize.grid import search_scales
from marlinctl.quantize.scheme import INT4, Grid
from marlinctl.quantize.solver import sweep


class Sweep(Protocol):
    """`quantize.solver.sweep` without `choose`; of stacks [E, ...] of its arguments where SolverSteps.stacks is True."""

    def __call__(
        self, base: Tensor, anchor: Tensor, feedback: Tensor, scales: Tensor | None, group_of: Tensor, mask: Tensor | None = None,
        *, grid: Grid = INT4, zeros: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@dataclass(frozen=True, slots=True)
class SolverSteps:
    search_scales: Callable[..., Tensor]  # quantize.grid.search_scales
    sweep: Sweep
    stacks: bool = field(default=False, kw_only=True)  # whether all of them also take stacks of problems, [E, ...] for each argument


TORCH = SolverSteps(search_scales, sweep)
