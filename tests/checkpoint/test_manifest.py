from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from marlinctl.checkpoint import manifest
from marlinctl.errors import CheckFailed
from marlinctl.system.atomic import canonical, temporary_name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    out = tmp_path / "out"
    (out / "sub").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "sub/template.jinja", "README.md", "run.log"):
        (out / name).write_text(f"contents of {name}")
    (out / manifest.NAME).write_bytes(canonical(manifest.build(out, {"recipe_hash": "abc"})))
    return out


def test_a_good_folder_passes(folder: Path) -> None:
    """If an untouched folder failed, people would stop to verify."""
    document = manifest.check(folder)
    assert sorted(document["files"]) == ["config.json", "model.safetensors", "sub/template.jinja", "tokenizer.json"]
    assert document["recipe_hash"] == "abc" and document["tool"]["name"] == "marlinctl"


def test_card_report_and_log_may_be_rewritten(folder: Path) -> None:
    """Scores are added to the card after publishing; that is no damage."""
    for name in ("README.md", "marlinctl_report.json", "marlinctl_report.md", "marlinctl_report.html", "run.log", ".gitattributes"):
        (folder / name).write_text("new")
    manifest.check(folder)


def test_what_a_killed_rewrite_leaves_is_ignored_and_nothing_else(folder: Path) -> None:
    """`report` that was killed would spoil the folder; any other name could be a file that a loader takes."""
    (folder / temporary_name()).write_text("half")
    manifest.check(folder)
    (folder / temporary_name()).symlink_to("config.json")
    for name in ("README.md.part", ".marlinctl-xyz.part", ".marlinctl-0123456789abcdef.part.safetensors", f"sub/{temporary_name()}"):
        (folder / name).write_text("x")
    with pytest.raises(CheckFailed) as caught:
        manifest.check(folder)
    assert len(caught.value.problems) == 5


def test_the_manifest_is_the_same_everywhere(folder: Path, tmp_path: Path) -> None:
    """Times, host names or paths in it would make equal models look different."""
    moved = folder.rename(tmp_path / "elsewhere")
    again = canonical(manifest.build(moved, {"recipe_hash": "abc"}))
    assert again == (moved / manifest.NAME).read_bytes()
    assert str(tmp_path).encode() not in again


def flip(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[3] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def test_all_changes_are_named_at_once(folder: Path) -> None:
    """One per attempt would mean hashing gigabytes again and again."""
    flip(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "extra").write_text("x")
    with pytest.raises(CheckFailed) as caught:
        manifest.check(folder)
    assert [p.what.split()[0] for p in caught.value.problems] == ["tokenizer.json", "model.safetensors", "extra"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"files": {}}', '{"files": {"a": {"sha256": 1, "bytes": 2}}}', "[" * 100_000])
def test_a_damaged_manifest_is_refused(folder: Path, text: str) -> None:
    """A manifest that lists nothing would approve of everything."""
    (folder / manifest.NAME).write_text(text)
    with pytest.raises(CheckFailed, match="the manifest cannot be used") as caught:
        manifest.check(folder)
    assert caught.value.error_id == "E101"


def test_canonical_json_has_one_spelling() -> None:
    """Equal documents must be equal bytes, and NaN is no JSON."""
    assert canonical({"b": 1, "a": "ü"}) == canonical(json.loads('{"a": "\\u00fc", "b": 1}'))
    with pytest.raises(ValueError):
        canonical({"x": float("nan")})


def test_what_a_folder_was_made_from(folder: Path) -> None:
    """The chain from a distilled model back to its original would break at the first folder that was quantized from another."""
    facts = {"source": {"name": "student"}, "teacher": {"name": "original"}, "recipe": {"sha256": "1"}}
    (folder / manifest.NAME).write_bytes(canonical(manifest.build(folder, facts)))
    assert manifest.made_from(folder) == {"source": {"name": "student"}, "teacher": {"name": "original"}}


@pytest.mark.parametrize("damage", ["", "[]", '{"files": {"a": {"sha256": "1", "bytes": 1}}, "source": {"name": NaN}}', "[" * 100000])
def test_a_manifest_that_cannot_be_used_tells_nothing(folder: Path, damage: str) -> None:
    """It is asked after hours of work, when a damaged manifest of the source must not be their end."""
    (folder / manifest.NAME).write_text(damage)
    assert manifest.made_from(folder) == {}
    (folder / manifest.NAME).unlink()
    assert manifest.made_from(folder) == {}


def test_a_path_that_is_no_utf8_is_written_and_read_again() -> None:
    """A job on a folder whose name has bytes of another encoding ended in a traceback."""
    document = {"model": os.fsdecode(b"mod\xe8le"), "other": "modèle"}
    data = canonical(document)
    assert "modèle".encode() in data and json.loads(data) == document
