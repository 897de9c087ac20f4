"""What a distillation has in its job's folder (jobs/journal.py) beside the request and the journal.

    rows.safetensors              the training text as token ids
    teacher-00000.safetensors     the teacher's predictions, when they are cached
    block-00003.safetensors       a block that is finished, in mode blockwise; blocks.json lists them
    tracker.json                  the name of the run in TensorBoard or wandb, where one logs the curves
    state-00000200.safetensors    trained tensors and optimizer state after 200 steps
    state.json                    which state is the newest, and the loss curve up to it

Each file appears under its name when all of it is on the disk, and state.json is written after the state that it names. So whatever
moment a run is killed at, the newest named state is whole. Files are safetensors and JSON: nothing in them can run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from marlinctl.checkpoint.reader import Checkpoint
from marlinctl.checkpoint.safetensors_header import read_header
from marlinctl.jobs.journal import JobFolder
from marlinctl.system.atomic import write_document, write_tensors

_ROWS = "rows.safetensors"


@dataclass(frozen=True, slots=True)
class State:
    """Where a job stands. `document` holds everything that is not a tensor: the loss curve, seconds used, what was measured before."""

    step: int
    tensors: Mapping[str, Tensor]
    document: Mapping[str, Any]


class DistillJob(JobFolder):
    @property
    def progress(self) -> bool:
        """Text that the teacher wrote took long already."""
        return self.begun

    @property
    def staged(self) -> Path:
        return self.path / "staged"

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
        """BadInput E306 where student or teacher has changed since it was read."""
        self.require_inputs_unchanged()
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

    def newest_step(self) -> int:
        """The steps behind the newest state; 0 without one."""
        return int(self.document("state.json")["step"]) if (self.path / "state.json").exists() else 0

    def save_block(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """BadInput E306 where student or teacher has changed since it was read: blocks are read while others are trained."""
        self.require_inputs_unchanged()
        write_tensors(self.path / f"block-{index:05d}.safetensors", tensors)

    def save_document(self, name: str, document: Mapping[str, Any]) -> None:
        write_document(self.path / name, document)

    @contextmanager
    def tensors(self, name: str) -> Iterator[Checkpoint]:
        """A safetensors file of the folder, checked and open for reading."""
        tensors, problems = read_header(self.path, name)
        if problems:
            raise self.damaged(problems[0].what, problems[0].where)
        with Checkpoint(self.path, {}, tensors, (self.path / name,)) as found:
            yield found
