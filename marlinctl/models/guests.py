"""Tensors that others add to a model, and that transformers loads the model without: they are carried along as they are.

    model.layers.0.self_attn.k_scale        the calibration of a KV cache
    mtp.fc.weight, model.layers.61. ...     a head that predicts further tokens
    v_head.summary.weight                   the value head of a trainer, or any other part that the model of config.json lacks

What lies inside of the model and has no place there is not a guest: a bias that config.json does not announce, a block too many, an adapter
that was not merged. transformers drops those too, and computes another model than the one that was trained.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

_MTP = "a head that predicts several tokens (MTP)"
LEFT_OUT = "tensors that transformers leaves out of such a model"
_ANYWHERE = (
    (r"\.(k|v|q|prob)_(scale|zero_point)$", "scales of a quantized KV cache"),
    (r"(^|\.)(vision|visual|audio|multi_modal)", "a part for images or sound"),
)
_BESIDE = ((r"^mtp(\.|_)", _MTP), (r"^v_head\.", "the value head of a reinforcement-learning trainer"))
_ADAPTER = r"lora_[AB]\."
_MTP_KEYS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules")  # blocks behind the last one
_BLOCK = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")


def guests(names: Iterable[str], model: Collection[str], config: Mapping[str, Any]) -> dict[str, str]:
    """Those of `names`, which the model has no place for, that are guests -> what they are. model: all tensors that it has."""
    roots = {name.partition(".")[0] for name in model}
    text = config["text_config"] if isinstance(config.get("text_config"), Mapping) else config
    blocks = text.get("num_hidden_layers")
    heads = max((text[key] for key in _MTP_KEYS if type(text.get(key)) is int), default=0)
    behind = range(blocks, blocks + heads) if type(blocks) is int else range(0)
    found = {name: _kind(name, roots, behind) for name in names}
    return {name: kind for name, kind in found.items() if kind is not None}


def _kind(name: str, roots: Collection[str], heads: range) -> str | None:
    if re.search(_ADAPTER, name):
        return None
    block = _BLOCK.search(f".{name}")
    if block is not None and int(block[1]) in heads:
        return _MTP
    for pattern, kind in _ANYWHERE:
        if re.search(pattern, name):
            return kind
    if name.partition(".")[0] in roots:
        return None
    return next((kind for pattern, kind in _BESIDE if re.search(pattern, name)), "a part that the model of config.json lacks")
