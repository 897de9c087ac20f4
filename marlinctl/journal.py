"""The folder of an unfinished run, OUT.job/ beside OUT: what was asked for, what is finished, who is at work on it.

    job.json          what was asked for: the verb, the model, the whole recipe, the options. `marlinctl resume OUT` asks for it again
    journal.jsonl     one line for each thing that is finished, each on the disk before the next thing begins:
                        begun        what decides the numbers (the fingerprint): model, recipe, tokens, versions, dtype, kind of device
                        block, head  a piece of the walk (walk_job.py), with size and SHA-256 of its files
                        publishing   everything is checked; these folders get their names now
                        published    they have them
    staged/           the checkpoint as it is built (checkpoint/writer.py); the last step renames it to OUT
    OUT.old-1f0c9a2e/ the OUT that is being replaced; goes back if the new one does not get there
    lock              held while a process is at work; running.json says which one

A line is written after the files that it names, so whatever moment a run dies at, what the lines say is true. A torn or damaged last line
is dropped, and so is, with all that follow, one whose files are not as it says. Nothing here is a pickle, and nothing asks a clock. Paths
inside are relative to the folder, so it may be moved together with OUT's place, to another disk or machine.

The folder goes when OUT is published (--keep-job keeps it), and when a run ends with nothing finished. `distill` has files of its own in
it (distillation/job.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marlinctl import manifest
from marlinctl.checkpoint.durable import append_line, write_document
from marlinctl.checkpoint.files import FileRefused, read_json
from marlinctl.checkpoint.writer import Finished, publish_together
from marlinctl.errors import BadInput, EnvironmentProblem, HubProblem, Problem, ResourceProblem, UsageError

if TYPE_CHECKING:
    from marlinctl.console import Console

FORMAT = 1  # of job.json and the journal; a greater one was written by a newer marlinctl
ENDING = ".job"
JOB, JOURNAL = "job.json", "journal.jsonl"
_LOCK, _RUNNING = "lock", "running.json"
_MEASURED = "recipe.evaluate."  # how a result is measured decides none of its numbers, so it may differ on resuming
# Refusals: running again without a change would end the same way, so they alone are no reason to keep a folder or to name `resume`.
_REFUSALS = (UsageError, BadInput, EnvironmentProblem, HubProblem)


@dataclass(frozen=True, slots=True)
class Request:
    """What a person asked for, so that it can be asked for again. `arguments` is a JSON document."""

    verb: str
    arguments: Mapping[str, Any]
    folder: Path | None = None  # in which the command was given: its paths may be relative to that


@dataclass(frozen=True, slots=True)
class Place:
    """A finished folder on its way to its place (what publish_together needs)."""

    path: Path
    out: Path
    overwrite: bool


class JobFolder:
    """Use through `held`. `lines` are the journal's."""

    def __init__(self, out: Path) -> None:
        self.out = out.resolve()
        if not self.out.name:
            raise UsageError("E234", "the root of the file system is no output", where=str(out), fix="name a folder in it")
        self.path = self.out.with_name(self.out.name + ENDING)
        self.lines: list[dict[str, Any]] = []
        self._ends: list[int] = []  # where each line ends in the file
        self._shown = out
        self._asked: Request | None = None
        self._measures = False

    # Who may use it

    @contextmanager
    def held(self, request: Request, *, resume: bool, console: Console, launcher: str = "") -> Iterator[None]:
        """Take the folder for this run: a new one, or with `resume` the one that is there. It stays if there is something to go on with.

        launcher: what stands before `marlinctl` on the command line, where the person is told how to go on.
        UsageError E285 for an unfinished job without `resume`, or a run that is at work; E287 for `resume` and no job.
        """
        if resume and not (self.path / JOB).is_file():
            fix = "give the whole command again: it starts anew"
            raise UsageError("E287", "there is no job to go on with", where=str(self.path), fix=fix)
        self._asked = request
        with self._locked():
            self._read()
            if resume:
                self.request()  # one that this version understands
                self._cut(len(self.lines))
            else:
                self._refuse_unfinished()
                self.clear()
                self._note(request)
            try:
                yield
            except BaseException as error:
                self._leave(error, console, launcher)
                raise

    @contextmanager
    def _locked(self) -> Iterator[None]:
        from filelock import FileLock, Timeout

        try:
            self.path.mkdir(exist_ok=True)
        except OSError as problem:
            raise ResourceProblem(
                "E501", f"writing failed: {problem.strerror}", where=str(self.path), fix="mend the disk or name another place"
            ) from problem
        lock = FileLock(self.path / _LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            what = f"another run is at work on this output{_by(self.path)}"
            raise UsageError("E285", what, where=str(self.path), fix="wait until it ends, or stop it") from None
        try:
            with suppress(OSError):  # for people; nothing depends on it
                (self.path / _RUNNING).write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
            yield
        finally:
            with suppress(OSError):
                (self.path / _RUNNING).unlink(missing_ok=True)
            lock.release()
            if not (self.path / JOB).exists():  # refused before it began: nothing to go on with
                shutil.rmtree(self.path, ignore_errors=True)

    def _refuse_unfinished(self) -> None:
        if (self.path / JOB).exists() and self.progress and not self.published:
            again = shlex.quote(str(self._shown))
            fix = (
                f"`marlinctl resume {again}` goes on with it, and takes other --tasks, --text or --window where those were wrong; "
                f"to start anew, `marlinctl jobs rm {again}` first"
            )
            raise UsageError("E285", "an unfinished job for this output is there", where=str(self.path), fix=fix)

    def _leave(self, error: BaseException, console: Console, launcher: str) -> None:
        """After a run that did not get through: keep the folder and say how to go on, or remove it."""
        if not (self.path / JOB).exists():
            return
        if not self.progress and not (self.begun and isinstance(error, (ResourceProblem, OSError))):
            self.remove()
        elif self.path.parent.suffix != ENDING:  # a stage goes on with the whole
            resume = f"{launcher}marlinctl resume {shlex.quote(str(self._shown))}"
            if self._measures:
                resume += "; add what shall be measured otherwise (--tasks, --text, --window, --limit, ...), or --no-eval"
            if self._measures or not isinstance(error, _REFUSALS):
                console.error(resume, label="to go on:")

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """While the finished result is measured: where that fails, the person is told that it can be measured otherwise."""
        self._measures = True
        yield
        self._measures = False

    # What was asked for, and whether it is the same now

    @property
    def progress(self) -> bool:
        """Whether anything is finished that took long."""
        return any(line["step"] != "begun" for line in self.lines)

    def has_progress(self) -> bool:
        """`progress`, of a folder that nobody has taken yet. Reads the journal."""
        self._read()
        return self.progress

    def request(self) -> Request:
        """UsageError E290 for a folder of a newer marlinctl; BadInput E374 for a damaged one."""
        document = self.document(JOB)
        if document.get("format") != FORMAT:
            what = f"the job is in format {document.get('format')!r}, and this marlinctl writes format {FORMAT}"
            fix = "go on with the version of marlinctl that began it, or start anew"
            raise UsageError("E290", what, where=str(self.path / JOB), fix=fix)
        verb, arguments, folder = document.get("verb"), document.get("arguments"), document.get("folder")
        if not isinstance(verb, str) or not isinstance(arguments, dict) or not isinstance(folder, str):
            raise self.damaged("it does not say what was asked for", self.path / JOB)
        return Request(verb, arguments, Path(folder))

    def _note(self, request: Request) -> None:
        asked = {"verb": request.verb, "arguments": request.arguments, "folder": str(Path.cwd())}
        write_document(self.path / JOB, {"format": FORMAT, **asked})

    def begin(self, fingerprint: Mapping[str, Any], **more: Any) -> None:
        """Note what decides the numbers; on resuming, compare it instead (`check`)."""
        self.append({"step": "begun", "fingerprint": fingerprint, **more})

    def check(self, fingerprint: Mapping[str, Any]) -> None:
        """UsageError E286 that lists every difference between the job that was begun and the one asked for now.

        What may differ, and does (how the result is measured), is noted for the next time that the job is resumed.
        """
        begun = dict(_flat(self.lines[0]["fingerprint"]))
        now = dict(_flat(json.loads(json.dumps(fingerprint))))
        fix = "put back what the job was begun with, or start anew: " + f"marlinctl jobs rm {shlex.quote(str(self._shown))}"
        problems = [
            Problem(f"{key} was {begun.get(key)!r} and is now {now.get(key)!r}", str(self.path), fix)
            for key in sorted(begun.keys() | now.keys())
            if begun.get(key) != now.get(key) and not key.startswith(_MEASURED)
        ]
        if problems:
            raise UsageError.from_problems("E286", problems)
        if self._asked is not None and _apart_from_options(self._asked.arguments) != _apart_from_options(self.request().arguments):
            self._note(self._asked)

    @property
    def begun(self) -> bool:
        return bool(self.lines)

    def document(self, name: str) -> dict[str, Any]:
        """A JSON document of the folder; BadInput E374 where it cannot be read."""
        try:
            found = read_json(self.path, name)
        except FileRefused as refused:
            raise self.damaged(refused.problem.what, refused.problem.where) from None
        if not isinstance(found, dict):
            raise self.damaged("it is no JSON object", self.path / name)
        return found

    def damaged(self, what: str, where: Path | str) -> BadInput:
        fix = f"start anew: marlinctl jobs rm {shlex.quote(str(self._shown))}, then the whole command"
        return BadInput("E374", what, where=str(where), fix=fix)

    # The journal

    def append(self, line: Mapping[str, Any]) -> None:
        """A line, on the disk when this returns."""
        append_line(self.path / JOURNAL, line)
        self.lines.append(dict(line))
        self._ends.append((self.path / JOURNAL).stat().st_size)

    def drop_from(self, count: int) -> None:
        """Keep the first `count` lines."""
        del self.lines[count:], self._ends[count:]
        self._cut(count)

    def _read(self) -> None:
        """Lines up to the first that is torn or no line of a journal. Changes nothing on the disk."""
        self.lines, self._ends = [], []
        with suppress(FileNotFoundError):
            end = 0
            for raw in (self.path / JOURNAL).read_bytes().splitlines(keepends=True):
                end += len(raw)
                try:
                    line = json.loads(raw)
                except (ValueError, RecursionError):
                    break
                well_formed = raw.endswith(b"\n") and isinstance(line, dict) and isinstance(line.get("step"), str)
                if not well_formed or (line["step"] == "begun") != (not self.lines):
                    break
                self.lines.append(line)
                self._ends.append(end)

    def _cut(self, count: int) -> None:
        """The file ends where its last good line ends, so that the next one does not continue a torn one."""
        with suppress(FileNotFoundError):
            os.truncate(self.path / JOURNAL, self._ends[count - 1] if count else 0)

    # Publishing

    @property
    def publishing(self) -> dict[str, Any] | None:
        """The line that says everything is checked, where the run came that far."""
        return next((line for line in self.lines if line["step"] == "publishing"), None)

    @property
    def published(self) -> bool:
        return bool(self.lines) and self.lines[-1]["step"] == "published"

    def publish(self, stages: Sequence[Finished], *, keep: bool) -> None:
        """Give checked folders of this job their names, all or none; then the job is over."""
        places = [{"from": stage.path.name, "to": stage.out.name, "manifest": manifest.digest(stage.path)} for stage in stages]
        self.append({"step": "publishing", "folders": places})
        publish_together(stages, aside_in=self.path)
        self._over(keep)

    def publish_again(self, *, overwrite: bool, keep: bool) -> list[Path]:
        """Go on with a publication that was cut short; returns the published folders. Nothing is computed again."""
        line = self.publishing
        assert line is not None
        waiting: list[Place] = []
        places = [self.out.with_name(item["to"]) for item in line["folders"]]
        for item, place in zip(line["folders"], places, strict=True):
            folder = self.path / Path(item["from"]).name
            if _digest(folder) == item["manifest"]:
                waiting.append(Place(folder, place, overwrite))
            elif _digest(place) != item["manifest"]:
                raise self.damaged("what was checked and should get its name now is neither here nor there", folder)
        publish_together(waiting, aside_in=self.path)
        self._over(keep)
        return places

    def _over(self, keep: bool) -> None:
        if keep:
            self.append({"step": "published"})
        else:
            self.remove()

    # Going

    def clear(self) -> None:
        """Start anew: nothing of an earlier run stays, but for an output that it had set aside."""
        self._put_back()
        for path in self.path.iterdir():
            if path.name not in (_LOCK, _RUNNING):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
        self.lines, self._ends = [], []

    def remove(self) -> None:
        self._put_back()
        # The request first: without it nobody takes the rest for a job, should this be cut short.
        with suppress(OSError):
            (self.path / JOB).unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)

    def _put_back(self) -> None:
        """An output that was set aside, and whose successor never came, returns to its place: it may be the only copy."""
        if not self.path.is_dir():
            return
        for old in self.path.glob("*.old-*"):
            place = self.out.with_name(old.name.rpartition(".old-")[0])
            if not place.exists():
                old.rename(place)


