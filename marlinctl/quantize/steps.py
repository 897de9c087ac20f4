"""The inner loops of a solve. They may be torch operators or CUDA kernels (marlinctl/solver_kernels); what they compute is the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from marlinctl.quantize.grid import search_scales
from marlinctl.quantize.solver import sweep


class Sweep(Protocol):
    """`quantize.solver.sweep` without `choose`."""

    def __call__(
        self, base: Tensor, anchor: Tensor, feedback: Tensor, scales: Tensor | None, group_of: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True, slots=True)
class SolverSteps:
    search_scales: Callable[..., Tensor]  # quantize.grid.search_scales
    sweep: Sweep


TORCH = SolverSteps(search_scales, sweep)
