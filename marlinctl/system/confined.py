"""Work on what strangers wrote, in a process of its own that may take so much memory and so much time.

Two things cannot be bounded from inside: a chat template is a program (jinja's sandbox keeps it from files and modules, not from
`{% for %}` in `{% for %}` or `'a' * 10**10`), and a parquet file of 600 bytes may unpack to gigabytes inside of a C++ library.

    for item in confined(lambda: (render(chat) for chat in chats), Bounds(memory=2**30, cpu=30, wait=20)):
        ...

The child is a fork, as the workers of torch's DataLoader are: nothing is imported a second time and closures need no pickling. It writes
JSON into a pipe and is never ahead of the reader by more than the pipe holds, so who stops reading stops the work. It is killed when it
takes too long for one item or the reader goes away; the kernel refuses memory and ends it when its processor time is used up. Where the
kernel does not count address space (macOS), only time is bounded.

A fork holds the locks that other threads held. What the child calls takes none of ours, but libraries have some: of 28 forks in processes
with CUDA two hung, and one ended with 127, without a word (six and eight test runs side by side, H200, 2026-11-30). Such a child has taken
no processor time, and is replaced once.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from marlinctl import errors
from marlinctl.errors import MarlinctlError, Problem

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
MOST_BYTES = 256 << 20  # of one item
_IDLE = 0.5  # seconds of processor time that a child takes before it hangs, at most


@dataclass(frozen=True, slots=True)
class Bounds:
    """memory: bytes beyond what this process has. cpu: seconds of processor time in all. wait: seconds for one item."""

    memory: int
    cpu: int
    wait: float


class Exceeded(Exception):
    """A bound was reached; the text says which one."""


class _Silent(Exception):
    """The child is dead, or was killed because nothing came in time; the text says which."""

    def __init__(self, text: str, seconds: float) -> None:
        super().__init__(text)
        self.seconds = seconds  # of processor time that it took


def confined(work: Callable[[], Iterator[Any]], bounds: Bounds) -> Generator[Any, None, None]:
    """The items of `work()`, which are JSON documents. `work` runs in the child; what it changes is not seen here.

    Raises Exceeded, any MarlinctlError that `work` raises, and RuntimeError with the child's traceback for everything else it raises.
    """
    try:
        yield from _attempt(work, bounds)
    except _Hung:
        yield from _attempt(work, bounds, last=True)


class _Hung(Exception):
    """A child did not begin."""


def _attempt(work: Callable[[], Iterator[Any]], bounds: Bounds, *, last: bool = False) -> Generator[Any, None, None]:
    """With one child. Raises _Hung, unless it is the last, where that gave nothing and took no processor time."""
    ours, theirs = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads: see above
        masked = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)  # the child must not run what the parent does at its end
        try:
            child = os.fork()
            if child == 0:
                os.close(ours)
                _run(work, bounds, theirs, masked)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, masked)
    os.close(theirs)
    began = False
    try:
        for item in _items(ours, child, bounds):
            began = True
            yield item
    except _Silent as silent:
        if began or last or silent.seconds > _IDLE:
            raise Exceeded(str(silent)) from None
        raise _Hung from None
    finally:
        os.close(ours)
        with suppress(ChildProcessError):  # asked already how it ended: its number may be another process's by now
            if os.waitpid(child, os.WNOHANG) == (0, 0):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)


# The child


def _run(work: Callable[[], Iterator[Any]], bounds: Bounds, pipe: int, masked: set[int | signal.Signals]) -> NoReturn:
    """Never returns, and runs nothing that was registered for the end of the parent."""
    code = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which kills us
        signal.pthread_sigmask(signal.SIG_SETMASK, masked)
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):  # a library that dies says so on stderr, in its own words
            os.dup2(nowhere, stream)
        _limit(bounds)
        for item in work():
            _send(pipe, {"item": item})
        _send(pipe, {"end": True})
        code = 0
    except MemoryError:
        _tell(pipe, {"exceeded": "memory"})
    except MarlinctlError as error:
        problems = [[problem.what, problem.where, problem.fix] for problem in error.problems]
        _tell(pipe, {"error": [type(error).__name__, error.error_id, problems]})
    except BrokenPipeError:  # the reader has enough
        code = 0
    except BaseException:  # noqa: BLE001  the edge of the process
        _tell(pipe, {"defect": traceback.format_exc()})
    finally:
        os._exit(code)


def _limit(bounds: Bounds) -> None:
    _lower(resource.RLIMIT_CORE, 0, 0)
    _lower(resource.RLIMIT_CPU, bounds.cpu, bounds.cpu + 1)  # SIGXCPU, and SIGKILL for who ignores it
    with suppress(OSError):  # no /proc: macOS, whose kernel does not keep to the limit either
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
        memory = pages * resource.getpagesize() + bounds.memory
        _lower(resource.RLIMIT_AS, memory, memory)


def _lower(kind: int, soft: int, hard: int) -> None:
    """Never above what holds already."""
    now = resource.getrlimit(kind)
    lowest = [asked if there == resource.RLIM_INFINITY else min(asked, there) for asked, there in zip((soft, hard), now, strict=True)]
    resource.setrlimit(kind, (lowest[0], lowest[1]))


def _tell(pipe: int, message: dict[str, Any]) -> None:
    with suppress(OSError, MemoryError):
        _send(pipe, message)


def _send(pipe: int, message: dict[str, Any]) -> None:
    data = json.dumps(message).encode()
    view = memoryview(len(data).to_bytes(8, "little") + data)
    while view:
        view = view[os.write(pipe, view) :]


# The parent


def _items(pipe: int, child: int, bounds: Bounds) -> Iterator[Any]:
    while True:
        until = time.monotonic() + bounds.wait
        size = int.from_bytes(_read(pipe, 8, until, child, bounds), "little")
        if size > MOST_BYTES:
            raise Exceeded(f"more than {MOST_BYTES >> 20} MiB came out of one piece of it")
        message = json.loads(_read(pipe, size, until, child, bounds))
        if "item" in message:
            yield message["item"]
        elif "end" in message:
            return
        elif "exceeded" in message:
            raise Exceeded(_too_much_memory(bounds))
        elif "error" in message:
            name, error_id, problems = message["error"]
            raise getattr(errors, name).from_problems(error_id, [Problem(*problem) for problem in problems])
        else:
            raise RuntimeError(message["defect"])


def _read(pipe: int, count: int, until: float, child: int, bounds: Bounds) -> bytes:
    data = bytearray()
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    while len(data) < count:
        left = until - time.monotonic()
        if left <= 0 or not poll.poll(1000 * left):
            os.kill(child, signal.SIGKILL)
            raise _Silent(f"it took more than {bounds.wait:g} s", _ended(child)[1])
        found = os.read(pipe, min(count - len(data), 1 << 20))
        if not found:
            code, seconds = _ended(child)
            raise _Silent(_cause_of_death(code, bounds), seconds)
        data += found
    return bytes(data)


def _ended(child: int) -> tuple[int, float]:
    """The exit code of a child, and its processor time in seconds."""
    _, status, usage = os.wait4(child, 0)
    return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime


def _cause_of_death(code: int, bounds: Bounds) -> str:
    """Of a child that ended without a word."""
    if code == -signal.SIGXCPU:
        return f"it took more than {bounds.cpu} s of processor time"
    if code in (1, -signal.SIGABRT, -signal.SIGSEGV, -signal.SIGKILL):  # how a process ends that gets no memory
        return _too_much_memory(bounds)
    return f"the process that did it ended with {code}"


def _too_much_memory(bounds: Bounds) -> str:
    return f"it takes more than {bounds.memory >> 20} MiB of memory"
