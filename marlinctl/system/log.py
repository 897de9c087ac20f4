"""The log, and what must be taken out of a text before anybody sees it.

A log line has a timestamp and a level. Lines are kept in memory until a file is known, then written through one by one, so that a
killed run leaves a log that ends where the run ended.

`redact` takes out secrets, `without_home` the home folder. `printable` makes control characters visible: the names in a checkpoint
are written by strangers.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TextIO, cast

from marlinctl.system.after_import import after_import

LINES_IN_MEMORY = 2000  # of log, as long as no file is known

_LINE = re.compile(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} [A-Z]+ +")  # how every line of a log begins
_SHORTEST_SECRET = 8  # letters of a text that may hold one
_TOKEN = re.compile(r"(?<![A-Za-z0-9])hf_(?:(?=[a-z]*[A-Z0-9])[A-Za-z0-9]{8,}|[a-z]{17,})")  # not `hf_datasets`
_BEARER = re.compile(r"(?i)\b(bearer|authorization:|token=)\s*[A-Za-z0-9._~+/=-]{8,}")
_KEY = re.compile(r"(?<![A-Za-z0-9])(sk-|gh[opsur]_|github_pat_|api_org_)[A-Za-z0-9_-]{16,}")  # of services beside the hub
_LOGIN = re.compile(r"(?:(?<=://)|(?<=[a-z]:/))[^/\s?#]+(?=@)")  # a user alone too: it is often a token; a path has one slash
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")  # all but the newline


def redact(text: str) -> str:
    """Without secrets: tokens of the hub and of other services, bearer headers, logins in addresses."""
    text = _TOKEN.sub("hf_<redacted>", text)
    text = _KEY.sub(lambda match: f"{match[1]}<redacted>", text)
    text = _BEARER.sub(lambda match: f"{match[1]} <redacted>", text)
    return _LOGIN.sub("<redacted>", text)


def redacted(document: Any) -> Any:
    """A JSON document whose texts are without secrets."""
    if isinstance(document, dict):
        return {key: redacted(item) for key, item in document.items()}
    if isinstance(document, (list, tuple)):
        return [redacted(item) for item in document]
    return redact(document) if isinstance(document, str) and len(document) >= _SHORTEST_SECRET else document


def without_home(text: str) -> str:
    """With `~` for the home folder, which often holds a person's name. `/root` leaves `/rootfs` alone."""
    try:
        home = Path.home()
    except RuntimeError:  # a user without one, as containers have
        return text
    for folder in {str(home), os.path.realpath(home)} - {os.sep}:
        text = re.sub(rf"(?<![\w.-]){re.escape(folder)}(?![\w.-])", "~", text)
    return text


def printable(text: str, *, one_line: bool = False) -> str:
    """Without control characters: names in a checkpoint are written by strangers and must not steer a terminal."""
    text = _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode() if match[0] != "\t" else "    ", text)
    return text.replace("\n", "\\n") if one_line else text


class Foreign(OSError):
    """A file that is not a log of marlinctl."""


def _own_log(path: Path) -> TextIO:
    """A log to append to. OSError for a link and for what is not a regular file; Foreign for a file that does not begin as our logs do, and
    for one that the shell sends our output to (`> OUT.log`)."""
    from marlinctl.system.atomic import open_regular

    file = os.fdopen(open_regular(path, os.O_RDWR | os.O_APPEND | os.O_CREAT), "a+", encoding="utf-8", errors="backslashreplace")
    begin = os.pread(file.fileno(), 64, 0)
    if (begin and not _LINE.match(begin)) or _is_output(file.fileno()):
        file.close()
        raise Foreign(errno.EEXIST, "the file that is there is not a log of marlinctl", str(path))
    return file


def _is_output(descriptor: int) -> bool:
    """Whether stdout or stderr of the process is this file."""
    for stream in (1, 2):
        with suppress(OSError):  # closed
            if os.path.samestat(os.fstat(stream), os.fstat(descriptor)):
                return True
    return False


def _named_log(path: Path) -> TextIO:
    # O_NONBLOCK: a FIFO without a reader is an error (ENXIO) and not a wait without an end
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    os.set_blocking(descriptor, True)
    return os.fdopen(descriptor, "a", encoding="utf-8", errors="backslashreplace")


