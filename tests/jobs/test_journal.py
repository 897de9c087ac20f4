"""The folder of an unfinished run: who may use it, what its lines are worth, what is removed and what never."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marlinctl.checkpoint.manifest import NAME, digest
from marlinctl.checkpoint.ownership import mark_job
from marlinctl.errors import BadInput, NumericalProblem, ResourceProblem, UsageError
from marlinctl.jobs import journal
from marlinctl.jobs.journal import JOB, JOURNAL, JobFolder, Place, Request, held_by
from marlinctl.system.atomic import temporary_name
from marlinctl.system.console import Console

REQUEST = Request("quantize", {"model": "m"})


@contextmanager
def held(out: Path, *, resume: bool = False, told: io.StringIO | None = None) -> Iterator[JobFolder]:
    folder = JobFolder(out)
    console = Console(colour=False, stderr=told) if told is not None else Console.quiet()
    with folder.held(REQUEST, resume=resume, console=console):
        yield folder


def stop(out: Path, work: Callable[[JobFolder], object], error: BaseException | None = None, **how: Any) -> JobFolder:
    """A job that does some work and then ends with `error`."""
    raised = error or KeyboardInterrupt()

    def run() -> None:
        with held(out, **how) as folder:
            work(folder)
            raise raised

    with pytest.raises(type(raised)):
        run()
    return JobFolder(out)


def stopped(out: Path, *lines: dict[str, object], error: BaseException | None = None) -> JobFolder:
    """A new job that writes these lines and then ends with `error`."""

    def work(folder: JobFolder) -> None:
        folder.begin({"recipe": {"a": 1}, "versions": {"torch": "2"}})
        for line in lines:
            folder.append(line)

    return stop(out, work, error)


BLOCK = {"step": "block", "index": 0}


# ---- who may use it ------------------------------------------------------------------------------------------------------------------


def test_two_runs_cannot_share_a_folder(tmp_path: Path) -> None:
    """Two writers of one journal would leave a mixture of two models."""
    with held(tmp_path / "out") as folder:
        folder.begin({})
        folder.append(BLOCK)
        for resume in (True, False):
            with (
                pytest.raises(ResourceProblem, match=f"at work on this output .process {os.getpid()} on") as caught,
                held(tmp_path / "out", resume=resume),
            ):
                pass
            assert caught.value.error_id == "E503"
        assert held_by(folder.path) == {"pid": os.getpid(), "host": os.uname().nodename}
        folder.remove()


def test_an_unfinished_job_is_in_the_way_of_a_new_one(tmp_path: Path) -> None:
    """Starting over unasked would throw hours away; the way out is named."""
    stopped(tmp_path / "out", BLOCK)
    with pytest.raises(UsageError) as caught, held(tmp_path / "out"):
        pass
    assert caught.value.error_id == "E285" and "marlinctl resume" in caught.value.problems[0].fix
    with held(tmp_path / "out", resume=True) as folder:
        assert [line["step"] for line in folder.lines] == ["begun", "block"]
        folder.remove()


def test_a_job_without_anything_finished_is_in_nobodys_way(tmp_path: Path) -> None:
    """A run that was killed while it read its text has nothing to resume; its folder must not block the next."""
    (tmp_path / "out.job").mkdir()
    mark_job(tmp_path / "out.job")
    (tmp_path / "out.job" / "lock").touch()
    (tmp_path / "out.job" / JOB).write_text("{}")
    with held(tmp_path / "out") as folder:
        assert folder.request() == Request("quantize", {"model": "m"}, Path.cwd())
        folder.remove()
    assert not (tmp_path / "out.job").exists()


def test_a_folder_of_somebody_else_is_not_taken(tmp_path: Path) -> None:
    """Somebody keeps a thesis in out.job: a run with the output `out` would delete it, a refused run too."""
    theirs = tmp_path / "out.job"
    theirs.mkdir()
    (theirs / "thesis.tex").write_text("mine")
    for resume in (False, True):
        with pytest.raises(UsageError) as caught, held(tmp_path / "out", resume=resume):
            pass
        assert caught.value.error_id == "E224" and "thesis.tex" in caught.value.problems[0].what
    JobFolder(tmp_path / "out").remove()
    assert [path.name for path in theirs.iterdir()] == ["thesis.tex"]


def test_a_link_in_the_place_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    """`out.job -> /home/me/project` would be emptied, or journal lines appended to somebody's file."""
    real = stopped(tmp_path / "real", BLOCK).path
    before = sorted(path.name for path in real.iterdir())
    (tmp_path / "out.job").symlink_to(real)
    for resume in (False, True):
        with pytest.raises(UsageError) as caught, held(tmp_path / "out", resume=resume):
            pass
        assert caught.value.error_id == "E224" and "a link" in caught.value.problems[0].what
    JobFolder(tmp_path / "out").remove()
    assert sorted(path.name for path in real.iterdir()) == before
    (real / JOURNAL).rename(tmp_path / "precious")
    (real / JOURNAL).symlink_to(tmp_path / "precious")
    precious = (tmp_path / "precious").read_bytes() + b"torn"
    (tmp_path / "precious").write_bytes(precious)
    with pytest.raises(UsageError, match=r"journal\.jsonl .a link."), held(tmp_path / "real", resume=True):
        pass
    assert (tmp_path / "precious").read_bytes() == precious


