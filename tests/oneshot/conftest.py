"""A small model and what a run of it publishes."""

from __future__ import annotations

from pathlib import Path

import pytest

from marlinctl.cli import main
from tests.oneshot.stopping import SIZES, Stopped, quantize
from tests.runs import TEXT
from tests.tiny import make_tiny


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model, text, and what a run that nobody stopped publishes."""
    root = tmp_path_factory.mktemp("resume")
    make_tiny(root / "model", **SIZES)
    (root / "text.txt").write_text(TEXT)
    (root / "mine.yaml").write_text("extends: int4\ncalibration: {minimum_tokens: 32}\n")
    (root / "whole").mkdir()
    assert main(quantize(root, root / "whole" / "out")) == 0
    return root


@pytest.fixture(scope="module")
def stopped(place: Path) -> Stopped:
    """The same command, stopped where the test says."""
    return Stopped(place)
