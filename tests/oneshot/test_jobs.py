"""`marlinctl jobs` on jobs that were stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from marlinctl.cli import main
from tests import forked
from tests.oneshot.stopping import PROGRAM, quantize, stop_in
from tests.oneshot.test_resume_refused import refused
from tests.test_architecture import ROOT


def test_jobs_are_listed_and_removed(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What fills the disk would not be found, or the wrong thing would be removed."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert stop_in(monkeypatch, 3, quantize(place, tmp_path / "a" / "b" / "out")) == 130
    assert stop_in(monkeypatch, 1, ["compress", *quantize(place, tmp_path / "a" / "whole")[1:], "--no-eval"]) == 130
    capfd.readouterr()
    assert main(["jobs", "ls", str(tmp_path), "--json"]) == 0
    found = {Path(job["path"]).name: job for job in json.loads(capfd.readouterr().out)["jobs"]}
    assert {name: (job["verb"], job["stage"], job["blocks"]) for name, job in found.items()} == {
        "out.job": ("quantize", "3 blocks finished", 3),
        "whole.job": ("compress", "ct: 1 block finished", 1),
    }
    on_disk = sum(path.stat().st_size for path in (tmp_path / "a" / "b" / "out.job").rglob("*") if path.is_file())
    assert found["out.job"]["size"] == on_disk and found["out.job"]["running"] is None and 0 <= found["out.job"]["age"] < 300

    told = refused(capfd, "jobs", "rm", str(tmp_path / "a" / "whole"))
    assert told["id"] == "E202" and told["problems"][0]["fix"] == "add --yes"
    assert refused(capfd, "jobs", "rm", str(tmp_path / "nothing"), "--yes")["id"] == "E287"
    told = refused(capfd, "jobs", "ls", str(tmp_path / "nothing"))
    assert told["id"] == "E240" and told["problems"][0]["where"].endswith("nothing")
    assert main(["jobs", "rm", str(tmp_path / "a" / "whole"), str(tmp_path / "a" / "b" / "out.job"), "--yes"]) == 0
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_dir()) == ["a", "b"]
    capfd.readouterr()
    assert main(["jobs", "ls", str(tmp_path)]) == 0
    assert capfd.readouterr().out == f"no jobs below {tmp_path}\n"


def test_only_jobs_of_ours_are_removed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Any folder called X.job with any job.json in it would be deleted, and what a link of that name leads to."""
    theirs = tmp_path / "x.job"
    theirs.mkdir()
    (theirs / "job.json").write_text('{"queue": "long"}')
    (theirs / "thesis.tex").write_text("mine")
    (tmp_path / "link.job").symlink_to(theirs)
    for name in ("x", "x.job", "link", "link.job"):
        told = refused(capfd, "jobs", "rm", str(tmp_path / name), "--yes")
        assert told["id"] == "E224", name
    for name in ("x", "link"):
        assert refused(capfd, "resume", str(tmp_path / name))["id"] == "E224"
    assert sorted(path.name for path in theirs.iterdir()) == ["job.json", "thesis.tex"]
    capfd.readouterr()
    assert main(["jobs", "ls", str(tmp_path)]) == 0
    assert capfd.readouterr().out == f"no jobs below {tmp_path}\n"


def test_a_job_at_work_is_shown_and_not_removed(place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Removing the folder under a running process would break it hours in."""
    out = tmp_path / "out"
    process = forked.Popen(
        [sys.executable, "-c", PROGRAM, "60", *quantize(place, out)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "in block 1\n"
        assert main(["jobs", "ls", str(tmp_path), "--json"]) == 0
        (job,) = json.loads(capfd.readouterr().out)["jobs"]
        assert job["running"]["pid"] == process.pid and job["blocks"] == 1
        assert refused(capfd, "jobs", "rm", str(out), "--yes", code=5)["id"] == "E503"
        told = refused(capfd, *quantize(place, out), code=5)
        assert told["id"] == "E503" and f"process {process.pid} on {os.uname().nodename}" in told["problems"][0]["what"]
    finally:
        process.kill()
        process.communicate()
    assert main(["jobs", "rm", str(out), "--yes"]) == 0
    assert not (tmp_path / "out.job").exists()
