"""Dockerfile: what it copies is there, what it installs is pinned, and its commands run, in a fresh environment instead of an image."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.test_architecture import ROOT

TEXT = (ROOT / "Dockerfile").read_text("utf-8")


def instructions() -> list[tuple[str, str]]:
    """(FROM, "base AS cuda"), ... without comments, continued lines joined."""
    lines = re.sub(r"^#.*\n", "", TEXT, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    return [(name, " ".join(rest.split())) for name, _, rest in (line.partition(" ") for line in lines if line)]


def stages() -> dict[str, list[tuple[str, str]]]:
    """Name -> its instructions, the first being FROM; what a stage begins with belongs to it."""
    found: dict[str, list[tuple[str, str]]] = {}
    for name, rest in instructions():
        if name == "FROM":
            base, _, stage = rest.partition(" AS ")
            found[stage] = [*found.get(base, [])]
        if found:
            found[stage].append((name, rest))
    return found


def copied() -> list[str]:
    """Of the repository."""
    return [source for name, rest in instructions() if name == "COPY" and "--from" not in rest for source in shlex.split(rest)[:-1]]


def test_what_is_copied_is_in_the_repository() -> None:
    """`docker build` would stop at a file that was moved, or that .dockerignore holds back."""
    assert len(copied()) > 4
    assert [source for source in copied() if not (ROOT / source).exists()] == []
    allowed = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text("utf-8"), flags=re.MULTILINE)
    assert sorted(allowed) == sorted(copied())


def test_every_stage_that_is_named_exists() -> None:
    """A renamed stage would be asked of Docker's registry."""
    found = stages()
    named = re.findall(r"from=(\w+)", TEXT) + re.findall(r"--target (\w+)", TEXT)
    assert set(named) <= set(found) and "cuda" in named
    assert list(found)[-1] == "cpu", "the last one is what `docker build .` makes"


@pytest.mark.parametrize("stage", ["cpu", "cuda"])
def test_images_are_pinned_and_need_no_root(stage: str) -> None:
    """A build of next year would hold other versions than the figures were measured with, or leave files of root in the user's folder."""
    lines = stages()[stage]
    assert [rest for name, rest in lines if name == "USER"][-1:] == ["1000:1000"]
    assert ("ENTRYPOINT", '["marlinctl"]') in lines
    installs = [part for name, rest in lines if name == "RUN" for part in rest.split("&&") if "pip install" in part]
    assert len(installs) == 2 and all("--no-cache-dir -c /constraints.txt" in part for part in installs)
    assert all(re.fullmatch(r"python:\$\{PYTHON\}-slim AS \w+|base AS \w+", rest) for name, rest in instructions() if name == "FROM")
    python = re.search(r"^ARG PYTHON=(\S+)$", TEXT, flags=re.MULTILINE)
    assert python is not None and f'"Programming Language :: Python :: {python[1]}"' in (ROOT / "pyproject.toml").read_text("utf-8")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_commands_of_the_cpu_image_run_in_a_fresh_environment() -> None:
    """A wheel that lacks a file, versions that do not resolve, a command that is not there: the image would not build.

    Only what the Dockerfile copies is there. The index is this machine's: that of CPU builds of torch may be out of reach.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        venv = place / "venv"
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True, timeout=120)
        probe = [str(venv / "bin" / "pip"), "download", "-q", "--no-deps", "-d", str(place / "probe"), "packaging"]
        if subprocess.run(probe, capture_output=True, timeout=120, check=False).returncode != 0:
            pytest.skip("needs a package index")
        (place / "source").mkdir()
        for source in copied():
            copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
            copy(ROOT / source, place / "source" / source)
        shutil.move(place / "source" / "constraints.txt", place)
        environment = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}  # where its wheels are
        environment["PIP_NO_COMPILE"] = "1"  # bytecode takes minutes, and the environment is gone after this test
        environment |= {"PATH": f"{venv / 'bin'}:/usr/bin:/bin", "HOME": str(place), "MARLINCTL_CACHE": str(place / "cache")}
        commands = [rest for stage in ("wheel", "cpu") for name, rest in stages()[stage] if name == "RUN" and "mkdir" not in rest]
        assert len(commands) == 3
        for command in commands:
            command = re.sub(r"--mount=\S+|--index-url \S+", "", command)
            command = command.replace("/wheels", str(place / "wheels")).replace("/constraints.txt", str(place / "constraints.txt"))
            done = subprocess.run(
                ["sh", "-c", command], cwd=place / "source", env=environment, capture_output=True, text=True, timeout=1200, check=False
            )
            assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        answer = subprocess.run(["marlinctl", "--help"], env=environment, capture_output=True, text=True, timeout=60, check=True, cwd=place)
        assert "marlinctl compress" in answer.stdout
