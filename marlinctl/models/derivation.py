"""The architecture of a model that is not in the table: transformers builds it without weights, and one forward pass shows what runs.

    meta model ─► linears and embeddings stand in for themselves (they return zeros) ─► forward over four tokens ─► calls, in order
        ─► a block's linears by what they read:   [q k v] [o] [gate up] [down]   ─► two branches, each in a module of its own
        ─► the embedding, the blocks, the final norm and the head, by what was called between them

No weight is read and no matrix multiplied, so it takes a second after the imports, whatever the size. What the pipeline cannot run
(oneshot/sequential.py) is refused with the reason: experts, recurrent blocks, branches without a module, inputs that depend on tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from torch import Tensor, nn

from marlinctl.errors import BadInput
from marlinctl.models.architectures import Architecture, Block, Branch, LinearSpec, Shape
from marlinctl.models.meta_model import bound, build
from marlinctl.models.transformers_config import building

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOKENS = 4
_TREE = "docs/models.md has the models that work, and why others do not"


@dataclass(frozen=True, slots=True)
class _Call:
    """A module was called. `given` is the first tensor that it was given, `returned` the first that it returned."""

    name: str
    given: Tensor | None
    returned: Tensor | None
    elements: int  # of the tuple that it returned, 0 where it is none
    order: int  # of the end of the call; linears that ran inside ended before


@dataclass(slots=True)
class _Trace:
    """Calls by the time they ended."""

    calls: list[_Call] = field(default_factory=list)
    linears: list[_Call] = field(default_factory=list)
    arguments: dict[str, Mapping[str, Any]] = field(default_factory=dict)  # block, or module with linears in it -> what it was given

    def of(self, name: str) -> list[_Call]:
        return [call for call in self.calls if call.name == name]


def derived_architecture(config: Mapping[str, Any]) -> Architecture:
    """Names and shapes of the model that `config` describes, from transformers' own code.

    BadInput E390 with the reason for a model that the pipeline cannot run; E392 for one that transformers cannot build.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = str(config.get("model_type"))
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        _refuse(kind, "transformers has no language model of this type; a newer release may have one")
    return architecture_of_model(cast("PreTrainedModel", build(config, torch.float32)), kind)


def architecture_of_model(model: PreTrainedModel, kind: str) -> Architecture:
    """The same of a model on the meta device. kind: what it is called in a refusal."""
    names = {module: name for name, module in model.named_modules()}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    decoder, blocks_at = _stack(model, kind, names)
    _refuse_experts(model.get_submodule(blocks_at), kind)
    embedding = names.get(model.get_input_embeddings())
    if embedding is None or not embedding.startswith(f"{decoder}."):
        _refuse(kind, "its token embedding is not part of the decoder")
    blocks = [f"{blocks_at}.{i}" for i in range(len(list(model.get_submodule(blocks_at).children())))]
    trace = _traced(model, kind, blocks, first=1)
    _refuse_arguments_of_tokens(kind, trace, _traced(model, kind, blocks, first=2))
    norm = _final_norm(kind, trace, decoder, blocks[-1])
    buffers = {name for name, _ in model.named_buffers() if name in shapes}
    built = tuple(_block(i, prefix, model, kind, trace, shapes, buffers) for i, prefix in enumerate(blocks))

    head = _head(model, names, trace, norm)
    if renamed := _renamed(model, kind, head):
        shapes = {renamed.get(name, name): shape for name, shape in shapes.items()}
        if head is not None:
            head = replace(head, name=renamed.get(f"{head.name}.weight", f"{head.name}.weight").removesuffix(".weight"))
    tied = head is not None and bool(model.config.tie_word_embeddings)
    expected = {name: shape for name, shape in shapes.items() if head is None or not tied or name != f"{head.name}.weight"}
    apart = tuple(f"{part}." for part in (blocks_at, embedding, norm))
    outside = tuple(n for n in expected if n.startswith(f"{decoder}.") and not n.startswith(apart))
    vocab, hidden = shapes[f"{embedding}.weight"]
    return Architecture(
        kind, decoder, built, embedding, norm, None if tied else head, hidden, vocab, expected,
        tied=head if tied else None, outside=outside,
    )  # fmt: skip


def _refuse(kind: str, reason: str) -> NoReturn:
    raise BadInput("E390", f"models of type {kind!r} cannot be compressed: {reason}", where="config.json, key model_type", fix=_TREE)


# ---- what the model is made of -------------------------------------------------------------------------------------------------------


def _stack(model: PreTrainedModel, kind: str, names: Mapping[nn.Module, str]) -> tuple[str, str]:
    """Names of the decoder and of its list of blocks."""
    decoder = getattr(model, "base_model", model)
    if hasattr(decoder, "decoder"):
        decoder = decoder.decoder
    count = getattr(model.config, "num_hidden_layers", None)
    lists = [module for module in decoder.children() if isinstance(module, nn.ModuleList) and len(module) == count]
    if len(lists) != 1 or decoder is model:
        _refuse(kind, "it is not a decoder with one list of blocks, as many as config.json says")
    return names[decoder], names[lists[0]]


