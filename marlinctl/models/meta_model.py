"""A transformers model without weights: its code runs the blocks, our reader feeds them one at a time.

The model is built on the meta device (buffers are real, so rotary embeddings work). A block gets weights when its turn comes and loses them
after it; nothing ever holds the whole model.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from marlinctl.models.transformers_config import building, model_class, transformers_config


class _WithoutMemory(TorchFunctionMode):
    """Large tensors of three dimensions are made without memory: experts of a block of DeepSeek-V3 would take 30 GB until they move.

    Random numbers are not drawn for tensors without memory: torch takes a millisecond for each, and draws nothing.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", "") in _RANDOM:
            drawn = kwargs["tensor"] if "tensor" in kwargs else args[0]
            if drawn.is_meta:
                return drawn
        if func in (torch.empty, torch.zeros) and "device" not in kwargs:
            sizes = _sizes(args)
            if len(sizes) == _FUSED_DIMENSIONS and math.prod(sizes) > _LARGE:
                kwargs["device"] = "meta"
        return func(*args, **kwargs)


_RANDOM = {"normal_", "uniform_", "trunc_normal_"}  # of torch.nn.init, of transformers in its place, and of tensors
_FUSED_DIMENSIONS, _LARGE = 3, 1 << 24  # elements; buffers are smaller, and must be real


def _sizes(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(args[0]) if len(args) == 1 and isinstance(args[0], tuple | list) else args


def build(config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """The model that `config` describes, with parameters on the meta device and code from transformers alone: a causal language model, or
    one with the parts for images or sound around it."""
    from accelerate import init_empty_weights
    from transformers.utils import logging

    logging.set_verbosity_error()
    parsed = transformers_config(config)
    parsed.use_cache = False
    made_of = model_class(parsed)
    with building("config.json"), init_empty_weights(include_buffers=False), _WithoutMemory():
        model: nn.Module = made_of._from_config(parsed, dtype=dtype)
    return model.eval()


def meta_shapes(config: Mapping[str, Any]) -> tuple[dict[str, tuple[int, ...]], bool]:
    """Names and shapes of all parameters, and whether the head is tied to the embedding."""
    model = build(config, torch.bfloat16)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    return shapes, bool(getattr(model.config, "tie_word_embeddings", False))


def linear_modules(config: Mapping[str, Any]) -> set[str]:
    """Names of all nn.Linear modules."""
    return {name for name, module in build(config, torch.bfloat16).named_modules() if isinstance(module, nn.Linear)}


def set_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Put `value` where the (meta) parameter, or the buffer, `name` is. A buffer keeps its dtype."""
    parent, _, leaf = name.rpartition(".")
    holder = module.get_submodule(parent)
    buffer = holder._buffers.get(leaf)
    if buffer is not None:
        holder._buffers[leaf] = value.to(buffer.dtype)
    else:
        holder._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def drop_parameters(module: nn.Module) -> None:
    """Free all weights of a block: back to the meta device."""
    for sub in module.modules():
        for name, parameter in sub._parameters.items():
            if parameter is not None:
                sub._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)


def bound(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name, in the order in which the module's class declares them."""
    signature = inspect.signature(type(module).forward)
    self_, *others = signature.parameters.items()
    found = dict(signature.bind_partial(module, *args, **kwargs).arguments)
    del found[self_[0]]
    for name, parameter in others:
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            found |= found.pop(name, {})
    return found


class Reached(Exception):
    """A forward pass came to the module that was waited for; carries the call's arguments."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.args_, self.kwargs = args, kwargs


def call_until(target: nn.Module, run: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Run `run(*args, **kwargs)` and stop it where it calls `target`: the arguments of that call."""

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise Reached(args, kwargs)

    handle = target.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        run(*args, **kwargs)
    except Reached as reached:
        return reached.args_, reached.kwargs
    finally:
        handle.remove()
    raise RuntimeError(f"{type(target).__name__} was never called")


def call_through(target: nn.Module, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run `run(*args, **kwargs)` and stop it where `target` returns: what it returned."""

    def stop(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        raise Reached((output,), {})

    handle = target.register_forward_hook(stop)
    try:
        run(*args, **kwargs)
    except Reached as reached:
        return reached.args_[0]
    finally:
        handle.remove()
    raise RuntimeError(f"{type(target).__name__} was never called")


@contextmanager
def inputs_of(module: nn.Module, names: Iterable[str], *, copy: bool = True) -> Iterator[dict[str, Tensor]]:
    """While it lasts, what sub-modules of `module` that are run were given: their first argument. copy: as it was then, for some models
    change it in place."""
    seen: dict[str, Tensor] = {}

    def note(name: str, _: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        x = (*args, *kwargs.values())[0]
        seen[name] = x.clone() if copy else x

    handles = [module.get_submodule(name).register_forward_pre_hook(partial(note, name), with_kwargs=True) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def hidden_states(output: Any) -> Tensor:
    """Of what a block returned: some return a tuple."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


class Replay(nn.Module):
    """Stands in for a part of a block whose output [B, L, hidden] is known already."""

    def __init__(self, returns_tuple: bool = False, flat: bool = False, experts: int = 1) -> None:
        """flat: it is returned as [B * L, hidden], as experts do. experts: so many such outputs are asked for, to be added up."""
        super().__init__()
        self.returns_tuple, self.flat, self.experts = returns_tuple, flat, experts
        self.output = torch.empty(0)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.output.flatten(0, 1) if self.flat else self.output
        if self.experts > 1:
            output = torch.cat([output, output.new_zeros((self.experts - 1) * output.shape[0], output.shape[1])])
        return (output, None) if self.returns_tuple else output
