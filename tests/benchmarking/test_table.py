"""The document for people."""

from __future__ import annotations

import re
from dataclasses import replace

from marlinctl.benchmarking.cases import named_set
from marlinctl.benchmarking.documents import make_set
from marlinctl.benchmarking.table import render
from tests.benchmarking.figures import MADE_UP, made_up


def test_every_figure_of_a_case_is_in_its_row() -> None:
    """If this failed, the table would say something else than the JSON."""
    document = made_up()
    text = render(document)
    case = document.cases[0]
    for timed in case.candidates:
        row = next(line for line in text.splitlines() if timed.name in line)
        assert f"{timed.us:.1f}" in row and f"{timed.speedup:.2f}x" in row and f"{timed.bytes_per_second / 1e12:.2f}" in row
    assert f"{case.baseline} (baseline)" in text


def test_sums_and_the_ideal_stand_beside_each_other() -> None:
    """If this failed, the figure that a model feels would be missing."""
    document = made_up()
    text = render(document)
    total = next(row for row in document.sets[0].sums if row.name == "int4" and row.m == 16)
    assert f"{total.us:.1f} {total.speedup:.2f}x" in text
    assert "ideal, sum of" not in text, "the two orientations of one product are no model"
    assert re.search(r"ideal, sparse +\d\.\d\dx", text)


def test_what_the_figures_stand_on_is_told() -> None:
    """If this failed, a table could be quoted without its GPU, its error, its drift, or the peers that were not there."""
    text = render(made_up())
    for part in (MADE_UP, "reads 4.00 TB/s", "700 TFLOP/s", "relative 2.5e-04", "+1.0 %", "not installed, so not measured: humming"):
        assert part in text
    assert "not measured: vllm machete 0: machete_mm has no parameter b_q" in text


def test_no_line_has_trailing_blanks_or_colour() -> None:
    """If this failed, a table in a page or a file would hold escape sequences."""
    assert not re.search(r"\x1b| $", render(made_up()), flags=re.MULTILINE)


def test_of_many_configurations_the_fastest_is_told() -> None:
    """If this failed, --tune would print thousands of rows, or hide what it found."""
    document = made_up()
    first = document.cases[0]
    ours = first.named("int4")
    assert ours is not None
    many = [replace(ours, name=f"m8n128k256x4/{i}", us=ours.us + i) for i in (3, 1, 2)]
    case = replace(first, candidates=[*first.candidates, *many])
    text = render(replace(document, cases=[case], sets=[make_set(named_set("llama3-8b", 128), [case, *document.cases[1:]])]))
    assert "m8n128k256x4/1" in text and "m8n128k256x4/2" not in text and "m8n128k256x4/3" not in text
