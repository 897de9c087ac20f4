"""Sets of layer names as the short patterns that config.json carries, and back.

A config says which scheme holds for which linear by exact names, by regular expressions ("re:...") or by a class name
("Linear"). A mixture-of-experts model has tens of thousands of linears, and every client compares each of them with each
entry, so a list of exact names is out of the question there: names that differ only in their numbers form a family

    model.layers.#.mlp.experts.#.down_proj

and a family of which all members are meant becomes one regular expression; one of which whole blocks are meant becomes one
with the block numbers spelled out. Anything else stays a list of exact names.

NOTE: transformers finds the scheme of the experts by looking for an expression that mentions them, so experts never become a list of
names where an expression will do.

NOTE: every expression is anchored at both ends. Clients use `re.match`, which would let `...layers.1` match `...layers.11`.

Clients of a wrapper for images or sound have names of their own: a linear is language_model.model.layers.0.mlp.up_proj in the file,
model.language_model.layers.0.mlp.up_proj in transformers, and something else in a server. There an expression may begin anywhere,
`(.*\\.)?layers\\.0\\.mlp\\.up_proj`, and parts without a packed linear are named as a whole, `(.*\\.)?vision_tower\\..*`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from marlinctl.system.patterns import Expressions

_EXACT_AT_MOST = 8  # a family up to this size stays a list of names: readable, and immune to regex dialects
_MARK = "re:"
_ANYWHERE = r"(.*\.)?"
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")

_Kind = TypeVar("_Kind")
# What servers fuse at load: the shards of one fused linear must be quantized alike.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def name_patterns(chosen: Iterable[str], everything: Iterable[str], tower: str | None = None) -> list[str]:
    """Entries that match exactly `chosen` among `everything` (all linears of the model, quantized or not), in an order of their own.

    tower: where clients have names of their own, what all linears of the blocks begin with; they match in any spelling.
    """
    if tower is not None:
        return _in_any_spelling(list(chosen), list(everything), tower)
    families: dict[str, list[str]] = defaultdict(list)
    for name in sorted(everything, key=_by_number):
        families[_NUMBER.sub("#", name)].append(name)
    wanted = set(chosen)
    patterns: list[str] = []
    for family, members in families.items():
        hits = [name for name in members if name in wanted]
        if hits:
            patterns += _family_patterns(family, members, hits)
    return patterns


def tower_of(layers: Iterable[str]) -> str | None:
    """What the names of the blocks begin with: "model" of model.layers.0.mlp.up_proj, "" of layers.0.mlp.up_proj."""
    blocks = next((name for name in layers if _NUMBER.search(name)), None)
    return None if blocks is None else blocks[: _NUMBER.search(blocks).start() - 1].rpartition(".")[0]  # type: ignore[union-attr]


def _in_any_spelling(chosen: Sequence[str], everything: Sequence[str], tower: str) -> list[str]:
    begins = f"{tower}." if tower else ""

    def in_blocks(names: Iterable[str]) -> list[str]:
        return [name.removeprefix(begins) for name in names if name.startswith(begins) and _NUMBER.search(name)]

    inside = name_patterns(in_blocks(chosen), in_blocks(everything))
    expressions = [p.removeprefix(f"{_MARK}^") if p.startswith(_MARK) else f"{re.escape(p)}$" for p in inside]
    blocks = set(in_blocks(chosen))
    for name in chosen:
        if name.removeprefix(begins) not in blocks:
            part, below = _part(name, tower)
            expressions.append(re.escape(part) + (r"\..*" if below else "$"))
    return [f"{_MARK}^{_ANYWHERE}{expression}" for expression in dict.fromkeys(expressions)]


def _part(name: str, tower: str) -> tuple[str, bool]:
    """Of a linear outside of the blocks, the part of the model that it belongs to, and whether it lies below that part."""
    parts, shared = name.split("."), set(tower.split("."))
    while len(parts) > 1 and parts[0] in shared:
        parts.pop(0)
    return parts[0], len(parts) > 1


def _family_patterns(family: str, members: Sequence[str], hits: Sequence[str]) -> list[str]:
    few = len(hits) <= _EXACT_AT_MOST and "experts" not in family
    if few or "#" not in family:
        return list(hits)
    if len(hits) == len(members):
        return ["re:" + _expression(family)]
    per_block: dict[str, list[str]] = defaultdict(list)
    for name in members:
        per_block[_block(name)].append(name)
    chosen = set(hits)
    whole = [block for block, names in per_block.items() if all(name in chosen for name in names)]
    rest = [name for name in hits if _block(name) not in set(whole)]
    first = ["re:" + _expression(family, whole)] if whole else []
    return first + rest


def _by_number(name: str) -> list[tuple[int, str]]:
    """Sorts block 2 before block 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _block(name: str) -> str:
    found = _NUMBER.search(name)
    return found.group() if found else ""


