"""Runs marlinctl in processes that die, or whose disk fails, at a step that the test chooses.

Each is a fork of tests/forked.py: it costs milliseconds where a new interpreter costs seconds, and SIGKILL is as real in it. The steps are
seen from outside: the functions of the system, and the two that write the journal, are replaced by doubles that count. Nothing in marlinctl
knows of it.

    lines   every journal line and every JSON document of a job's folder; `half`: killed with half of it written, `after`: with all of it
    calls   every fsync, rename, replace, unlink, truncate, mkdir and copy within the kernel; killed before it is made
    writes  every write to a file, copy, fsync, rename, replace, truncate and mkdir; fails with ENOSPC instead
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import forked
from tests.faults.machines import STATES
from tests.test_architecture import ROOT

_CALLS = ("fsync", "fdatasync", "rename", "replace", "unlink", "truncate", "mkdir", "copy_file_range")
_FAILING = ("fsync", "fdatasync", "rename", "replace", "truncate", "mkdir", "pwrite", "posix_fallocate", "copy_file_range")


@dataclass(frozen=True)
class Ended:
    """How a run ended. code: its exit code, or -9; steps: how many there were, where it got to its end."""

    code: int
    steps: int
    told: str  # stderr


def run(
    arguments: list[str],
    *,
    at: str = "",
    n: int = 0,
    environment: Mapping[str, str | None] | None = None,
    machine: Sequence[str] = (),
) -> Ended:
    """`marlinctl ARGUMENTS`; at: half or after (lines), calls, writes, or nothing; n: the step, counted from 1.

    environment: variables that differ; None: not set. machine: states of tests/faults/machines.py.
    """
    asked = json.dumps({"arguments": arguments, "at": at, "n": n, "machine": list(machine)})
    variables = {key: value for key, value in (os.environ | dict(environment or {})).items() if value is not None}
    command = [sys.executable, "-m", "tests.killing", asked]
    done = forked.run(command, cwd=ROOT, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
    told, found, steps = done.stderr.rpartition("\nsteps: ")
    return Ended(done.returncode, int(steps), told) if found else Ended(done.returncode, 0, done.stderr)


# ---- in the process that runs it -----------------------------------------------------------------------------------------------------


def _child(arguments: list[str], at: str, n: int, machine: list[str]) -> int:
    from marlinctl.cli import main

    for state in machine:
        STATES[state]()
    counter = _Counter(n)
    with counter.installed(at):
        code = main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(2, f"\nsteps: {counter.seen}".encode())
    return code


class _Counter:
    def __init__(self, n: int) -> None:
        self.n, self.seen = n, 0

    def hit(self) -> bool:
        self.seen += 1
        return self.seen == self.n

    @contextmanager
    def installed(self, at: str) -> Iterator[None]:
        if at in ("half", "after"):
            self._lines(at)
        elif at == "calls":
            for name in _CALLS:
                setattr(os, name, self._killing(getattr(os, name)))
        elif at == "writes":
            for name in _FAILING:
                setattr(os, name, self._failing(getattr(os, name)))
            self._failing_files()
        yield

    def _lines(self, at: str) -> None:
        from marlinctl import compress
        from marlinctl.distillation import state as job
        from marlinctl.jobs import journal
        from marlinctl.system import atomic
        from marlinctl.system.atomic import temporary_name

        def double(real: Callable[..., None], appends: bool) -> Callable[..., None]:
            def write(target: Path, document: Any) -> None:
                if not self.hit():
                    real(target, document)
                    return
                if at == "half":
                    torn = target if appends else target.with_name(temporary_name())
                    text = json.dumps(document)
                    with torn.open("a") as file:
                        file.write(text[: len(text) // 2])
                else:
                    real(target, document)
                os.kill(os.getpid(), signal.SIGKILL)

            return write

        journal.append_line = double(atomic.append_line, True)
        document = double(atomic.write_document, False)
        for module in (journal, compress, job):
            module.write_document = document  # type: ignore[attr-defined]

    def _killing(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.hit():
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    def _failing(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.hit():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **kwargs)

        return call

    def _failing_files(self) -> None:
        """Files that are opened for writing fail with half of the data written."""
        open_file = Path.open
        counter = self

        class File:
            def __init__(self, file: Any) -> None:
                self._file = file

            def write(self, data: Any) -> Any:
                if counter.hit():
                    self._file.write(data[: len(data) // 2])
                    self._file.flush()
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return self._file.write(data)

            def __enter__(self) -> File:
                return self

            def __exit__(self, *_: object) -> None:
                self._file.close()

            def __getattr__(self, name: str) -> Any:
                return getattr(self._file, name)

        def opened(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            file = open_file(path, mode, *args, **kwargs)
            return File(file) if set(mode) & set("wa+x") else file

        open_descriptor = os.fdopen

        def opened_descriptor(descriptor: int, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            file = open_descriptor(descriptor, mode, *args, **kwargs)
            return File(file) if set(mode) & set("wa+x") else file

        Path.open = opened  # type: ignore[method-assign, assignment]
        os.fdopen = opened_descriptor  # type: ignore[assignment]


if __name__ == "__main__":
    sys.exit(_child(**json.loads(sys.argv[1])))
