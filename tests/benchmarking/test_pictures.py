"""The pictures: files with something in them, drawn without a display."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from marlinctl.benchmarking import pictures
from tests.benchmarking.figures import made_up, made_up_roofline


def size(path: Path) -> tuple[int, int]:
    """Width and height out of a PNG's header."""
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def test_a_set_and_single_linears_get_their_pictures(tmp_path: Path) -> None:
    """If this failed, a run of an hour would end without its pictures."""
    names = {path.name for path in pictures.draw(made_up(), tmp_path)}
    assert names == {"speedup-llama3-8b.png", "shares-llama3-8b.png", "speedup-73728x18432.png", "speedup-18432x73728.png"}
    for path in tmp_path.iterdir():
        width, height = size(path)
        assert 0.9 <= width / (pictures.WIDTH * pictures.DPI) <= 1.15, "as wide as a column, or the type is not the size that was chosen"
        assert 0.6 <= height / width <= 1.2
        assert path.stat().st_size > 10_000, "an empty frame"


def test_the_roofline_is_drawn_for_its_own_matrices(tmp_path: Path) -> None:
    """If this failed, --roofline would measure for minutes and draw nothing."""
    assert [path.name for path in pictures.draw(made_up_roofline(), tmp_path)] == ["roofline.png"]


def test_the_lines_are_the_documents_figures() -> None:
    """If this failed, the picture would show something else than the table."""
    document = made_up()
    figures: dict[str, Any] = dict(pictures._figures(document))
    lines = {line.get_label(): line for line in figures["speedup-llama3-8b"].axes[0].get_lines()}
    sums = [row for row in document.sets[0].sums if row.name == "int4"]
    assert list(lines["int4"].get_xdata()) == [row.m for row in sums]
    assert list(lines["int4"].get_ydata()) == [row.speedup for row in sums]
    assert list(lines["ideal, 4 bits"].get_ydata()) == [point.speedup for point in document.sets[0].ideal if point.kind == "dense"]
    bars = figures["shares-llama3-8b"].axes[0].patches
    total = sum(row.us for row in document.sets[0].sums if row.family != "peer")
    assert sum(bar.get_height() for bar in bars) == pytest.approx(total)


def test_nothing_measured_draws_nothing(tmp_path: Path) -> None:
    """If this failed, `bench --check --out` would end in a traceback."""
    document = replace(made_up(), cases=[], sets=[], ceilings=None, drift=None)
    assert pictures.draw(document, tmp_path) == []