def held_by(path: Path) -> dict[str, Any] | None:
    """Who is at work in a job's folder: {"pid", "host"}, {} where that is not known, None for nobody."""
    from filelock import FileLock, Timeout

    lock = FileLock(path / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        with suppress(OSError, ValueError):
            found = json.loads((path / _RUNNING).read_text())
            if isinstance(found, dict):
                return found
        return {}
    except OSError:
        return None
    lock.release()
    return None


def _by(path: Path) -> str:
    found = held_by(path) or {}
    return f" (process {found['pid']} on {found['host']})" if {"pid", "host"} <= found.keys() else ""


def _digest(folder: Path) -> str | None:
    """The SHA-256 of a folder's manifest, None where there is none."""
    try:
        return manifest.digest(folder)
    except OSError:
        return None


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _apart_from_options(arguments: Mapping[str, Any]) -> Any:
    """How a run goes about its work may differ each time; as JSON, so that a tuple is the list that it was written as."""
    apart = ("options", "overwrite", "keep_job")
    return json.loads(json.dumps({key: value for key, value in arguments.items() if key not in apart}))


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """{"a": {"b": 1}} -> ("a.b", 1)"""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _flat(item, f"{key}.{name}" if key else str(name))
    else:
        yield key, list(value) if isinstance(value, tuple) else value
