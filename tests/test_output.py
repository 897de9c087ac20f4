"""The contract of output, for every command: results on stdout, progress on stderr, JSON with a schema version, plain lines without a
terminal.

`CALLS` has one real call of each command, on tiny models. A command that is missing there fails the first test.
"""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path

import click
import pytest

from marlinctl import cli
from marlinctl.models.architectures import Block
from marlinctl.oneshot.gram import SolveStage
from marlinctl.oneshot.sequential import SequentialPipeline
from marlinctl.system.console import SCHEMA_VERSION
from tests.blank import blank_pictures
from tests.runs import TEXT
from tests.tiny import make_tiny

SOLVE = "--recipe R --calibration T --samples 8 --sequence-length 64 --group-size 32 --dtype float32"
MEASURE = "--text T --tokens 128 --window 32"
CALLS = {
    "compress": f"compress M OUT {SOLVE} {MEASURE}",
    "quantize": f"quantize M OUT {SOLVE}",
    "sparsify": f"sparsify M OUT --no-eval {SOLVE}",
    "distill": "distill S OUT --teacher M --data T --tokens 64 --sequence-length 16 --batch-tokens 32 --micro-batch 2 --dtype float32",
    "pack": "pack P OUT --format marlin",
    "eval": f"eval P --against M --dtype float32 {MEASURE}",
    "bench": "bench --build --arch sm_80 --only m8n128k256x4",
    "resume": "resume OUT",
    "jobs ls": "jobs ls .",
    "jobs rm": "jobs rm OUT --yes",
    "plan": f"plan M --out OUT {SOLVE}",
    "inspect": "inspect P",
    "report": "report Q",
    "verify": "verify P --no-load",
    "doctor": "doctor --quick",
    "recipes ls": "recipes ls",
    "recipes show": "recipes show quick",
    "recipes check": "recipes check R",
    "explain": "explain E255",
    "completion": "completion bash",
}


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every leaf, by what is typed."""
    with click.Context(cli.marlinctl) as context:
        for verb in cli.VERBS:
            command = cli.marlinctl.get_command(context, verb)
            assert command is not None
            if isinstance(command, click.Group):
                yield from ((f"{verb} {name}", leaf) for name, leaf in command.commands.items())
            else:
                yield verb, command


@pytest.fixture(autouse=True)
def drawn(request: pytest.FixtureRequest) -> Iterator[None]:
    """Pictures where `report` is called, so that what a library says of them is heard; elsewhere they only take time."""
    with nullcontext() if "[report]" in request.node.name else blank_pictures():
        yield


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the letters of CALLS stand for: a model, a packed one, a pruned one, one with a report, a text, a recipe."""
    folder = tmp_path_factory.mktemp("output")
    (folder / "text.txt").write_text(TEXT)
    (folder / "tiny.yaml").write_text("calibration:\n  minimum_tokens: 256\n")
    make_tiny(folder / "model")
    names = {"M": folder / "model", "T": folder / "text.txt", "R": folder / "tiny.yaml"}
    found = {letter: str(path) for letter, path in names.items()}
    assert cli.main([*spelled(f"quantize M {folder / 'quantized'} -q {SOLVE}", found)]) == 0
    assert cli.main([*spelled(f"sparsify M {folder / 'sparse'} -q --no-eval {SOLVE}", found)]) == 0
    with pytest.MonkeyPatch.context() as stopped:  # a run that was stopped in its second block
        stopped.setattr(SequentialPipeline, "run_block", stopping_at_the_second(SequentialPipeline.run_block))
        assert cli.main([*spelled(f"quantize M {folder / 'unfinished'} -q {SOLVE}", found)]) == 130
    jobs = {"JOB": str(folder / "unfinished.job")}
    return found | jobs | {"P": str(folder / "quantized"), "Q": str(folder / "quantized"), "S": str(folder / "sparse")}


def stopping_at_the_second(run_block: Callable[..., None]) -> Callable[..., None]:
    def stopping(self: SequentialPipeline, block: Block, solve: SolveStage) -> None:
        if block.index == 1:
            raise KeyboardInterrupt
        run_block(self, block, solve)

    return stopping


def put_job(name: str, places: dict[str, str]) -> None:
    """What `resume` and `jobs` work with: an unfinished job for OUT, in the current folder."""
    if name == "resume" or name.startswith("jobs"):
        shutil.copytree(places["JOB"], "OUT.job")


def spelled(call: str, places: dict[str, str]) -> list[str]:
    return [places.get(word, word) for word in call.split()]


