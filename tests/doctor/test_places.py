"""marlinctl/doctor/places.py: folders that really cannot be written, files in the way, disks that are too small."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from marlinctl.doctor import places
from marlinctl.doctor.result import Check


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Cache folders of both kinds below one folder that is not there yet."""
    monkeypatch.setenv("MARLINCTL_CACHE", str(tmp_path / "home" / "cache" / "marlinctl"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home" / "hf"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    return tmp_path / "home"


def test_the_caches_are_tried_and_left_as_they_were(home: Path) -> None:
    """If this failed, a doctor would leave folders and probes behind on every machine that it looks at."""
    (home / "hf" / "hub").mkdir(parents=True)
    (home / "hf" / "hub" / "version.txt").touch()
    assert [c.status for c in places.cache()] == ["ok", "ok"]
    assert sorted(path.relative_to(home).as_posix() for path in home.rglob("*")) == ["hf", "hf/hub", "hf/hub/version.txt"]


def test_a_cache_below_a_file(home: Path) -> None:
    """If this failed, a long download would end where it was to be stored."""
    home.mkdir()
    (home / "cache").touch()
    (check, hub) = places.cache()
    assert (check.status, hub.status) == ("fail", "ok")
    assert "Not a directory" in check.found and "MARLINCTL_CACHE" in check.cure


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs a file system that nobody may write to, not even root")
def test_a_read_only_cache(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """If this failed, a read-only mount, whose mode bits look fine to root, would pass."""
    monkeypatch.setenv("MARLINCTL_CACHE", "/sys/kernel")
    check = by_name(list(places.cache()))["cache"]
    assert check.status == "fail" and "/sys/kernel" in check.found


def test_a_disk_that_takes_nothing(home: Path) -> None:
    """If this failed, a full disk or a quota would pass, because the folder itself can be made."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        checks = list(places.cache())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert {check.status for check in checks} == {"fail"}
    assert all("writing failed: File too large" in check.found for check in checks)
    assert not home.exists()


@pytest.mark.parametrize(("call", "step"), [("fsync", "fsync"), ("replace", "renaming")])
def test_a_disk_that_cannot_do_what_publishing_needs(home: Path, monkeypatch: pytest.MonkeyPatch, call: str, step: str) -> None:
    """If this failed, a network drive without fsync or rename would lose a result at its very end."""

    def refuses(*_args: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os if call == "fsync" else Path, call, refuses)
    check = by_name(list(places.cache()))["cache"]
    assert check.status == "fail" and f"{step} failed: Operation not supported" in check.found
    assert not home.exists(), "the probe and the folders made for it are gone"


def test_a_temporary_folder_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, files would go to another disk than the one named, without a word."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    (check,) = places.temporary(os.environ["TMPDIR"])
    assert check.status == "warn" and str(tmp_path / "none") in check.found
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    (check,) = places.temporary(os.environ["TMPDIR"])
    assert check.status == "ok" and str(tmp_path) in check.found


def test_free_space_is_that_of_the_disk(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, a job would find out at its end that the disk is too small; folders to come count by the disk they will be on."""
    monkeypatch.setattr(places, "OUTPUT_BYTES", 1)
    monkeypatch.setattr(places, "CACHE_BYTES", 1 << 60)
    checks = by_name(list(places.space(tmp_path)))
    assert {name: check.status for name, check in checks.items()} == {"disk": "ok", "disk-cache": "warn", "disk-hub-cache": "warn"}
    stat = os.statvfs(tmp_path)
    stated = float(checks["disk"].found.split()[0])
    assert stated == pytest.approx(stat.f_bavail * stat.f_frsize / 2**30, abs=0.5)


def test_shared_memory_matters_to_several_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, a container's 64 MiB would stop a run on two GPUs, or alarm those who have one."""
    assert list(places.shared_memory(1, tmp_path)) == []
    assert [c.status for c in places.shared_memory(2, tmp_path)] == ["ok"]
    monkeypatch.setattr(places, "SHARED_BYTES", 1 << 60)
    assert [c.status for c in places.shared_memory(2, tmp_path)] == ["warn"]


def test_the_hub_cache_is_where_the_hub_library_puts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, the doctor would test another folder than downloads use. The library itself is asked, in each environment."""
    settings = [{}, {"HF_HOME": "~/hf"}, {"HF_HUB_CACHE": "$HOME/hub"}, {"XDG_CACHE_HOME": str(tmp_path / "xdg")}]
    for setting in settings:
        for name in ("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME", "HUGGINGFACE_HUB_CACHE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in setting.items():
            monkeypatch.setenv(name, value)
        program = "from huggingface_hub.constants import HF_HUB_CACHE; print(HF_HUB_CACHE)"
        theirs = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
        assert str(places.hub_cache()) == theirs
