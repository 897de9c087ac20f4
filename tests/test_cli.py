"""marlinctl/cli.py: every way of stopping becomes three lines and an exit code; the table of verbs is complete."""

from __future__ import annotations

import errno
import importlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from marlinctl import __version__, cli
from marlinctl.commands.common import common_options
from marlinctl.errors import BadInput, CheckFailed, HubProblem, NumericalProblem, Problem
from marlinctl.system.console import Console
from tests.tiny import make_tiny

TOKEN = "hf_" + "aBcDeFgHiJ1234567890KlMnOpQrStUvWx"


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Console], None]], None]:
    """Puts a verb `probe` with the given body into the table, as a module that is imported when it is used."""

    def install(body: Callable[[Console], None]) -> None:
        @click.command("probe")
        @click.option("--group-size", type=int, default=None)
        @common_options
        def command(console: Console, group_size: int | None) -> None:
            body(console)

        module = type(sys)("marlinctl.commands.probe")
        module.command = command  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "marlinctl.commands.probe", module)
        monkeypatch.setitem(cli.VERBS, "probe", "A verb for tests.")

    return install


def raising(error: BaseException) -> Callable[[Console], None]:
    def body(_console: Console) -> None:
        raise error

    return body


@pytest.mark.parametrize("name", list(cli.VERBS))
def test_every_verb_of_the_table_is_there(name: str) -> None:
    """`--help` would promise a verb that fails with an import error."""
    command = importlib.import_module(f"marlinctl.commands.{name}").command
    assert isinstance(command, click.Command)
    assert command.name == name


def test_every_command_module_is_in_the_table() -> None:
    """A verb that nobody put into the table cannot be called."""
    folder = Path(cli.__file__).parent / "commands"
    found = {path.stem for path in folder.glob("*.py") if "\ndef command(" in path.read_text("utf-8")}
    assert found == set(cli.VERBS)


@pytest.mark.parametrize("name", list(cli.VERBS))
def test_every_verb_takes_the_common_options_and_opens_its_help_with_an_example(name: str) -> None:
    """A verb without --json or an example breaks the contract that all verbs share."""
    command = importlib.import_module(f"marlinctl.commands.{name}").command
    leaves = list(command.commands.values()) if isinstance(command, click.Group) else [command]
    for leaf in leaves:
        options = {option for parameter in leaf.params for option in parameter.opts}
        assert {"--json", "--quiet", "--verbose", "--log-file", "--no-color", "--debug", "--offline"} <= options, leaf.name
        assert leaf.help is not None and "Example" in leaf.help, leaf.name
        undocumented = [p.opts for p in leaf.params if isinstance(p, click.Option) and not p.help and not p.hidden]
        assert not undocumented, leaf.name


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    """The first two things that anybody tries."""
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"marlinctl {__version__}\n"
    for arguments in ([], ["--help"], ["-h"]):
        assert cli.main(arguments) == 0
        out = capsys.readouterr().out
        assert "Example:" in out and all(name in out for name in cli.VERBS)


