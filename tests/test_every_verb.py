"""Random damage to every kind of file, and random arguments, for every verb: no exit 70, no traceback, no file where none may be.

tests/every_verb.py draws the trials. Here are as many as some seconds allow, a few in processes of their own, and with `-m slow` thousands;
`python -m tests.every_verb 0 2000` prints all that it finds.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from marlinctl.cli import VERBS
from tests import every_verb
from tests.every_verb import Trial
from tests.test_architecture import ROOT

SECONDS = 8.0
MANY = 2000


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return every_verb.furnish(tmp_path_factory.mktemp("every-verb") / "furnished")


def test_every_verb_is_driven() -> None:
    """Broken: a verb that is not in the table meets no damage at all."""
    assert {command[0] for _, command in every_verb.COMMANDS} == set(VERBS)


def test_no_damage_ends_in_a_traceback(room: Path, tmp_path: Path) -> None:
    """Broken: some damage or argument ends with exit 70 or a traceback, or writes where it may not. The seed reproduces it."""
    until = time.monotonic() + SECONDS
    wrong = []
    for seed in range(MANY):
        base = tmp_path / str(seed)
        base.mkdir()
        trial = Trial(seed)
        wrong += [f"{trial}\n    {problem}" for problem in every_verb.run(trial, room, base)]
        if time.monotonic() > until:
            break
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_no_damage_of_thousands_ends_in_a_traceback() -> None:
    """Broken: as above, further out."""
    command = [sys.executable, "-m", "tests.every_verb", "0", str(MANY)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=7000, check=False)
    assert done.returncode == 0, done.stdout[-20_000:]


@pytest.mark.parametrize("seed", [3, 4, 14])
def test_a_process_of_its_own_ends_as_well(seed: int, room: Path, tmp_path: Path) -> None:
    """Broken: what the interpreter does at its end, after `main`, prints a traceback or changes the exit code."""
    copy = tmp_path / "room"
    trial = Trial(seed)
    every_verb.furnished_copy(room, tmp_path)
    trial.prepare(copy)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "marlinctl", *trial.arguments]
    done = subprocess.run(
        command, cwd=copy, env=environment, stdin=subprocess.DEVNULL, capture_output=True, errors="replace", timeout=120, check=False
    )
    assert done.returncode in every_verb.CODES, f"{trial}\n{done.stderr}"
    assert "Traceback" not in done.stderr, f"{trial}\n{done.stderr}"


def test_what_is_wrong_is_seen(room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken: the trials pass because nothing is looked at."""

    def ending(end: object) -> list[str]:
        base = Path(tmp_path / str(len(list(tmp_path.iterdir()))))
        base.mkdir()

        def main(_arguments: list[str]) -> int:
            if isinstance(end, BaseException):
                raise end
            if isinstance(end, str):
                exec(end)
                return 0
            assert isinstance(end, int)
            return end

        monkeypatch.setattr(every_verb, "main", main)
        return every_verb.run(Trial(0), room, base)

    assert ending(0) == ending(3) == []
    assert "exit code 70" in ending(70)[0] and "out of main" in ending(ValueError("x"))[0]
    assert "a traceback" in ending("import sys; print('Traceback (most recent call last)', file=sys.stderr)")[0]
    assert ending("import pathlib; pathlib.Path('../outside/secret').write_text('x')") == ["changed: outside/secret"]
    assert ending("import pathlib; pathlib.Path('../elsewhere').write_text('x')") == ["new: elsewhere"]
    assert ending("import pathlib; pathlib.Path('text.txt').unlink()") == ["removed: room/text.txt"]
    monkeypatch.setattr(every_verb, "PATIENCE", 1)
    assert "TooLong" in ending("import time; time.sleep(30)")[0]
