"""What may be in config.json before anybody builds a model from it.

Sizes come from config.json, so a hostile or mistyped one decides how much memory others allocate and how long they loop. They
are bounded here, once, far above any model that exists. What is bounded is hostile values alone: whether a model of these sizes is one
that marlinctl knows is asked later (architectures.py). Nothing in this file imports torch or transformers. Keys that choose code:
switches.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from marlinctl.errors import BadInput, Problem
from marlinctl.system.files import FileRefused, brief, exists, read_json, refuse_deep, shown

CONFIG = "config.json"
_MAX_CONFIG_BYTES = 8_000_000
_LIMITS = {
    "vocab_size": 10**8, "hidden_size": 10**6, "intermediate_size": 10**7, "moe_intermediate_size": 10**7, "head_dim": 10**5,
    "num_hidden_layers": 10**4, "num_attention_heads": 10**5, "num_key_value_heads": 10**5, "max_position_embeddings": 10**10,
    "num_experts": 10**4, "num_local_experts": 10**4, "num_experts_per_tok": 10**4,
    "num_labels": 10**5,  # of a classifier; transformers makes a table of them for every model
}  # fmt: skip
_MAY_BE_ZERO = ("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size")  # a dense one of a family with experts
_NO_MODEL = "config.json is damaged or belongs to no real model; download it again"
_MAX_LIST = 10**4  # some families have one value for each layer
_DTYPES = ("float16", "bfloat16", "float32", "float64", "half", "float", "double", "auto")
_MAX_EXPERTS_IN_MODEL = 2 * 10**5  # layers x experts; each is three linears, of which an object is made before any header is compared


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as an object with sizes in reason, or BadInput with everything that is wrong with it."""
    where = str(folder / CONFIG)
    if not exists(folder, CONFIG):
        raise BadInput("E392", "config.json is missing", where=where, fix="name the model's folder, or download config.json into it")
    try:
        config = read_json(folder, CONFIG, limit=_MAX_CONFIG_BYTES)
        refuse_deep(config, where)
    except FileRefused as refused:
        raise BadInput.from_problems("E392", [refused.problem]) from None
    if not isinstance(config, dict):
        raise BadInput("E392", f"config.json holds a {type(config).__name__}, not an object", where=where, fix="download config.json again")
    text = config.get("text_config")
    problems = _problems(config, where) + (_problems(text, where) if isinstance(text, dict) else [])
    problems += [Problem(f"{shown(key, 100)} is not a finite number", where, _NO_MODEL) for key in _not_finite(config)]
    if problems:
        raise BadInput.from_problems("E392", problems)
    return config


def positions(config: Mapping[str, Any]) -> int | None:
    """How many tokens a model can read at once; None where config.json does not say."""
    text = config.get("text_config")
    for part in (text if isinstance(text, dict) else {}, config):
        for key in ("max_position_embeddings", "n_positions"):
            if type(part.get(key)) is int:
                return int(part[key])
    return None


def wraps(config: Mapping[str, Any]) -> bool:
    """Whether config.json describes a language model with other parts around it, for images or sound: it has a config for each part."""
    return any(isinstance(config.get(key), Mapping) for key in ("text_config", "vision_config"))


# Families whose checkpoints call the decoder otherwise than transformers does.
RENAMED_DECODERS = frozenset(("nemotron_h",))


def named_otherwise(config: Mapping[str, Any]) -> bool:
    """Whether clients have names of their own for the linears of the blocks."""
    return wraps(config) or config.get("model_type") in RENAMED_DECODERS


def sizes_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config in which a language model's own sizes stand at the top, also those of one inside of a wrapper: a `hidden_size` of the
    wrapper itself may be that of another part (PaliGemma)."""
    text = config.get("text_config")
    return {**config, **text} if isinstance(text, Mapping) else config


def language_model_type(config: Mapping[str, Any]) -> object:
    """The model_type of the language model, also of one inside of a wrapper."""
    text = config.get("text_config")
    return (text if isinstance(text, Mapping) else config).get("model_type")


def refuse_large(config: Mapping[str, Any], names: Mapping[str, str], where: str) -> None:
    """BadInput E392 for a size beyond reason under the name that a family has for it: `n_layer` for num_hidden_layers.

    names: the usual name -> the family's own, as transformers' classes hold them (`attribute_map`).
    """
    if problems := _sizes(config, names, where):
        raise BadInput.from_problems("E392", problems)


def _sizes(config: Mapping[str, Any], names: Mapping[str, str], where: str) -> list[Problem]:
    problems = []
    for usual, name in names.items():
        least, limit = 0 if usual in _MAY_BE_ZERO else 1, _LIMITS.get(usual)
        if limit is not None and not _in_reason(config.get(name), least, limit):
            what = f"{name} is {shown(repr(config[name]), 60)}, which is not a whole number from {least} to {limit:,}"
            problems.append(Problem(what, where, _NO_MODEL))
    return problems


def _not_finite(document: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """Settings that are NaN or infinite: Python reads such JSON, and every number that they touch becomes the same or zero.

    Lists are left out: Mamba 2 has [0.0, Infinity] as the limits of a time step.
    """
    for key, value in document.items():
        if isinstance(value, dict):
            yield from _not_finite(value, f"{above}{key}.")
        elif isinstance(value, float) and not math.isfinite(value):
            yield f"{above}{key}"


def _problems(config: dict[str, Any], where: str) -> list[Problem]:
    problems = _sizes(config, {name: name for name in _LIMITS}, where)
    for key in ("dtype", "torch_dtype"):
        value = config.get(key)
        if any(part is not None and part not in _DTYPES for part in (value.values() if isinstance(value, dict) else [value])):
            what = f"{key} is {brief(value)}, which names no type of floating-point weights"
            problems.append(Problem(what, where, f"one of {', '.join(_DTYPES[:4])}: the type that the weights have"))
    if not isinstance(config.get("is_causal"), (bool, type(None))):  # no class of transformers checks it, and attention fails with it
        what = f"is_causal is {brief(config['is_causal'])}, not true or false"
        problems.append(Problem(what, where, "config.json is damaged; download it again"))
    experts = next((config[key] for key in ("num_experts", "num_local_experts") if type(config.get(key)) is int), 1)
    layers = config.get("num_hidden_layers")
    if not problems and type(layers) is int and layers * experts > _MAX_EXPERTS_IN_MODEL:
        what = f"num_hidden_layers {layers} times {experts} experts is impossibly large"
        problems.append(Problem(what, where, _NO_MODEL))
    return problems


def _in_reason(value: object, least: int, limit: int) -> bool:
    """Absent, a whole number up to the limit, or a list of such: one for each layer, where a layer may have none."""
    if isinstance(value, list):
        return 0 < len(value) <= _MAX_LIST and all(item is None or (type(item) is int and 0 <= item <= limit) for item in value)
    return value is None or (type(value) is int and least <= value <= limit)
