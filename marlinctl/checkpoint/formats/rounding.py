"""Which 4-bit linears of a folder may have their activations rounded to 8 bits when the model runs.

    "activations": "int8", "activation_group": 128, "sixteen_bit_activations": ["model.layers.0.mlp.down_proj"]

Native blocks have these keys themselves, from format_version 2 on. In other formats, whose programs know nothing of it, they stand below
the key `marlinctl` and are a note for `pack`. Experts are never rounded, and not listed.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any

from marlinctl.checkpoint.formats.base import EXPERTS, PROVENANCE
from marlinctl.quantize.scheme import ACTIVATION_GROUP, Rounding

KIND, GROUP, EXCEPT = KEYS = ("activations", "activation_group", "sixteen_bit_activations")
_GROUPS: Mapping[int, Rounding] = {ACTIVATION_GROUP: "int8-128", -1: "int8"}


def entries(rounding: Mapping[str, Rounding], layers: Iterable[str]) -> dict[str, Any]:
    """The keys for linears of which those in `rounding` may be rounded, all in one way; none where there is no such linear."""
    if not rounding:
        return {}
    kinds = set(rounding.values())
    if len(kinds) > 1:
        raise ValueError(f"activations of one model are rounded in one way, not in {len(kinds)}")
    group = next(size for size, kind in _GROUPS.items() if kind in kinds)
    exact = sorted(layer for layer in layers if layer not in rounding and EXPERTS not in layer)
    return {KIND: "int8", GROUP: group} | ({EXCEPT: exact} if exact else {})


def read(block: Mapping[str, Any], layers: Iterable[str]) -> dict[str, Rounding]:
    """The linears of `layers` that may be rounded, and how. ValueError for what `entries` does not write."""
    kind, group, exact = (block.get(key) for key in KEYS)
    way = _GROUPS.get(group) if type(group) is int else None
    if kind is None and group is None and exact is None:
        return {}
    if kind != "int8" or way is None:
        raise ValueError(f"{KIND} {kind!r} with {GROUP} {group!r} is not int8 with one of {', '.join(map(str, _GROUPS))}")
    if exact is not None and not (isinstance(exact, list) and all(isinstance(name, str) for name in exact)):
        raise ValueError(f"{EXCEPT} is not a list of names")
    apart = set(exact or ())
    return {layer: way for layer in layers if layer not in apart and EXPERTS not in layer}


def misspelt(block: Mapping[str, Any], packed: Container[str]) -> list[str]:
    """Linears that a whole quantization_config keeps from rounding and that are not packed: such a name leaves its linear rounded."""
    said = next((keys for keys in (block, block.get(PROVENANCE)) if isinstance(keys, Mapping) and KIND in keys), {})
    return [name for name in said.get(EXCEPT, ()) if name not in packed]


def without(block: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in block.items() if key not in KEYS}
