"""Which tensors write and read the residual stream, and which make and take the channels of value heads, so that both can be rotated.

    embedding ─► x ─┬─► norm g ─► q k v ─► attention ─► o ─┬─► norm g ─► gate up ─► down ─┬─► ... ─► norm g ─► head
                    └──────────────────────────────────────┴──────────────────────────────┘

With x R in place of x for an orthogonal R, rows of the embedding are multiplied by R, so are those of every weight that reads the stream,
after the norm's g was multiplied into its columns and g became 1; what is written to the stream is multiplied by R on the side of its
outputs. A norm that divides by the root of the mean square does not see R. In each value head, likewise, rows of v and columns of o.

The types below have such blocks: two norms, in front of the attention and in front of what follows it, and nothing else that reads or
writes the stream. A scale of all of it (Granite) changes nothing. Models with norms behind a branch (Gemma 2, OLMo 2), norms that subtract
a mean, or norms that compute with 1 + weight are not among them. That the function stays as it is is shown for every type by
tests/models/test_rotation.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from marlinctl.models.architectures import Architecture, Block, Branch, Experts

ROTATABLE = frozenset(
    {
        "apertus", "arcee", "ernie4_5", "glm", "granite", "granitemoe", "helium", "hunyuan_v1_dense", "llama", "minimax_m2", "ministral",
        "ministral3", "mistral", "mixtral", "olmoe", "phi3", "qwen2", "qwen3", "qwen3_moe", "seed_oss", "smollm3",
    }
)  # fmt: skip
_VALUES = ("v_proj", "qkv_proj")  # as the types above call v, or q, k and v in one


@dataclass(frozen=True, slots=True)
class Stream:
    """All tensors that a rotation changes, by their names in the checkpoint."""

    hidden: int
    head_dim: int
    read: Mapping[str, str]  # weight [N, hidden] whose input is the stream behind a norm -> the weight of the norm
    entered: str  # the embedding, [vocab, hidden]
    written: frozenset[str]  # weights [hidden, K] and biases [hidden] whose output is added to the stream
    norms: frozenset[str]  # weights [hidden], which become 1
    values_made: Mapping[str, int]  # weight [N, K] or bias [N] -> its first row of the value heads, which reach to its last one
    values_taken: frozenset[str]  # weights [hidden, heads * head_dim] of what value heads are given to


def stream_of(known: Architecture, config: Mapping[str, Any]) -> Stream | None:
    """None for a model whose stream other things may read or write. known: with a head of its own. config: of the language model."""
    others = known.spelling is not None or known.carried or known.guests or known.outside
    if known.model_type not in ROTATABLE or known.head is None or others:
        return None
    width = _head_dim(known, config)
    blocks = [None if width is None else _of_block(block, known.hidden_size, width) for block in known.blocks]
    whole = [found for found in blocks if found is not None]
    if width is None or len(whole) != len(blocks):
        return None
    final = f"{known.norm}.weight"
    return Stream(
        known.hidden_size,
        width,
        {name: norm for found in whole for name, norm in found.read.items()} | {f"{known.head.name}.weight": final},
        f"{known.embedding}.weight",
        frozenset(chain.from_iterable(found.written for found in whole)),
        frozenset({final, *chain.from_iterable(found.norms for found in whole)}),
        {name: first for found in whole for name, first in found.values_made.items()},
        frozenset(chain.from_iterable(found.values_taken for found in whole)),
    )


def _of_block(block: Block, hidden: int, head_dim: int) -> Stream | None:
    """The part of a block; None where it is built in another way."""
    begins = f"{block.prefix}."
    norms = [name for name, shape in block.others.items() if shape == (hidden,) and name[len(begins) :].count(".") == 1]
    attention, *others = block.parts
    if len(norms) != 2 or not all(name.endswith(".weight") for name in norms) or not isinstance(attention, Branch) or len(others) != 1:
        return None
    behind = others[0]
    value = next((name for name in attention.first if name.endswith(_VALUES)), None)  # a module map may name it first
    if not isinstance(behind, Branch | Experts) or value is None:
        return None
    readers = {f"{block.linear(name)}.weight": norms[0] for name in attention.first}
    copies = range(behind.count) if isinstance(behind, Experts) else (0,)
    readers |= {f"{block.linear(name.format(e=e))}.weight": norms[1] for e in copies for name in behind.first}
    readers |= {name: norms[1] for name, shape in block.others.items() if len(shape) == 2 and shape[1] == hidden}  # routers
    writers = [block.linear(attention.last), *(block.linear(behind.last.format(e=e)) for e in copies)]
    made = block.linears[block.linear(value)]
    taken = block.linears[block.linear(attention.last)]
    values = made.out_features if len(attention.first) > 1 else (made.out_features - taken.in_features) // 2
    if values <= 0 or values % head_dim or taken.in_features % values:
        return None
    first = made.out_features - values
    named = {f"{made.name}.weight": first} | ({f"{made.name}.bias": first} if made.bias else {})
    written = {f"{name}.{part}" for name in writers for part in ("weight", *(("bias",) if block.linears[name].bias else ()))}
    return Stream(hidden, head_dim, readers, "", frozenset(written), frozenset(norms), named, frozenset({f"{taken.name}.weight"}))


def _head_dim(known: Architecture, config: Mapping[str, Any]) -> int | None:
    """From the model's own linears: where config.json says none, types have widths of their own, and not all are hidden_size over heads.
    None where config.json does not say how many heads there are."""
    first, heads = known.blocks[0], config.get("num_attention_heads")
    attention = first.parts[0]
    if not isinstance(attention, Branch) or not isinstance(heads, int):
        return None
    return first.linears[first.linear(attention.last)].in_features // heads
