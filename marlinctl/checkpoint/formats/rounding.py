"""Which 4-bit linears of a folder may have their activations rounded to 8 bits when the model runs.

    "activations": "int8", "activation_group": 128, "sixteen_bit_activations": ["model.layers.0.mlp.down_proj"]

Native blocks have these keys themselves, from format_version 2 on. In other formats, whose programs know nothing of it, they stand below
the key `marlinctl` and are a note for `pack`. Experts are never rounded, and not listed.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any

from marlinctl.checkpoint.formats.base import EXPERTS, PROVENANCE, Format
from marlinctl.quantize.scheme import ACTIVATION_GROUP, Rounding

KIND, GROUP, EXCEPT = KEYS = ("activations", "activation_group", "sixteen_bit_activations")
_GROUPS: Mapping[int, Rounding] = {ACTIVATION_GROUP: "int8-128", -1: "int8"}


def entries(rounding: Mapping[str, Rounding], layers: Iterable[str]) -> dict[str, Any]:
    """The keys for linears of which those in `rounding` may be rounded, all in one way; empty where `rounding` is."""
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
    if not any(key in block for key in KEYS):
        return {}
    kind, group, exact = block.get(KIND), block.get(GROUP), block.get(EXCEPT, [])
    way = _GROUPS.get(group) if type(group) is int else None
    if kind != "int8" or way is None:
        raise ValueError(f"{KIND} {kind!r} with {GROUP} {group!r} is not int8 with one of {', '.join(map(str, _GROUPS))}")
    if not (isinstance(exact, list) and all(isinstance(name, str) for name in exact)):
        raise ValueError(f"{EXCEPT} is not a list of names")
    apart = set(exact)
    return {layer: way for layer in layers if layer not in apart and EXPERTS not in layer}


def misspelt(block: Mapping[str, Any], fmt: Format, packed: Container[str]) -> list[str]:
    """Linears that the quantization_config of such a folder, which `read` has accepted, keeps from rounding and that are not packed: such
    a name leaves its linear rounded."""
    said = block if fmt.rounds else block.get(PROVENANCE)
    return [name for name in said.get(EXCEPT, ()) if name not in packed] if isinstance(said, Mapping) else []


def without(block: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in block.items() if key not in KEYS}
