"""What a recipe does to the stacked rows of linears that share an input: correct drift, prune, quantize, or two of these together.

The sequential pipeline solves every stack of a model with it (layers.py), and the probe one stack of random numbers (probe.py): the probe
measures what a run does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from marlinctl.quantize.drift import corrected_target
from marlinctl.quantize.gptq import Solved, SolveSettings, solve
from marlinctl.quantize.scheme import Scheme
from marlinctl.quantize.types import Hessian, QuantizedLinear
from marlinctl.recipes.schema import Recipe
from marlinctl.sparsify.sparsegpt import PruneSettings, fit_mask, prune, prune_and_quantize, solve_pruned
from marlinctl.sparsify.steps import TORCH, PruneSteps
from marlinctl.sparsify.types import SparseQuantizedLinear
from marlinctl.system.console import Console


class Outcome(Protocol):
    """What every solve reports about its stacked rows (quantize.gptq.Solved, sparsify.sparsegpt.Pruned)."""

    @property
    def error(self) -> Tensor: ...
    @property
    def output_energy(self) -> Tensor: ...
    @property
    def damping(self) -> float: ...
    @property
    def fallback(self) -> str | None: ...
    @property
    def dead(self) -> int: ...


@dataclass(frozen=True, slots=True)
class StackedSolver:
    drift_correction: float  # share, 0..1; 0 where there is no reference model
    scheme: Scheme
    pruning: PruneSettings
    settings: SolveSettings  # of int4; the group size is that of each stack
    steps: PruneSteps = TORCH

    @classmethod
    def of(cls, recipe: Recipe, *, corrects_drift: bool, bfloat16_exact: bool, steps: PruneSteps = TORCH) -> StackedSolver:
        q = recipe.quantize
        return cls(
            drift_correction=q.drift_correction if corrects_drift else 0.0,
            scheme=recipe.scheme,
            pruning=PruneSettings(
                method=recipe.sparsify.method,
                damping=q.damping,
                mask_sweeps=recipe.sparsify.mask_sweeps,
                iterations=recipe.sparsify.ls_iterations,
            ),
            settings=SolveSettings(
                group_size=q.group_size,
                both_signs=q.scale_sign == "both",
                bfloat16_exact=bfloat16_exact,
                act_order=q.act_order,
                scale_search=q.scale_search,
                damping=q.damping,
                refine=q.refine,
            ),
            steps=steps,
        )

    def solve(
        self, stack: Tensor, mask: Tensor | None, hessian: Hessian, group_size: int
    ) -> tuple[Outcome, Callable[[slice], Tensor | QuantizedLinear], Tensor | None]:
        """The outcome, what each slice of rows became, and the mask of all rows [R, K].

        stack: [R, K] float32. mask: a mask that the source has already, [R, K] bool, or None.

        Raises:
            ValueError: weights or Hessian are not finite, or no damping makes the Hessian positive definite.
        """
        if self.drift_correction:
            stack = corrected_target(stack, hessian, share=self.drift_correction, damping=self.pruning.damping)
        if not self.scheme.quantizes:
            pruned = prune(stack, hessian, self.pruning, self.steps)
            return pruned, lambda rows: pruned.weight[rows], pruned.mask
        settings = replace(self.settings, group_size=group_size)
        solved: Solved
        if mask is not None:
            pruned_stack = fit_mask(stack, mask, hessian, self.pruning) if self.drift_correction else stack
            solved, mask = solve_pruned(pruned_stack, mask, hessian, settings, original=stack, steps=self.steps)
        elif self.scheme.prunes:
            solved, mask = prune_and_quantize(stack, hessian, self.pruning, settings, self.steps)
        else:
            solved = solve(stack, hessian, settings, steps=self.steps)
        kept = mask
        return solved, lambda rows: rows_of_linear(solved.linear, kept, rows), kept


def steps_on(device: torch.device, console: Console) -> PruneSteps:
    """The solver's kernels on a GPU, torch operators on a CPU; those too, with a warning, where no kernel can be compiled or loaded."""
    if device.type != "cuda":
        return TORCH
    from marlinctl.kernels import jit
    from marlinctl.solver_kernels.steps import SolverKernels

    index = torch.cuda.current_device() if device.index is None else device.index
    kernels = SolverKernels(torch.device("cuda", index), jit.default_folder())
    try:
        kernels.require()
    except torch.OutOfMemoryError:
        raise
    except (ValueError, OSError, RuntimeError) as reason:  # no such GPU, no compiler or driver, no cache; or one of them refuses
        console.warn(f"the solver's kernels cannot be used, and torch operators take about twenty times as long: {reason}")
        return TORCH
    return kernels.steps()


def rows_of_linear(linear: QuantizedLinear, mask: Tensor | None, rows: slice) -> QuantizedLinear:
    """These rows, with their mask where there is one [R, K]."""
    codes, scales = linear.codes[rows], linear.scales[rows]
    if mask is None:
        return QuantizedLinear(codes, scales, linear.group_size)
    return SparseQuantizedLinear(codes, scales, linear.group_size, mask[rows])