def test_files_beside_those_of_a_job_stay(tmp_path: Path) -> None:
    """Notes that somebody put into the folder would vanish with the job; they must not keep it from resuming either."""
    path = stopped(tmp_path / "out", BLOCK).path
    (path / "notes.txt").write_text("mine")
    with held(tmp_path / "out", resume=True) as folder:
        folder.remove()
    assert [left.name for left in path.iterdir()] == ["notes.txt"]
    with pytest.raises(UsageError, match=r"notes\.txt"), held(tmp_path / "out"):
        pass


def test_the_mark_is_the_first_thing_and_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in between, a folder without its mark would be in the way of every later run, and `jobs rm` would refuse it."""
    seen: list[list[str]] = []
    real = os.unlink

    def unlink(path: Any, **how: Any) -> None:
        seen.append(sorted(entry.name for entry in Path(path).parent.iterdir()))
        real(path, **how)

    at_the_lock: list[str] = []
    take = journal.lock

    def lock(path: Path, *, wait: bool) -> Any:
        at_the_lock.extend(entry.name for entry in path.parent.iterdir())
        return take(path, wait=wait)

    monkeypatch.setattr(journal, "lock", lock)

    def run() -> None:
        with held(tmp_path / "out") as folder:
            assert at_the_lock == ["marlinctl_job.json"]
            folder.begin({})
            monkeypatch.setattr(os, "unlink", unlink)
            folder.remove()

    run()
    assert seen and all("marlinctl_job.json" in names for names in seen) and not any(JOB in names for names in seen[1:])


def test_a_job_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    """Jobs begun before folders were marked, perhaps days ago, would be lost with the update."""
    path = stopped(tmp_path / "out", BLOCK).path
    (path / "marlinctl_job.json").unlink()
    with pytest.raises(UsageError) as caught, held(tmp_path / "out"):
        pass
    assert caught.value.error_id == "E285"
    with held(tmp_path / "out", resume=True) as folder:
        assert [line["step"] for line in folder.lines] == ["begun", "block"]
        folder.remove()
    assert not path.exists()


@pytest.mark.parametrize("kind", ["folder", "link", "fifo"])
def test_a_lock_that_cannot_be_taken_is_told(tmp_path: Path, kind: str) -> None:
    """A folder called `lock` would end in a traceback."""
    path = stopped(tmp_path / "out", BLOCK).path
    (path / "lock").unlink()
    if kind == "folder":
        (path / "lock").mkdir()
    elif kind == "link":
        (path / "lock").symlink_to(tmp_path / "made")
    else:
        os.mkfifo(path / "lock")
    for resume in (False, True):
        with pytest.raises(ResourceProblem, match="lock cannot be taken") as caught, held(tmp_path / "out", resume=resume):
            pass
        assert caught.value.error_id == "E503" and not (tmp_path / "made").exists()
    assert held_by(path) is None and (path / JOURNAL).exists()


def test_looking_at_a_job_changes_nothing(tmp_path: Path) -> None:
    """`jobs ls` would put a lock into every folder that it passes."""
    path = stopped(tmp_path / "out", BLOCK).path
    (path / "lock").unlink()
    before = sorted(entry.name for entry in path.iterdir())
    assert held_by(path) is None
    assert sorted(entry.name for entry in path.iterdir()) == before


def test_what_a_killed_run_was_writing_goes(tmp_path: Path) -> None:
    """Each kill would leave a state of gigabytes under a name of its own."""
    path = stopped(tmp_path / "out", BLOCK).path
    (path / "states").mkdir()
    for place in (path, path / "states"):
        (place / temporary_name()).write_text("half")
    with held(tmp_path / "out", resume=True) as folder:
        assert not list(folder.path.rglob("*.part"))
        folder.remove()


def test_nothing_to_go_on_with_is_said(tmp_path: Path) -> None:
    """`resume` without a job must not begin one that the person takes for the old one."""
    with pytest.raises(UsageError, match="no job") as caught, held(tmp_path / "out", resume=True):
        pass
    assert caught.value.error_id == "E287" and not (tmp_path / "out.job").exists()


# ---- what is kept when a run stops ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "lines", "kept"),
    [
        (KeyboardInterrupt(), [], False),
        (KeyboardInterrupt(), [BLOCK], True),
        (ResourceProblem("E500", "full", where="", fix=""), [], True),
        (OSError("gone"), [], True),
        (NumericalProblem("E620", "nan", where="", fix=""), [], False),
        (NumericalProblem("E620", "nan", where="", fix=""), [BLOCK], True),
        (BadInput("E301", "bad", where="", fix=""), [BLOCK], True),
    ],
)
def test_what_a_stopped_run_leaves(tmp_path: Path, error: BaseException, lines: list[dict[str, object]], kept: bool) -> None:
    """Work must not be thrown away, and a run that had nothing must not leave a folder to clear away."""
    assert stopped(tmp_path / "out", *lines, error=error).path.exists() == kept


def test_the_way_on_is_told(tmp_path: Path) -> None:
    """Somebody who pressed Ctrl-C must not have to look up how to resume; for a refusal there is no way on."""
    told = io.StringIO()
    stop(tmp_path / "my out", lambda folder: (folder.begin({}), folder.append(BLOCK)), told=told)
    assert told.getvalue() == f"to resume: marlinctl resume '{tmp_path}/my out'\n"
    with pytest.raises(UsageError), held(tmp_path / "my out", told=told, resume=True):
        raise UsageError("E286", "differs", where="", fix="")
    assert told.getvalue().count("to resume") == 1


# ---- what the lines are worth --------------------------------------------------------------------------------------------------------


def test_a_torn_line_is_dropped_and_does_not_spoil_the_next(tmp_path: Path) -> None:
    """A line appended behind a torn one would be lost with it, and the block it speaks of solved twice for ever."""
    path = stopped(tmp_path / "out", BLOCK).path / JOURNAL
    with path.open("ab") as file:
        file.write(b'{"step":"block","ind')
    stop(tmp_path / "out", lambda folder: folder.append({"step": "block", "index": len(folder.lines) - 1}), resume=True)
    with held(tmp_path / "out", resume=True) as folder:
        assert [line.get("index") for line in folder.lines] == [None, 0, 1]
        folder.drop_from(2)
        folder.append({"step": "block", "index": 7})
        assert len(path.read_text().splitlines()) == 3
        folder.remove()


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 400), st.integers(0, 2**64))
def test_no_damage_of_the_journal_is_believed(tmp_path_factory: pytest.TempPathFactory, junk: bytes, place: int, flip: int) -> None:
    """Whatever lies in the file, only whole lines count, begin with `begun`, and nothing fails that is not an error of ours."""
    folder = JobFolder(tmp_path_factory.getbasetemp() / "damaged")
    folder.path.mkdir(exist_ok=True)
    good = b'{"step":"begun","fingerprint":{}}\n{"step":"block","index":0}\n'
    data = bytearray(good[:place] + junk + good[place:])
    if data:
        data[flip % len(data)] ^= 1 << flip % 8
    (folder.path / JOURNAL).write_bytes(bytes(data))
    folder.has_progress()
    assert all(isinstance(line["step"], str) for line in folder.lines)
    assert [line["step"] == "begun" for line in folder.lines] == [i == 0 for i in range(len(folder.lines))]


def test_differences_are_told_field_by_field(tmp_path: Path) -> None:
    """`something differs` does not tell what to put back."""
    stopped(tmp_path / "out", BLOCK)
    with held(tmp_path / "out", resume=True) as folder:
        folder.check({"recipe": {"a": 1}, "versions": {"torch": "2"}})
        with pytest.raises(UsageError) as caught:
            folder.check({"recipe": {"a": 2, "b": "new"}, "versions": {"torch": "2"}})
        folder.remove()
    assert caught.value.error_id == "E286"
    assert [problem.what for problem in caught.value.problems] == ["recipe.a was 1 and is now 2", "recipe.b was None and is now 'new'"]


@pytest.mark.parametrize(
    ("text", "error_id", "what"),
    [
        ('{"format": 2, "verb": "quantize", "arguments": {}, "folder": "."}', "E287", "the job is in format 2"),
        ("{", "E374", ""),
        ("[]", "E374", ""),
        ('{"format": 1}', "E374", ""),
        ('{"format": 1, "verb": 7, "arguments": {}, "folder": "."}', "E374", ""),
    ],
)
def test_a_request_that_cannot_be_read_is_refused(tmp_path: Path, text: str, error_id: str, what: str) -> None:
    """A job of a newer version may mean something else by the same words."""
    path = stopped(tmp_path / "out", BLOCK).path
    (path / JOB).write_text(text)
    with pytest.raises((UsageError, BadInput)) as caught, held(tmp_path / "out", resume=True):
        pass
    assert caught.value.error_id == error_id and what in str(caught.value) and (path / JOURNAL).exists()


# ---- publishing ----------------------------------------------------------------------------------------------------------------------


def finished(folder: JobFolder, name: str, text: str) -> Place:
    made = folder.path / f"staged-{name}"
    made.mkdir()
    (made / NAME).write_text(text)
    return Place(made, folder.out.with_name(name), True)


def test_a_publication_that_was_cut_short_is_completed(tmp_path: Path) -> None:
    """Two folders that belong together, one in place: the other must follow, without anything being computed again."""

    def half(folder: JobFolder) -> None:
        folder.begin({})
        stages = [finished(folder, name, name) for name in ("out", "out-ct")]
        lines = [{"from": s.path.name, "to": s.out.name, "manifest": digest(s.path)} for s in stages]
        folder.append({"step": "publishing", "folders": lines})
        stages[0].path.rename(stages[0].out)

    stop(tmp_path / "out", half)
    with held(tmp_path / "out", resume=True) as folder:
        assert folder.publishing is not None
        folder.publish_again(overwrite=False, keep=False)
    assert (tmp_path / "out" / NAME).read_text() == "out" and (tmp_path / "out-ct" / NAME).read_text() == "out-ct"
    assert not folder.path.exists()


def test_a_result_that_is_nowhere_is_not_called_published(tmp_path: Path) -> None:
    """Somebody removed the staged folder: saying `done` would be a lie."""
    line: dict[str, object] = {"step": "publishing", "folders": [{"from": "staged", "to": "out", "manifest": "0" * 64}]}
    stopped(tmp_path / "out", line)
    with pytest.raises(BadInput) as caught, held(tmp_path / "out", resume=True) as folder:
        folder.publish_again(overwrite=False, keep=False)
    assert caught.value.error_id == "E374"


def test_the_old_output_goes_back_where_the_new_one_never_came(tmp_path: Path) -> None:
    """Killed between the two renames, the only copy of the old model lies in the job's folder: removing that must not remove the model."""
    path = stopped(tmp_path / "out", BLOCK).path
    (path / "out.old-12345678").mkdir()
    (path / "out.old-12345678" / "model").write_text("old")
    JobFolder(tmp_path / "out").remove()
    assert (tmp_path / "out" / "model").read_text() == "old" and not path.exists()


