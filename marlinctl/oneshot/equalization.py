"""Powers of two that are moved from the norms of a block into the linears behind them, before these are solved (quantize/equalize.py).

    linears behind a norm ─► exponents e of their columns ─► worth it? ─► norm x 2^-e, columns x 2^e ─► tried: the same block? ─► Folded

Which norm is in front of which linears is found out with the block's own code: the norm is multiplied by a pattern, and linears whose input
shows exactly that pattern are behind it. Whether anything else reads the norm's output, as a router does, shows when the block is run with
both changed: every other module with weights must be given what it was given before. What the block leaves does not show it alone: beside
large hidden states all that a block adds is small, and DeepSeek V3.2's choice of tokens changes nothing while all may be chosen. Norms that
compute with 1 + weight show no such pattern and are left alone, as are linears of experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from marlinctl.checkpoint.orders import COLUMN_EXPONENTS, ROW_EXPONENTS, shifted
from marlinctl.models.architectures import Block, Experts
from marlinctl.oneshot.folded import Folded
from marlinctl.quantize.equalize import WORTH, NormFed, column_exponents, fitted_exponents, relative_error, relative_squares
from marlinctl.system.processes import ALONE, Processes

_SAME = 1e-3  # relative difference of a token or a channel. Powers of two change no sum; otherwise it is about 1
_SMALLEST = 2.0**-24  # of float16, by which its small numbers may be off


class Walk(Protocol):
    """What is asked of the pipeline (sequential.py)."""

    def first_inputs(self, block: Block, layer: nn.Module, modules: Sequence[str]) -> tuple[dict[str, Tensor], Tensor]: ...

    def install(self, block: Block, layer: nn.Module, tensors: Iterable[str]) -> None: ...

    def put(self, block: Block, layer: nn.Module, tensors: Mapping[str, Tensor]) -> None: ...


@dataclass(frozen=True, slots=True)
class _Trial:
    """A block that exponents are tried in."""

    block: Block
    layer: nn.Module
    walk: Walk
    weights: Mapping[str, Tensor]  # linear -> its weight, as in the original; the module holds them
    inputs: Mapping[str, Tensor]  # module with weights that is run -> what it reads of the first sample, [T, K]
    left: Tensor  # by the block, or to its experts, [T, hidden]


class Equalization:
    """Of the norms of a model's blocks."""

    def __init__(self, chosen: Mapping[str, int], folded: Folded, *, processes: Processes = ALONE) -> None:
        """chosen: the linears whose columns may be multiplied -> group size, which divides K, or -1."""
        self.chosen, self.folded, self.processes = chosen, folded, processes

    def linears(self, block: Block) -> list[str]:
        """Those that `choose` reads, each once: all but those of experts."""
        parts = (part for part in block.parts if not isinstance(part, Experts))
        return list(dict.fromkeys(block.linear(name) for part in parts for stage in part.stages for name in stage))

    def norms(self, block: Block) -> dict[str, tuple[str, ...]]:
        """Norm -> its tensors, by their names in the checkpoint. Those that a linear of `stages` may be behind."""
        widths = {block.linears[names[0]].in_features for names in self.stages(block).values()}
        apart = {*block.buffers, *block.pieces, *(f"{name}.bias" for name in block.linears)}
        found: dict[str, tuple[str, ...]] = {}
        for name, shape in block.others.items():
            norm, _, leaf = name.rpartition(".")
            if leaf in ("weight", "bias") and len(shape) == 1 and shape[0] in widths and name not in apart:
                found[norm] = (*found.get(norm, ()), name)
        return {norm: names for norm, names in found.items() if f"{norm}.weight" in names}

    def stages(self, block: Block) -> dict[str, tuple[str, ...]]:
        """Module of the first -> linears that share an input, all of them chosen. Those behind a mixture of experts are left out."""
        found: dict[str, tuple[str, ...]] = {}
        for part in block.parts:
            if isinstance(part, Experts):
                break
            for stage in part.stages:
                names = tuple(map(block.linear, stage))
                if self.chosen.keys() >= set(names):
                    found[stage[0]] = names
        return found

    def choose(self, block: Block, layer: nn.Module, walk: Walk) -> bool:
        """Fold exponents into a block, whose module holds its other tensors. Returns whether the module holds weights of linears now."""
        weights = {name: self.folded.weights.read(f"{name}.weight") for name in self.linears(block)}
        stages, norms = self.stages(block), self.norms(block)
        squares = {place: relative_squares(weights[name] for name in names) for place, names in stages.items()}
        uneven = self.processes.share({place for place, square in squares.items() if bool(column_exponents(square).any())})
        if not norms or not uneven:
            return False
        walk.put(block, layer, {f"{name}.weight": weight for name, weight in weights.items()})
        readers = [name for name, module in layer.named_modules() if name and _has_weights_alone(module)]
        trial = _Trial(block, layer, walk, weights, *walk.first_inputs(block, layer, readers))
        for norm, tensors in norms.items():
            width = block.others[f"{norm}.weight"][0]
            if not any(place in uneven and trial.inputs[place].shape[-1] == width for place in stages):
                continue
            places = self._behind(trial, norm, tensors, stages)
            if not places:
                continue
            linears = {name: place for place in places for name in stages.pop(place)}
            exponents = self._exponents(trial, tensors, linears, torch.stack([squares[place] for place in places]).sum(0))
            if exponents is None:
                continue
            before = self.folded.of(block.index)
            columns = {name + COLUMN_EXPONENTS: exponents for name in linears}
            self._fold(trial, {**before, **columns, norm + ROW_EXPONENTS: -exponents}, tensors)
            walk.put(block, layer, {f"{name}.weight": shifted(weights[name], exponents, 1) for name in linears})
            multiplied = {block.parameter(f"{name}.weight").removesuffix(".weight") for name in linears}
            expected = {reader: shifted(x, -exponents, 1) if reader in multiplied else x for reader, x in trial.inputs.items()}
            if all(self.processes.gather(_shows(trial, expected))):
                trial = replace(trial, inputs=expected)
            else:  # something else reads what the norm makes
                self._fold(trial, before, tensors)
                walk.put(block, layer, {f"{name}.weight": weights[name] for name in linears})
        return True

    def _behind(self, trial: _Trial, norm: str, tensors: Sequence[str], stages: Mapping[str, tuple[str, ...]]) -> list[str]:
        """The stages whose input is what the norm makes."""
        width = trial.block.others[f"{norm}.weight"][0]
        pattern = torch.arange(width) % 3 - 1
        before = self.folded.of(trial.block.index)
        self._fold(trial, {**before, norm + ROW_EXPONENTS: pattern}, tensors)
        seen, _ = trial.walk.first_inputs(trial.block, trial.layer, list(stages))
        self._fold(trial, before, tensors)
        fed = [place for place, x in seen.items() if x.shape[-1] == width and _alike(x, shifted(trial.inputs[place], pattern, 1))]
        return [place for place in stages if all(self.processes.gather(place in fed))]

    def _exponents(self, trial: _Trial, tensors: Sequence[str], linears: Mapping[str, str], squares: Tensor) -> Tensor | None:
        """Of the columns of linears -> their place, behind a norm of these tensors. None where they do not pay."""
        fed = [NormFed(trial.weights[name], self.chosen[name]) for name in linears]
        energies = trial.inputs[next(iter(linears.values()))].float().square().mean(0)
        exponents = fitted_exponents(fed, energies, column_exponents(squares)).cpu()
        for name in linears:
            exponents[~_exact(trial.weights[name], exponents, 1).cpu()] = 0
        for name in tensors:
            exponents[~_exact(self.folded.weights.read(name), -exponents, 0).cpu()] = 0
        exponents = self.processes.share_tensor(exponents)
        pays = bool(exponents.any()) and relative_error(fed, energies, exponents) <= WORTH
        return exponents if self.processes.share(pays) else None

    def _fold(self, trial: _Trial, orders: Mapping[str, Tensor], tensors: Iterable[str]) -> None:
        """Have these in the block and its norm."""
        self.folded.put(trial.block.index, orders)
        trial.walk.install(trial.block, trial.layer, tensors)


