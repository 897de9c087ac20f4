"""The results file: whole at every moment, never overwritten by accident, continued only when nothing differs."""

from __future__ import annotations

import copy
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from marlinctl.errors import BadInput, ResourceProblem, UsageError
from marlinctl.evaluation import results
from marlinctl.evaluation.results import ResultsFile


def document() -> dict[str, Any]:
    return {
        "kind": "evaluation",
        "finished": False,
        "settings": {"limit": 5, "dtype": "bfloat16"},
        "versions": {"torch": "2.13.0"},
        "names": ["a"],
        "text": None,
        "model": {"name": "m", "identity": "1", "tasks": {"a": {"split": "test", "samples": {"acc": [0.0, 1.0]}}}},
        "baseline": {"name": "b", "identity": "2"},
        "comparison": {},
    }


def test_text_form_is_json_with_a_line_for_each_task() -> None:
    """The file would be no JSON, or a million lines long with MMLU's 14,042 answers."""
    text = results.render(document())
    assert json.loads(text) == document()
    assert '      "a": {"split": "test", "samples": {"acc": [0.0, 1.0]}}' in text.splitlines()
    with pytest.raises(ValueError, match="JSON"):
        results.render({"a": float("nan")})


def test_continues_what_is_equal(tmp_path: Path) -> None:
    """A killed run would start from the beginning."""
    path = tmp_path / "r.json"
    first = ResultsFile(path, document(), resume=False)
    first.document["model"]["tasks"]["b"] = {"split": "test"}
    first.save()
    fresh = document()
    del fresh["model"]["tasks"]
    again = ResultsFile(path, fresh, resume=True)
    assert set(again.document["model"]["tasks"]) == {"a", "b"}


def test_resume_without_a_file_yet_starts(tmp_path: Path) -> None:
    """A script that always passes --resume would fail the first time."""
    assert ResultsFile(tmp_path / "r.json", document(), resume=True).document == document()
    assert (tmp_path / "r.json").exists()


@pytest.mark.parametrize(
    ("part", "key", "value", "named"),
    [
        ("settings", "limit", 6, "settings.limit was 6, is 5"),
        ("settings", "window", 7, "settings.window was 7, is not there"),
        ("versions", "torch", "2.12.0", "versions.torch was 2.12.0, is 2.13.0"),
        ("model", "identity", "9", "model.identity was 9, is 1"),
        ("baseline", "identity", "9", "baseline.identity was 9, is 2"),
    ],
)
def test_refuses_to_mix(tmp_path: Path, part: str, key: str, value: object, named: str) -> None:
    """Scores of two models or two settings would stand in one table."""
    path = tmp_path / "r.json"
    old = document()
    old[part][key] = value
    ResultsFile(path, old, resume=False)
    before = path.read_bytes()
    with pytest.raises(UsageError) as caught:
        ResultsFile(path, document(), resume=True)
    assert caught.value.error_id == "E286"
    assert [problem.what for problem in caught.value.problems] == [named]
    assert path.read_bytes() == before


def test_another_baseline_or_none(tmp_path: Path) -> None:
    """Differences against one baseline would be continued with another."""
    path = tmp_path / "r.json"
    ResultsFile(path, document() | {"baseline": None}, resume=False)
    with pytest.raises(UsageError, match=r"baseline\.identity was not there, is 2"):
        ResultsFile(path, document(), resume=True)


def test_folders_of_the_results_are_made(tmp_path: Path) -> None:
    """OUT of every other verb makes its parents; `eval --out runs/one/scores.json` ended with "make the folder first"."""
    path = tmp_path / "runs" / "one" / "r.json"
    results.check_place(path, resume=False)
    assert not path.parent.exists()
    ResultsFile(path, document(), resume=False)
    assert path.is_file()


def test_existing_files_and_impossible_places(tmp_path: Path) -> None:
    """Hours of results would be overwritten, or lost at the end because no file can be there."""
    path = tmp_path / "r.json"
    path.write_text("mine")
    impossible = path / "no" / "r.json"
    for target, resume, what in (
        (path, False, "exists already"), (None, True, "needs the file"),
        (impossible, False, "not a folder"), (impossible, True, "not a folder"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=what) as caught:
            ResultsFile(target, document(), resume=resume)
        assert caught.value.error_id == "E244"
    assert path.read_text() == "mine"
    with pytest.raises(UsageError):
        results.write_atomically(tmp_path, b"x")


@pytest.mark.parametrize(
    "content", [b"", b"[1]", b'{"kind": "evaluation"}', b'{"kind": "other", "settings": {}, "versions": {}, "model": {}}']
)
def test_damaged_files_are_refused(tmp_path: Path, content: bytes) -> None:
    """A foreign file would be filled with results, or end in a traceback."""
    path = tmp_path / "r.json"
    path.write_bytes(content)
    with pytest.raises(BadInput, match="not a results file") as caught:
        ResultsFile(path, document(), resume=True)
    assert caught.value.error_id == "E374"
    assert path.read_bytes() == content


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """A run that dies while writing would leave half a file and lose all finished tasks."""
    path = tmp_path / "r.json"
    file = ResultsFile(path, document(), resume=False)
    before = path.read_bytes()
    file.document = copy.deepcopy(document()) | {"finished": True}

    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(*((os, "fsync", full) if call == "fsync" else (Path, "replace", full)))
    with pytest.raises(ResourceProblem, match="cannot write the results") as caught:
        file.save()
    assert caught.value.error_id == "E500"
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.json"]


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    """`scores.json -> thesis.tex` would overwrite the thesis."""
    (tmp_path / "thesis.tex").write_text("mine")
    (tmp_path / "r.json").symlink_to(tmp_path / "gone")
    ResultsFile(tmp_path / "r.json", document(), resume=False)
    assert not (tmp_path / "gone").exists() and not (tmp_path / "r.json").is_symlink()
    (tmp_path / "s.json").symlink_to(tmp_path / "thesis.tex")
    results.write_atomically(tmp_path / "s.json", b"x")
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_others_may_read_the_file(tmp_path: Path) -> None:
    """The file would have mode 0600, as temporary files have, and the next person could not read it."""
    ResultsFile(tmp_path / "r.json", document(), resume=False)
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "r.json").stat().st_mode) == 0o666 & ~umask
