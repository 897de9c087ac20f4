"""marlinctl/system/console.py: what goes to stdout, to stderr and into the log, and what must never go anywhere."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from marlinctl.errors import UsageError
from marlinctl.system import console as console_module
from marlinctl.system.console import Console, duration
from marlinctl.system.log import _to_root, libraries_in_log


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> tuple[io.StringIO, io.StringIO]:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    return io.StringIO(), io.StringIO()


TOKEN = "hf_" + "aBcDeFgHiJ1234567890KlMnOpQrStUvWx"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (65, "1 min 05 s"), (7800, "2 h 10 min")])
def test_durations_read_as_a_person_says_them(seconds: float, text: str) -> None:
    """Time left must not come out as 59.99999 s or 1 min 5 s."""
    assert duration(seconds) == text


def test_the_result_is_alone_on_stdout(streams: tuple[io.StringIO, io.StringIO]) -> None:
    """`marlinctl inspect F > file` would hold progress messages, too."""
    out, err = streams
    console = Console(stdout=out, stderr=err)
    console.say("working")
    console.warn("careful")
    console.detail("hidden without --verbose")
    console.result("the answer", {"answer": 42})
    console.close()
    assert out.getvalue() == "the answer\n"
    assert err.getvalue() == "working\nwarning: careful\n"


def test_json_is_one_strict_document(streams: tuple[io.StringIO, io.StringIO]) -> None:
    """A machine could not parse NaN, a path object, or two documents in a row."""
    out, err = streams
    console = Console(json=True, stdout=out, stderr=err)
    answer: dict[Any, Any] = {"score": float("nan"), "folder": Path("a/b"), "nested": [{"x": float("inf")}], 3: "né"}
    console.result("unused", answer)
    with pytest.raises(RuntimeError, match="twice"):
        console.result("again", {})
    console.close()
    document = json.loads(out.getvalue(), parse_constant=pytest.fail)
    assert document == {"schema_version": 1, "score": None, "folder": "a/b", "nested": [{"x": None}], "3": "né"}
    assert out.getvalue().isascii()


def test_quiet_keeps_warnings_and_results(streams: tuple[io.StringIO, io.StringIO]) -> None:
    """-q must silence progress messages without hiding that something is wrong."""
    out, err = streams
    console = Console(quiet=True, verbose=True, stdout=out, stderr=err)
    console.say("story")
    console.detail("detail")
    console.warn("careful")
    console.result("answer", {})
    console.close()
    assert (out.getvalue(), err.getvalue()) == ("answer\n", "warning: careful\n")


@pytest.mark.parametrize(
    ("terminal", "no_color", "flag", "painted"),
    [(True, None, True, True), (True, "1", True, False), (True, "", True, True), (True, None, False, False), (False, None, True, False)],
)
def test_colour_only_where_it_is_wanted(
    terminal: bool, no_color: str | None, flag: bool, painted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Escape codes in a pipe, or for a person who set NO_COLOR."""
    monkeypatch.setenv("TERM", "xterm")
    if no_color is None:
        monkeypatch.delenv("NO_COLOR", raising=False)
    else:
        monkeypatch.setenv("NO_COLOR", no_color)
    err = Terminal() if terminal else io.StringIO()
    console = Console(colour=flag, stderr=err)
    console.warn("w")
    console.close()
    assert ("\x1b[" in err.getvalue()) is painted
    assert "warning:" in err.getvalue()


