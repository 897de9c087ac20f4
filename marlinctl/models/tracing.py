"""What runs in a model, in which order, and what it reads: one forward pass over a few tokens, without weights.

    meta model ─► linears, embeddings and experts stand in for themselves, parameters are one number repeated
        ─► forward over two samples of three tokens ─► calls, by the time they ended

What stands in returns numbers that depend on what it is given, so whatever is computed from the tokens differs between two traces over
different tokens. No weight is read and no matrix multiplied, so it takes a second after the imports, whatever the size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from marlinctl.errors import BadInput
from marlinctl.models.meta_model import bound
from marlinctl.models.refusals import refused
from marlinctl.models.transformers_config import building

SAMPLES, LENGTH = 2, 3
_WHOLE = 1 << 20  # parameters up to this size are not one number repeated: some models write into them


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor as it was at one time: what is written into it afterwards makes it another value."""

    tensor: Tensor
    version: int  # torch counts what is written in place

    @classmethod
    def now(cls, tensor: object) -> Value | None:
        return cls(tensor, tensor._version) if isinstance(tensor, Tensor) else None

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape


@dataclass(frozen=True, slots=True)
class Call:
    """A module was called. `given` is the first tensor that it was given, `returned` the first that it returned, both at the end of the
    call, but for a linear, which writes into neither."""

    name: str
    given: Value | None
    returned: Value | None
    elements: int  # of the tuple that it returned, 0 where it is none
    order: int  # of the end of the call; linears that ran inside ended before
    arguments: Mapping[str, Any] = field(default_factory=dict)  # of experts, all


@dataclass(slots=True)
class Trace:
    """Calls by the time they ended."""

    calls: list[Call] = field(default_factory=list)
    linears: list[Call] = field(default_factory=list)  # and modules of experts
    arguments: dict[str, Mapping[str, Any]] = field(default_factory=dict)  # block, or module with linears in it -> what it was given
    by_token: set[str] = field(default_factory=set)  # embeddings that were given the tokens
    filled: set[str] = field(default_factory=set)  # arguments that held tensors before the first block ran
    entered: dict[str, Value | None] = field(default_factory=dict)  # the same modules -> the first tensor of it, at the begin of the call
    second_read: set[str] = field(default_factory=set)  # modules of whose tuples something reads more than the first element
    arguments_read: set[tuple[str, str]] = field(default_factory=set)  # block and argument, of those that are tensors
    weights_read: set[str] = field(default_factory=set)  # linears of whose weight the model asks something, besides that it calls them

    def of(self, name: str) -> list[Call]:
        return [call for call in self.calls if call.name == name]


