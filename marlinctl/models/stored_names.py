"""What checkpoints call the tensors of a model: transformers' own conversions, run backwards.

    model.layers.0.mlp.gate.weight           ─► model.layers.0.block_sparse_moe.gate.weight
    model.layers.0.mlp.experts.gate_up_proj  ─► model.layers.0.block_sparse_moe.experts.7.w1.weight, one tensor for each expert

The parameters of experts are stood in for by small ones that number their parts, so the way of each is seen, whatever the conversion is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from marlinctl.models.architectures import Experts
from marlinctl.models.refusals import refused

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class StoredNames:
    tensors: Mapping[str, str]  # of the model -> of checkpoints; parameters of experts that checkpoints do not hold as they are lack
    experts: Mapping[str, tuple[str, ...]]  # module -> weights of gate, up and down of expert {e}, where each has a tensor of its own


def stored_names(model: PreTrainedModel, kind: str, experts: Mapping[str, Experts]) -> StoredNames:
    """experts: by the full names of their modules. BadInput E390 for other tensors that are stored in another way."""
    from transformers.core_model_loading import revert_weight_conversion

    state: dict[str, Tensor] = dict(model.state_dict())
    numbers: list[tuple[str, int, int]] = []  # module, linear and expert of each number
    for module, known in experts.items():
        up = len(known.first)
        for parameter, linears in zip(known.parameters, (range(up), range(up, up + 1)), strict=True):
            first = len(numbers)
            numbers += [(module, i, e) for e in range(known.count) for i in linears]
            parts = torch.arange(first, len(numbers)).view(known.count, len(linears), 1)
            state[f"{module}.{parameter}"] = parts.transpose(1, 2) if known.transposed else parts
    whole = {id(tensor): name for name, tensor in state.items()}
    tensors: dict[str, str] = {}
    single: dict[tuple[str, int], dict[int, str]] = {}  # module and linear -> expert -> name
    for stored, tensor in revert_weight_conversion(model, state).items():
        if name := whole.get(id(tensor)):
            tensors[name] = stored
        elif tensor.dtype == torch.int64 and tensor.numel() == 1:
            module, i, e = numbers[int(tensor)]
            single.setdefault((module, i), {})[e] = stored
        else:
            raise refused(kind, f"its checkpoints hold {stored}, which no single tensor of transformers' model is")
    of_experts = {f"{module}.{parameter}" for module, known in experts.items() for parameter in known.parameters}
    if lost := sorted(set(state) - set(tensors) - of_experts):
        raise refused(kind, f"its checkpoints hold {lost[0]} in another way")
    found = {}
    for module, known in experts.items():
        names = [single.get((module, i), {}) for i in range(len(known.first) + 1)]
        if all(len(one) == known.count > 1 for one in names):
            found[module] = tuple(_template(one[0], one[1]) for one in names)
        elif any(f"{module}.{parameter}" not in tensors for parameter in known.parameters):
            raise refused(kind, f"its checkpoints hold the experts of {module} in another way")
    return StoredNames(tensors, found)


def _template(zero: str, one: str) -> str:
    """The name of expert {e}, from those of experts 0 and 1."""
    return ".".join("{e}" if a != b else a for a, b in zip(zero.split("."), one.split("."), strict=True))