def _expression(family: str, blocks: Sequence[str] = ()) -> str:
    parts = [re.escape(part) for part in family.split("#")]
    first = rf"({'|'.join(sorted(blocks, key=int))})" if blocks else r"\d+"
    return "^" + parts[0] + first + r"\d+".join(["", *parts[1:]])[len(r"\d+") :] + "$"


class Entries:
    """A list of `targets` or `ignore`: names, "re:" expressions, or a class. ValueError for an expression that is none."""

    def __init__(self, entries: Iterable[str]) -> None:
        given = list(entries)
        self._exact = {entry for entry in given if not entry.startswith(_MARK)}
        self._expressions = Expressions(entry.removeprefix(_MARK) for entry in given if entry.startswith(_MARK))

    def __contains__(self, name: str) -> bool:
        """Whether this linear is meant."""
        return name in self._exact or "Linear" in self._exact or self._expressions.first(name) is not None


def matches(name: str, target: str) -> bool:
    """Whether one entry of `targets` or `ignore` means this linear. ValueError for an expression that is none."""
    return name in Entries((target,))


class GroupOf:
    """Which group's targets win for a layer: an exact name beats an expression, an expression beats a class name."""

    def __init__(self, groups: Mapping[str, Sequence[str]]) -> None:
        entries = [(target, group) for group, targets in groups.items() for target in targets]
        self._exact = dict(reversed(entries))  # the first group that names it
        expressions = sorted((target.removeprefix(_MARK), group) for target, group in entries if target.startswith(_MARK))
        self._groups = [group for _, group in expressions]
        self._expressions = Expressions(expression for expression, _ in expressions)

    def __call__(self, name: str) -> str | None:
        if name in self._exact:
            return self._exact[name]
        found = self._expressions.first(name)
        return self._groups[found] if found is not None else self._exact.get("Linear")


def split_fused(kinds: Mapping[str, _Kind]) -> list[tuple[str, dict[str, _Kind]]]:
    """Linears that servers load as one although they are not quantized alike: (fused name, {shard: what it is}).

    Fused are q/k/v, gate/up, and all experts of a block.
    """
    families: dict[str, dict[str, _Kind]] = defaultdict(dict)
    for name, kind in kinds.items():
        parent, _, last = name.rpartition(".")
        head, found, _ = name.partition(".experts.")
        if found:
            families[f"{head}.experts"][name] = kind
        for fused, shards in FUSED.items():
            if last in shards and not found:
                families[f"{parent}.{fused}"][name] = kind
    return [(fused, shards) for fused, shards in families.items() if len(set(shards.values())) > 1]


def with_fused_names(names: Iterable[str], everything: Iterable[str]) -> list[str]:
    """The names, and the fused name wherever all its shards are among them (GPTQ's `dynamic` is matched after fusing). vLLM has one module
    for all experts of a block; it has a name here where all linears below it in `everything` are among the names.
    """
    chosen = list(names)
    have = set(chosen)
    incomplete = {_experts(name) for name in everything if name not in have}
    extra = list(dict.fromkeys(module for name in chosen if (module := _experts(name)) and module not in incomplete))
    for name in chosen:
        parent, _, last = name.rpartition(".")
        extra += [
            f"{parent}.{fused}"
            for fused, shards in FUSED.items()
            if last == shards[0] and all(f"{parent}.{shard}" in have for shard in shards)
        ]
    return chosen + extra


def _experts(name: str) -> str:
    """model.layers.0.mlp.experts of model.layers.0.mlp.experts.7.up_proj; nothing of other linears."""
    head, found, _ = name.partition(".experts.")
    return f"{head}.experts" if found else ""
