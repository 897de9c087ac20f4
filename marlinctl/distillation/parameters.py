"""Which parameters of transformers' model distillation trains, and how one is put together from tensors of the checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from marlinctl.models.architectures import Architecture
from marlinctl.models.places import Place, block_places


def trained_places(architecture: Architecture) -> dict[str, Place]:
    """What distillation trains: the linears of the blocks with their biases, and all norms. Embedding, head and routers stay."""
    found = {name: Place(name) for name in architecture.norm_tensors}
    for block in architecture.blocks:
        fixed = {name for name, shape in block.others.items() if len(shape) != 1} | block.buffers
        found |= {name: place for name, place in block_places(block).items() if name not in fixed}
    return {name: replace(place, parameter=architecture.module(place.parameter)) for name, place in found.items()}


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
        place.of(whole).copy_(piece)
    return whole


def parent_of(model: nn.Module, parameter: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter, and the parameter's name in it."""
    path, _, name = parameter.rpartition(".")
    return model.get_submodule(path), name
