"""The architecture of any model that can be compressed: from the table or a module map, else from transformers' own code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from marlinctl.models.architectures import Architecture, architecture, may_be_derived


def any_architecture(config: Mapping[str, Any], module_map: Path | None = None) -> Architecture:
    """As `architecture`, and torch is imported only for a model_type that is in the table neither as a dense model nor as a mixture."""
    if module_map is not None or not may_be_derived(config):
        return architecture(config, module_map)
    from marlinctl.models.derivation import derived_architecture

    return derived_architecture(config)
