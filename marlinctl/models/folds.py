"""Channels whose order can be undone for nothing: what one linear makes and another reads, with nothing between them that mixes channels.

    gated MLP   rows of gate and up, columns of down                        any order of the inner channels
    attention   rows of v, columns of o, for all query heads of a kv head   any order within a kv head

Reordering producers' rows (weights and biases) and the consumer's columns alike leaves the function as it is. Which of four neighbours
along K are kept in a 2:4 pattern depends on the order, so it is worth choosing (sparsify/permute.py).

Names and shapes say where that may hold; `candidates` lists the possibilities for each consumer, likeliest first. Whether it does is tried
with the block's own code (oneshot/permutation.py): rotary embeddings, norms and gates between two linears are not visible here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from marlinctl.models.architectures import Block, Experts, LinearSpec


@dataclass(frozen=True, slots=True)
class Producer:
    name: str  # full name of the linear
    first: int  # its row that makes channel 0: not 0 in a linear that is several in one
    bias: bool


@dataclass(frozen=True, slots=True)
class Fold:
    """`channels` channels that `producers` make and `consumer` reads, `repeats` times each: by all query heads of a kv head.

    They lie one after another in `segments` equal parts (kv heads), each of which keeps its channels.
    """

    consumer: str  # full name of the linear
    module: str  # the same, relative to the block's module
    producers: tuple[Producer, ...]
    channels: int
    segments: int
    repeats: int

    @property
    def width(self) -> int:
        """Channels of a segment."""
        return self.channels // self.segments


def candidates(block: Block, head_dim: int | None) -> dict[str, tuple[Fold, ...]]:
    """Consumer -> what may hold of it, likeliest first; consumers in run order. Those behind a mixture of experts are left out."""
    found: dict[str, tuple[Fold, ...]] = {}
    for part in block.parts:
        if isinstance(part, Experts):
            break
        for before, after in zip(part.stages, part.stages[1:], strict=False):
            if len(after) != 1:
                continue
            producers = [block.linears[block.linear(name)] for name in before]
            consumer = block.linears[block.linear(after[0])]
            folds = tuple(_folds(producers, consumer, after[0], head_dim))
            if folds:
                found[consumer.name] = folds
    return found


def _folds(producers: list[LinearSpec], consumer: LinearSpec, module: str, head_dim: int | None) -> Iterator[Fold]:
    k = consumer.in_features

    def fold(made: list[tuple[LinearSpec, int]], channels: int, segments: int) -> Fold:
        named = tuple(Producer(spec.name, first, spec.bias) for spec, first in made)
        return Fold(consumer.name, module, named, channels, segments, k // channels)

    if all(spec.out_features == k for spec in producers):  # gate and up, or up alone
        yield fold([(spec, 0) for spec in producers], k, 1)
    if len(producers) == 1 and producers[0].out_features == 2 * k:  # both in one
        yield fold([(producers[0], 0), (producers[0], k)], k, 1)
    if head_dim is None or head_dim % 4 or k % head_dim:
        return
    for spec in reversed(producers):  # v stands behind q and k, in a linear of its own or at the end of theirs
        rows = spec.out_features if len(producers) > 1 else (spec.out_features - k) // 2
        if rows > 0 and rows % head_dim == 0 and k % rows == 0:
            yield fold([(spec, spec.out_features - rows)], rows, rows // head_dim)


def head_dim(config: Mapping[str, Any]) -> int | None:
    """Channels of a value head, of the config of the language model."""
    for key in ("v_head_dim", "head_dim"):
        if isinstance(config.get(key), int):
            return int(config[key])
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads > 0 else None
