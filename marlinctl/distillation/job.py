"""The folder of a running job, OUT.job/ beside OUT: what a killed run goes on from.

    job.json                      what decides the numbers: student, teacher, recipe, data, versions
    rows.safetensors              the training text as token ids
    teacher-00000.safetensors     the teacher's predictions, when they are cached
    block-00003.safetensors       a block that is finished, in mode blockwise; blocks.json lists them
    state-00000200.safetensors    trained tensors and optimiser state after 200 steps
    state.json                    which state is the newest, and the loss curve up to it
    lock                          held while a run uses the folder

Each file appears under its name when all of it is on the disk, and state.json is written after the state that it names. So whatever
moment a run is killed at, the newest named state is whole. Files are safetensors and JSON: nothing in them can run.
The folder is removed after publishing.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from marlinctl.checkpoint.files import FileRefused, read_json
from marlinctl.checkpoint.header import read_header
from marlinctl.checkpoint.reader import Checkpoint
from marlinctl.checkpoint.writer import write_document, write_tensors
from marlinctl.errors import BadInput, Problem, UsageError

_ROWS = "rows.safetensors"
_DAMAGED = "the folder is damaged; delete it and start the job again without --resume"


@dataclass(frozen=True, slots=True)
class State:
    """Where a job stands. `document` holds what is no tensor: the loss curve, seconds used, what was measured before."""

    step: int
    tensors: Mapping[str, Tensor]
    document: Mapping[str, Any]


class JobFolder:
    def __init__(self, out: Path) -> None:
        self.path = out.resolve().with_name(f"{out.name}.job")

    @contextmanager
    def held(self, *, resume: bool) -> Iterator[None]:
        """Take the folder for this run: a new one, or with `resume` the one that is there."""
        from filelock import FileLock, Timeout

        if resume and not (self.path / "job.json").is_file():
            raise UsageError("E287", "there is no job to go on with", where=str(self.path), fix="leave --resume out: the job starts anew")
        if not resume and (self.path / "job.json").exists():
            fix = f"--resume goes on with it; to start anew, delete {self.path}"
            raise UsageError("E285", "an unfinished job for this output is there", where=str(self.path), fix=fix)
        self.path.mkdir(exist_ok=True)
        lock = FileLock(self.path / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            fix = "wait until it ends, or stop it"
            raise UsageError("E285", "another run is at work on this output", where=str(self.path), fix=fix) from None
        try:
            yield
        finally:
            lock.release()
            if not (self.path / "job.json").exists():  # refused before it began: nothing to go on with
                shutil.rmtree(self.path, ignore_errors=True)

    def begin(self, fingerprint: Mapping[str, Any]) -> None:
        write_document(self.path / "job.json", fingerprint)

    def check(self, fingerprint: Mapping[str, Any]) -> None:
        """UsageError E286 that lists every difference between the job that was begun and the one asked for now."""
        begun = dict(_flat(self.document("job.json")))
        now = dict(_flat(fingerprint))
        problems = [
            Problem(f"{key} was {begun.get(key)!r} and is now {now.get(key)!r}", str(self.path), "use what the job was begun with")
            for key in sorted(begun.keys() | now.keys())
            if begun.get(key) != now.get(key)
        ]
        if problems:
            raise UsageError.from_problems("E286", problems)

    def document(self, name: str) -> dict[str, Any]:
        try:
            found = read_json(self.path, name)
        except FileRefused as refused:
            raise BadInput("E374", refused.problem.what, where=refused.problem.where, fix=_DAMAGED) from None
        return dict(found)

    # Rows

    def save_rows(self, ids: Tensor, counted: Tensor) -> None:
        write_tensors(self.path / _ROWS, {"ids": ids, "counted": counted})

    def rows(self) -> tuple[Tensor, Tensor] | None:
        """(ids, counted) as the job was begun with, or None where it was killed before it had any."""
        if not (self.path / _ROWS).exists():
            return None
        with self.tensors(_ROWS) as found:
            return found.read("ids"), found.read("counted")

    # States

    def save(self, state: State) -> None:
        name = f"state-{state.step:08d}.safetensors"
        write_tensors(self.path / name, state.tensors)
        write_document(self.path / "state.json", {"step": state.step, "file": name, **state.document})
        for old in self.path.glob("state-*.safetensors"):
            if old.name != name:
                old.unlink()

    def newest(self) -> State | None:
        if not (self.path / "state.json").exists():
            return None
        document = self.document("state.json")
        step, name = int(document.pop("step")), str(document.pop("file"))
        with self.tensors(name) as found:
            return State(step, {key: found.read(key) for key in found.tensors}, document)

    def save_block(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        write_tensors(self.path / f"block-{index:05d}.safetensors", tensors)

    def save_document(self, name: str, document: Mapping[str, Any]) -> None:
        write_document(self.path / name, document)

    @contextmanager
    def tensors(self, name: str) -> Iterator[Checkpoint]:
        """A safetensors file of the folder, checked and open for reading."""
        tensors, problems = read_header(self.path, name)
        if problems:
            raise BadInput("E374", problems[0].what, where=problems[0].where, fix=_DAMAGED)
        with Checkpoint(self.path, {}, tensors, (self.path / name,)) as found:
            yield found

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """{"a": {"b": 1}} -> ("a.b", 1)"""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _flat(item, f"{key}.{name}" if key else str(name))
    else:
        yield key, list(value) if isinstance(value, tuple) else value
