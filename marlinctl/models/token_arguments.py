"""What the blocks of a traced model are given besides the hidden states, and is of the tokens.

    of the tokens alone           Gemma 4: per_layer_input [B, L, 256], another one for each block; Zamba 2: the embeddings, for all blocks
    left by blocks for later ones Gemma 4: shared_kv_states, keys and values by the kind of attention

The pipeline keeps the former for all samples, and the latter from the block that leaves them on (oneshot/of_tokens.py). All other arguments
are the same for all samples. What depends on the hidden states in another way is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from marlinctl.models.architectures import Shape
from marlinctl.models.refusals import refused
from marlinctl.models.tracing import LENGTH, SAMPLES, Trace, Value, equal, holds_tensors, same


@dataclass(slots=True)
class OfTokens:
    """As `Block.given`, `Block.shares`, `Architecture.per_token` and `Architecture.shared` have it, by the names of the blocks."""

    given: dict[str, dict[str, str]] = field(default_factory=dict)
    shares: dict[str, str] = field(default_factory=dict)
    per_token: dict[str, int] = field(default_factory=dict)
    shared: dict[str, tuple[Shape, ...]] = field(default_factory=dict)


def of_tokens(kind: str, blocks: Sequence[str], one: Trace, other: Trace, shifted: Callable[[], Trace]) -> OfTokens:
    """other: the trace over other tokens. shifted: makes one in which blocks return other hidden states. BadInput E390."""
    found = OfTokens()
    kept: list[tuple[str, Tensor]] = []
    _refuse_odd_streams(kind, blocks, one)
    for block in blocks:
        for key, value in list(one.arguments[block].items())[1:]:
            if holds_tensors(value):
                _note_shared(found, kind, block, key, value, one)
            elif (block, key) in one.arguments_read and not equal(value, other.arguments[block].get(key)):
                if not isinstance(value, Tensor) or value.shape[:2] != (SAMPLES, LENGTH):
                    raise refused(kind, f"{block} is given {key}, which depends on the tokens, besides the hidden states")
                name = next((known for known, tensor in kept if same(Value.now(tensor), Value.now(value))), f"{key} of {block}")
                kept.append((name, value))
                found.given.setdefault(block, {})[key] = name
                found.per_token[name] = value.numel() // (SAMPLES * LENGTH)
    if found.given:
        _refuse_computed(kind, found, one, shifted())
    return found


def _refuse_odd_streams(kind: str, blocks: Sequence[str], trace: Trace) -> None:
    for block in blocks:
        hidden = next(iter(trace.arguments[block].values()), None)
        if not isinstance(hidden, Tensor) or hidden.dim() != 3 or hidden.shape[:2] != (SAMPLES, LENGTH):
            shape = list(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
            raise refused(kind, f"its blocks pass on several hidden states for each token ({shape} of {SAMPLES} times {LENGTH} tokens)")


def _refuse_computed(kind: str, found: OfTokens, one: Trace, shifted: Trace) -> None:
    for block, given in found.given.items():
        for key in given:
            if not equal(one.arguments[block][key], shifted.arguments[block].get(key)):
                raise refused(kind, f"{block} is given {key}, which depends on what other blocks return, besides the hidden states")


def _note_shared(found: OfTokens, kind: str, block: str, key: str, value: Mapping[str, Any], trace: Trace) -> None:
    if key in trace.filled or found.shares.setdefault(block, key) != key or len({*found.shares.values()}) > 1:
        raise refused(kind, f"{block} is given {key}, which is filled by others than the blocks, besides the hidden states")
    for name, held in value.items():
        tensors = held if isinstance(held, tuple) else (held,)
        shapes = tuple(_shape_of_tokens(tensor) for tensor in tensors)
        if not isinstance(name, str) or None in shapes:
            raise refused(kind, f"{block} is given {key}, which other blocks fill with more than tensors of the tokens")
        found.shared[name] = tuple(shape for shape in shapes if shape is not None)


def _shape_of_tokens(tensor: object) -> Shape | None:
    """Of what a sample has, with 0 for the number of its tokens; None where it is not clear which dimension that is."""
    if not isinstance(tensor, Tensor) or tensor.dim() < 2 or tensor.shape[0] != SAMPLES or list(tensor.shape[1:]).count(LENGTH) != 1:
        return None
    return tuple(0 if n == LENGTH else n for n in tensor.shape[1:])
