"""A checkpoint that is published while the disk fails, a signal comes, or other programs write beside it."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from marlinctl.checkpoint import manifest, writer
from marlinctl.checkpoint.formats.registry import FORMATS
from marlinctl.errors import MarlinctlError, ResourceProblem, UsageError
from marlinctl.system import atomic
from tests import forked
from tests.checkpoint.test_writer import nothing, publish
from tests.packed import tree
from tests.tiny import make_tiny


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_tiny(tmp_path / "source")


class FailAt:
    """Counts calls of a system function and fails at the n-th, as SQLite's tests do."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, n: int, error: BaseException) -> None:
        self.calls, self.n, self.error, self.on = 0, n, error, True
        for name in ("replace", "rename", "fsync", "mkdir"):
            monkeypatch.setattr(os, name, self.wrap(getattr(os, name)))

    def wrap(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.on:
                self.calls += 1
                if self.calls == self.n:
                    self.on = False  # the cleaning-up that follows works again
                    raise self.error
            return real(*args, **kwargs)

        return call


def every_call(tmp_path: Path, error: Callable[[], BaseException]) -> Iterator[tuple[int, pytest.MonkeyPatch, FailAt]]:
    """(n, patch, fault) for n = 1 until a publication no longer reaches its n-th system call."""
    for n in range(1, 200):
        with pytest.MonkeyPatch.context() as patch:
            fault = FailAt(patch, n, error())
            yield n, patch, fault
        if fault.on:
            assert n > 20, "the faults were never injected"
            return
    raise AssertionError("a publication makes fewer than 200 system calls")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_fails_at_any_call_leaves_the_old_model(source: Path, tmp_path: Path, code: int) -> None:
    """A failed save that mixes old and new shards still loads without a warning: transformers' own save does this."""
    publish(tmp_path / "out", value=1.0)
    old = tree(tmp_path / "out")
    for n, _, fault in every_call(tmp_path, lambda: OSError(code, os.strerror(code))):
        noticed = None
        try:
            publish(tmp_path / "out", value=2.0, overwrite=True)
        except ResourceProblem as problem:
            noticed = problem
        if noticed is None:
            assert fault.on, f"call {n} failed without an error"
        else:
            assert noticed.exit_code == 5 and "nothing was published" in noticed.problems[0].fix
            assert tree(tmp_path / "out") == old, f"call {n}"
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith("out.")] == [], f"call {n} left something behind"
    assert tree(tmp_path / "out") != old  # the last round had no fault


def test_ctrl_c_at_any_call_leaves_nothing(source: Path, tmp_path: Path) -> None:
    """An interrupted run may leave neither half a model nor gigabytes of staging."""
    for n, _, fault in every_call(tmp_path, KeyboardInterrupt):
        try:
            publish(tmp_path / "out")
        except KeyboardInterrupt:
            assert [p.name for p in tmp_path.iterdir() if p.name.startswith("out")] == [], f"call {n}"
        else:
            assert fault.on
    manifest.check(tmp_path / "out")


def test_what_a_killed_run_was_writing_is_not_published(source: Path, tmp_path: Path) -> None:
    """A run that was killed while it rewrote the card of a finished folder would leave half a file in the published one."""

    def half_a_card(folder: Path) -> None:
        (folder / atomic.temporary_name()).write_bytes(b"half a card")

    publish(tmp_path / "plain")
    publish(tmp_path / "out", verify=half_a_card)
    assert {*tree(tmp_path / "out")} == {*tree(tmp_path / "plain")}


def test_folders_that_belong_together_appear_together(source: Path, tmp_path: Path) -> None:
    """With --also, one folder without the other would be taken for a finished run."""
    publish(tmp_path / "a", value=1.0)
    old = tree(tmp_path / "a")
    with pytest.MonkeyPatch.context() as patch:
        stages = [writer.StagedCheckpoint(tmp_path / name, overwrite=True, fmt=FORMATS["ct"]) for name in "ab"]
        with stages[0], stages[1]:
            for stage in stages:
                stage.write_shard({"t": torch.zeros(2)})
                stage.finish({}, manifest={}, verify=nothing, report_files={})
            renames = 0
            real = os.rename

            def third_fails(a: Path, b: Path) -> None:
                nonlocal renames
                renames += 1
                if renames == 3:  # a aside, a in place, then b
                    raise OSError(errno.ENOSPC, "No space left on device")
                real(a, b)

            patch.setattr(os, "rename", third_fails)
            with pytest.raises(ResourceProblem):
                writer.publish_together(stages)
    assert tree(tmp_path / "a") == old and not (tmp_path / "b").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "source"]


