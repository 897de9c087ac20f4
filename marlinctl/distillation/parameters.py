"""Where a tensor of the checkpoint lies in transformers' model.

Mostly under its own name. The experts of a mixture are 2-D linears on disk, which transformers stacks into two 3-D parameters:

    experts.gate_up_proj [E, 2 I, H]     rows 0..I are gate, I..2I are up
    experts.down_proj    [E, H, I]
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from marlinctl.models.architectures import Architecture, Block, Experts


@dataclass(frozen=True, slots=True)
class Place:
    parameter: str
    index: tuple[int | slice, ...] = ()  # the part of the parameter; () is all of it


def block_places(block: Block) -> dict[str, Place]:
    """Every tensor of a block -> its place. Parameters are named as in the whole model."""
    found = {name: Place(block.renamed.get(name, name)) for name in block.others}
    found |= {f"{name}.weight": Place(f"{name}.weight") for name in block.linears}
    if isinstance(block.mlp, Experts):
        experts = f"{block.prefix}.{block.mlp.module}"
        for e in range(block.mlp.count):
            gate, up, down = (f"{block.prefix}.{name.format(e=e)}" for name in (*block.mlp.first, block.mlp.last))
            width = block.linears[gate].out_features
            found[f"{gate}.weight"] = Place(f"{experts}.gate_up_proj", (e, slice(0, width)))
            found[f"{up}.weight"] = Place(f"{experts}.gate_up_proj", (e, slice(width, 2 * width)))
            found[f"{down}.weight"] = Place(f"{experts}.down_proj", (e,))
    return found


def trained_places(architecture: Architecture) -> dict[str, Place]:
    """What distillation trains: the linears of the blocks with their biases, and all norms. Embedding, head and routers stay."""
    found = {name: Place(name) for name in architecture.norm_tensors}
    for block in architecture.blocks:
        fixed = {name for name, shape in block.others.items() if len(shape) != 1} | block.buffers
        found |= {name: place for name, place in block_places(block).items() if name not in fixed}
    return found


def by_parameter(places: Mapping[str, Place]) -> dict[str, list[str]]:
    """Parameter -> the tensors it is made of."""
    found: dict[str, list[str]] = {}
    for tensor, place in places.items():
        found.setdefault(place.parameter, []).append(tensor)
    return found


def assemble(pieces: Iterable[tuple[Place, Tensor]], shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A parameter, or a mask of one, from its pieces."""
    whole = torch.zeros(shape, dtype=dtype)
    for place, piece in pieces:
        whole[place.index] = piece.to(dtype)
    return whole


def parent_of(model: nn.Module, parameter: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter, and the parameter's name in it."""
    path, _, name = parameter.rpartition(".")
    return model.get_submodule(path), name
