"""Unfinished jobs in a folder tree. Their folders are read, and neither locked nor changed."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from marlinctl.checkpoint.ownership import is_job, refuse_strangers, strangers_in_job
from marlinctl.errors import BadInput, UsageError, number_of
from marlinctl.jobs.journal import ENDING, JobFolder, held_by


@dataclass(frozen=True, slots=True)
class UnfinishedJob:
    path: Path
    verb: str  # "unknown" where job.json cannot be read
    stage: str  # how far it came, for people
    blocks: int  # finished blocks of the current stage
    age: float  # seconds since something was finished
    size: int  # bytes
    running: Mapping[str, Any] | None  # the process at work: {"pid", "host"}, {} where not known, None where there is none

    def document(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path), "age": round(self.age, 1)}


def find(folder: Path) -> list[UnfinishedJob]:
    """All jobs below a folder, the oldest first; the stages of a compress are parts of it and not listed."""
    return sorted((_of(path) for path in _below(folder)), key=lambda item: -item.age)


def look(out: Path) -> UnfinishedJob:
    """The job of an output, named as OUT or as OUT.job. UsageError E287 where there is none, E224 for what is not marlinctl's."""
    named = out.parent.resolve() / out.name  # a link in the place of the job's folder is not followed
    path = named if out.name.endswith(ENDING) and os.path.lexists(named) else JobFolder(out).path
    if os.path.lexists(path):
        what = "this is not removed, because it holds what marlinctl did not write"
        refuse_strangers(what, path, strangers_in_job(path), "move these files away, or remove the folder yourself")
    if not is_job(path):
        raise UsageError("E287", "there is no job", where=str(path), fix="`marlinctl jobs ls FOLDER` lists those below a folder")
    return _of(path)


def remove(item: UnfinishedJob) -> None:
    JobFolder(item.path.with_name(item.path.name.removesuffix(ENDING))).remove()


def _below(folder: Path) -> Iterator[Path]:
    for name, folders, _ in os.walk(folder):
        jobs = [Path(name) / inner for inner in folders if inner.endswith(ENDING)]
        yield from (path for path in jobs if is_job(path))
        folders[:] = [inner for inner in folders if not inner.endswith(ENDING)]


def _of(path: Path) -> UnfinishedJob:
    job = JobFolder(path.with_name(path.name.removesuffix(ENDING)))
    try:
        verb = job.request().verb
    except (BadInput, UsageError):
        verb = "unknown"
    finished = job.has_progress()
    stage, blocks = _stage(job) if finished or job.begun else ("nothing finished", 0)
    files = list(_files(path))
    newest = max((file.st_mtime for file in files), default=path.stat().st_mtime)
    return UnfinishedJob(path, verb, stage, blocks, max(time.time() - newest, 0.0), sum(file.st_size for file in files), held_by(path))


def _files(folder: Path) -> Iterator[os.stat_result]:
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # the run may be at work
            found = path.lstat()
            if stat.S_ISREG(found.st_mode):
                yield found


def _stage(job: JobFolder) -> tuple[str, int]:
    if job.published:
        return "published", 0
    if job.publishing is not None:
        return "checked, not all in place", 0
    inner = sorted(path for path in job.path.glob(f"*{ENDING}") if is_job(path))
    if inner:  # a stage of compress
        part = JobFolder(inner[0].with_suffix(""))
        part.has_progress()
        stage, blocks = _stage(part)
        return f"{inner[0].stem}: {stage}", blocks
    state = job.path / "state.json"
    if state.is_file():
        return f"state after step {job.document('state.json').get('step')}", 0
    blocks = sum(line["step"] in ("block", "head") for line in job.lines)
    return (f"{number_of(blocks, 'block')} finished", blocks) if blocks else ("begun", 0)
