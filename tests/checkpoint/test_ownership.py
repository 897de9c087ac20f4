"""What may be removed or replaced: where this is wrong, somebody's work is deleted."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from marlinctl.checkpoint import manifest, ownership
from marlinctl.checkpoint.formats.registry import FORMATS
from marlinctl.checkpoint.model_files import is_companion, is_model_file
from marlinctl.errors import UsageError
from marlinctl.system.atomic import canonical, is_temporary, temporary_name

REQUEST = {"format": 1, "verb": "quantize", "arguments": {}, "folder": "/"}
LINES = "journal.jsonl"


def job(path: Path, *, marked: bool = True, request: object = REQUEST) -> Path:
    """A job's folder as a run leaves it."""
    path.mkdir()
    if marked:
        ownership.mark_job(path)
    (path / "job.json").write_text(json.dumps(request))
    for name in (LINES, "lock", "calibration.safetensors", "staged.masks", "state-00000200.safetensors", temporary_name()):
        (path / name).write_text("")
    for name in ("staged", *FORMATS, *(f"staged-{fmt}" for fmt in FORMATS), "out.old-1f0c9a2e"):
        (path / name).mkdir()
        for file in ("config.json", "model-00001.safetensors", ".nfs00ab", temporary_name()):
            (path / name / file).write_text("x")
    (path / "states").mkdir()
    (path / "states" / "00001.safetensors").write_text("x")
    (path / "marlin.job").mkdir()
    ownership.mark_job(path / "marlin.job")
    (path / "marlin.job" / LINES).write_text("x")
    return path


def model(path: Path) -> Path:
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama"}')
    for name in ("model.safetensors", "tokenizer.json", "LICENSE.txt", "README.md", ".gitattributes", "tokenizer.model"):
        (path / name).write_text(name)
    (path / "original").mkdir()
    (path / "original" / "consolidated.00.pth").write_text("x")
    return path


def published(path: Path) -> Path:
    model(path)
    (path / manifest.NAME).write_bytes(canonical(manifest.build(path, {})))
    (path / "marlinctl_report.html").write_text("x")
    (path / temporary_name()).write_text("half")
    return path


# ---- jobs ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("marked", [True, False])
def test_a_jobs_folder_is_ours(tmp_path: Path, marked: bool) -> None:
    """A job, of an earlier version too, which did not mark its folder, could neither be resumed nor removed."""
    folder = job(tmp_path / "out.job", marked=marked)
    (folder / "journal.jsonl.part").write_text("x")  # as earlier versions left it
    assert ownership.is_job(folder) and ownership.strangers_in_job(folder) == [] and ownership.misfits_in_job(folder) == []
    ownership.remove_job(folder)
    assert not folder.exists()


@pytest.mark.parametrize(
    "request_of_another",
    [{"a": 1}, [], {**REQUEST, "format": 2}, {**REQUEST, "more": 1}, {**REQUEST, "verb": 7}, {k: REQUEST[k] for k in ("format", "verb")}],
)
def test_a_folder_without_our_mark_is_nobodys_to_remove(tmp_path: Path, request_of_another: object) -> None:
    """A batch system keeps its `run.job/job.json` and `journal.jsonl` too."""
    folder = job(tmp_path / "out.job", marked=False, request=request_of_another)
    assert not ownership.is_job(folder) and "job.json" in ownership.strangers_in_job(folder)


def test_a_mark_of_somebody_else_is_none(tmp_path: Path) -> None:
    """A file of that name alone must not open a folder to deletion."""
    for text in ("{}", '{"magic": "other"}', "[]", "{", ""):
        (tmp_path / ownership.JOB_MARKER).write_text(text)
        assert not ownership.is_job(tmp_path) and ownership.strangers_in_job(tmp_path) == [ownership.JOB_MARKER]