class Visible:
    """A stream for what other libraries print: their warnings and messages quote names as they find them.

    A bar is let through: tqdm begins each of its lines with a carriage return, and moves between bars in writes of their own.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        if text.replace("\x1b[A", "").strip("\n"):
            body = text.lstrip("\r")
            text = text[: len(text) - len(body)] + redact(printable(body.replace("\r\n", "\n")))
        self.stream.write(text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def plain(stream: TextIO) -> TextIO:
    """The stream itself, for who makes its own text visible."""
    return stream.stream if isinstance(stream, Visible) else stream


@contextmanager
def visible_streams() -> Iterator[None]:
    """stdout and stderr of the process are `Visible` inside."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, Visible(plain(stream))) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class _OfLibraries(logging.Handler):
    """Into our log what other libraries log."""

    def emit(self, record: logging.LogRecord) -> None:
        if not record.name.startswith("marlinctl"):  # ours reach the root, too, while no console is there
            logging.getLogger("marlinctl").debug("%s: %s", record.name, " ".join(record.getMessage().split()))


_OWN_HANDLERS = {"transformers.utils.logging": "transformers", "huggingface_hub.utils.logging": "huggingface_hub"}
_watched: set[str] = set()  # modules whose import has been waited for in this process


@contextmanager
def libraries_in_log() -> Iterator[None]:
    """What libraries warn of and log goes to the log alone: a person cannot act on a deprecation inside of transformers."""
    for module in _OWN_HANDLERS.keys() - _watched:
        _watched.add(module)
        after_import(module, partial(_to_root, _OWN_HANDLERS[module]))
    handler = _OfLibraries(logging.WARNING)
    root = logging.getLogger()
    root.addHandler(handler)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.removeHandler(handler)


def _to_root(name: str) -> None:
    """A library that has its own way to stderr, once it has set that up."""
    library = logging.getLogger(name)
    for handler in [handler for handler in library.handlers if isinstance(handler, logging.StreamHandler)]:
        library.removeHandler(handler)
    library.propagate = True


class MemoryThenFile(logging.Handler):
    """Keeps the last lines until it learns of a file, then writes every line through."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%Y-%m-%dT%H:%M:%S%z"))
        self.lines: deque[str] = deque(maxlen=LINES_IN_MEMORY)
        self.file: TextIO | None = None
        self.path: Path | None = None
        self._begin: int | None = None  # where the lines of this run begin in a file that no one asked for by name

    def open(self, path: Path, *, named: bool) -> None:
        """named: the person named this file, so whatever it is, lines are appended to it. Otherwise it is new, or a log of ours."""
        self.file = _named_log(path) if named else _own_log(path)
        self._begin = None if named else os.fstat(self.file.fileno()).st_size
        try:
            self.file.writelines(self.lines)
            self.file.flush()
        except OSError:
            self._let_go()
            raise
        self.path = path
        self.lines.clear()

    def withdraw(self) -> None:
        """Back to memory: take the lines of this run out of the file, and the file away where it was new. A named one keeps them."""
        if self.file is None or self.path is None or self._begin is None:
            return
        with suppress(OSError):
            if self._begin:
                os.truncate(self.file.fileno(), self._begin)
            else:
                self.path.unlink()
        self._let_go()
        self.path = None

    def emit(self, record: logging.LogRecord) -> None:
        text = printable(without_home(redact(self.format(record)))) + "\n"
        if self.file is None:
            self.lines.append(text)
            return
        try:
            self.file.write(text)
            self.file.flush()
        except OSError:
            self._let_go()  # raised once, so that the error itself can still be reported
            raise

    def handleError(self, record: logging.LogRecord) -> None:
        """A log that cannot be written means a full disk: stop for it, as for any other file, instead of continuing without."""
        raise

    def close(self) -> None:
        self._let_go()
        super().close()

    def _let_go(self) -> None:
        """Every line is flushed as it is written, so that closing has nothing left to lose."""
        if self.file is not None:
            with suppress(OSError):
                self.file.close()
            self.file = None
