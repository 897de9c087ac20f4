"""The 2:4 masks of a student in training: fixed, or renewed as in CAST (arXiv 2509.25996).

    fixed      pruned weights are zero from the start, and are set to zero again after each step
    renewed    every weight takes part in the forward pass and is trained. Every `interval` steps, and after the last, the two smallest
               weights of each four are the pruned ones; pruned weights decay, and what is left of them in the end is set to zero

Step t of T of a renewed mask:

    AdamW  ─►  pruned weights move toward zero by  decay · unit · 2 (t + 1) / (T (T + 1)),  and stop there  ─►  the mask again, when due

`unit` is the mean magnitude of the parameter's kept weights before the training, so that one `decay` fits models and linears of any scale.
The amount rises linearly and sums to `decay` units. It depends on neither gradient nor learning rate, which falls to 0 while the decay
rises: what a gradient holds up early is let go late. CAST's decay follows the optimizer's second moments and adds two learned factors
for each row, which are left out here: the kept weights are trained themselves.

The mask of a four that the pattern does not cover (its linear stays dense) prunes nothing, before and after.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import softshrink

from marlinctl.distillation.distributed import Processes, local, shard_like, whole
from marlinctl.distillation.open import Pattern
from marlinctl.distillation.parameters import assemble, by_parameter
from marlinctl.models.places import Place
from marlinctl.planning.training_settings import steps_of
from marlinctl.recipes.schema import Distill
from marlinctl.sparsify.mask import best_two
from marlinctl.sparsify.types import QUAD

_AT_ONCE = 1 << 24  # weights whose mask is renewed together: the comparisons take twelve bytes each


@dataclass(frozen=True, slots=True)
class Masked:
    """A parameter of the model with its mask."""

    name: str
    linears: Mapping[str, Place]  # whose weights lie in it and are pruned
    parameter: Tensor
    pruned: Tensor  # bool, True = pruned; divided among processes as the parameter is; renewed in place
    axis: int  # of the parameter, along which the fours lie: -2 where experts are stored transposed
    kept: int  # weights, of the whole parameter
    unit: float  # their mean magnitude before the training


@dataclass(frozen=True, slots=True)
class Renewal:
    """How masks are renewed in a training of `steps`."""

    interval: int
    decay: float
    steps: int

    def amount(self, step: int) -> float:
        """By how many units pruned weights decay in a step."""
        return self.decay * 2 * (step + 1) / (self.steps * (self.steps + 1))

    def due(self, step: int) -> bool:
        return (step + 1) % self.interval == 0 or step + 1 == self.steps

    @property
    def count(self) -> int:
        return -(-self.steps // self.interval)


class Masks:
    """All masks of the student."""

    def __init__(self, masked: Sequence[Masked], renewal: Renewal | None, processes: Processes) -> None:
        """renewal: None where the masks are fixed."""
        self.masked, self.renewal, self._processes = masked, renewal, processes
        self._replaced = torch.zeros((), dtype=torch.int64, device=processes.device)  # kept weights, for `progress`

    @torch.no_grad()
    def prune(self) -> None:
        """Set to zero what is pruned."""
        for held in self._held():
            held.parameter.masked_fill_(held.pruned, 0.0)

    @torch.no_grad()
    def constrain(self, step: int) -> None:
        """What follows an optimizer step, which moves pruned weights too: they have a gradient. Waits for nothing."""
        if self.renewal is None:
            self.prune()
            return
        amount = self.renewal.amount(step)
        for held in self._held():
            weight = held.parameter
            weight.copy_(torch.where(held.pruned, softshrink(weight, amount * held.unit), weight))
            if self.renewal.due(step):
                new = renewed(weight, held.pruned, held.axis)
                self._replaced += (new & ~held.pruned).sum()
                held.pruned.copy_(new)

    def progress(self) -> dict[str, float]:
        """Of renewed masks: the share of kept weights that were replaced since the last call, and what pruned weights still hold. Waits for
        the device; all processes must ask together."""
        if self.renewal is None:
            return {}
        replaced = self._sum(self._replaced.clone()).item()
        self._replaced.zero_()
        return {"mask_changed": replaced / max(sum(masked.kept for masked in self.masked), 1), "pruned_norm": self.pruned_norm()}

    @torch.no_grad()
    def pruned_norm(self) -> float:
        """Norm of the pruned weights as a share of the norm of all weights of these parameters. All processes must ask together."""
        squares = torch.zeros(2, dtype=torch.float64, device=self._processes.device)
        for held in self._held():
            for i, weight in enumerate((held.parameter.masked_fill(~held.pruned, 0.0), held.parameter)):
                squares[i] += torch.linalg.vector_norm(weight, dtype=torch.float64).square()
        pruned, everything = self._sum(squares).tolist()
        return float((pruned / everything) ** 0.5) if everything else 0.0

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Renewed masks, to resume from. All processes must ask together."""
        for masked in self.masked if self.renewal is not None else ():
            yield f"mask.{masked.name}", whole(masked.pruned)

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """state: what a saved state holds, in the main process; nothing in the others."""
        for masked in self.masked if self.renewal is not None else ():
            found = state.get(f"mask.{masked.name}")
            spread = self._processes.spread(None if found is None else found.float(), masked.parameter)
            local(masked.pruned).copy_(local(spread) != 0)

    def of_linears(self) -> Iterator[tuple[str, Tensor]]:
        """Linear -> its mask [N, K], True = kept. All processes must ask together."""
        for masked in self.masked:
            pruned = whole(masked.pruned)
            for linear, place in masked.linears.items():
                yield linear, ~place.of(pruned)

    def _held(self) -> Iterator[Masked]:
        """With this process's part of each parameter and mask."""
        for masked in self.masked:
            yield replace(masked, parameter=local(masked.parameter), pruned=local(masked.pruned))

    def _sum(self, part: Tensor) -> Tensor:
        """Over all processes, of what each has a part of; of replicated ones, each has it all."""
        return self._processes.sum(part) if self._processes.sharded else part