def test_what_somebody_put_into_a_job_stays(tmp_path: Path) -> None:
    """Notes beside a journal, or a folder with the name of one of our files, would go with the job."""
    folder = job(tmp_path / "out.job")
    (folder / "thesis.tex").write_text("mine")
    (folder / "src").mkdir()
    assert ownership.strangers_in_job(folder) == ["src/", "thesis.tex"] and ownership.misfits_in_job(folder) == []
    ownership.remove_job(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["src", "thesis.tex"]
    assert not ownership.is_job(folder)


@pytest.mark.parametrize("place", ["staged", "ct", "states", "marlin.job", "out.old-1f0c9a2e"])
def test_what_somebody_put_into_a_folder_of_a_job_stays(tmp_path: Path, place: str) -> None:
    """A note beside the shards of an unfinished checkpoint would go with the job, or when the run goes on."""
    folder = job(tmp_path / "out.job")
    (folder / place / "thesis.tex").write_text("mine")
    (folder / place / "src").mkdir()
    expected = [f"{place}/src/", f"{place}/thesis.tex"]
    assert ownership.strangers_in_job(folder) == ownership.misfits_in_job(folder) == expected
    ownership.empty_job(folder)
    ownership.remove_job(folder)
    assert (folder / place / "thesis.tex").read_text() == "mine" and [path.name for path in folder.iterdir()] == [place]


def test_links_and_other_kinds_are_strangers(tmp_path: Path) -> None:
    """A journal that is a link would be truncated where it leads; `staged`, where it is one, emptied there."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "thesis.tex").write_text("mine")
    folder = job(tmp_path / "out.job")
    (folder / LINES).unlink()
    (folder / LINES).symlink_to(elsewhere / "thesis.tex")
    (folder / "pruned").symlink_to(elsewhere)
    (folder / "rows.safetensors").mkdir()
    os.mkfifo(folder / "state.json")
    expected = ["journal.jsonl (a link)", "pruned (a link)", "rows.safetensors/", "state.json (no file)"]
    assert ownership.strangers_in_job(folder) == ownership.misfits_in_job(folder) == expected
    ownership.remove_job(folder)
    assert (elsewhere / "thesis.tex").read_text() == "mine" and len(list(folder.iterdir())) == 4
    (tmp_path / "link.job").symlink_to(elsewhere)
    assert not ownership.is_job(tmp_path / "link.job") and ownership.strangers_in_job(tmp_path / "link.job") == ["link.job (a link)"]


def test_what_a_run_leaves_that_dies_at_once_is_in_nobodys_way(tmp_path: Path) -> None:
    """SIGKILL before the folder is marked must not cost the next run its output name."""
    (tmp_path / "lock").touch()
    (tmp_path / temporary_name()).write_text('{"magic"')
    (tmp_path / "running.json").write_text('{"pid": 1, "host": "h"}')
    assert ownership.strangers_in_job(tmp_path) == [] and not ownership.is_job(tmp_path)
    (tmp_path / "lock").write_text("held by my own program")
    (tmp_path / "running.json").write_text('{"pid": 1}')
    assert ownership.strangers_in_job(tmp_path) == ["lock", "running.json"]


# ---- outputs -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", [model, published])
def test_a_model_may_be_replaced(tmp_path: Path, made: Callable[[Path], Path]) -> None:
    """--overwrite would be refused where it is meant."""
    assert ownership.strangers_in_output(made(tmp_path / "out")) == []


@pytest.mark.parametrize("made", [model, published])
@pytest.mark.parametrize(
    ("name", "told"),
    [
        (".git/HEAD", ".git/"),
        ("src/main.py", "src/"),
        ("model/x.safetensors", "model/"),
        ("thesis.tex", "thesis.tex"),
        ("train.py", "train.py"),
        ("original/notes.txt", "original/notes.txt"),
    ],
)
def test_whatever_else_is_there_stops_it(tmp_path: Path, made: Callable[[Path], Path], name: str, told: str) -> None:
    """A project that has a config.json, or one that grew around a published model, would be deleted."""
    folder = made(tmp_path / "out")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("mine")
    assert ownership.strangers_in_output(folder) == [told]


def test_an_extra_shard_in_a_published_folder_stops_it(tmp_path: Path) -> None:
    """A LoRA or a shard that somebody trained and put there is theirs; in a folder without a manifest it looks like the model's."""
    folder = published(tmp_path / "out")
    (folder / "mine.safetensors").write_text("x")
    assert ownership.strangers_in_output(folder) == ["mine.safetensors"]
    assert "mine.safetensors" not in ownership.strangers_in_output(model(tmp_path / "other"))


def test_a_manifest_cannot_make_anything_a_part_of_a_model(tmp_path: Path) -> None:
    """A manifest is a file that anybody can write: a repository could name its own sources in it."""
    folder = published(tmp_path / "out")
    (folder / "thesis.tex").write_text("mine")
    (folder / manifest.NAME).write_bytes(canonical(manifest.build(folder, {})))
    assert "thesis.tex" in json.loads((folder / manifest.NAME).read_text())["files"]
    assert ownership.strangers_in_output(folder) == ["thesis.tex"]


def test_a_config_json_alone_is_no_model(tmp_path: Path) -> None:
    """Many programs call their settings config.json."""
    (tmp_path / "README.md").write_text("x")
    for text in ('{"port": 80}', '{"model_type": "llama"}', "{", "[]"):
        (tmp_path / "config.json").write_text(text)
        assert ownership.strangers_in_output(tmp_path) == ["README.md", "config.json"]
    (tmp_path / "data.safetensors").write_text("x")
    assert len(ownership.strangers_in_output(tmp_path)) == 3


def test_code_counts_where_the_config_names_it(tmp_path: Path) -> None:
    """Models with code of their own could not be replaced; any other script could be."""
    folder = model(tmp_path / "out")
    auto_map = {"AutoConfig": "configuration_x.Config", "AutoTokenizer": ["tokenization_x.T", None], "AutoModel": "org/repo--modeling_y.M"}
    (folder / "config.json").write_text(json.dumps({"model_type": "x", "auto_map": auto_map}))
    for name in ("configuration_x.py", "tokenization_x.py", "modeling_y.py"):
        (folder / name).write_text("")
    assert ownership.strangers_in_output(folder) == ["modeling_y.py"]


def test_links_in_an_output_are_strangers(tmp_path: Path) -> None:
    """A link is judged by itself: what it leads to is not ours to weigh."""
    (tmp_path / "x").mkdir()
    folder = model(tmp_path / "out")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to(tmp_path / "x")
    (folder / "additional_chat_templates").symlink_to(tmp_path / "x")
    assert ownership.strangers_in_output(folder) == ["additional_chat_templates (a link)", "tokenizer.json (a link)"]
    (tmp_path / "link").symlink_to(folder)
    assert ownership.strangers_in_output(tmp_path / "link") == ["link (a link)"]


def test_rejected_results(tmp_path: Path) -> None:
    """The result that was refused last time must be replaceable, a checkpoint or all formats of a compress; a thesis must not."""
    assert ownership.strangers_in_rejected(published(tmp_path / "one")) == []
    whole = job(tmp_path / "two")
    (whole / "notes.txt").write_text("mine")
    ownership.leave_results(whole)
    assert sorted(path.name for path in whole.iterdir() if path.is_file()) == [ownership.JOB_MARKER, "notes.txt"]
    (whole / "notes.txt").unlink()
    assert ownership.strangers_in_rejected(whole) == []
    earlier = tmp_path / "three"
    earlier.mkdir()
    published(earlier / "ct")
    published(earlier / "marlin")
    assert ownership.strangers_in_rejected(earlier) == []
    (earlier / "ct" / "thesis.tex").write_text("mine")
    assert ownership.strangers_in_rejected(earlier) == ["ct/thesis.tex"]
    (whole / "thesis.tex").write_text("mine")
    assert ownership.strangers_in_rejected(whole) == ["thesis.tex"]


# ---- removing and telling ------------------------------------------------------------------------------------------------------------


def test_a_link_is_never_followed_when_removing(tmp_path: Path) -> None:
    """What a link leads to belongs to somebody else."""
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "thesis.tex").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(NotADirectoryError):
        ownership.remove_tree(tmp_path / "link")
    ownership.remove(tmp_path / "link")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "link").symlink_to(tmp_path / "real")
    ownership.remove_tree(tmp_path / "tree")
    assert [path.name for path in tmp_path.iterdir()] == ["real"] and (tmp_path / "real" / "thesis.tex").read_text() == "mine"


