"""Keys and values of recipes that were renamed, and keys that came later.

Recipes with a former name are accepted for one version, and the new one is printed. Hashes and journals keep the former names for
good (`canonical`): a published folder holds the hash of its recipe, and a job compares the recipe that it was begun with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_Path = tuple[str, ...]

_KEYS: Mapping[_Path, str] = {("quantize", "drift_correction"): "match"}  # key -> its former name in the same section
_VALUES: Mapping[_Path, Mapping[str, str]] = {("sparsify", "method"): {"iterative": "refined"}}  # key -> value -> its former name
_LATER: Mapping[_Path, object] = {  # key that came later -> what recipes without it mean
    ("quantize", "symmetric"): True,
    ("quantize", "activations"): "16-bit",
    ("quantize", "activation_group"): 128,
    ("quantize", "group_scales"): "float16",
    ("quantize", "drift_damping"): 0.01,
    ("quantize", "equalize"): "never",
    ("quantize", "rotate"): "never",
    ("quantize", "token_weights"): "uniform",
    ("quantize", "tune_steps"): 0,
    ("quantize", "tune_learning_rate"): 0.006,
    ("sparsify", "permute"): "never",
    ("distill", "mask"): "fixed",
    ("distill", "mask_interval"): 10,
    ("distill", "mask_decay"): 2.0,
    ("evaluate", "num_fewshot"): None,
    ("evaluate", "apply_chat_template"): False,
}


@dataclass(frozen=True, slots=True)
class Renamed:
    path: _Path  # where it stands, under its former name
    now: _Path  # the key's name now
    what: str  # for people


def canonical(values: Mapping[str, Any]) -> dict[str, Any]:
    """A whole recipe as a JSON document under the names that its hash has always been taken over."""
    names = {section: dict(keys) if isinstance(keys, Mapping) else keys for section, keys in values.items()}
    for (section, key), former_values in _VALUES.items():
        names[section][key] = former_values.get(names[section][key], names[section][key])
    for (section, key), former in _KEYS.items():
        names[section][former] = names[section].pop(key)
    for (section, key), meant in _LATER.items():
        if names[section][key] == meant:
            del names[section][key]
    return names


def completed(values: Mapping[str, Any]) -> dict[str, Any]:
    """A whole recipe that an earlier version may have written, with the keys that came later."""
    names = dict(values)
    for (section, key), meant in _LATER.items():
        if isinstance(names.get(section), dict):
            names[section] = {key: meant, **names[section]}
    return names


def current(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[Renamed]]:
    """A recipe or a part of one under today's names, and what had to be renamed. A key that is there under both names stays twice."""
    names = {section: dict(keys) if isinstance(keys, Mapping) else keys for section, keys in values.items()}
    found = list(_former(names))
    for item in found:
        section, key = item.path
        if item.now != item.path:
            names[section][item.now[1]] = names[section].pop(key)
        else:
            names[section][key] = {former: now for now, former in _VALUES[item.path].items()}[names[section][key]]
    return names, found


def former_keys() -> dict[str, str]:
    """{"match": "quantize"}: former names of keys, and their sections."""
    return {former: section for (section, _), former in _KEYS.items()}


def _former(names: Mapping[str, Any]) -> Iterator[Renamed]:
    for (section, key), former in _KEYS.items():
        keys = names.get(section)
        if isinstance(keys, dict) and former in keys and key not in keys:
            yield Renamed((section, former), (section, key), f"{section}.{former} is called {section}.{key} now")
    for (section, key), values in _VALUES.items():
        keys = names.get(section)
        given = keys.get(key) if isinstance(keys, dict) else None
        for now, former in values.items():
            if given == former:
                yield Renamed((section, key), (section, key), f"{section}.{key} {former} is called {now} now")
