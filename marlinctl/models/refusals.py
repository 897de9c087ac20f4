"""How a model is refused that transformers knows and the pipeline cannot run."""

from __future__ import annotations

from marlinctl.errors import BadInput

_TREE = "docs/models.md has the models that work, and why others do not"


def refused(kind: str, reason: str) -> BadInput:
    return BadInput("E390", f"models of type {kind!r} cannot be compressed: {reason}", where="config.json, key model_type", fix=_TREE)
