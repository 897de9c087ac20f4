"""Runs marlinctl in processes that die, or whose disk fails, at a step that the test chooses.

    test ──► one helper process, which has imported everything ──► a fork for each run: `marlinctl ARGUMENTS`, killed at step N

A fork costs milliseconds where a new interpreter costs seconds, and SIGKILL is as real in it. The steps are seen from outside: the
functions of the system, and the two that write the journal, are replaced by doubles that count. Nothing in marlinctl knows of it.

    lines   every journal line and every JSON document of a job's folder; `half`: killed with half of it written, `after`: with all of it
    calls   every fsync, rename, replace, unlink, truncate and mkdir; killed before it is made
    writes  every write to a file, fsync, rename, replace, truncate and mkdir; fails with ENOSPC instead
"""

from __future__ import annotations

import errno
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.blank import blank_pictures
from tests.faults.machines import STATES
from tests.test_architecture import ROOT
from tests.tiny import make_tiny

_CALLS = ("fsync", "rename", "replace", "unlink", "truncate", "mkdir")
_FAILING = ("fsync", "rename", "replace", "truncate", "mkdir", "pwrite", "posix_fallocate")


@dataclass(frozen=True)
class Ended:
    """How a run ended. code: its exit code, or -9; steps: how many there were, where it got to its end."""

    code: int
    steps: int
    told: str  # stderr


class Runner:
    """The helper process, seen from the test."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.killing"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    def run(
        self,
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
        assert self._process.stdin is not None and self._process.stdout is not None
        asked = {"arguments": arguments, "at": at, "n": n, "environment": dict(environment or {}), "machine": list(machine)}
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the helper process is gone"
        return Ended(**json.loads(answer))

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.communicate(timeout=30)


# ---- the helper process --------------------------------------------------------------------------------------------------------------


def _serve() -> None:
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401  what the first run would import

    import marlinctl.commands.compress
    import marlinctl.commands.resume
    import marlinctl.compress
    import marlinctl.distillation.run
    import marlinctl.evaluation.run  # noqa: F401

    torch.set_num_threads(1)  # a fork has no threads but its own
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with blank_pictures():
        _warm()
        gc.freeze()  # neither looked at nor copied by a fork
        for line in sys.stdin:
            asked = json.loads(line)
            answers.write(json.dumps(_fork(**asked)) + "\n")
            answers.flush()


def _warm() -> None:
    """One run, so that forks find what the first run of a process makes: late imports, compiled patterns, tables of transformers."""
    from marlinctl.cli import main

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_tiny(folder / "model")
        (folder / "text.txt").write_text("Some words that are read to see what a layer gets. " * 40)
        walk = ["--calibration", str(folder / "text.txt"), "--samples", "2", "--sequence-length", "32", "--group-size", "32", "-q"]
        (folder / "small.yaml").write_text("extends: int4\nquantize: {refine: 0}\ncalibration: {minimum_tokens: 16}\n")
        assert main(["quantize", str(folder / "model"), str(folder / "out"), "--recipe", str(folder / "small.yaml"), *walk]) == 0


def _fork(arguments: list[str], at: str, n: int, environment: dict[str, str | None], machine: list[str]) -> dict[str, Any]:
    told, telling = os.pipe()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            os.close(told)
            os.dup2(telling, 2)
            sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115  the fork's for as long as it lives
            sys.stderr = os.fdopen(telling, "w", buffering=1)
            os.environ.update({key: value for key, value in environment.items() if value is not None})
            for key in [key for key, value in environment.items() if value is None]:
                os.environ.pop(key, None)
            for state in machine:
                STATES[state]()
            code = _child(arguments, at, n)
        except BaseException:  # noqa: BLE001  a fork must never go on with what its parent was doing
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(telling)
    with os.fdopen(told, errors="replace") as stream:
        text = stream.read()
    _, status = os.waitpid(child, 0)
    told_text, found, steps = text.rpartition("\nsteps: ")
    code = os.waitstatus_to_exitcode(status)
    return {"code": code, "steps": int(steps), "told": told_text} if found else {"code": code, "steps": 0, "told": text}


def _child(arguments: list[str], at: str, n: int) -> int:
    from marlinctl.cli import main

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

        journal.append_line = double(atomic.append_line, True)  # type: ignore[attr-defined]
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
    _serve()
