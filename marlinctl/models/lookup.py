"""The architecture of any model that can be compressed: from the table or a module map, else from transformers' own code."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from marlinctl.errors import BadInput, UsageError
from marlinctl.models.architectures import Architecture, Spelling, renamed, respelled
from marlinctl.models.config import wraps
from marlinctl.models.families import architecture, may_be_derived
from marlinctl.models.guests import LEFT_OUT, guests
from marlinctl.system.files import shown


def any_architecture(config: Mapping[str, Any], module_map: Path | None = None) -> Architecture:
    """As `architecture`, and torch is imported only for a model_type that is not in the table."""
    if module_map is not None or not may_be_derived(config):
        return architecture(config, module_map)
    _refuse_unlisted(str(config["model_type"]))
    from marlinctl.models.derivation import derived_architecture

    return derived_architecture(config)


def architecture_of(config: Mapping[str, Any], names: Collection[str], module_map: Path | None = None) -> Architecture:
    """The same in the names of a checkpoint, which holds `names`: a wrapper has several spellings, and others lack "model."."""
    known = _wrapped(config, names, module_map) if wraps(config) else any_architecture(config, module_map)
    return spelled_as(known, config, names)


def spelled_as(known: Architecture, config: Mapping[str, Any], names: Collection[str]) -> Architecture:
    """In the names of a checkpoint, with what others added to it. No torch."""
    begins = f"{known.decoder}."
    missing = [name for name in known.expected if name not in names]
    # A model that was saved without its head has names without the part before the first dot. transformers adds it when it loads.
    if missing and all(name.startswith(begins) and name.removeprefix(begins) in names for name in missing):
        head = known.head or known.tied
        known = respelled(known, Spelling(("", known.decoder), ("lm_head", "lm_head") if head is None else (head.name, head.name)))
    known = _as_modules(known, names)
    head_names = [f"{head.name}.weight" for head in (known.head, known.tied) if head is not None]
    strange = known.unexpected(dict.fromkeys(names))
    left_out = {name: LEFT_OUT for name in strange if any(re.search(pattern, name) for pattern in known.dropped)}
    return replace(known, guests=left_out | guests(strange, [*known.expected, *known.carried, *head_names], config))


def _as_modules(known: Architecture, names: Collection[str]) -> Architecture:
    """With the modules' own names where the checkpoint has those alone: transformers loads both. The dense blocks of Kimi Linear say `mlp`,
    and it would save them as `block_sparse_moe`. A checkpoint with all experts in one tensor is another matter (fused_experts.py)."""
    own: dict[str, str] = {}
    for block in known.blocks:
        fused = (f"{block.prefix}.{part.module}.{weight}" for part in block.experts for weight in part.parameters)
        if not any(name in names for name in fused):
            own |= {name: module for name, module in block.renamed.items() if name not in names and module in names}
    return renamed(known, own) if own else known


def _wrapped(config: Mapping[str, Any], names: Collection[str], module_map: Path | None) -> Architecture:
    if module_map is not None:
        raise UsageError(
            "E251",
            f"{shown(repr(config.get('model_type')), 60)} has parts for images or sound besides its language model; no map describes those",
            where=str(module_map),
            fix="leave --module-map out: transformers says which part is the language model",
        )
    from marlinctl.models.wrappers import wrapped_architecture

    return wrapped_architecture(config, names)


def _refuse_unlisted(model_type: str) -> None:
    """BadInput E390 for a type that transformers' list of language models does not name. Read as text: its import takes torch."""
    spec = find_spec("transformers")
    assert spec is not None and spec.origin is not None  # marlinctl requires it
    listed = Path(spec.origin).parent / "models" / "auto" / "modeling_auto.py"
    if f'"{model_type}"' not in listed.read_text("utf-8"):
        raise BadInput(
            "E390",
            f"transformers has no language model of type {shown(repr(model_type), 60)}",
            where="config.json, key model_type",
            fix="a newer release of transformers may have one; docs/models.md has the types that work",
        )
