"""What blocks are given besides the hidden states and is of the tokens (models/token_arguments.py), for all samples.

    per token   computed once, with the embeddings: Gemma 4's per-layer inputs
    shared      left by a block for later ones: its keys and values. The compressed model and the reference model have their own

Both lie in scratch. A block is handed what belongs to the samples that it is run on. What it leaves replaces what an earlier run of it
left; the last run is that with its final weights.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from marlinctl.models.architectures import Architecture, Block
from marlinctl.system.offload import Scratch, Slot

COMPRESSED, REFERENCE = "compressed", "reference"


class TokenArguments:
    """Of [samples, length] tokens on their way through a model."""

    def __init__(
        self, architecture: Architecture, samples: int, length: int, dtype: torch.dtype, device: torch.device, scratch: Scratch
    ) -> None:
        self.architecture, self.device = architecture, device
        self.samples, self.length, self.dtype, self.scratch = samples, length, dtype, scratch
        self.kept: dict[str, Slot] = {}  # of `per_token` -> all samples
        self.shared: dict[str, dict[str, tuple[Slot, ...]]] = {}  # model -> name -> all samples

    def keep(self, block: Block, part: slice, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Note what a block is given for a range of samples; returns what is the same for all."""
        for name, key in block.given.items():
            value: Tensor = arguments[name]
            if key not in self.kept:
                self.kept[key] = self.scratch.tensor(key, (self.samples, *value.shape[1:]), value.dtype)
            self.kept[key][part] = value
        return {name: value for name, value in arguments.items() if name not in block.given and name != block.shares}

    def of(self, block: Block, part: slice, model: str) -> dict[str, Any]:
        """What a block is given for a range of samples."""
        found: dict[str, Any] = {name: self.kept[key][part].to(self.device) for name, key in block.given.items()}
        if block.shares:
            found[block.shares] = SharedOfSamples(self, model, part)
        return found

    def slots(self, model: str) -> Mapping[str, tuple[Slot, ...]]:
        """What blocks of a model leave for later ones, all samples."""
        if model not in self.shared:
            self.shared[model] = {
                name: tuple(
                    self.scratch.tensor(f"{model} {name} {i}", (self.samples, *(n or self.length for n in shape)), self.dtype)
                    for i, shape in enumerate(shapes)
                )
                for name, shapes in self.architecture.shared.items()
            }
        return self.shared[model]

    def states(self, model: str) -> dict[str, Tensor]:
        """The same, to resume from."""
        everything = slice(0, self.samples)
        return {f"{model}.{name}.{i}": slot[everything] for name, slots in self.slots(model).items() for i, slot in enumerate(slots)}

    def restore(self, model: str, states: Mapping[str, Tensor]) -> None:
        for name, slots in self.slots(model).items():
            for i, slot in enumerate(slots):
                slot[slice(0, self.samples)] = states[f"{model}.{name}.{i}"]


class SharedOfSamples(UserDict[str, Any]):
    """What blocks leave for later ones, of a range of samples: reads and writes go to scratch."""

    def __init__(self, whole: TokenArguments, model: str, part: slice) -> None:
        super().__init__()
        self.whole, self.model, self.part = whole, model, part

    def of(self, part: slice) -> SharedOfSamples:
        return SharedOfSamples(self.whole, self.model, part)

    def __getitem__(self, name: str) -> Any:
        values = tuple(slot[self.part].to(self.whole.device) for slot in self.whole.slots(self.model)[name])
        return values

    def __setitem__(self, name: str, values: Any) -> None:
        for slot, value in zip(self.whole.slots(self.model)[name], values, strict=True):
            slot[self.part] = value


def for_samples(arguments: Mapping[str, Any], part: slice) -> dict[str, Any]:
    """The arguments of a module that were noted for other samples."""
    return {name: value.of(part) if isinstance(value, SharedOfSamples) else value for name, value in arguments.items()}
