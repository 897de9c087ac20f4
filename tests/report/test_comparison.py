"""`marlinctl report A B C --out FILE.html`: quality against size, of outputs that can be compared."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from marlinctl.cli import main
from marlinctl.report import comparison, markdown, pictures
from tests.packed import make_packed
from tests.report import documents
from tests.tiny import make_tiny


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """two/a and two/b: folders with a report, as `compress` leaves them."""
    root = tmp_path_factory.mktemp("two")
    make_tiny(root / "tiny")
    make_packed(root / "tiny", root / "a")
    report = documents.report()
    (root / "a" / "marlinctl_report.json").write_text(json.dumps(report))
    shutil.copytree(root / "a", root / "b")
    return root


@pytest.fixture
def two(published: Path, tmp_path: Path) -> Path:
    shutil.copytree(published, tmp_path / "two")
    return tmp_path / "two"


def run(*arguments: object) -> int:
    return main(["report", *(str(argument) for argument in arguments)])


def edit(folder: Path, change: str, value: object) -> None:
    """Set one value of a report: `evaluation.document.text.sha256`."""
    path = folder / "marlinctl_report.json"
    report = json.loads(path.read_text())
    *keys, last = change.split(".")
    place = report
    for key in keys:
        place = place[key]
    place[last] = value
    path.write_text(json.dumps(report))


def test_several_folders_become_a_page_a_picture_and_markdown(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Who chooses among outputs wants one picture, and a card needs it as a file."""
    before = {path: path.read_bytes() for folder in ("a", "b") for path in (two / folder).iterdir() if path.is_file()}
    edit(two / "b", "evaluation.document.comparison.kl.value", 0.05)
    before[two / "b" / "marlinctl_report.json"] = (two / "b" / "marlinctl_report.json").read_bytes()
    assert run(two / "a", two / "b", "--out", two / "all.html", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert [Path(name).name for name in told["files"]] == ["all.html", "all.svg", "all.md"]
    assert [(output["name"], output["kl"]) for output in told["outputs"]] == [("a", 0.1234), ("b", 0.05)]
    assert told["outputs"][0]["recovery"] == {"winogrande": pytest.approx(0.53 / 0.55), "arc_easy": pytest.approx(0.59 / 0.61)}
    page = (two / "all.html").read_text("utf-8")
    assert "org/Model-1B, compressed" in page and "0.05000" in page and "recovery, % of the original" in page
    text = (two / "all.md").read_text("utf-8")
    assert "](all.svg)" in text and "| a | compressed-tensors |" in text and "96.5 %" in text and "near the score of guessing" in text
    assert {path: path.read_bytes() for path in before} == before, "the folders stay as they are"


def test_the_picture_is_text_too_and_follows_the_reader(two: Path) -> None:
    """In a card the picture stands alone: without its colours it is black on black, without a description a screen reader skips it."""
    picture = comparison.picture(documents.outputs())
    svg = pictures.standalone(picture)
    root = ElementTree.fromstring(svg)
    label = root.attrib["aria-label"]
    for wanted in ("model-int4 1 MB", "model-2of4 1 MB", "original 100", "perplexity", "KL divergence"):
        assert wanted in label, wanted
    assert "prefers-color-scheme: dark" in svg and "var(--paper)" in svg
    used = set(re.findall(r"var\((--[\w-]+)\)", svg))
    assert all(f"{name}:" in pictures.LIGHT and f"{name}:" in pictures.DARK for name in used)
    assert "the upper left is best" in picture.caption and len(picture.caption) < len(picture.alt)


def test_names_that_begin_alike_stay_apart() -> None:
    """Outputs of one model share the beginning of their names; the legend would show one name twice."""
    stem = "SmolLM2-135M-Instruct-compressed-with"
    picture = comparison.picture(documents.outputs([f"{stem}-g32", f"{stem}-g64"]))
    shown = set(re.findall(r">(SmolLM2[^<]*)<", picture.wide))
    assert len(shown) == 2 and any(name.endswith("g32") for name in shown)


def test_only_tasks_over_the_same_questions_are_averaged() -> None:
    """A mean over different questions would rank the outputs by what they were asked."""
    first, second, third = documents.outputs()
    other = replace(second, questions={**second.questions, "arc_easy": ("c" * 64,)})
    text = markdown.render(comparison.page([first, other, third]))
    assert "| output | winogrande |" in text and "arc\\_easy" not in text.split("## Recovery by task")[1]
    assert "| output | winogrande | arc" in markdown.render(comparison.page([first, second, third]))


@pytest.mark.parametrize(
    ("change", "value", "told"),
    [
        ("evaluation.document.text.sha256", "cd" * 32, "on another text"),
        ("evaluation.document.baseline.identity", "another", "another original"),
        ("evaluation.document.baseline", None, "no measurement against the original"),
        ("evaluation", None, "no measurement against the original"),
    ],
)
def test_what_cannot_be_compared_is_refused(change: str, value: object, told: str, two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Perplexities of two texts in one picture are a lie; a folder that was never measured would be missing without a word."""
    edit(two / "b", change, value)
    assert run(two / "a", two / "b", "--out", two / "all.html") == 2
    error = capsys.readouterr().err
    assert told in error and "E261" in error and not list(two.glob("all.*"))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["a", "b"], "--out is missing"),
        (["a", "--out", "all.html"], "comparison of several"),
        (["a", "b", "--out", "all.pdf"], "HTML"),
        (["a", "a", "--out", "all.html"], "twice"),
        (["a", "b", "--out", "a/config.json/all.html"], "not a folder"),
        (["a", "b", "--out", "taken.html"], "exists already"),
        (["a", "b", "--out", "all.html", "--license", "mit"], "--license belongs to one folder"),
        (["a", "b", "--out", "all.html", "--scores", "s.json"], "--scores belongs to one folder"),
    ],
)
def test_arguments_that_do_not_go_together(
    arguments: list[str], told: str, two: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A page over somebody's file, or flags that do nothing."""
    monkeypatch.chdir(two)
    (two / "taken.svg").touch()
    assert run(*arguments) == 2
    assert told in capsys.readouterr().err and not list(two.glob("all.*"))


def test_a_damaged_report_is_one(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Reports may come from strangers."""
    edit(two / "b", "evaluation.document.text", {"sha256": 1})
    assert run(two / "a", two / "b", "--out", two / "all.html") == 3
    assert "E374" in capsys.readouterr().err