def traced(
    model: nn.Module, kind: str, blocks: Sequence[str], experts: Sequence[str], first: int, *, shifted: bool = False, length: int = LENGTH
) -> Trace:
    """Calls of one forward pass over tokens `first`, `first` + 1, ... experts: names of their modules. shifted: blocks return other hidden
    states than they compute, so that what depends on those differs from another trace."""
    trace = Trace()
    reads = _Reads(trace)
    ids = torch.arange(first, first + SAMPLES * length).view(SAMPLES, length)
    handles: list[Any] = []
    replaced = []
    for name, module in model.named_modules():
        stand_in: Any = None
        if isinstance(module, nn.Linear):
            stand_in = partial(_linear, trace, reads, name, module)
        elif isinstance(module, nn.Embedding):
            stand_in = partial(_embedding, trace, name, module, ids)
        elif name in experts:
            stand_in = partial(_experts, trace, name, module)
        if stand_in is None:
            handles.append(module.register_forward_hook(partial(_ended, trace, reads, name), with_kwargs=True))
        else:
            setattr(module, "forward", stand_in)  # noqa: B010 - mypy: a method
            replaced.append(module)
    if shifted:
        handles += [model.get_submodule(prefix).register_forward_hook(_shift) for prefix in blocks]
    handles.append(model.get_submodule(blocks[0]).register_forward_pre_hook(partial(_first_begins, trace), with_kwargs=True))
    for prefix in blocks:
        for inner, module in model.get_submodule(prefix).named_modules():
            if not isinstance(module, nn.Linear) and (not inner or any(isinstance(one, nn.Linear) for one in module.modules())):
                name = f"{prefix}.{inner}" if inner else prefix
                handles.append(module.register_forward_pre_hook(partial(_begins, trace, reads, name, not inner), with_kwargs=True))
    try:
        with torch.no_grad(), _stand_ins(model):
            reads.weights = {id(module.weight): name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
            with building("config.json"), reads:
                model(input_ids=ids, use_cache=False)
    except BadInput as error:
        reason = error.problems[0].what.partition(": ")[2]  # behind "transformers cannot build this model"
        raise refused(kind, f"its forward pass cannot be followed without weights ({reason})") from None
    finally:
        for handle in handles:
            handle.remove()
        for module in replaced:
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
                    one = torch.ones(1).expand(parameter.shape)
                    value = one.clone() if parameter.numel() <= _WHOLE else one
                    module._parameters[name] = nn.Parameter(value, requires_grad=False)
        yield
    finally:
        for module, parameters in kept:
            module._parameters.update(parameters)


class _Reads(TorchFunctionMode):
    """Notes which of the tensors that are watched are given to a function of torch."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace
        self.seconds: dict[int, tuple[Tensor, set[str]]] = {}  # by id: tensors, which stay alive for it, and the modules that returned them
        self.weights: dict[int, str] = {}  # of linears
        self.given: dict[int, tuple[Tensor, set[tuple[str, str]]]] = {}  # the same for the arguments of the block that runs

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        for tensor in _tensors((*args, *(kwargs or {}).values())):
            if id(tensor) in self.weights:
                self.trace.weights_read.add(self.weights[id(tensor)])
            self.trace.second_read |= self.seconds.get(id(tensor), (tensor, set()))[1]
            self.trace.arguments_read |= self.given.get(id(tensor), (tensor, set()))[1]
        return func(*args, **(kwargs or {}))

    def begins(self, block: str, arguments: Mapping[str, Any]) -> None:
        self.given = {}
        for key, value in list(arguments.items())[1:]:
            for tensor in _tensors((value,)):
                self.given.setdefault(id(tensor), (tensor, set()))[1].add((block, key))

    def ended(self, module: str, output: tuple[Any, ...]) -> None:
        first = {id(tensor) for tensor in _tensors(output[:1])}
        for tensor in _tensors(output[1:]):
            if id(tensor) not in first:
                self.seconds.setdefault(id(tensor), (tensor, set()))[1].add(module)


def _tensors(values: object) -> Iterator[Tensor]:
    """All tensors in a value, or in rows of such."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)


def _numbers(x: Tensor, width: int) -> Tensor:
    """[..., K] -> [..., width] float32 from -1 to 1, of which each depends on the whole row."""
    weights = torch.arange(1, x.shape[-1] + 1, dtype=torch.float32).cos()
    sums = (x.float() * weights).sum(-1, keepdim=True).nan_to_num()
    return (sums + torch.arange(width, dtype=torch.float32)).sin()


def _linear(trace: Trace, reads: _Reads, name: str, module: nn.Linear, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A router that is made of nn.Linear computes more than a product, and is none of the linears."""
    own = type(module).forward
    if own is nn.Linear.forward:
        y = _numbers(x, module.out_features).to(x.dtype)
    else:
        weight = reads.weights.pop(id(module.weight))  # it may read its own
        y = own(module, x, *args, **kwargs)
        reads.weights[id(module.weight)] = weight
    if isinstance(y, Tensor):
        trace.linears.append(Call(name, Value.now(x), Value.now(y), 0, len(trace.calls)))
    return y


def _embedding(trace: Trace, name: str, module: nn.Embedding, tokens: Tensor, ids: Any, *args: Any, **kwargs: Any) -> Tensor:
    if not isinstance(ids, Tensor):  # positions, found by a shape
        return type(module).forward(module, ids, *args, **kwargs)
    if torch.equal(ids, tokens) and _looks_up(module, tokens, ids, *args, **kwargs):
        trace.by_token.add(name)
    return _numbers(ids.unsqueeze(-1), module.embedding_dim)


def _looks_up(module: nn.Embedding, tokens: Tensor, *args: Any, **kwargs: Any) -> bool:
    """Whether an embedding that is given the tokens looks those up, and not the positions that it finds by them."""
    with _LookUps() as looked_up:
        type(module).forward(module, *args, **kwargs)
    return len(looked_up.ids) == 1 and torch.equal(looked_up.ids[0], tokens)


class _LookUps(TorchFunctionMode):
    """What embeddings are asked for; no row is read."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is not nn.functional.embedding:
            return func(*args, **(kwargs or {}))
        ids, weight = args[:2]
        self.ids.append(ids)
        return weight.new_zeros(*ids.shape, weight.shape[-1])


def _experts(trace: Trace, name: str, module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    arguments = bound(module, args, kwargs)
    x: Tensor = next(iter(arguments.values()))
    y = _numbers(x, x.shape[-1]).to(x.dtype)
    trace.linears.append(Call(name, Value.now(x), Value.now(y), 0, len(trace.calls), arguments))
    return y


def _first_begins(trace: Trace, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    trace.filled |= {name for name, value in bound(module, args, kwargs).items() if holds_tensors(value)}


def _shift(_: nn.Module, __: Any, output: Any) -> Any:
    def other(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value + torch.arange(value.numel()).view(value.shape) % 7  # not by one number, which a norm would take away

    return tuple(map(other, output)) if isinstance(output, tuple) else other(output)


def _begins(
    trace: Trace, reads: _Reads, name: str, is_block: bool, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    trace.arguments[name] = bound(module, args, kwargs)
    trace.entered[name] = Value.now(_first(args, kwargs))
    if is_block:
        reads.begins(name, trace.arguments[name])


def _ended(trace: Trace, reads: _Reads, name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    elements = len(output) if isinstance(output, tuple) else 0
    if elements:
        reads.ended(name, output)
    returned = output[0] if elements else output
    trace.calls.append(Call(name, Value.now(_first(args, kwargs)), Value.now(returned), elements, len(trace.calls)))


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> object:
    return args[0] if args else kwargs.get("hidden_states")


def same(one: Value | None, other: Value | None) -> bool:
    """One tensor, or two views of all of it, into which nothing was written in between."""
    if one is None or other is None or one.version != other.version:
        return False
    a, b = one.tensor, other.tensor
    return a is b or (a.data_ptr() == b.data_ptr() and a.numel() == b.numel() and a.dtype == b.dtype)


def equal(a: object, b: object) -> bool:
    """Whether two arguments are the same; what is neither tensor nor row of tensors is taken to be."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(map(equal, a, b))
    return not isinstance(a, Tensor) and not isinstance(b, Tensor)


def holds_tensors(value: object) -> bool:
    """Whether an argument is a place where blocks leave tensors for each other."""
    return isinstance(value, Mapping) and any(isinstance(held, Tensor | tuple) for held in value.values())


def of_all_tokens(x: Value | None) -> bool:
    """[B, L, ...] or [B * L, ...], or with dimensions of 1 between, so that a row of it is a token."""
    return x is not None and tuple(n for n in x.shape[:-1] if n > 1) in ((SAMPLES, LENGTH), (SAMPLES * LENGTH,))