def test_five_names_are_told_and_the_rest_counted(tmp_path: Path) -> None:
    """A project of thousands of files would fill the terminal, and a name with escape sequences steer it."""
    with pytest.raises(UsageError) as caught:
        ownership.refuse_strangers("there is", tmp_path, ["\x1b[2Jx", *"abcdef"], "move them")
    assert caught.value.error_id == "E224" and caught.value.problems[0].what == "there is: \\x1b[2Jx, a, b, c, d and 2 more"
    ownership.refuse_strangers("there is", tmp_path, [], "move them")


def test_places_that_a_rename_must_not_replace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OUT=. would take the folder away under the person's feet; a mount point fails at the last step, after the hours."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "home" / "x").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "disk")
    for name, why in (("a/b", "current"), ("a", "current"), ("home", "home"), ("disk", "mount")):
        with pytest.raises(UsageError, match=why) as caught:
            ownership.refuse_protected(tmp_path / name)
        assert caught.value.error_id == "E225"
    ownership.refuse_protected(tmp_path / "home" / "x")
    ownership.refuse_protected(tmp_path / "a" / "b" / "c")


def test_stale_temporaries_go_and_nothing_else(tmp_path: Path) -> None:
    """What a killed run was writing would fill the disk; a link of that name, or a file that is being written, must stay."""
    old, new, link = (tmp_path / temporary_name() for _ in range(3))
    old.write_text("x")
    new.write_text("x")
    link.symlink_to(old)
    (tmp_path / ".marlinctl-mine.part").write_text("x")
    os.utime(old, (0, 0))
    ownership.remove_temporaries(tmp_path, older=3600)
    assert not old.exists() and new.exists() and link.is_symlink() and (tmp_path / ".marlinctl-mine.part").exists()
    ownership.remove_temporaries(tmp_path)
    assert not new.exists() and link.is_symlink()


def test_names_of_model_files() -> None:
    """Everything that is published must be replaceable, and nothing that people call their own files."""
    for name in ("marlin-00001-of-00002.safetensors", "marlin.safetensors.index.json", "marlinctl_mask.safetensors", "recipe.yaml"):
        assert is_model_file(name)
    for name in ("main.py", "LICENSE.py", "package.json", "data.bin", "x/model.safetensors", "src/LICENSE", "../config.json", ".env"):
        assert not is_model_file(name)
    assert is_companion("NOTICE") and not is_companion("README.md")
    assert is_temporary(temporary_name()) and not is_temporary("x.part") and not is_temporary("sub/" + temporary_name())
