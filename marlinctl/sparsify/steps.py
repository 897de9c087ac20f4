"""The inner loops of pruning, beside those of the solver."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from marlinctl.quantize import steps
from marlinctl.quantize.steps import SolverSteps
from marlinctl.sparsify.masked_ls import improve_mask
from marlinctl.sparsify.sweep import sparsegpt_sweep


@dataclass(frozen=True, slots=True)
class PruneSteps(SolverSteps):
    sparsegpt_sweep: Callable[..., tuple[Tensor, Tensor]]  # sparsify.sweep.sparsegpt_sweep
    improve_mask: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


TORCH = PruneSteps(steps.TORCH.search_scales, steps.TORCH.sweep, sparsegpt_sweep, improve_mask)
