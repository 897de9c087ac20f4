"""What a recipe does to the stacked rows of linears that share an input: correct drift, prune, quantize, or two of these together.

The sequential pipeline solves every stack of a model with it (layers.py), and the probe one stack of random numbers (probe.py): the probe
measures what a run does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from marlinctl.quantize.drift import DriftSettings, corrected_stack, corrected_target
from marlinctl.quantize.gptq import Solved, SolveSettings, solve_many
from marlinctl.quantize.scheme import INT4, Grid, Scheme
from marlinctl.quantize.stacks import stacked
from marlinctl.quantize.types import Hessian, QuantizedLinear
from marlinctl.recipes.schema import Recipe
from marlinctl.sparsify.sparsegpt import Pruned, PruneSettings, fit_mask, prune_and_quantize_many, prune_many, solve_pruned_many
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


# The outcome, what each slice of rows became, and the mask of all rows [R, K].
StackOutcome = tuple[Outcome, Callable[[slice], Tensor | QuantizedLinear], Tensor | None]


@dataclass(frozen=True, slots=True)
class StackedSolver:
    drift: DriftSettings | None  # None: without a reference model
    scheme: Scheme
    pruning: PruneSettings
    settings: SolveSettings  # of the codes; the group size is that of each stack
    offered: PruneSteps = TORCH  # of the device

    @property
    def steps(self) -> PruneSteps:
        """The GPU's kernels have integer codes without zero points, so other ones are found by torch operators."""
        return self.offered if self.settings.grid.symmetric and not self.settings.grid.floating else TORCH

    @classmethod
    def of(cls, recipe: Recipe, *, corrects_drift: bool, bfloat16_exact: bool, steps: PruneSteps = TORCH) -> StackedSolver:
        q = recipe.quantize
        return cls(
            drift=DriftSettings(q.drift_correction, q.drift_damping) if corrects_drift and q.drift_correction else None,
            scheme=recipe.scheme,
            pruning=PruneSettings(
                method=recipe.sparsify.method,
                damping=q.fixed_damping,
                mask_sweeps=recipe.sparsify.mask_sweeps,
                iterations=recipe.sparsify.ls_iterations,
            ),
            settings=SolveSettings(
                group_size=q.group_size,
                both_signs=q.scale_sign == "both",
                bfloat16_exact=bfloat16_exact,
                act_order=q.act_order,
                scale_search=q.scale_search,
                damping=q.fixed_damping,
                refine=q.refine,
                grid=recipe.scheme.grid,
                integer_scales=q.group_scales == "integer",
            ),
            offered=steps,
        )

    def on(self, grid: Grid) -> StackedSolver:
        """The same with other codes. Those of symmetric int4 alone have integer group scales. Scales of linears whose activations are
        rounded are positive, as other tools write them: a sign is worth one of 256 levels, and not every kernel for such products was made
        with negative ones in mind."""
        both_signs = self.settings.both_signs and not grid.rounds_activations
        integer = self.settings.integer_scales and grid == INT4
        return replace(self, settings=replace(self.settings, grid=grid, both_signs=both_signs, integer_scales=integer))

    def solve(self, stack: Tensor, mask: Tensor | None, hessian: Hessian, group_size: int) -> StackOutcome:
        """One stack [R, K]."""
        return self.solve_many(stack.unsqueeze(0), None if mask is None else mask.unsqueeze(0), [hessian], group_size)[0]

    def solve_many(self, stacks: Tensor, masks: Tensor | None, hessians: Sequence[Hessian], group_size: int) -> list[StackOutcome]:
        """Stacks that do not depend on each other, each with its Hessian; at once where the steps take several problems.

        stacks: [E, R, K] float32. masks: masks that the source has already, [E, R, K] bool, or None.

        Raises:
            ValueError: weights or Hessian are not finite, or no damping makes the Hessian positive definite.
        """
        if self.drift is not None:
            stacks = self._corrected(stacks, hessians, self.drift)
        if not self.scheme.quantizes:
            return [pruned(one) for one in prune_many(stacks, hessians, self.pruning, self.steps)]
        settings = replace(self.settings, group_size=group_size)
        if masks is not None:
            values = stacks
            if self.drift is not None:
                values = stacked([fit_mask(stack, mask, h, self.pruning) for stack, mask, h in zip(stacks, masks, hessians, strict=True)])
            return [quantized(*one) for one in solve_pruned_many(values, masks, hessians, settings, originals=stacks, steps=self.steps)]
        if self.scheme.prunes:
            return [quantized(*one) for one in prune_and_quantize_many(stacks, hessians, self.pruning, settings, self.steps)]
        return [quantized(solved, None) for solved in solve_many(stacks, hessians, settings, steps=self.steps)]

    def _corrected(self, stacks: Tensor, hessians: Sequence[Hessian], drift: DriftSettings) -> Tensor:
        """The targets of drift correction, [E, R, K]."""
        if self.steps.stacks and len(hessians) > 1 and all(hessian.residual is None for hessian in hessians):
            return corrected_stack(stacks, hessians, drift)
        return stacked([corrected_target(stack, h, drift) for stack, h in zip(stacks, hessians, strict=True)])


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


def pruned(found: Pruned) -> StackOutcome:
    return found, lambda rows: found.weight[rows], found.mask


def quantized(solved: Solved, mask: Tensor | None) -> StackOutcome:
    return solved, lambda rows: rows_of_linear(solved.linear, mask, rows), mask


def rows_of_linear(linear: QuantizedLinear, mask: Tensor | None, rows: slice) -> QuantizedLinear:
    """These rows, with their mask where there is one [R, K]."""
    codes, scales = linear.codes[rows], linear.scales[rows]
    if mask is None:
        zeros = None if linear.zeros is None else linear.zeros[rows]
        return QuantizedLinear(codes, scales, linear.group_size, grid=linear.grid, zeros=zeros)
    return SparseQuantizedLinear(codes, scales, linear.group_size, mask[rows], grid=linear.grid)
