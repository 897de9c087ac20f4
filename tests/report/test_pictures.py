"""The pictures: figures at their places, the page's colours, and no formula language for names."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import matplotlib as mpl
import pytest

from marlinctl.report import pictures
from marlinctl.report.page import Picture
from marlinctl.report.scores import Score
from tests.report import documents

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: str) -> list[str]:
    return ["".join(element.itertext()) for element in ET.fromstring(svg).iter(f"{SVG}text")]


def layers(kind: str = "q_proj", **changes: float) -> Picture:
    return pictures.layers(tuple(pictures.Layer(b, kind, changes.get("error", 0.001 * (b + 1)), 4.25, 0.5) for b in range(4)), "caption")


NAMES = [*documents.HOSTILE, "$x^{2$", "x" * 5000]


@pytest.mark.parametrize("kinds", [NAMES[i::3] for i in range(3)], ids=["one", "two", "three"])
def test_any_name_can_be_drawn_and_stays_text(kinds: list[str]) -> None:
    """matplotlib reads $..$ as a formula and stops at a wrong one; a tag in a label would be a tag of the page."""
    drawn = [pictures.Layer(0, kind, 0.2, 4.0, 0.1) for kind in (*kinds, "other")]
    picture = pictures.layers(tuple(drawn), f"caption of {kinds}")
    for svg in (picture.wide, picture.narrow):
        tree = ET.fromstring(svg)
        assert {element.tag.removeprefix(SVG) for element in tree.iter()} <= {
            "svg",
            "defs",
            "style",
            "g",
            "path",
            "use",
            "text",
            "clipPath",
            "rect",
        }
        assert max(map(len, texts(svg))) <= 40


def test_colours_follow_the_page() -> None:
    """A fixed black is invisible on a dark page."""
    picture = layers()
    for svg in (picture.wide, picture.narrow):
        assert not re.search(r"#[0-9a-fA-F]{6}\b|\b(black|white)\b", svg)
        assert "var(--series-1)" in svg and "var(--line)" in svg


def test_the_same_figures_give_the_same_bytes() -> None:
    """Reports of equal runs should differ in nothing but their times."""
    pictures.layers.cache_clear()
    first = layers()
    pictures.layers.cache_clear()
    assert layers() == first and not re.search(r"\b20\d\d-\d\d-\d\d\b", first.wide)


def test_a_matplotlibrc_has_no_say(tmp_path: Path) -> None:
    """Somebody's dark style or LaTeX setting would change, or break, every report."""
    plain = layers()
    pictures.layers.cache_clear()
    with mpl.rc_context({"text.usetex": True, "axes.facecolor": "black", "font.size": 30, "svg.fonttype": "path"}):
        assert layers() == plain
        assert mpl.rcParams["font.size"] == 30, "and the settings of an embedding program stay as they are"


def test_zero_errors_are_drawn() -> None:
    """A logarithm has no place for 0: a model that loses nothing would end the run after hours."""
    assert texts(layers(error=0.0).wide)


def test_heights_are_the_figures() -> None:
    """Points at the wrong height are worse than no picture: higher error must lie higher, in equal steps of the logarithm."""
    svg = pictures.layers(tuple(pictures.Layer(b, "q", 10.0**-b, 4.0, 1.0) for b in range(3)), "decades").wide
    lines = [path for path in ET.fromstring(svg).iter(f"{SVG}path") if "--series-1" in path.get("style", "")]
    line = next(path for path in lines if path.get("d", "").count("L") == 2)
    heights = [float(y) for _, y in re.findall(r"([\d.]+) ([\d.]+)", line.get("d", ""))]
    assert heights[0] < heights[1] < heights[2]
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], rel=1e-3)


def test_scores_without_an_error_or_a_value() -> None:
    """One document has no standard error, and a model of NaN no score: both must be reportable."""
    rows = [
        Score("task", "a", "test", "acc", 4, documents.estimate(0.5, None), documents.estimate(None)),
        Score("perplexity", "t", "-", "perplexity", 3, documents.estimate(12.0), None),
    ]
    labels = texts(pictures.comparison(rows, "c").wide)
    assert "a, acc" in labels and "t, perplexity" in labels


def test_a_home_that_cannot_be_written_is_no_trouble() -> None:
    """In a container without a home, matplotlib would add its own lines to the stderr of a quiet run."""
    program = "from marlinctl.report.pictures import Layer, layers; print(len(layers((Layer(0, 'q', 0.1, 4.0, 0.1),), 'c').wide) > 1000)"
    nowhere = {"HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null/a", "XDG_CONFIG_HOME": "/dev/null/b", "MPLCONFIGDIR": "/dev/null/c"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | nowhere, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.stdout, done.stderr) == ("True\n", "")