@pytest.mark.parametrize(
    ("arguments", "error_id", "suggestion"),
    [
        (["quantise", "m"], "E202", "quantize"),
        (["inspct"], "E202", "inspect"),
        (["zzzzz"], "E202", "marlinctl --help"),
        (["--jsno"], "E202", "--json"),
        (["probe", "--group-sise", "64"], "E202", "--group-size"),
        (["probe", "--groupsize", "64"], "E202", "did you mean --group-size? "),
        (["recipes", "lss"], "E202", "ls"),
        (["probe", "--group-size", "many"], "E202", "marlinctl probe --help"),
        (["probe", "--group-size"], "E202", "marlinctl probe --help"),
        (["probe", "extra"], "E202", "marlinctl probe --help"),
        (["recipes", "show"], "E202", "marlinctl recipes show --help"),
    ],
)
def test_wrong_usage_is_exit_2_with_a_suggestion(
    arguments: list[str], error_id: str, suggestion: str, verb: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """click's own two-line usage error would be a second form of error, without id and place."""
    verb(lambda console: None)
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    what, where, fix, docs = err.splitlines()
    assert what.startswith("error: ") and where.startswith("  where: marlinctl") and fix.startswith("  fix: ")
    assert suggestion in fix
    assert docs == f"  docs: marlinctl explain {error_id}"


@pytest.mark.parametrize("arguments", [["--json", "zzzzz"], ["zzzzz", "--json"], ["probe", "--group-size", "x", "--json"]])
def test_wrong_usage_as_json(arguments: list[str], verb: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A machine that asked for JSON would get text, and only in the case of an error."""
    verb(lambda console: None)
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert document["schema_version"] == 1 and document["error"]["exit_code"] == 2
    assert set(document["error"]["problems"][0]) == {"what", "where", "fix"}
    assert err == ""


CASES: list[tuple[BaseException, int, str]] = [
    (CheckFailed("E101", "w", where="p", fix="f"), 1, "E101"),
    (BadInput("E312", "w", where="p", fix="f"), 3, "E312"),
    (NumericalProblem("E620", "w", where="p", fix="f"), 6, "E620"),
    (HubProblem("E701", "w", where="p", fix="f"), 7, "E701"),
    (MemoryError(), 5, "E590"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), 5, "E590"),
    (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"), 5, "E590"),
    (OSError(errno.ENOSPC, "No space left on device", "/out/model"), 5, "E500"),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), 5, "E500"),
    (PermissionError(errno.EACCES, "Permission denied", "/srv/x"), 4, "E490"),
    (OSError(errno.EROFS, "Read-only file system"), 4, "E490"),
    (ModuleNotFoundError("No module named 'pydantic'", name="pydantic"), 4, "E402"),
    (ImportError("cannot import name 'x' from 'transformers.models'", name="transformers.models"), 4, "E402"),
    (ModuleNotFoundError("No module named 'marlinctl.gone'", name="marlinctl.gone"), 70, "E900"),
    (ValueError("boom"), 70, "E900"),
    (FileNotFoundError(errno.ENOENT, "No such file", "x"), 70, "E900"),
]


@pytest.mark.parametrize(
    ("error", "code", "error_id"), CASES, ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None
)
def test_every_error_has_its_exit_code(
    error: BaseException, code: int, error_id: str, verb: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scripts decide by the exit code; a traceback does not help at the terminal."""
    verb(raising(error))
    assert cli.main(["probe"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["error", "  where", "  fix", "  docs"]
    assert lines[-1].endswith(f"marlinctl explain {error_id}")
    assert "Traceback" not in err

    assert cli.main(["probe", "--json"]) == code
    document = json.loads(capsys.readouterr().out)["error"]
    assert (document["id"], document["exit_code"]) == (error_id, code)


def test_all_problems_are_listed(verb: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A person would fix one problem per run."""
    error = BadInput.from_problems("E301", [Problem("first", "a", "do a"), Problem("second", "b", "do b")])
    verb(raising(error))
    assert cli.main(["probe"]) == 3
    assert capsys.readouterr().err.splitlines() == [
        "error: first",
        "  where: a",
        "  fix: do a",
        "error: second",
        "  where: b",
        "  fix: do b",
        "  docs: marlinctl explain E301",
    ]
    assert cli.main(["--json", "probe"]) == 3
    problems = json.loads(capsys.readouterr().out)["error"]["problems"]
    assert problems == [{"what": "first", "where": "a", "fix": "do a"}, {"what": "second", "where": "b", "fix": "do b"}]


def test_problems_of_one_kind_are_three_and_a_count(verb: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A config that is wrong for each of a hundred layers would fill the screen; another kind of problem would be lost below."""
    of_layers = [Problem(f"K={i} of model.layers.{i}.q_proj is odd", f"layer {i}", "do it") for i in range(27)]
    verb(raising(BadInput.from_problems("E301", [*of_layers, Problem("the tokenizer is missing", "folder", "copy it")])))
    assert cli.main(["probe"]) == 3
    told = capsys.readouterr().err
    assert told.count("is odd") == 3 and "  ... and 24 more of the kind" in told and "error: the tokenizer is missing" in told
    assert cli.main(["--json", "probe"]) == 3
    assert len(json.loads(capsys.readouterr().out)["error"]["problems"]) == 28


def test_an_unexpected_error_names_type_text_and_log(verb: Any, capsys: pytest.CaptureFixture[str], own_cache: Path) -> None:
    """A defect must be reportable: what happened, where the log is, and how to see more."""
    error = ZeroDivisionError("by zero")
    error.add_note("model.layers.3.mlp.down_proj")

    def body(console: Console) -> None:
        console.detail("the last thing it did")
        raise error

    verb(body)
    assert cli.main(["probe"]) == 70
    what, where, fix, _ = capsys.readouterr().err.splitlines()
    assert what == "error: ZeroDivisionError: by zero"
    assert "test_cli.py:" in where and "model.layers.3.mlp.down_proj" in where
    assert "--debug" in fix
    log = Path(where.rpartition("log: ")[2])
    assert log.parent == own_cache / "logs"
    assert "the last thing it did" in log.read_text() and "Traceback" in log.read_text()


def test_debug_shows_the_traceback(verb: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Without it a developer has only the last line."""
    verb(raising(ValueError("boom")))
    assert cli.main(["probe", "--debug"]) == 70
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last)") and "error: ValueError: boom" in err


def test_hostile_text_and_secrets_do_not_reach_the_terminal(verb: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A tensor name could forge a `fix:` line or clear the screen; a token would end up in a bug report."""
    verb(raising(BadInput("E301", "bad tensor x\n  fix: rm -rf /\x1b[2J", where=f"https://hub/?token={TOKEN}", fix="f")))
    assert cli.main(["probe"]) == 3
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 4
    assert "\x1b" not in err and TOKEN not in err
    assert cli.main(["probe", "--json"]) == 3
    out = capsys.readouterr().out
    assert TOKEN not in out and json.loads(out)


def test_common_options_count_before_and_after_the_verb(verb: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`marlinctl --offline probe` would quietly go to the network."""
    seen: list[tuple[bool, bool]] = []
    verb(lambda console: seen.append((console.json, console.offline)))
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "0")
    assert cli.main(["probe"]) == 0
    assert os.environ["HF_HUB_OFFLINE"] == "0"
    assert cli.main(["--json", "--offline", "probe"]) == 0
    assert os.environ["HF_HUB_OFFLINE"] == os.environ["TRANSFORMERS_OFFLINE"] == "1"
    assert cli.main(["probe", "--json", "--offline"]) == 0
    assert seen == [(False, False), (True, True), (True, True)]


def test_the_log_file_is_written(verb: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--log-file given before or after the verb must hold progress messages even when the terminal is quiet."""
    verb(lambda console: console.say("a message"))
    assert cli.main(["probe", "-q", "--log-file", str(tmp_path / "a.log")]) == 0
    assert cli.main(["--log-file", str(tmp_path / "b.log"), "probe", "-q"]) == 0
    assert "a message" in (tmp_path / "a.log").read_text()
    assert "a message" in (tmp_path / "b.log").read_text()
    assert capsys.readouterr().err == ""
    assert cli.main(["probe", "--log-file", str(tmp_path / "none" / "a.log")]) == 2


def test_a_current_folder_that_is_gone_is_told(
    verb: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every relative path would end in a traceback, and torch's libraries end the process when they are loaded there."""
    called: list[Console] = []
    verb(called.append)
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert cli.main(["probe"]) == 4 and called == []
    assert "was deleted" in capsys.readouterr().err
    assert cli.main(["--version"]) == 0


# In a process of its own: signals and streams


def start(
    body: str, *arguments: str, stdout: Any = subprocess.PIPE, stderr: Any = subprocess.PIPE, before: Callable[[], object] = bool
) -> subprocess.Popen[str]:
    """A child that runs `marlinctl probe` with this body (a function of `console`); `before` runs in it first."""

    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell that runs tests in the background ignores it
        before()

    program = textwrap.dedent(
        """
        import sys, time, types
        import click
        from marlinctl import cli
        from marlinctl.commands.common import common_options
        @click.command("probe")
        @common_options
        def command(console):
        {body}
        module = types.ModuleType("marlinctl.commands.probe"); module.command = command
        sys.modules[module.__name__] = module; cli.VERBS["probe"] = "A verb for tests."
        sys.exit(cli.main(sys.argv[1:]))
        """
    ).format(body=textwrap.indent(textwrap.dedent(body), "    "))
    return subprocess.Popen(
        [sys.executable, "-c", program, "probe", *arguments],
        stdout=stdout,
        stderr=stderr,
        text=True,
        start_new_session=True,
        preexec_fn=prepare,
    )


@pytest.mark.parametrize(
    ("number", "code", "name"), [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM"), (signal.SIGHUP, 129, "SIGHUP")]
)
def test_interruption_is_one_line_and_cleans_up(number: signal.Signals, code: int, name: str, tmp_path: Path) -> None:
    """A killed run would leave its staging folder, or fifty lines of traceback."""
    mark = tmp_path / "cleaned"
    child = start(
        f"""
        try:
            console.say("ready")
            time.sleep(60)
        finally:
            open({str(mark)!r}, "w").close()
        """
    )
    assert child.stderr is not None
    assert child.stderr.readline() == "ready\n"
    child.send_signal(number)
    out, err = child.communicate(timeout=30)
    assert child.returncode == code
    assert (out, err) == ("", f"interrupted: by {name}; nothing unfinished was published\n")
    assert mark.exists()


def test_a_reader_that_goes_away_is_no_error() -> None:
    """`marlinctl inspect M --json | head -1` would end with a traceback on the terminal."""
    child = start("""console.result("line\\n" * 200_000, {})""")
    assert child.stdout is not None and child.stderr is not None
    assert child.stdout.readline() == "line\n"
    child.stdout.close()
    assert child.stderr.read() == ""
    assert child.wait(30) == 141
    child.stderr.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_stdout_on_a_full_disk_is_exit_5() -> None:
    """The result would be lost with exit code 0, or 120 and a message of the interpreter."""
    with Path("/dev/full").open("w") as full:
        child = start("""console.result("answer", {})""", stdout=full)
        _, err = child.communicate(timeout=30)
        assert child.returncode == 5
        assert [line.split(":")[0] for line in err.splitlines()] == ["error", "  where", "  fix", "  docs"]
    with Path("/dev/full").open("w") as full:
        child = start("""console.result("answer", {})""", "--json", stdout=full)
        child.communicate(timeout=30)
        assert child.returncode == 5


def test_as_a_module_from_any_folder(tmp_path: Path) -> None:
    """`python -m marlinctl` is what works when the scripts folder is not on PATH."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "marlinctl", "--version"], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == f"marlinctl {__version__}\n"
    assert time.monotonic() - started < 30


def test_nohup_is_heard() -> None:
    """`nohup marlinctl compress ... &` would end with the terminal that it was started to outlive."""
    child = start('console.say("ready"); time.sleep(1)', before=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    assert child.stderr is not None
    assert child.stderr.readline() == "ready\n"
    child.send_signal(signal.SIGHUP)
    child.communicate(timeout=30)
    assert child.returncode == 0


ERROR = """
from marlinctl.errors import BadInput
console.say("a message")
raise BadInput("E301", "w", where="p", fix="f")
"""
RESULT = """
console.say("a message")
console.result("answer", {})
"""


@pytest.mark.parametrize("closed", [(0, 1), (0, 2), (1, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize(("body", "code"), [(RESULT, 0), (ERROR, 3)], ids=["result", "error"])
def test_closed_streams_lead_to_nowhere(closed: tuple[int, ...], body: str, code: int, tmp_path: Path) -> None:
    """`>&-` would end with a traceback; and the next file that is opened would be number 2, so that messages are written into it."""
    mark = tmp_path / "file"
    whole = f'file = open({str(mark)!r}, "wb"); import os; os.write(2, b"a message"); file.write(b"data"); file.close()\n{body}'
    child = start(whole, before=lambda: [os.close(number) for number in closed])
    out, err = child.communicate(timeout=30)
    assert child.returncode == code
    assert mark.read_bytes() == b"data"
    assert "Traceback" not in err and "E900" not in err
    assert out == ("answer\n" if code == 0 and 1 not in closed else "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(("body", "code"), [(RESULT, 0), (ERROR, 3)], ids=["result", "error"])
def test_a_message_that_cannot_be_written_costs_nothing_else(body: str, code: int, tmp_path: Path) -> None:
    """A run of ten hours would stop because the disk of its messages is full or their reader gone; an error's code would be lost."""
    log = tmp_path / "log"
    with Path("/dev/full").open("w") as full:
        child = start(body, "--log-file", str(log), stderr=full)
        out, _ = child.communicate(timeout=30)
        assert child.returncode == code
        assert out == ("answer\n" if code == 0 else "")
    assert "a message" in log.read_text() and "stderr cannot be written" in log.read_text()
    reader, writer = os.pipe()
    os.close(reader)
    child = start(body, stderr=writer)
    os.close(writer)
    child.communicate(timeout=30)
    assert child.returncode == code


def test_a_stdout_that_is_open_for_reading_alone_is_exit_5() -> None:
    """`marlinctl inspect M 1< file`: the result would be lost with exit code 0, or a traceback."""
    with Path(os.devnull).open("rb") as nothing:
        child = start(RESULT, stdout=nothing)
        _, err = child.communicate(timeout=30)
    assert child.returncode == 5
    assert "marlinctl explain E500" in err


def removed_folder(tmp_path: Path) -> Callable[[], None]:
    def leave() -> None:
        gone = tmp_path / "gone"
        gone.mkdir()
        os.chdir(gone)
        gone.rmdir()

    return leave


def run_in_removed_folder(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "marlinctl", *arguments],
        preexec_fn=removed_folder(tmp_path),
        env=os.environ | {"PYTHONPATH": str(Path(cli.__file__).parent.parent)},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_absolute_paths_work_from_a_removed_working_folder(tmp_path: Path) -> None:
    """A deployment that replaced the folder would end the run in a traceback, or in the middle by oneMKL."""
    make_tiny(tmp_path / "model")
    done = run_in_removed_folder(tmp_path, "inspect", str(tmp_path / "model"))
    assert done.returncode == 0 and "llama" in done.stdout
    assert done.stderr.startswith("warning: the current folder was deleted")


@pytest.mark.parametrize("arguments", [["inspect", "model"], ["recipes", "ls"], ["jobs", "rm", "/x", "y", "--yes"]], ids=" ".join)
def test_relative_paths_from_a_removed_working_folder_are_refused(arguments: list[str], tmp_path: Path) -> None:
    """A result would be written into a temporary folder and be removed with it."""
    done = run_in_removed_folder(tmp_path, *arguments)
    assert done.returncode == 4
    assert "the current folder was deleted" in done.stderr and "explain E490" in done.stderr


def test_a_folder_that_is_removed_while_it_runs(verb: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Path.resolve() raises a bare FileNotFoundError then: no defect of marlinctl."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)

    def body(_console: Console) -> None:
        gone.rmdir()
        Path("x").resolve()

    verb(body)
    assert cli.main(["probe"]) == 4
    assert "explain E490" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a" * 300, "a/" * 3000])
def test_a_path_that_no_system_takes_is_exit_2(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """pathlib raises OSError for a name that is too long: no defect of marlinctl."""
    for verb_name in (["inspect"], ["verify", "--no-load"], ["plan"], ["jobs", "ls"], ["report"], ["recipes", "check"]):
        assert cli.main([*verb_name, name]) in (1, 2, 3), verb_name
    assert "explain E900" not in capsys.readouterr().err