def load_masks(model: nn.Module, places: Mapping[str, Place], pattern: Pattern, asked: Distill, processes: Processes) -> Masks:
    """The masks that a training begins with. The model may be sharded already."""
    renewal = Renewal(asked.mask_interval, asked.mask_decay, steps_of(asked)) if asked.mask == "renewed" else None
    pruned_linears = {layer: places[f"{layer}.weight"] for layer in pattern.shapes if f"{layer}.weight" in places}
    found = []
    for name, linears in by_parameter(pruned_linears).items():
        parameter = model.get_parameter(name)
        pieces = ((pruned_linears[layer], ~pattern.mask(layer)) for layer in linears)
        pruned = assemble(pieces, parameter.shape, torch.bool).to(processes.device)
        axis = -2 if pruned_linears[linears[0]].transposed else -1
        unit = mean_kept(whole(parameter.detach()), pruned, axis) if renewal is not None else 0.0
        held = {layer: pruned_linears[layer] for layer in linears}
        found.append(Masked(name, held, parameter, shard_like(pruned, parameter), axis, int(pruned.sum()), unit))
    return Masks(found, renewal, processes)


def renewed(weight: Tensor, pruned: Tensor, axis: int) -> Tensor:
    """The mask of a parameter [..., K] or [..., K, R], True = pruned: the two smallest of each four along K. Among equals the lower
    index is kept. Where `pruned`, the mask until now, prunes nothing of a four, nothing is pruned.
    """
    rows = max(1, _AT_ONCE // max(1, weight[:1].numel()))
    found = torch.empty_like(pruned)
    for new, w, old in zip(*(tensor.split(rows) for tensor in (found, weight, pruned)), strict=True):
        kept = best_two(_fours(w.abs(), axis).movedim(-1, 0)).movedim(0, -1)
        _fours(new, axis).copy_(~kept & _fours(old, axis).any(-1, keepdim=True))
    return found


def mean_kept(weight: Tensor, pruned: Tensor, axis: int) -> float:
    """Mean magnitude of what the mask keeps in the fours that it covers."""
    kept = ~_fours(pruned, axis) & _fours(pruned, axis).any(-1, keepdim=True)
    total = _fours(weight, axis).abs().masked_fill(~kept, 0.0).sum(dtype=torch.float64)
    return float(total / kept.sum().clamp(min=1))


def _fours(tensor: Tensor, axis: int) -> Tensor:
    """[..., K/4, 4]: a view."""
    return tensor.movedim(axis, -1).unflatten(-1, (-1, QUAD))
