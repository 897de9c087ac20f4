"""One model in each packed format."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.packed import (
    make_packed,
)
from tests.tiny import make_tiny


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("repack") / "source", shards=2)


@pytest.fixture(scope="module")
def packed(source: Path) -> dict[str, Path]:
    """One model in each packed format, with exceptions among its group sizes and a skipped linear."""
    folders = {}
    for fmt in ("ct", "gptq", "marlin"):
        folders[fmt] = source.parent / fmt
        options = {"overrides": {"model.layers.1.mlp.down_proj": 64, "model.layers.0.self_attn.o_proj": -1}}
        make_packed(source, folders[fmt], fmt, skip=["model.layers.1.self_attn.o_proj"], **options)  # type: ignore[arg-type]
    return folders
