"""What the person at the terminal sees: results on stdout, progress messages on stderr, everything in the log.

    stdout   the result alone: text, or with --json exactly one JSON document
    stderr   progress: lines, warnings, one progress bar; colour only on a terminal that wants it
    log      every line with a timestamp. It is kept in memory until `log_to` names a file (a command does so as soon as it
             knows where its output goes, the person may do so with --log-file), then written through line by line, so that a
             killed run leaves a log that ends where the run ended.

On a terminal, progress is a bar with the time left, drawn by rich, which is imported only then. Elsewhere it is plain lines:
every step that carries a note is a line, and bare steps make at most one line in ten seconds.
All text passes through `redact` (tokens) and `printable` (a tensor name may hold escape sequences) before it leaves, and what is said is
one line. What other libraries print meets the same at the edge of the program (`visible_streams`, marlinctl/cli.py).

A stderr that takes nothing more (its terminal or its reader is gone, its disk is full) loses only the messages: the work and the
log continue without it. A stdout that takes nothing more is an error, since the result is what was asked for.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from marlinctl.errors import ResourceProblem, UsageError
from marlinctl.system.log import Foreign, MemoryThenFile, plain, printable, redact, visible_streams

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

SCHEMA_VERSION = 1
SECONDS_BETWEEN_LINES = 10.0
COUNTABLE = 10_000  # totals from here on are shown as a share

_LOGGER = logging.getLogger("marlinctl")
_LOGGER.setLevel(logging.DEBUG)
_LOGGER.addHandler(logging.NullHandler())  # as every library does: without a handler, logging would print warnings itself


def gibibytes(size: float, digits: int = 2) -> str:
    """An amount of memory in bytes, as people read it."""
    return f"{size / 2**30:,.{digits}f} GiB"


def duration(seconds: float) -> str:
    """`42 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def colour_wanted(stream: TextIO) -> bool:
    """A terminal, and colour is not disabled (https://no-color.org: set and not empty)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


class _Messages:
    """A stream that is dropped for good once it cannot be written, instead of stopping the work."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._broken = False

    def write(self, text: str) -> int:
        self._try(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def isatty(self) -> bool:
        return not self._broken and not self.stream.closed and self.stream.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _try(self, do: Callable[[], object]) -> None:
        if self._broken:
            return
        try:
            do()
        except UnicodeError:
            raise
        except (OSError, ValueError) as error:  # ValueError: it was closed
            self._broken = True
            _LOGGER.debug("stderr cannot be written (%s); messages go to the log alone", error)


class Progress:
    """Handed out by `Console.progress`; the commands call nothing but `advance`."""

    def __init__(self, console: Console, label: str, total: int, bar: Bar | None) -> None:
        self._console = console
        self._label = label
        self._total = total
        self._bar = bar
        self._task = bar.add_task(printable(label, one_line=True), total=total, status="") if bar is not None else None
        self._done = 0
        self._started = self._last_line = time.monotonic()
        self._lock = threading.Lock()  # of threads that are at work on the same steps

    def advance(self, steps: int = 1, note: str = "", status: str = "") -> None:
        """`steps` more are done. A note is worth a line of its own. With a status, a few words that stand in the bar, that line is for
        --verbose and the log where there is a bar.
        """
        with self._lock:
            self._advance(steps, note, status)

    def _advance(self, steps: int, note: str, status: str) -> None:
        self._done += steps
        now = time.monotonic()
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task, steps)
            if status:
                self._bar.update(self._task, status=printable(status, one_line=True))
            if note:
                (self._console.detail if status else self._console.say)(note)
        elif note:
            self._console.say(f"{self._label} {self._how_far()}: {note}")
            self._last_line = now
        elif now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._console.say(f"{self._label} {self._how_far()}, {self._left(now)} left")
            self._last_line = now

    def _how_far(self) -> str:
        """Steps that a person can count are counted; weights and bytes are a share."""
        if self._total < COUNTABLE:
            return f"{self._done}/{self._total}"
        return f"{100 * self._done // self._total} %"

    def _left(self, now: float) -> str:
        return duration((now - self._started) / max(self._done, 1) * max(self._total - self._done, 0))


class Console:
    """One per run. `json`: the result is a JSON document; `offline`: the hub is not asked."""

    def __init__(
        self,
        *,
        json: bool = False,
        quiet: bool = False,
        verbose: bool = False,
        colour: bool = True,
        offline: bool = False,
        log_file: Path | None = None,
        stdout: TextIO | None = None,
        stderr: TextIO | None = None,
    ) -> None:
        self.started = time.monotonic()
        self.json = json
        self.offline = offline
        self._quiet = quiet
        self._verbose = verbose and not quiet
        self._stdout = stdout
        self._stderr = stderr
        self._messages: _Messages | None = None
        self._colour = colour
        self._bar: Bar | None = None
        self._has_result = False
        self._muted = False
        self._log = self._attach_log()
        if log_file is not None:
            self.log_to(log_file, named=True)

    @classmethod
    def quiet(cls) -> Console:
        """A silent one, for use as a library and in tests. Warnings go to the log only."""
        return _SilentConsole(quiet=True)

    def mute(self) -> None:
        """For every process of a run but the main one: errors are shown, nothing else, and there is no result."""
        self._quiet = self._muted = True

    # Progress messages

    def say(self, text: str) -> None:
        text = printable(text, one_line=True)
        self._record(logging.INFO, text)
        if not self._quiet:
            self._write_message(text)

    def detail(self, text: str) -> None:
        text = printable(text, one_line=True)
        self._record(logging.DEBUG, text)
        if self._verbose:
            self._write_message(text)

    def warn(self, text: str) -> None:
        text = printable(text, one_line=True)
        self._record(logging.WARNING, text)
        if not self._muted:
            self._write_message(text, label="warning:", colour="33")

    def error(self, text: str, label: str = "error:") -> None:
        """One line of an error report (marlinctl/cli.py)."""
        self._record(logging.ERROR, f"{label} {text}")
        self._write_message(text, label=label, colour="31;1" if label == "error:" else "2")

    def traceback(self, error: BaseException, *, show: bool) -> None:
        """Into the log always, to the terminal only for --debug."""
        text = "".join(traceback.format_exception(error)).rstrip()
        self._record(logging.ERROR, text)
        if show:
            self._write_message(text)

    @contextmanager
    def progress(self, label: str, total: int) -> Iterator[Progress]:
        """A bar on a terminal, lines elsewhere. One bar at a time: a second one inside the first is lines."""
        started = time.monotonic()
        if self._quiet or self.json or self._bar is not None or not self._err.isatty():
            yield Progress(self, label, total, None)
        else:
            with _draw_bar(self._err, self._colour and colour_wanted(self._err), total) as self._bar, visible_streams():
                try:
                    yield Progress(self, label, total, self._bar)
                finally:
                    self._bar = None
        self.detail(f"{label}: {duration(time.monotonic() - started)}")

    # The result

    def result(self, text: str, document: dict[str, Any], *, hanging: int | None = None) -> None:
        """Once per run: two JSON documents on stdout would be none.

        hanging: of a table of names and sentences, the column of the sentences; on a terminal, lines that are too wide continue there.
        """
        if self._has_result:
            raise RuntimeError("Console.result was called twice in one run")
        self._has_result = True
        self._record(logging.INFO, f"result:\n{text}")
        if self._muted:
            return
        if self.json:
            self.write_json(document)
        else:
            safe = printable(redact(text))
            if hanging is not None and self._out.isatty():
                safe = "\n".join(_wrapped(line, " " * hanging) for line in safe.splitlines())
            self._write_result(safe)

    def write_json(self, document: dict[str, Any]) -> None:
        """ASCII, so that no locale can break it; NaN and infinity, which JSON does not know, become null."""
        body = json.dumps(strict({"schema_version": SCHEMA_VERSION, **document}), indent=2, allow_nan=False)
        self._write_result(redact(body))

    def _write_result(self, text: str) -> None:
        """OSError where stdout cannot be written, BrokenPipeError where its reader is gone, ResourceProblem E500 where it was closed."""
        try:
            print(text, file=self._out, flush=True)
        except OSError as error:
            if error.errno == errno.EIO:  # a terminal that was hung up
                raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)) from error
            raise
        except UnicodeError:
            raise
        except ValueError as error:
            fix = "leave stdout open, or send it to a file"
            raise ResourceProblem("E500", f"writing failed: {error}", where="stdout", fix=fix) from error

    # The log

    @property
    def log_path(self) -> Path | None:
        return self._log.path

    def log_to(self, path: Path, *, named: bool = False) -> None:
        """From here on, and with what was said so far, into this file. --log-file given by the person (`named`) wins.

        OUT.log that is somebody else's is left alone, and OUT.run.log taken. UsageError E244 where that is foreign too, and for links.
        """
        if self._log.path is not None:
            return
        fix = "name a file in a folder that exists and is writable: --log-file FILE"
        try:
            try:
                self._log.open(path, named=named)
            except Foreign:
                other = path.with_name(f"{path.stem}.run.log")
                self._log.open(other, named=named)
                self.say(f"the log is {other.name}: {path.name} is another file")
        except OSError as error:
            raise UsageError(
                "E244",
                f"the log cannot be written: {error.strerror}",
                where=str(path),
                fix=fix if named else f"move what is there away, or {fix}",
            ) from error

    def withdraw_log(self) -> None:
        """Of a run that was refused, nothing stays in the log that `log_to` chose: neither a new file nor lines in one that was there."""
        self._log.withdraw()

    def close(self) -> None:
        _LOGGER.removeHandler(self._log)
        _LOGGER.propagate = True
        self._log.close()

    def _attach_log(self) -> MemoryThenFile:
        log = MemoryThenFile()
        _LOGGER.addHandler(log)
        _LOGGER.propagate = False  # lm_eval and others set up the root logger, and every line would come twice
        return log

    def _record(self, level: int, text: str) -> None:
        _LOGGER.log(level, "%s", redact(text))

    # Where it goes. Looked up late: tests and embedding programs exchange sys.stdout and sys.stderr.

    @property
    def _out(self) -> TextIO:
        return plain(self._stdout or sys.stdout)

    @property
    def _err(self) -> TextIO:
        stream = plain(self._stderr or sys.stderr)
        if self._messages is None or self._messages.stream is not stream:
            self._messages = _Messages(stream)
        return cast(TextIO, self._messages)

    def _write_message(self, text: str, *, label: str = "", colour: str = "") -> None:
        safe = printable(redact(text))
        safe = self._fitted(f"{label} {safe}" if label else safe)
        if label and self._colour and colour_wanted(self._err):
            safe = f"\x1b[{colour}m{label}\x1b[0m{safe.removeprefix(label)}"
        if self._bar is not None:
            self._bar.console.out(safe, highlight=False)  # above the bar
        else:
            print(safe, file=self._err, flush=True)

    def _fitted(self, text: str) -> str:
        """Broken between words at the width of a terminal. Elsewhere a message is one line, and so is one that has lines already."""
        if "\n" in text or not self._err.isatty():
            return text
        return _wrapped(text, "    ")


def _wrapped(line: str, indent: str) -> str:
    """Broken between words at the width of the terminal; what follows the first line is indented."""
    import shutil
    import textwrap

    columns = shutil.get_terminal_size().columns
    beginning = line[: len(line) - len(line.lstrip())]
    lines = textwrap.wrap(
        line.strip(), max(columns, 20), initial_indent=beginning, subsequent_indent=indent, break_long_words=False,
        break_on_hyphens=False, drop_whitespace=True,
    )  # fmt: skip
    return "\n".join(lines) or line


class _SilentConsole(Console):
    """Says nothing at all; every line still reaches the `marlinctl` logger, which the embedding program may show."""

    def _attach_log(self) -> MemoryThenFile:
        return MemoryThenFile()  # not attached: a library makes many consoles and closes none

    def _write_message(self, text: str, *, label: str = "", colour: str = "") -> None:
        pass

    def result(self, text: str, document: dict[str, Any], *, hanging: int | None = None) -> None:
        self._record(logging.INFO, f"result:\n{text}")


def _draw_bar(stream: TextIO, colour: bool, total: int) -> Bar:
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, MofNCompleteColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar
    from rich.table import Column

    return Bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=16),
        MofNCompleteColumn() if total < COUNTABLE else TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
        console=RichConsole(file=stream, no_color=not colour, force_terminal=True, highlight=False, markup=False),
        expand=True,  # the status has what the others leave; without it, a long one would cut the count and the time left
        transient=True,
    )


def strict(value: Any) -> Any:
    """The same document in what JSON knows: no NaN, text keys, paths as text."""
    if isinstance(value, dict):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)