def _exact(tensor: Tensor, exponents: Tensor, axis: int) -> Tensor:
    """For which of the exponents along an axis all values can be multiplied and divided again, [len(exponents)] bool."""
    there = shifted(tensor, exponents, axis)
    same = shifted(there, -exponents, axis) == tensor
    return same.all(1 - axis) if tensor.ndim == 2 else same


def _shows(trial: _Trial, expected: Mapping[str, Tensor]) -> bool:
    """Whether the modules of the block as it is now read this, and the block leaves what the original's does."""
    seen, left = trial.walk.first_inputs(trial.block, trial.layer, list(expected))
    return _alike(left, trial.left) and all(_alike(seen[reader], x) for reader, x in expected.items())


def _alike(found: Tensor, expected: Tensor) -> bool:
    """[T, K] both. In every token and in every channel: a few large ones would hide the others."""
    found, expected = found.float(), expected.float()
    apart = found - expected
    return all(
        bool((apart.norm(dim=axis) <= _SAME * expected.norm(dim=axis) + _SMALLEST * apart.shape[axis] ** 0.5).all()) for axis in (0, 1)
    )


def _has_weights_alone(module: nn.Module) -> bool:
    """A linear, norm, router or convolution. What holds other modules is given what these are given."""
    return not any(module.children()) and any(True for _ in module.parameters(recurse=False))