def test_every_command_has_a_call() -> None:
    """A new command would go without every check of this file."""
    assert [name for name, _ in commands()] == list(CALLS)


@pytest.mark.parametrize("name", CALLS)
def test_json_is_alone_on_stdout_and_the_log_has_the_messages(
    name: str, places: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that reads stdout would stumble over one stray line, from us or from a library."""
    monkeypatch.chdir(tmp_path)
    put_job(name, places)
    log = tmp_path / "run.log"
    assert cli.main([*spelled(CALLS[name], places), "--json", "--verbose", "--log-file", str(log)]) == 0
    out, err = capfd.readouterr()
    document = json.loads(out)
    assert document["schema_version"] == SCHEMA_VERSION and len(document) > 1
    assert "\x1b" not in out + err and "\r" not in out + err, "without a terminal there are neither colours nor bars"
    written = log.read_text("utf-8")
    assert "result:" in written
    for line in err.splitlines():
        assert line.removeprefix("warning: ") in written, "the log has all that was said"


@pytest.mark.parametrize("name", CALLS)
def test_quiet_leaves_the_result(
    name: str, places: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cron mails whatever a quiet program says."""
    monkeypatch.chdir(tmp_path)
    put_job(name, places)
    assert cli.main([*spelled(CALLS[name], places), "--quiet"]) == 0
    out, err = capfd.readouterr()
    assert out.strip() and "\x1b" not in out
    assert all(line.startswith("warning: ") for line in err.splitlines()), err


@pytest.mark.parametrize(("name", "command"), list(commands()), ids=lambda value: value if isinstance(value, str) else "")
def test_an_error_is_one_json_document_too(name: str, command: click.Command, capfd: pytest.CaptureFixture[str]) -> None:
    """The one document that a script most needs to understand."""
    assert cli.main([*name.split(), "--json", "--no-such-option"]) == 2
    out, err = capfd.readouterr()
    assert json.loads(out)["schema_version"] == SCHEMA_VERSION and json.loads(out)["error"]["id"] == "E202"
    assert err == ""


@pytest.mark.parametrize(("name", "command"), list(commands()), ids=lambda value: value if isinstance(value, str) else "")
def test_help_is_a_result(name: str, command: click.Command, capfd: pytest.CaptureFixture[str]) -> None:
    """`marlinctl VERB --help | less` must show something."""
    assert cli.main([*name.split(), "--help"]) == 0
    out, err = capfd.readouterr()
    assert "Example:" in out and err == "" and "\x1b" not in out


def on_a_terminal(arguments: list[str], folder: Path, **environment: str) -> str:
    """What a person sees: stdout and stderr on one pseudo-terminal of 100 columns."""
    master, slave = pty.openpty()
    clean = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "TERM", "CI")}
    child = subprocess.Popen(
        [sys.executable, "-m", "marlinctl", *arguments],
        stdin=slave, stdout=slave, stderr=slave, cwd=folder, env=clean | {"TERM": "xterm-256color", "COLUMNS": "100"} | environment,
    )  # fmt: skip
    os.close(slave)
    seen = b""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if select.select([master], [], [], 0.1)[0]:
            with suppress(OSError):  # Linux says EIO when the other end is closed
                if data := os.read(master, 65536):
                    seen += data
                    continue
        if child.poll() is not None:
            break
    child.kill()
    os.close(master)
    return seen.decode()


def test_colour_on_a_terminal_and_none_with_no_color(places: dict[str, str], tmp_path: Path) -> None:
    """https://no-color.org: who sets NO_COLOR gets none, whatever the terminal can do."""
    wrong = ["inspect", str(tmp_path / "missing")]
    assert "\x1b[31;1merror:\x1b[0m" in on_a_terminal(wrong, tmp_path)
    for arguments, environment in ((wrong, {"NO_COLOR": "1"}), ([*wrong, "--no-color"], {}), (wrong, {"TERM": "dumb"})):
        seen = on_a_terminal(arguments, tmp_path, **environment)
        assert "error:" in seen and "\x1b" not in seen, (arguments, environment)


def test_a_bar_on_a_terminal_has_no_colour_with_no_color(places: dict[str, str], tmp_path: Path) -> None:
    """The bar is drawn by rich, which has colours of its own."""
    call = [*spelled(CALLS["pack"], places)]
    seen = on_a_terminal(call, tmp_path, NO_COLOR="1")
    assert "OUT (marlin)" in seen
    assert not [
        part for part in seen.split("\x1b[")[1:] if part.split("m")[0].replace(";", "").isdigit() and part.split("m")[0] not in ("0", "")
    ]