def test_progress_without_a_terminal_is_a_line_per_note_and_few_others(
    streams: tuple[io.StringIO, io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A log of a batch job would hold thousands of bars, or nothing for an hour."""
    out, err = streams
    clock = iter(range(0, 1000, 4))  # four seconds pass between any two looks at the clock
    monkeypatch.setattr(console_module.time, "monotonic", lambda: float(next(clock)))
    console = Console(stdout=out, stderr=err)
    with console.progress("solving", 10) as progress:
        progress.advance(note="q_proj error 0.1")
        for _ in range(9):
            progress.advance()
    console.close()
    lines = err.getvalue().splitlines()
    assert lines[0] == "solving 1/10: q_proj error 0.1"
    assert [line.split(",")[0] for line in lines[1:]] == ["solving 4/10", "solving 7/10", "solving 10/10"]
    assert lines[1].endswith(" left") and lines[-1].endswith(", 0 s left")


def test_large_totals_are_a_share(streams: tuple[io.StringIO, io.StringIO]) -> None:
    """`quantize 103514112/106168320` tells a person nothing."""
    _, err = streams
    console = Console(stderr=err)
    with console.progress("quantize", 106_168_320) as progress:
        progress.advance(103_514_112, note="o_proj")
    console.close()
    assert err.getvalue() == "quantize 97 %: o_proj\n"


def test_progress_on_a_terminal_is_a_bar_with_lines_above(monkeypatch: pytest.MonkeyPatch) -> None:
    """Notes and warnings would be lost behind the bar, or tear it."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    err = Terminal()
    console = Console(stderr=err)
    with console.progress("solving [x]", 2) as progress:
        progress.advance(note="first [/x] note\x1b[2J")
        console.warn("mind")
        with console.progress("inner", 1) as inner:
            inner.advance(note="inside")
        progress.advance()
    console.close()
    shown = err.getvalue()
    assert "solving [x]" in shown and "2/2" in shown
    assert "first [/x] note\\x1b[2J\n" in shown
    assert "mind" in shown and "inner 1/1: inside" in shown


def test_the_log_has_everything_from_the_first_line(streams: tuple[io.StringIO, io.StringIO], tmp_path: Path) -> None:
    """Lines said before the output folder was known would be missing from the log of a failed run."""
    out, err = streams
    console = Console(quiet=True, stdout=out, stderr=err)
    console.say("before")
    console.detail(f"with {TOKEN} in {Path.home()}/models/x")
    console.log_to(tmp_path / "run.log")
    console.say("after")
    console.log_to(tmp_path / "other.log")
    console.close()
    lines = (tmp_path / "run.log").read_text().splitlines()
    assert [line.split(maxsplit=2)[2] for line in lines] == ["before", "with hf_<redacted> in ~/models/x", "after"]
    assert lines[0].split()[0].count(":") >= 2 and lines[0].split()[1] == "INFO"
    assert not (tmp_path / "other.log").exists()


def test_a_log_that_cannot_be_opened_is_a_usage_error(tmp_path: Path) -> None:
    """A typing error in --log-file must stop the run before hours of work, not after."""
    with pytest.raises(UsageError, match="log cannot be written") as caught:
        Console(log_file=tmp_path / "missing" / "run.log")
    assert caught.value.error_id == "E244"


@pytest.mark.parametrize("kind", ["texts", "link", "dangling", "fifo", "folder"])
def test_a_file_of_somebody_else_is_not_appended_to(tmp_path: Path, kind: str) -> None:
    """`thesis.log` beside an output called `thesis` is LaTeX's; a link would spoil whatever it leads to."""
    place, elsewhere = tmp_path / "out.log", tmp_path / "elsewhere"
    if kind == "texts":
        place.write_text("This is pdfTeX, Version 3.14\n")
        (tmp_path / "out.run.log").write_text("of a race\n")
    elif kind == "link":
        elsewhere.write_text("2026-11-21T05:11:58+0000 INFO    even a log of ours\n")
        place.symlink_to(elsewhere)
    elif kind == "dangling":
        place.symlink_to(elsewhere)
    elif kind == "fifo":
        os.mkfifo(place)
    else:
        place.mkdir()
    before = [path.read_bytes() for path in (place, elsewhere) if path.is_file()]
    console = Console(quiet=True)
    with pytest.raises(UsageError) as caught:
        console.log_to(place)
    console.say("the error itself")
    console.close()
    assert caught.value.error_id == "E244" and "--log-file" in caught.value.problems[0].fix
    assert [path.read_bytes() for path in (place, elsewhere) if path.is_file()] == before


@pytest.mark.parametrize("foreign", ["text", "our output"])
def test_a_foreign_file_in_the_place_of_the_log(tmp_path: Path, foreign: str) -> None:
    """`marlinctl quantize MODEL out > out.log` would be refused, or lines of output and log would lie in one file."""
    place = tmp_path / "out.log"
    place.write_text("This is pdfTeX, Version 3.14\n" if foreign == "text" else "")
    code = "from pathlib import Path; from marlinctl.system.console import Console; Console().log_to(Path('out.log'))"
    with place.open("a") as output:
        stdout = output if foreign == "our output" else subprocess.DEVNULL
        ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, stdout=stdout, stderr=subprocess.PIPE, text=True, check=True)
    assert ended.stderr == "the log is out.run.log: out.log is another file\n"
    assert "pdfTeX" in place.read_text() if foreign == "text" else place.read_text() == ""
    assert "the log is out.run.log" in (tmp_path / "out.run.log").read_text()


def test_a_log_of_ours_is_continued(tmp_path: Path) -> None:
    """A resumed run would be refused for the log of the run that it continues, or would wipe it."""
    for text in ("one", "two"):
        console = Console(quiet=True)
        console.say(text)
        console.log_to(tmp_path / "out.log")
        console.close()
    lines = (tmp_path / "out.log").read_text().splitlines()
    assert [line.split()[-1] for line in lines] == ["one", "two"]
    (tmp_path / "mine.txt").write_text("mine\n")
    (tmp_path / "link").symlink_to("mine.txt")
    console = Console(quiet=True, log_file=tmp_path / "link")  # who names a file means it
    console.say("text")
    console.close()
    assert (tmp_path / "mine.txt").read_text().splitlines()[0] == "mine" and "text" in (tmp_path / "mine.txt").read_text()


def test_a_full_disk_under_the_log_is_not_swallowed(tmp_path: Path) -> None:
    """logging prints such errors and goes on; then the log of a long job ends in the middle, unnoticed."""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    console = Console(quiet=True)
    console.log_to(Path("/dev/full"), named=True)  # nothing was said yet, so nothing is written yet
    with pytest.raises(OSError, match="No space left"):
        console.say("text")
    console.say("the report of the error itself")
    console.close()


def test_the_silent_console_prints_nothing_but_feeds_logging(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    """As a library, marlinctl must not write to the terminal of the program that uses it."""
    console = Console.quiet()
    with caplog.at_level(logging.INFO, "marlinctl"):
        console.say(f"story {TOKEN}")
        console.warn("careful")
        console.result("answer", {})
        console.result("answer", {})
    assert capfd.readouterr() == ("", "")
    assert [record.getMessage() for record in caplog.records] == ["story hf_<redacted>", "careful", "result:\nanswer", "result:\nanswer"]


def test_silent_in_a_program_without_logging() -> None:
    """Python's logging prints warnings to stderr by itself when nobody has set it up."""
    program = "from marlinctl.system.console import Console; Console.quiet().warn('careful')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


# ---- on a terminal of 80 columns -----------------------------------------------------------------------------------------------------


def test_messages_are_broken_between_words_at_the_width_of_a_terminal(
    streams: tuple[io.StringIO, io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A terminal would break an error in the middle of a word; in a pipe, a line is what grep looks for."""
    monkeypatch.setenv("COLUMNS", "80")
    terminal = Terminal()
    fix = "fewer --samples, a smaller --sequence-length, or --calibration FILE in place of self, which loads the whole model"
    for stream in (terminal, streams[1]):
        console = Console(stdout=streams[0], stderr=stream, colour=False)
        console.error(fix, label="  fix:")
        console.close()
    lines = terminal.getvalue().splitlines()
    assert len(lines) == 2 and all(len(line) <= 80 for line in lines) and " ".join(map(str.strip, lines)) == f"fix: {fix}"
    assert lines[0].startswith("  fix: ") and lines[1].startswith("    ")
    assert streams[1].getvalue() == f"  fix: {fix}\n"


def test_a_table_of_sentences_continues_in_the_column_of_the_sentences(
    streams: tuple[io.StringIO, io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a plan in a terminal of 80 columns, the second halves of the lines would stand below the names; a pipe gets whole lines."""
    monkeypatch.setenv("COLUMNS", "80")
    terminal, piped = Terminal(), streams[0]
    text = (
        "output        ct, 113.1 MB: linears 56.4 MB (4.25 bits a weight), the rest 56.7 MB, and the mask of the pattern\nfits          yes"
    )
    for stream in (terminal, piped):
        console = Console(stdout=stream, stderr=streams[1])
        console.result(text, {}, hanging=14)
        console.close()
    assert terminal.getvalue().splitlines() == [
        "output        ct, 113.1 MB: linears 56.4 MB (4.25 bits a weight), the rest 56.7",
        "              MB, and the mask of the pattern",
        "fits          yes",
    ]
    assert piped.getvalue() == text + "\n"


@pytest.mark.parametrize("verbose", [False, True])
def test_on_a_terminal_the_bar_has_the_status_in_place_of_lines(
    verbose: bool, streams: tuple[io.StringIO, io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    """224 lines would push everything else off the screen; --verbose and the log have them."""
    monkeypatch.setenv("COLUMNS", "80")
    terminal = Terminal()
    console = Console(stdout=streams[0], stderr=terminal, colour=False, verbose=verbose)
    with console.progress("quantize", 2) as progress:
        progress.advance(1, "layers.0.mlp.down_proj error 0.01234", "worst error 0.0123, layers.0.mlp.down_proj")
    lines = "".join(console._log.lines)
    console.close()
    assert ("down_proj error 0.01234" in terminal.getvalue()) == verbose and "down_proj error 0.01234" in lines
    assert "worst error 0.0123" in terminal.getvalue()


def test_a_long_status_leaves_the_time_left(streams: tuple[io.StringIO, io.StringIO], monkeypatch: pytest.MonkeyPatch) -> None:
    """How long it will take is what a person looks for; it read `210… 0:10… left 0:0…` in a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    terminal = Terminal()
    console = Console(stdout=streams[0], stderr=terminal, colour=False)
    with console.progress("quantize", 210) as progress:
        progress.advance(209, status="worst error 0.0074, model.layers.17.self_attn.v_proj")
    console.close()
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue()).replace("\r", "\n").splitlines()
    (line,) = {line for line in drawn if "worst error 0.0074" in line}
    assert re.match(r"quantize ━+\S* +209/210 \d:\d\d:\d\d left (\d|-):(\d\d|--):(\d\d|--) worst error 0.0074, \S", line), line
    assert len(line) <= 80


def test_what_libraries_warn_of_goes_to_the_log_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A person would take a deprecation inside of transformers for a problem of the model."""
    console = Console(log_file=tmp_path / "log")
    own = logging.getLogger("a_library")
    handler = logging.StreamHandler()
    own.addHandler(handler)
    _to_root("a_library")
    with libraries_in_log():
        warnings.warn("past_key_values is deprecated", FutureWarning, stacklevel=1)
        logging.getLogger("a_library.modeling").warning("some weights were not used")
    console.close()
    log = (tmp_path / "log").read_text()
    assert "past_key_values is deprecated" in log and "a_library.modeling: some weights were not used" in log
    assert capsys.readouterr().err == "" and handler not in own.handlers