def test_nothing_leaves_a_job_under_a_name_that_is_not_its_outputs(tmp_path: Path) -> None:
    """A job that somebody sent could put a `.git`, or any other folder, beside itself when it is removed or published."""
    path = stopped(tmp_path / "out", BLOCK).path
    for name in (".git.old-1f0c9a2e", "other.old-1f0c9a2e", "out.old-1f0c9a2e"):
        (path / name).mkdir()
    with (path / JOURNAL).open("a") as file:
        file.write(json.dumps({"step": "publishing", "folders": [{"from": "staged", "to": ".git", "manifest": ""}]}) + "\n")
    folder = JobFolder(tmp_path / "out")
    assert folder.has_progress() and folder.publishing is None
    folder.remove()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize(
    "line",
    [
        {"step": "publishing"},
        {"step": "publishing", "folders": 7},
        {"step": "publishing", "folders": [{"from": "staged", "to": "out"}]},
        {"step": "publishing", "folders": [{"from": "staged", "to": "../out", "manifest": ""}]},
    ],
)
def test_a_line_of_another_form_is_none(tmp_path: Path, line: dict[str, object]) -> None:
    """`jobs rm` and `resume` would end in a traceback, and the job could not be removed."""
    path = stopped(tmp_path / "out", BLOCK).path
    (path / "out.old-1f0c9a2e").mkdir()
    (tmp_path / "out").mkdir()
    with (path / JOURNAL).open("a") as file:
        file.write(json.dumps(line) + "\n")
    with held(tmp_path / "out", resume=True) as folder:
        assert [found["step"] for found in folder.lines] == ["begun", "block"]
        folder.remove()
    assert not path.exists()