def _refuse_experts(blocks: nn.Module, kind: str) -> None:
    for name, parameter in blocks.named_parameters():
        if parameter.dim() == 3 and "expert" in name:
            index, _, inner = name.partition(".")
            _refuse(kind, f"it is a mixture of experts (block {index} holds {inner}), and no family that marlinctl knows")


# ---- the forward pass ----------------------------------------------------------------------------------------------------------------


def _traced(model: nn.Module, kind: str, blocks: Sequence[str], first: int) -> _Trace:
    """Calls of one forward pass over tokens `first`, `first` + 1, ... Weights are stand-ins of one number."""
    trace = _Trace()
    handles: list[Any] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            setattr(module, "forward", partial(_linear, trace, name, module.out_features))  # noqa: B010 - mypy: a method
        elif isinstance(module, nn.Embedding):
            setattr(module, "forward", partial(_embedding, module.embedding_dim))  # noqa: B010
        else:
            handles.append(module.register_forward_hook(partial(_ended, trace, name), with_kwargs=True))
    for prefix in blocks:
        for inner, module in model.get_submodule(prefix).named_modules():
            if not inner or any(isinstance(child, nn.Linear) for child in module.children()):
                name = f"{prefix}.{inner}" if inner else prefix
                if not isinstance(module, nn.Linear):
                    handles.append(module.register_forward_pre_hook(partial(_begins, trace, name), with_kwargs=True))
    try:
        with torch.no_grad(), _stand_ins(model):
            ids = torch.arange(first, first + _TOKENS).unsqueeze(0)
            with building("config.json"):
                model(input_ids=ids, use_cache=False)
    except BadInput as error:
        reason = error.problems[0].what.partition(": ")[2]  # behind "transformers cannot build this model"
        _refuse(kind, f"its forward pass cannot be followed without weights ({reason})")
    finally:
        for handle in handles:
            handle.remove()
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                del module.forward
    return trace


@contextmanager
def _stand_ins(model: nn.Module) -> Iterator[None]:
    """Parameters on the CPU, each one number that is repeated; meta parameters again afterwards."""
    kept = [(module, dict(module._parameters)) for module in model.modules()]
    try:
        for module, parameters in kept:
            for name, parameter in parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(torch.ones(1).expand(parameter.shape), requires_grad=False)
        yield
    finally:
        for module, parameters in kept:
            module._parameters.update(parameters)


def _linear(trace: _Trace, name: str, out_features: int, x: Tensor) -> Tensor:
    y = x.new_zeros(*x.shape[:-1], out_features)
    trace.linears.append(_Call(name, x, y, 0, len(trace.calls)))
    return y


def _embedding(width: int, ids: Tensor, *_: Any, **__: Any) -> Tensor:
    return ids.to(torch.float32).unsqueeze(-1).repeat(*(1 for _ in ids.shape), width)


