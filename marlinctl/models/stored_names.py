"""What checkpoints call the tensors of a model: transformers' own conversions, run backwards.

    model.layers.0.mlp.gate.weight           ─► model.layers.0.block_sparse_moe.gate.weight
    model.layers.0.mlp.experts.gate_up_proj  ─► model.layers.0.block_sparse_moe.experts.7.w1.weight, one tensor for each expert

    model.layers.0.mixer.in_proj.weight      ─► backbone.layers.0.mixer.in_proj.weight

A name counts where the way back leads to the tensor that it came from, and where no other tensor has it: then transformers loads a
checkpoint in these names. The parameters of experts are stood in for by small ones that number their parts, so the way of each is seen,
whatever the conversion is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple

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
    pieces: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # parameters held as several tensors -> those, and their rows

    def prefix(self, module: str, block: str) -> str:
        """What checkpoints call a module that holds `block`, by the names of that block's tensors: "backbone" for "model"."""
        pairs = (_without_common_end(name, stored) for name, stored in self.tensors.items() if name.startswith(f"{block}."))
        above = ((name, stored) for name, stored in pairs if name in ("", module) or module.startswith(f"{name}."))
        found = Counter(f"{stored}{module[len(name) :]}".removeprefix(".") for name, stored in above)
        return found.most_common(1)[0][0] if found else self._above_all(module, block)

    def _above_all(self, module: str, block: str) -> str:
        """The same where checkpoints call everything in the block otherwise (Mistral Large 4): by what all names begin with."""
        named = [stored.split(".") for name, stored in self.tensors.items() if name.startswith(f"{block}.")]
        begins = ".".join(parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*named, strict=False)))
        inner = block[len(module) :]
        return f".{begins}".removesuffix(inner).removeprefix(".") if begins and f".{begins}".endswith(inner) else module

    def within(self, decoder: str, prefix: str) -> StoredNames:
        """The same with the decoder's own name in place of `prefix`."""
        begins = f"{prefix}." if prefix else ""

        def named(stored: str) -> str:
            return f"{decoder}.{stored.removeprefix(begins)}" if stored.startswith(begins) else stored

        tensors = {name: named(stored) if name.startswith(f"{decoder}.") else stored for name, stored in self.tensors.items()}
        pieces = {name: {named(stored): rows for stored, rows in parts.items()} for name, parts in self.pieces.items()}
        return StoredNames(tensors, {name: tuple(map(named, weights)) for name, weights in self.experts.items()}, pieces)


def stored_names(model: PreTrainedModel, kind: str, experts: Mapping[str, Experts]) -> StoredNames:
    """experts: by the full names of their modules. BadInput E390 for other tensors that are stored in another way, and for names from which
    transformers does not find back.
    """
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
    strange: list[str] = []
    for stored, tensor in revert_weight_conversion(model, state).items():
        if name := whole.get(id(tensor)):
            tensors[name] = stored
        elif tensor.dtype == torch.int64 and tensor.numel() == 1:
            module, i, e = numbers[int(tensor)]
            single.setdefault((module, i), {})[e] = stored
        else:
            strange.append(stored)
    of_experts = {f"{module}.{parameter}" for module, known in experts.items() for parameter in known.parameters}
    lost = sorted(set(state) - set(tensors) - of_experts)
    pieces = _in_pieces(model, state, lost)
    if odd := [name for name in strange if not any(name in parts for parts in pieces.values())]:
        raise refused(kind, f"its checkpoints hold {odd[0]}, which no single tensor of transformers' model is")
    if lost := [name for name in lost if name not in pieces]:
        raise refused(kind, f"its checkpoints hold {lost[0]} in another way")
    found = {}
    for module, known in experts.items():
        names = [single.get((module, i), {}) for i in range(len(known.first) + 1)]
        if all(len(one) == known.count > 1 for one in names):
            found[module] = tuple(template(one[0], one[1]) for one in names)
        elif any(f"{module}.{parameter}" not in tensors for parameter in known.parameters):
            raise refused(kind, f"its checkpoints hold the experts of {module} in another way")
    _refuse_one_way(model, kind, tensors, state)
    return StoredNames(tensors, found, pieces)


def _in_pieces(model: PreTrainedModel, state: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, dict[str, int]]:
    """Those of the parameters `names` that checkpoints hold as several tensors, one below the other -> these, and their rows as
    transformers saves them; it loads others (`with_stored_pieces`)."""
    from transformers.core_model_loading import revert_weight_conversion

    numbered = dict(state)
    rows: list[str] = []  # the parameter of each number
    for name in names:
        count = state[name].shape[0]
        numbered[name] = torch.arange(len(rows), len(rows) + count, dtype=torch.int32).view(count, *[1] * (state[name].dim() - 1))
        rows += [name] * count
    made = revert_weight_conversion(model, numbered) if names else {}
    found: dict[str, dict[str, int]] = {}
    read: dict[str, list[int]] = {}
    for name, tensor in made.items():
        numbers = tensor.flatten().tolist() if tensor.dtype == torch.int32 else []
        if numbers and (owner := rows[numbers[0]]) in names:
            found.setdefault(owner, {})[name] = len(numbers)
            read.setdefault(owner, []).extend(numbers)
    whole = {owner: parts for owner, parts in found.items() if read[owner] == [i for i, name in enumerate(rows) if name == owner]}
    return {owner: parts for owner, parts in whole.items() if len(parts) > 1}


class Loaded(NamedTuple):
    """What transformers makes of a tensor of a checkpoint."""

    name: str
    converted: bool  # it is another tensor: a part, or several put together
    others: tuple[str, ...] = ()  # that are made of it too
    part: int = 0  # of those that are put together, in their order: gate is 0, up is 1


def module_names(model: PreTrainedModel, held: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Loaded]:
    """Names of a checkpoint -> what transformers loads the tensor as.

    held: the model's state dict. What the model has no place for comes out under a name that is not in it.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    known = dict(held)
    found = {}
    for name in sorted(names):
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if renamed not in held and name in held:  # a spelling of its own modules
            renamed, pattern = name, None
        converter = next((one for one in converters if pattern in one.source_patterns), None)
        parts: list[str] = [] if converter is None else converter.target_patterns
        others = tuple(renamed.replace(parts[0], part, 1) for part in parts[1:] if parts[0] in renamed)
        found[name] = Loaded(renamed, pattern is not None, others, 0 if converter is None else converter.source_patterns.index(pattern))
    return found


def _refuse_one_way(model: PreTrainedModel, kind: str, tensors: Mapping[str, str], state: Mapping[str, Tensor]) -> None:
    """BadInput E390 for a name that two tensors have, or that transformers loads as another tensor."""
    renamed = {name: stored for name, stored in tensors.items() if name != stored}
    back = module_names(model, state, renamed.values())
    shared = Counter(tensors.values())
    for name, stored in renamed.items():
        if back[stored].name != name or shared[stored] > 1:
            raise refused(
                kind, f"its checkpoints hold {name} in another way, as {stored}, and transformers does not load that name as this tensor"
            )


def _without_common_end(one: str, other: str) -> tuple[str, str]:
    """Two names without the last parts that they share."""
    a, b = one.split("."), other.split(".")
    while a and b and a[-1] == b[-1]:
        a.pop()
        b.pop()
    return ".".join(a), ".".join(b)


def template(zero: str, one: str) -> str:
    """The name of expert {e}, from those of experts 0 and 1."""
    return ".".join("{e}" if a != b else a for a, b in zip(zero.split("."), one.split("."), strict=True))