def test_the_old_output_is_kept_where_something_else_has_its_place(tmp_path: Path) -> None:
    """Somebody makes a folder where the old model was, and removes the job: the only copy of the old model would go with it."""
    path = stopped(tmp_path / "out", BLOCK).path
    (path / "out.old-12345678").mkdir()
    (path / "out.old-12345678" / "model").write_text("old")
    (tmp_path / "out").mkdir()
    JobFolder(tmp_path / "out").remove()
    assert (tmp_path / "out.old-12345678" / "model").read_text() == "old" and not path.exists()
    assert list((tmp_path / "out").iterdir()) == []


def test_a_finished_result_waits_where_its_place_is_taken(tmp_path: Path) -> None:
    """Somebody puts notes into OUT while the run is at work: deleting them is wrong, and so is throwing hours away."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    told = io.StringIO()

    def run() -> None:
        with held(tmp_path / "out", told=told) as folder:
            folder.begin({})
            folder.publish([finished(folder, "out", "one")], keep=False)

    with pytest.raises(UsageError) as caught:
        run()
    assert caught.value.error_id == "E224" and "notes.txt" in caught.value.problems[0].what
    assert f"marlinctl resume {tmp_path}/out" in caught.value.problems[0].fix
    (tmp_path / "out" / "notes.txt").rename(tmp_path / "notes.txt")
    with held(tmp_path / "out", resume=True) as folder:
        folder.publish_again(overwrite=True, keep=False)
    assert (tmp_path / "out" / NAME).read_text() == "one" and not (tmp_path / "out.job").exists()


def test_a_kept_job_is_not_in_the_way(tmp_path: Path) -> None:
    """--keep-job keeps the journal of a run that is over: the next run with this OUT may replace it."""
    with held(tmp_path / "out") as folder:
        folder.begin({})
        folder.publish([finished(folder, "out", "one")], keep=True)
    assert JobFolder(tmp_path / "out").has_progress()
    assert json.loads((folder.path / JOURNAL).read_text().splitlines()[-1]) == {"step": "published"}
    with held(tmp_path / "out") as folder:
        assert folder.lines == []
        folder.remove()
    assert (tmp_path / "out" / NAME).exists()


# ---- what a refused run leaves -------------------------------------------------------------------------------------------------------


def logged(out: Path, error: BaseException, *, begins: bool) -> None:
    """A run with a log, as run.py has it, that ends with `error`."""
    folder, console = JobFolder(out), Console(colour=False, stderr=io.StringIO())
    try:
        with folder.held(REQUEST, resume=False, console=console):
            console.log_to(folder.log)
            if begins:
                folder.begin({})
            raise error
    except type(error):
        console.traceback(error, show=False)
    finally:
        console.close()


def test_a_refused_run_leaves_no_folders_and_no_log(tmp_path: Path) -> None:
    """Each typing error would leave a log, and folders that were made for an output that never came."""
    refusal = BadInput("E302", "what", where="where", fix="fix")
    logged(tmp_path / "new" / "place" / "out", refusal, begins=False)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out.log").write_text(before := "2026-11-30T00:00:00+0000 INFO    of an earlier run\n")
    logged(tmp_path / "out", refusal, begins=False)
    assert (tmp_path / "out.log").read_text() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt(), NumericalProblem("E620", "what", where="where", fix="fix")])
def test_a_run_that_failed_at_work_keeps_its_log(error: BaseException, tmp_path: Path) -> None:
    """What happened in a run that had begun could not be looked up."""
    logged(tmp_path / "new" / "out", error, begins=True)
    assert "INFO" in (log := (tmp_path / "new" / "out.log").read_text()) or type(error).__name__ in log
