"""Every fault of tests/faults, as the command line answers it: exit code, three lines, no traceback, nothing published, nothing left.

A process of its own has the first command of each exit code and of each table, and what plays another environment or machine. The others
are told in this one, through the same main(): what a process adds is the same for all. None may hang.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from marlinctl.cli import main
from tests import killing
from tests.checkpoint.test_source import Hub, hub_environment, serving
from tests.faults.checkpoints import FAULTS, SHARDS
from tests.faults.commands import COMMANDS, WORKS, Command
from tests.faults.machines import MACHINES, STILL_WORKS
from tests.faults.packed import PACKED
from tests.killing import Ended
from tests.runs import TEXT
from tests.test_architecture import ROOT
from tests.tiny import make_tiny

# The reader refuses every one of FAULTS in tests/checkpoint/test_reader.py, in milliseconds. What the command line makes of a refusal is
# the same for all: the first of each exit code and every eighth are enough to see it.
CODES = [fault.exit_code for fault in FAULTS.values()]
SHOWN = {name for i, name in enumerate(FAULTS) if i % 8 == 0 or CODES.index(CODES[i]) == i}
REFUSED = COMMANDS | PACKED | MACHINES
WORK = WORKS | STILL_WORKS


def first_of_each(table: dict[str, Command]) -> set[str]:
    """The first name of each exit code."""
    return set({command.exit_code: name for name, command in reversed(table.items())}.values())


IN_A_PROCESS = {name for table in (COMMANDS, PACKED, WORKS) for name in first_of_each(table)}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model, good (the same in one shard), text and recipe."""
    root = tmp_path_factory.mktemp("good")
    make_tiny(root / "model", shards=SHARDS)
    make_tiny(root / "good")
    (root / "text.txt").write_text(TEXT)
    (root / "small.yaml").write_text("extends: int4\nquantize: {refine: 0}\ncalibration: {minimum_tokens: 16}\n")
    return root


@pytest.fixture
def place(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "place"))


def names(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*")}


def run_here(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> Ended:
    capfd.readouterr()
    return Ended(main([*arguments, "-q"]), 0, capfd.readouterr().err)


def run(name: str, command: Command, arguments: list[str], cache: Path, capfd: pytest.CaptureFixture[str]) -> Ended:
    if name not in IN_A_PROCESS and not command.machine and not command.environment:
        return run_here(arguments, capfd)
    if command.machine and sys.platform != "linux":
        pytest.skip("NVIDIA's compiler comes for Linux alone here")
    environment = {"MARLINCTL_CACHE": str(cache), **command.environment}
    return killing.run([*arguments, "-q"], environment=environment, machine=command.machine)


def assert_told(ended: Ended, exit_code: int, text: str) -> None:
    assert ended.code == exit_code, ended.told
    lines = [line for line in ended.told.splitlines() if not line.startswith(("warning: ", "to resume: "))]
    assert text in ended.told and "Traceback" not in ended.told
    kinds = [re.match(r"error: |  where: |  fix: |  docs: |  \.\.\. and ", line) for line in lines if line]
    assert all(kinds), ended.told
    told = [match[0].strip() for match in kinds if match and match[0].strip() != "... and"]
    assert told[-1] == "docs:" and told[:-1] == ["error:", "where:", "fix:"] * (len(told[:-1]) // 3) and len(told) >= 4
    assert re.search(r"docs: marlinctl explain E\d{3}$", ended.told.strip())


def assert_nothing_left(root: Path, before: set[str]) -> None:
    """A log may be written: it tells what happened. Nothing else is."""
    assert {name for name in names(root) - before if not name.endswith(".log")} == set()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in SHOWN else pytest.mark.slow) for name in FAULTS])
def test_a_damaged_checkpoint_is_refused(place: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """A damaged model would be quantized, or the person would get a traceback, a hang, or a folder that looks like a result."""
    fault = FAULTS[name]
    shutil.copytree(place / "model", place / "spoilt" / "model")
    fault.damage(place / "spoilt" / "model")
    before = names(place)
    arguments = ["quantize", str(place / "spoilt" / "model"), str(place / "out"), "--calibration", str(place / "text.txt")]
    arguments += ["--samples", "2", "--sequence-length", "32", "--group-size", "32"]  # enough text: it is read before the weights
    arguments += ["--recipe", str(place / "small.yaml")]
    first = name == next(other for other, one in FAULTS.items() if one.exit_code == fault.exit_code)
    ended = killing.run([*arguments, "-q"]) if first else run_here(arguments, capfd)
    assert_told(ended, fault.exit_code, fault.text)
    assert_nothing_left(place, before)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", REFUSED)
def test_a_command_that_cannot_work_is_refused(
    place: Path, own_cache: Path, name: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same for arguments, places, recipes, numbers, texts and the machine, and for damage of what marlinctl published."""
    command: Command = REFUSED[name]
    arguments = command.prepare(place)
    before = names(place)
    monkeypatch.chdir(ROOT)
    ended = run(name, command, arguments, own_cache, capfd)
    assert_told(ended, command.exit_code, command.text)
    assert_nothing_left(place, before)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", WORK)
def test_what_looks_wrong_and_is_not_works(place: Path, own_cache: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """A check that is too strict turns people away; what was done instead must be in the report, and in the result."""
    command: Command = WORK[name]
    ended = run(name, command, command.prepare(place), own_cache, capfd)
    assert ended.code == 0, ended.told
    report = json.loads((place / "out" / "marlinctl_report.json").read_text())
    assert command.text in json.dumps(report)
    if command.holds is not None:
        command.holds(place)


IMPATIENT = """
import sys, time
sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.01))  # between two attempts to reach the hub
from marlinctl.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_model_of_the_hub_from_refusal_to_result(place: Path) -> None:
    """Cut in the middle of a file, whole, then without network: a refusal would be a traceback, or half a model would be used."""
    hub = Hub(place / "model")

    def quantize(endpoint: str, out: str, *more: str) -> Ended:
        arguments = ["quantize", "org/tiny", str(place / out), "--recipe", str(place / "small.yaml"), "--group-size", "32"]
        arguments += [
            "--calibration",
            str(place / "text.txt"),
            "--samples",
            "2",
            "--sequence-length",
            "32",
            "--dtype",
            "float32",
            "-q",
            *more,
        ]
        environment = hub_environment(endpoint, place / "cache")
        done = subprocess.run(
            [sys.executable, "-c", IMPATIENT, *arguments],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        return Ended(done.returncode, 0, done.stderr)

    with serving(hub) as endpoint:
        hub.fault = "cut"
        assert_told(quantize(endpoint, "out"), 7, "org/tiny")
        assert [path.name for path in place.glob("out*")] == [], "a refused run leaves no log"
        hub.fault = ""
        assert quantize(endpoint, "out").code == 0
    assert quantize("http://127.0.0.1:9", "again", "--offline").code == 0
    for name in ("config.json", "marlinctl_manifest.json"):
        assert (place / "out" / name).read_bytes() == (place / "again" / name).read_bytes()