@pytest.mark.parametrize("appears", ["file", "link"])
def test_what_comes_in_the_last_moment_stays(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, appears: str) -> None:
    """Between the look at the old folder and the rename: a file was deleted with it, and a link was taken for it."""
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    publish(out, value=1.0)
    shutil.copytree(out, elsewhere)
    looked = writer.ownership.strangers_in_output

    def look(folder: Path) -> list[str]:
        found = looked(folder)
        if folder == out and appears == "file":
            (out / "thesis.tex").write_text("mine")
        elif folder == out and not out.is_symlink():
            shutil.rmtree(out)
            out.symlink_to(elsewhere)
        return found

    with writer.StagedCheckpoint(out, overwrite=True, fmt=FORMATS["ct"]) as stage:
        stage.write_shard({"t": torch.zeros(2)})
        stage.finish({}, manifest={}, verify=nothing, report_files={})
        monkeypatch.setattr(writer.ownership, "strangers_in_output", look)
        with pytest.raises(UsageError) as caught:
            writer.publish_together([stage])
    assert caught.value.error_id == "E224"
    assert out.is_symlink() if appears == "link" else (out / "thesis.tex").read_text() == "mine"
    assert (elsewhere / "config.json").is_file() and sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "out", "source"]


def test_an_old_folder_that_cannot_be_deleted_is_named(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new model stands, but gigabytes stay behind: the person must learn where."""
    publish(tmp_path / "out", value=1.0)
    real = writer.shutil.rmtree

    def rmtree(path: Path, ignore_errors: bool = False) -> None:
        if ".old-" in str(path):
            raise OSError(errno.EACCES, "Permission denied")
        real(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(writer.shutil, "rmtree", rmtree)
    with pytest.raises(ResourceProblem) as caught:
        publish(tmp_path / "out", value=2.0, overwrite=True)
    assert caught.value.error_id == "E500" and "could not be deleted" in str(caught.value) and ".old-" in caught.value.problems[0].where
    manifest.check(tmp_path / "out")


def test_a_real_size_limit_is_a_resource_problem(source: Path, tmp_path: Path) -> None:
    """RLIMIT_FSIZE fails inside write(), as a full disk does: exit 5 with numbers, and the old model as it was."""
    publish(tmp_path / "out", value=1.0)
    old = tree(tmp_path / "out")
    program = textwrap.dedent(
        """
        import resource, signal, sys
        from pathlib import Path
        import torch
        from marlinctl.checkpoint.formats.registry import FORMATS
        from marlinctl.checkpoint.writer import StagedCheckpoint
        from marlinctl.errors import ResourceProblem
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
        try:
            with StagedCheckpoint(Path(sys.argv[1]), overwrite=True, fmt=FORMATS["ct"]) as stage:
                stage.write_shard({"big": torch.zeros(1_000_000)})
        except ResourceProblem as problem:
            print(problem.error_id, problem.problems[0].what)
            sys.exit(problem.exit_code)
        """
    )
    done = forked.run([sys.executable, "-c", program, str(tmp_path / "out")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout[:4]) == (5, "E500"), done.stderr
    assert "4,000,000 bytes were needed" in done.stdout and "are free" in done.stdout
    assert tree(tmp_path / "out") == old and not list(tmp_path.glob("out.*"))
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1_000_000


def test_missing_space_is_said_before_the_work(tmp_path: Path) -> None:
    """The disk's free space is known at the start; finding out at the end wastes the run."""
    writer.require_space(tmp_path / "out", 1)
    with pytest.raises(ResourceProblem) as caught:
        writer.require_space(tmp_path / "out", 1 << 60)
    assert f"{1 << 60:,} bytes were needed" in caught.value.problems[0].what


def test_an_output_that_appears_meanwhile_is_not_replaced(source: Path, tmp_path: Path) -> None:
    """Two runs with one OUT: the second to finish must not destroy what the first published."""

    def other_run_wins(folder: Path) -> None:
        publish(tmp_path / "out", value=1.0)

    with pytest.raises(MarlinctlError) as caught:
        publish(tmp_path / "out", value=2.0, verify=other_run_wins)
    assert caught.value.exit_code == 2
    manifest.check(tmp_path / "out")
    assert not list(tmp_path.glob("out.*"))
