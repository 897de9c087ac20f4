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
from typing import Protocol

import torch
from torch import Tensor, nn

from marlinctl.checkpoint.orders import COLUMN_EXPONENTS, ROW_EXPONENTS, shifted
from marlinctl.models.architectures import Block, Experts
from marlinctl.oneshot.folded import Folded
from marlinctl.quantize.equalize import WORTH, column_exponents, estimated_error
from marlinctl.system.processes import ALONE, Processes

_SAME = 1e-3  # relative difference of a token or a channel. Powers of two change no sum; otherwise it is about 1
_SMALLEST = 2.0**-24  # of float16, by which its small numbers may be off


class Walk(Protocol):
    """What is asked of the pipeline (sequential.py)."""

    def first_inputs(self, block: Block, layer: nn.Module, modules: Sequence[str]) -> tuple[dict[str, Tensor], Tensor]: ...

    def install(self, block: Block, layer: nn.Module, tensors: Iterable[str]) -> None: ...


class Equalization:
    """Of the norms of a model's blocks."""

    def __init__(self, chosen: Mapping[str, int], folded: Folded, *, processes: Processes = ALONE) -> None:
        """chosen: the linears whose columns may be multiplied -> group size, which divides K."""
        self.chosen, self.folded, self.processes = chosen, folded, processes

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
        stages, norms, read = self.stages(block), self.norms(block), self.folded.weights.read
        squares = {place: _squares(read(f"{name}.weight") for name in names) for place, names in stages.items()}
        uneven = self.processes.share({place for place, square in squares.items() if bool(column_exponents(square).any())})
        if not norms or not uneven:
            return False
        walk.install(block, layer, [f"{name}.weight" for name in block.linears if not _of_expert(block, name)])
        readers = [name for name, module in layer.named_modules() if name and _has_weights_alone(module)]
        plain, left = walk.first_inputs(block, layer, readers)
        open_places = {place: names for place, names in stages.items() if place in plain}
        for norm, tensors in norms.items():
            before, width = self.folded.of(block.index), block.others[f"{norm}.weight"][0]
            if not any(place in uneven and plain[place].shape[-1] == width for place in open_places):
                continue
            pattern = torch.arange(width) % 3 - 1
            self._fold(block, layer, walk, {norm + ROW_EXPONENTS: pattern}, tensors)
            seen, _ = walk.first_inputs(block, layer, list(open_places))
            behind = [place for place, x in seen.items() if x.shape[-1] == width and _alike(x, shifted(plain[place], pattern, 1))]
            self._restore(block, layer, walk, before, tensors)
            behind = [place for place in open_places if all(self.processes.gather(place in behind))]
            if not behind:
                continue
            linears = [name for place in behind for name in open_places.pop(place)]
            exponents = column_exponents(torch.stack([squares[place] for place in behind]).sum(0)).cpu()
            names = [*tensors, *(f"{name}.weight" for name in linears)]
            for name in names:
                tensor, axis = read(name), int(name not in tensors)
                exponents[~_exact(tensor, -exponents if axis == 0 else exponents, axis).cpu()] = 0
            exponents = self.processes.share_tensor(exponents)
            energies = {name: plain[place].float().square().mean(0) for place in behind for name in stages[place]}
            if not self.processes.share(self._pays(energies, exponents)):
                continue
            changed = {norm + ROW_EXPONENTS: -exponents} | {name + COLUMN_EXPONENTS: exponents for name in linears}
            self._fold(block, layer, walk, changed, names)
            seen, again = walk.first_inputs(block, layer, readers)
            multiplied = {block.parameter(f"{name}.weight").removesuffix(".weight") for name in linears}
            wanted = {reader: shifted(x, -exponents, 1) if reader in multiplied else x for reader, x in plain.items()}
            same = _alike(again, left) and all(_alike(seen[reader], x) for reader, x in wanted.items())
            if not all(self.processes.gather(same)):  # something else reads what the norm makes
                self._restore(block, layer, walk, before, names)
                continue
            plain |= {reader: seen[reader] for reader in multiplied}
        return True

    def _pays(self, energies: Mapping[str, Tensor], exponents: Tensor) -> bool:
        """Whether the error of linears is expected to fall. energies: of the inputs of each, [K]."""
        sums = {True: 0.0, False: 0.0}
        for name, energy in energies.items():
            weight = self.folded.weights.read(f"{name}.weight")
            for changed in sums:
                tried = exponents if changed else torch.zeros_like(exponents)
                sums[changed] += estimated_error(weight, energy, tried, self.chosen[name])
        return bool(exponents.any()) and sums[True] <= WORTH * sums[False]

    def _fold(self, block: Block, layer: nn.Module, walk: Walk, changed: Mapping[str, Tensor], tensors: Iterable[str]) -> None:
        self.folded.put(block.index, {**self.folded.of(block.index), **changed})
        walk.install(block, layer, tensors)

    def _restore(self, block: Block, layer: nn.Module, walk: Walk, before: Mapping[str, Tensor], tensors: Iterable[str]) -> None:
        self.folded.put(block.index, before)
        walk.install(block, layer, tensors)


def _squares(weights: Iterable[Tensor]) -> Tensor:
    """[K] float32: sums of squares of the columns of weights [N, K], over all of them."""
    found: Tensor = sum(weight.float().square().sum(0) for weight in weights)  # type: ignore[assignment]
    return found


def _exact(tensor: Tensor, exponents: Tensor, axis: int) -> Tensor:
    """For which of the exponents along an axis all values can be multiplied and divided again, [len(exponents)] bool."""
    there = shifted(tensor, exponents, axis)
    same = shifted(there, -exponents, axis) == tensor
    return same.all(1 - axis) if tensor.ndim == 2 else same


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


def _of_expert(block: Block, name: str) -> bool:
    return not any(name in map(block.linear, stage) for part in block.parts if not isinstance(part, Experts) for stage in part.stages)
