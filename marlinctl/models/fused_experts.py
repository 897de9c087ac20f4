"""Experts in transformers' model: modules that hold all experts of a block in two 3-D parameters, found by those.

What the parameters mean is said by the module itself (transformers.integrations.moe.use_experts_implementation), by their shapes, and by
how the block calls it. What checkpoints call each expert is said by transformers' conversions (stored_names.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from marlinctl.models.architectures import Experts
from marlinctl.models.refusals import refused
from marlinctl.models.stored_names import StoredNames
from marlinctl.models.tracing import LENGTH, SAMPLES, Call, Trace

_FIRST, _LAST = ("gate_up_proj", "up_proj"), "down_proj"
_FUSED = 3  # dimensions of a parameter that holds all experts


def expert_modules(model: nn.Module, blocks: Sequence[str], kind: str) -> dict[str, nn.Module]:
    """By their full names. BadInput E390 for experts that are held in another way."""
    found = {}
    for prefix in blocks:
        for inner, module in model.get_submodule(prefix).named_modules():
            fused = {name for name, parameter in module._parameters.items() if parameter is not None and parameter.dim() == _FUSED}
            if _LAST in fused and fused & set(_FIRST):
                found[f"{prefix}.{inner}"] = module
                strange = [name for name, _ in module.named_parameters() if name not in _known(module)]
                if strange:
                    raise refused(kind, f"its experts have {strange[0]} besides projections and their biases")
            elif fused and "expert" in f"{inner} {type(module).__name__}".lower():
                raise refused(
                    kind, f"its experts ({inner} of a block) are no module of gate, up and down that transformers runs in one way"
                )
    return found


def _known(module: nn.Module) -> set[str]:
    names = {name for name in (*_FIRST, _LAST) if name in module._parameters}
    return names | {f"{name}_bias" for name in names}


def experts_of(name: str, module: nn.Module, prefix: str, trace: Trace, kind: str) -> Experts:
    """Facts of one module, without the names that checkpoints have for each expert."""
    calls = [call for call in trace.linears if call.name == name]
    if len(calls) != 1:
        raise refused(kind, f"the experts of a block are run {len(calls)} times")
    first = next(one for one in _FIRST if one in module._parameters)
    up, down = module.get_parameter(first), module.get_parameter(_LAST)
    x = calls[0].given
    assert x is not None
    hidden = x.shape[-1]
    transposed = (up.shape[1], down.shape[2]) == (hidden, hidden)
    if up.shape[0] != down.shape[0] or (not transposed and (up.shape[2], down.shape[1]) != (hidden, hidden)):
        raise refused(kind, f"its experts are of the shapes {list(up.shape)} and {list(down.shape)}, and not one gate, up and down each")
    module_name = name[len(prefix) + 1 :]
    parts = ("gate_proj", "up_proj") if first == _FIRST[0] else ("up_proj",)
    known = Experts(
        module_name, up.shape[0], 1, tuple(f"{module_name}.{{e}}.{part}" for part in parts), f"{module_name}.{{e}}.down_proj",
        parameters=(first, _LAST), transposed=transposed, interleaved=not getattr(module, "is_concatenated", True),
        biased=f"{_LAST}_bias" in module._parameters,
    )  # fmt: skip
    return _as_called(known, calls[0], kind)


def _as_called(known: Experts, call: Call, kind: str) -> Experts:
    """With what the block hands to the module."""
    tokens = SAMPLES * LENGTH
    given = [value for value in call.arguments.values() if isinstance(value, Tensor)]
    x, others = given[0], given[1:]
    if not others and x.shape[0] == known.count * tokens:
        return replace(known, shares_first=True)
    numbers = [value.is_floating_point() for value in others]
    if numbers == [False, True] and x.shape[0] == tokens and x.dim() == 2 and others[0].shape == others[1].shape:
        return replace(known, top_k=others[0].shape[1])
    shapes = [list(value.shape) for value in given]
    raise refused(
        kind, f"its experts are called with tensors of the shapes {shapes}, and not with input, experts and shares, in this order"
    )


def named(experts: Mapping[str, Experts], names: StoredNames, prefixes: Mapping[str, str]) -> dict[str, Experts]:
    """With the names that checkpoints have for each expert, or for all of them. prefixes: module -> its block."""
    found = {}
    for module, known in experts.items():
        start = len(prefixes[module]) + 1
        if module in names.experts:
            relative = tuple(name[start:].removesuffix(".weight") for name in names.experts[module])
            found[module] = replace(known, first=relative[:-1], last=relative[-1])
        else:
            whole = tuple(names.tensors[f"{module}.{parameter}"][start:] for parameter in known.parameters)
            found[module] = replace(known, whole=whole)
    return found
