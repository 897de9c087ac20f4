"""The architecture of any model that can be compressed: from the table or a module map, else from transformers' own code."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from marlinctl.errors import BadInput
from marlinctl.models.architectures import Architecture, architecture, may_be_derived
from marlinctl.system.files import shown


def any_architecture(config: Mapping[str, Any], module_map: Path | None = None) -> Architecture:
    """As `architecture`, and torch is imported only for a model_type that is not in the table."""
    if module_map is not None or not may_be_derived(config):
        return architecture(config, module_map)
    _refuse_unlisted(str(config["model_type"]))
    from marlinctl.models.derivation import derived_architecture

    return derived_architecture(config)


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
