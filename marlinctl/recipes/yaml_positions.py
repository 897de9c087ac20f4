"""YAML as plain data, with the place of every key, and nothing that a stranger could misuse.

PyYAML's safe loader is the start. Three things are stricter here: a key may stand only once, tags and aliases are refused (a
recipe needs neither; aliases are how a few lines grow to gigabytes), and `1e-3` is a number, as in YAML 1.2, not text.
"""

from __future__ import annotations

import copy
import functools
import re
from dataclasses import dataclass
from typing import Any

import yaml

from marlinctl.errors import Problem, UsageError

_PLAIN = frozenset(f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str", "int", "float", "bool", "null"))


@dataclass(frozen=True, slots=True)
class Place:
    """`my.yaml:3:5`, or just a title where no line is known."""

    title: str
    line: int | None = None
    column: int | None = None

    def __str__(self) -> str:
        return self.title if self.line is None else f"{self.title}:{self.line}:{self.column}"


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.composer.ComposerError(None, None, "anchors and aliases are not allowed here", event.start_mark)
        return super().compose_node(parent, index)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789"))


def read_yaml(text: str, title: str) -> tuple[dict[str, Any], dict[tuple[str, ...], Place]]:
    """The mapping that `text` holds, and where each key (or list item) stands. `title` names the file in messages."""
    values, places = _read(text, title)
    return copy.deepcopy(values), dict(places)  # callers complete them


@functools.lru_cache(maxsize=16)  # every recipe extends the same one, which takes thirty milliseconds
def _read(text: str, title: str) -> tuple[dict[str, Any], dict[tuple[str, ...], Place]]:
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            raise UsageError("E206", "this is not a mapping of keys", where=title, fix="write `key: value` lines; see docs/recipes.md")
        places: dict[tuple[str, ...], Place] = {}
        twice: list[Problem] = []
        values = _plain(root, loader, (), places, twice, title)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = Place(title, mark.line + 1, mark.column + 1) if mark else Place(title)
        what = error.problem or error.context or "not YAML"
        raise UsageError(
            "E206", f"not readable as YAML: {what}", where=str(where), fix="correct that place; see docs/recipes.md"
        ) from error
    except yaml.YAMLError as error:  # an unprintable character: no mark
        raise UsageError("E206", f"not readable as YAML: {error}".split("\n")[0], where=title, fix="remove control characters") from error
    except RecursionError as error:
        raise UsageError("E206", "nested too deeply", where=title, fix="a recipe has three levels; see docs/recipes.md") from error
    if twice:
        raise UsageError.from_problems("E206", twice)
    assert isinstance(values, dict)
    return values, places


def _plain(
    node: yaml.Node,
    loader: _Loader,
    path: tuple[str, ...],
    places: dict[tuple[str, ...], Place],
    twice: list[Problem],
    title: str,
) -> Any:
    """The value of one node; fills `places` and `twice` on the way."""
    if node.tag not in _PLAIN:
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        raise yaml.constructor.ConstructorError(None, None, f"values of kind '{kind}' are not allowed here", node.start_mark)
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag not in _PLAIN:
                raise yaml.constructor.ConstructorError(None, None, "a key must be plain text", key_node.start_mark)
            key = str(key_node.value)
            here = (*path, key)
            place = Place(title, key_node.start_mark.line + 1, key_node.start_mark.column + 1)
            if key in mapping:
                twice.append(Problem(f"key {'.'.join(here)} stands twice", str(place), f"keep one; the first is at {places[here]}"))
            places.setdefault(here, place)
            mapping[key] = _plain(value_node, loader, here, places, twice, title)
        return mapping
    if isinstance(node, yaml.SequenceNode):
        items = []
        for number, item in enumerate(node.value):
            here = (*path, str(number))
            places[here] = Place(title, item.start_mark.line + 1, item.start_mark.column + 1)
            items.append(_plain(item, loader, here, places, twice, title))
        return items
    try:
        return loader.construct_object(node)
    except ValueError as error:  # a number with thousands of digits, `!!int x`
        raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from error
