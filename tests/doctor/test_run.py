"""marlinctl/doctor/run.py and its verb: the whole answer, its JSON, its exit code, and what must not be in it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from marlinctl.doctor import run as doctor
from marlinctl.doctor.result import Check
from tests.doctor.distributions import distribution
from tests.test_architecture import PACKAGE, ROOT

TOKEN = "hf_" + "aBcDeFgHiJ1234567890KlMnOpQrStUvWx"
QUICK = {"python", "marlinctl", "requirements", "vllm", "sglang", "known-bad", "duplicates", "names", "cache", "hub-cache", "temporary"}
QUICK |= {"disk", "disk-cache", "disk-hub-cache", "hub", "token", "driver"}


def run(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The verb in a process of its own, with a home of its own."""
    home = cwd / "home"
    home.mkdir(exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_HOME", "XDG_CACHE_HOME", "HF_TOKEN")}
    path = os.pathsep.join(filter(None, [environment.pop("PYTHONPATH", ""), str(ROOT)]))
    environment = {**kept, "HOME": str(home), "MARLINCTL_CACHE": str(home / "cache"), "PYTHONPATH": path, **environment}
    command = [sys.executable, "-P", "-m", "marlinctl", "doctor", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=200, check=False)


def test_the_document(tmp_path: Path) -> None:
    """If this failed, programs that read the answer would break, or a check would have left it."""
    done = run("--quick", "--json", cwd=tmp_path)
    document = json.loads(done.stdout)
    assert list(document) == ["schema_version", "version", "quick", "status", "counts", "checks"]
    assert (document["schema_version"], document["quick"]) == (1, True)
    assert {check["name"] for check in document["checks"]} == QUICK
    for check in document["checks"]:
        assert list(check) == ["name", "status", "found", "cure"]
        assert all(isinstance(value, str) for value in check.values())
        assert (check["status"] == "ok") == (check["cure"] == "")
    statuses = [check["status"] for check in document["checks"]]
    assert document["counts"] == {status: statuses.count(status) for status in ("ok", "warn", "fail")}
    assert document["status"] == ("warn" if "warn" in statuses else "ok"), done.stdout
    assert done.returncode == 0, "warnings are no failure"


def test_a_whole_run(tmp_path: Path) -> None:
    """If this failed, the torch half would be missing, or its process would not find marlinctl from another folder."""
    done = run(cwd=tmp_path)
    lines = [line.split() for line in done.stdout.splitlines()]
    found = {words[1]: words[0] for words in lines if words[0] in ("ok", "warn", "fail")}
    assert found.keys() >= QUICK | {"torch", "gpu", "nvrtc", "marlin", "sparse-marlin"}
    assert found["torch"] == found["marlin"] == found["sparse-marlin"] == "ok"
    assert "which takes some seconds" in done.stderr
    assert re.fullmatch(r"\d+ ok, \d+ warn, 0 fail", done.stdout.splitlines()[-1])
    assert done.returncode == 0


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_what_fails_gives_exit_code_4(tmp_path: Path, as_json: bool) -> None:
    """If this failed, a script that asks the doctor first would start its long job on a sick machine."""
    distribution(tmp_path / "lib", "transformers", "5.10.1")
    (tmp_path / "file").touch()
    done = run(
        "--quick", *(["--json"] if as_json else []), cwd=tmp_path, PYTHONPATH=str(tmp_path / "lib"), MARLINCTL_CACHE=f"{tmp_path}/file/x"
    )
    assert done.returncode == 4
    if as_json:
        checks = json.loads(done.stdout)["checks"]
        failed = {check["name"] for check in checks if check["status"] == "fail"}
    else:
        failed = {line.split()[1] for line in done.stdout.splitlines() if line.startswith("fail")}
        assert done.stdout.count("cure: ") == len(re.findall("^(?:warn|fail)", done.stdout, flags=re.MULTILINE))
    assert failed == {"requirements", "known-bad", "cache"}


def test_secrets_and_home_are_left_out(tmp_path: Path) -> None:
    """If this failed, an answer pasted into a bug report would publish a token, a password, or who somebody is."""
    home = tmp_path / "home"
    distribution(home / "lib", "torch", "2.0")
    done = run(
        "--json",
        "--quick",
        cwd=tmp_path,
        PYTHONPATH=str(home / "lib"),
        HF_TOKEN=TOKEN,
        TMPDIR=str(home / TOKEN),
        MARLINCTL_CACHE=str(home / "cache"),
    )
    assert str(home) not in done.stdout and TOKEN not in done.stdout
    checks = {check["name"]: check["found"] for check in json.loads(done.stdout)["checks"]}
    assert checks["cache"].startswith("~/cache")
    assert "hf_<redacted>" in checks["temporary"]
    assert "~/lib" in checks["duplicates"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://someone@hub.example/api cannot be reached", "https://<redacted>@hub.example/api cannot be reached"),
        ("proxy http://me:p@ss@10.0.0.1:3128", "proxy http://<redacted>@10.0.0.1:3128"),
        ("{home}/x and {home}: no", "~/x and ~: no"),
        ("{home}stead/x", "{home}stead/x"),
        ("/mnt{home}/x", "/mnt{home}/x"),
    ],
)
def test_private(text: str, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, a user's name would be in an answer, or another folder's name would be cut."""
    home = tmp_path.as_posix()
    monkeypatch.setenv("HOME", home)
    assert doctor.private(text.format(home=home)) == shown.format(home=home)


def test_a_cure_holds_no_secret_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, the cure would name the home folder that the finding leaves out."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "transformers.py").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "code"))
    (hidden,) = [check for check in doctor.examine(quick=True, offline=True) if check.name == "names"]
    assert hidden.cure == "rename it, or take ~/code off PYTHONPATH"


def test_offline_is_handed_down(tmp_path: Path) -> None:
    """If this failed, `marlinctl --offline doctor` would ask the hub."""
    done = run("--quick", "--offline", "--json", cwd=tmp_path)
    assert {c["found"].split(":")[0] for c in json.loads(done.stdout)["checks"] if c["name"] == "hub"} == {"offline by --offline"}


def test_a_check_that_breaks_is_a_finding() -> None:
    """If this failed, one broken library would hide everything else the doctor knows."""

    def breaks() -> Iterator[Check]:
        yield Check("names", "ok", "so far")
        raise RuntimeError("two\nlines")

    first, second = doctor.guarded("names", breaks)
    assert first.status == "ok"
    assert (second.name, second.status, second.found) == ("names", "fail", "cannot be tested: RuntimeError: two")


def test_a_current_folder_that_was_deleted(tmp_path: Path) -> None:
    """If this failed, a shell that stands in a deleted folder would get a traceback, or advice to reinstall."""
    program = "import os, sys; os.rmdir(os.getcwd()); from marlinctl.cli import main; sys.exit(main(['doctor', '--quick', '--json']))"
    gone = tmp_path / "gone"
    gone.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], cwd=gone, env=environment, capture_output=True, text=True, check=False)
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert done.returncode == 4
    assert checks["disk"]["status"] == "fail" and "change into one that exists" in checks["disk"]["cure"]
    assert checks["requirements"]["status"] == "ok"


def test_without_packaging_the_rest_is_still_told(tmp_path: Path) -> None:
    """If this failed, a half-installed environment, the very case for a doctor, would get a traceback."""
    (tmp_path / "lib" / "packaging").mkdir(parents=True)
    (tmp_path / "lib" / "packaging" / "__init__.py").touch()
    done = run("--quick", "--json", cwd=tmp_path, PYTHONPATH=str(tmp_path / "lib"))
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert done.returncode == 4
    assert checks["requirements"]["found"].startswith("cannot be tested: No module named 'packaging")
    assert checks["cache"]["status"] == "ok"


def test_every_check_is_explained() -> None:
    """If this failed, a line of the doctor would have no page that says what it means."""
    sources = "\n".join(path.read_text("utf-8") for path in (PACKAGE / "doctor").glob("*.py"))
    names = {*re.findall(r'(?:Check|_writable|_free|_server)\(\s*"([a-z-]+)"', sources), "marlin", "sparse-marlin"}
    page = (ROOT / "docs" / "doctor.md").read_text("utf-8")
    assert names >= QUICK
    rows = re.findall(r"^\| (`[a-z-]+`(?:, `[a-z-]+`)*) \|", page, flags=re.MULTILINE)  # checks of one kind share a row
    assert sorted(names) == sorted(name for row in rows for name in re.findall(r"[a-z-]+", row))


def test_a_check_without_its_package_names_the_package_to_install() -> None:
    """If this failed, the cure for `pip install --no-deps` would be to install everything again, torch included."""

    def ask() -> Iterator[Check]:
        raise ModuleNotFoundError("No module named 'packaging'", name="packaging.version")

    (check,) = doctor.guarded("python", ask)
    assert (check.status, check.cure) == ("fail", "pip install packaging")