def _begins(trace: _Trace, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    trace.arguments[name] = bound(module, args, kwargs)


def _ended(trace: _Trace, name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    given = args[0] if args else kwargs.get("hidden_states")
    returned = output[0] if isinstance(output, tuple) and output else output
    trace.calls.append(
        _Call(
            name,
            given if isinstance(given, Tensor) else None,
            returned if isinstance(returned, Tensor) else None,
            len(output) if isinstance(output, tuple) else 0,
            len(trace.calls),
        )
    )


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    """One tensor, or two views of all of it."""
    return a is not None and b is not None and (a is b or (a.data_ptr() == b.data_ptr() and a.numel() == b.numel() and a.dtype == b.dtype))


def _refuse_arguments_of_tokens(kind: str, one: _Trace, other: _Trace) -> None:
    """The pipeline keeps what blocks are given besides hidden states once for all samples."""
    for module, arguments in one.arguments.items():
        for key, value in list(arguments.items())[1:]:
            if isinstance(value, Mapping) and any(isinstance(held, Tensor | tuple) for held in value.values()):
                _refuse(kind, f"{module} is given {key}, which other blocks fill, besides the hidden states")
            if not _equal(value, other.arguments[module].get(key)):
                _refuse(kind, f"{module} is given {key}, which depends on the tokens, besides the hidden states")


def _equal(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(map(_equal, a, b))
    return True


def _final_norm(kind: str, trace: _Trace, decoder: str, last_block: str) -> str:
    """The module that is given the last block's output."""
    ends = trace.of(last_block)
    if len(ends) != 1:
        _refuse(kind, f"its blocks are run {len(ends)} times")
    for call in trace.calls[ends[0].order + 1 :]:
        if call.name.startswith(f"{decoder}.") and _same(call.given, ends[0].returned):
            if len(trace.of(call.name)) > 1:
                _refuse(kind, f"{call.name} runs in other places too, and not only after the last block")
            return call.name
    _refuse(kind, "no norm follows its last block")


def _head(model: PreTrainedModel, names: Mapping[nn.Module, str], trace: _Trace, norm: str) -> LinearSpec | None:
    """The output head, where it reads what the final norm returns."""
    module = model.get_output_embeddings()
    if not isinstance(module, nn.Linear):
        return None
    name = names[module]
    calls = [call for call in trace.linears if call.name == name]
    if len(calls) != 1 or not _same(calls[0].given, trace.of(norm)[-1].returned):
        return None
    return LinearSpec(name, module.out_features, module.in_features, module.bias is not None)


def _renamed(model: PreTrainedModel, kind: str, head: LinearSpec | None) -> dict[str, str]:
    """Tensors of the output head that checkpoints call otherwise than transformers' module; no others are known to the pipeline."""
    from transformers.core_model_loading import revert_weight_conversion

    held = model.state_dict()
    stored = {id(tensor): name for name, tensor in revert_weight_conversion(model, dict(held)).items()}
    renamed = {name: stored.get(id(tensor), "") for name, tensor in held.items() if stored.get(id(tensor)) != name}
    for name, other in renamed.items():
        if not other or head is None or not name.startswith(f"{head.name}."):
            _refuse(kind, f"its checkpoints hold {name} in another way{f', as {other}' if other else ''}")
    return renamed


# ---- one block -----------------------------------------------------------------------------------------------------------------------


def _block(index: int, prefix: str, model: nn.Module, kind: str, trace: _Trace, shapes: Mapping[str, Shape], buffers: set[str]) -> Block:
    runs = [call for call in trace.linears if call.name.startswith(f"{prefix}.")]
    holds = {f"{prefix}.{name}" for name, module in model.get_submodule(prefix).named_modules() if isinstance(module, nn.Linear)}
    if not holds:
        _refuse(kind, f"its block {index} has no linears (GPT-2's Conv1D stores weights the other way round)")
    stages: list[list[_Call]] = []
    for call in runs:
        if stages and _same(call.given, stages[-1][0].given):
            stages[-1].append(call)
        else:
            stages.append([call])
    branches = []
    for first, last in pairwise(stages):
        branch = _branch(prefix, trace, first, last)
        if branch is not None:
            branches.append(branch)
    if len(branches) != 2:
        listed = ", then ".join(" and ".join(call.name[len(prefix) + 1 :] for call in stage) for stage in stages)
        what = f"block {index} is not two modules, attention and MLP, each of which returns what its last linear returns"
        _refuse(kind, f"{what}; its linears run in this order: {listed or 'none'}")
    named = [f"{prefix}.{name}" for branch in branches for name in (*branch.first, branch.last)]
    inside = tuple(f"{prefix}.{branch.module}." for branch in branches)
    strays = sorted(name for name in holds if name not in named and name.startswith(inside))
    if strays:
        _refuse(kind, f"{strays[0]} is part of a branch, and neither reads its input nor makes its output")
    linears = {n: LinearSpec(n, shapes[f"{n}.weight"][0], shapes[f"{n}.weight"][1], f"{n}.bias" in shapes) for n in named}
    others = {n: s for n, s in shapes.items() if n.startswith(f"{prefix}.") and n.removesuffix(".weight") not in linears}
    elements = trace.of(prefix)[-1].elements
    if elements > 2:
        _refuse(kind, f"its blocks return {elements} values")
    return Block(
        index, prefix, branches[0], branches[1], linears, others, buffers=frozenset(buffers & set(others)), returns_tuple=elements > 0
    )


def _branch(prefix: str, trace: _Trace, first: Sequence[_Call], last: Sequence[_Call]) -> Branch | None:
    """The branch that these two stages make, if they do: a module that the first ones' input enters and the last one's output leaves."""
    names = [call.name for call in (*first, *last)]
    module = _common(names)
    if len(last) != 1 or len(set(names)) != len(names) or len(module) <= len(prefix):
        return None
    calls = trace.of(module)
    entered = first[0].given
    if entered is None or entered.dim() != 3 or len(calls) != 1 or calls[0].elements not in (0, 2):
        return None
    if not _same(calls[0].given, entered) or not _same(calls[0].returned, last[0].returned):
        return None
    start = len(prefix) + 1
    return Branch(module[start:], tuple(call.name[start:] for call in first), last[0].name[start:], calls[0].elements > 0)


def _common(names: Sequence[str]) -> str:
    """The module that holds all of these."""
    parts = [name.split(".")[:-1] for name in names]
    shared = 0
    while all(len(p) > shared for p in parts) and len({p[shared] for p in parts}) == 1:
        shared += 1
    return ".".join(parts[0][:shared])
