"""Folders for the tests of this room."""

from __future__ import annotations

from pathlib import Path

import pytest

from marlinctl.report.files import JSON
from tests.checkpoint.verbs import TEXT
from tests.packed import make_packed
from tests.pruned import prune
from tests.tiny import make_tiny


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`dense` and `packed`, good and published, and a text."""
    root = tmp_path_factory.mktemp("folder")
    make_tiny(root / "dense")
    prune(root / "dense", root / "pruned")  # a student for the teacher that is damaged
    make_packed(root / "dense", root / "packed")
    make_packed(root / "dense", root / "native", "marlin")
    for name in ("packed", "native"):
        (root / name / JSON).write_text('{"kind": "quantize"}')
    (root / "text.txt").write_text(TEXT)
    return root


@pytest.fixture
def place(root: Path, tmp_path: Path) -> Path:
    """The good folders, as links; `copied` gives one that may be damaged."""
    for path in root.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path
