"""The folder of an unfinished run, OUT.job/ beside OUT: what was asked for, what is finished, who is at work on it.

    marlinctl_job.json
                      says that the folder is marlinctl's: written before anything else, removed last
    job.json          what was asked for: the verb, the model, the whole recipe, the options. `marlinctl resume OUT` asks for it again
    journal.jsonl     one line for each thing that is finished, each on the disk before the next thing begins:
                        begun        what decides the numbers (the fingerprint): model, recipe, tokens, versions, dtype, kind of device;
                                     and the stamps of the model's shards, by which a resumed run sees that they are unchanged
                        token weights  of the calibration tokens, where the recipe wants any (oneshot/resume.py)
                        block, head  a finished block (oneshot/resume.py), with size and SHA-256 of its files
                        publishing   everything is checked; these folders get their names now
                        published    they have them
    staged/           what is finished of the checkpoint, piece by piece (checkpoint/writer.py)
    staged.whole/     the checkpoint itself, merged from the pieces; the last step renames it to OUT
    OUT.old-1f0c9a2e/ the OUT that is being replaced; goes back if the new one does not get there
    lock              held while a process is at work; running.json says which one

A line is written after the files that it names, so whatever moment a run dies at, what the lines say is true. A torn or damaged last line
is dropped, and so is, with all that follow, one whose files are not as it says. Nothing here is a pickle, and nothing asks a clock. Paths
inside are relative to the folder, so it may be moved together with OUT's place, to another disk or machine.

The folder goes when OUT is published (--keep-job keeps it), and when a run ends with nothing finished. Files in it that marlinctl did not
write are never removed (checkpoint/ownership.py). `distill` has files of its own in
it (distillation/state.py).
"""

from __future__ import annotations

import json
import os
import shlex
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marlinctl.checkpoint import manifest, ownership
from marlinctl.checkpoint.contents import Noted
from marlinctl.checkpoint.writer import Finished, publish_together
from marlinctl.errors import BadInput, EnvironmentProblem, HubProblem, MarlinctlError, Problem, ResourceProblem, UsageError
from marlinctl.system.atomic import append_line, disk_problems, whole_file, write_document
from marlinctl.system.files import FileRefused, read_json, read_plain, read_plain_json
from marlinctl.system.locks import Held, lock, refuse_unusable

if TYPE_CHECKING:
    from marlinctl.checkpoint.contents import Contents
    from marlinctl.system.console import Console

FORMAT = 1  # of job.json and the journal; a greater one was written by a newer marlinctl
ENDING = ".job"
JOB, JOURNAL = "job.json", "journal.jsonl"
_LOCK, _RUNNING = "lock", "running.json"
_MEASURED = "recipe.evaluate."  # how a result is measured decides none of its numbers, so it may differ on resuming
_CONTENTS = ".sha256"  # how the key of a digest of contents ends, in a flat fingerprint
_MOST_BYTES = 1 << 30  # of a journal; a line has a kilobyte for each linear of a block
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
            ownership.refuse_protected(self.out)
        self.path = self.out.with_name(self.out.name + ENDING)
        self.lines: list[dict[str, Any]] = []
        self._ends: list[int] = []  # where each line ends in the file
        self._shown = out
        self._inputs: list[Contents] = []
        self._asked: Request | None = None
        self._measures = False

    @property
    def log(self) -> Path:
        """Where a run writes its log, unless the person names another place."""
        out = self._shown.absolute()
        return out.with_name(f"{out.name}.log")

    # Who may use it

    @contextmanager
    def held(self, request: Request, *, resume: bool, console: Console, launcher: str = "") -> Iterator[None]:
        """Take the folder for this run: a new one, or with `resume` the one that is there. It stays if there is something to resume.

        launcher: what stands before `marlinctl` on the command line, in the message that says how to resume.
        UsageError E285 for an unfinished job without `resume`, E287 for `resume` and no job, E224 for a folder that is not marlinctl's;
        ResourceProblem E503 for a run that is at work or a lock that cannot be taken.
        """
        self.refuse_foreign(resume=resume)
        if resume and not (self.path / JOB).is_file():
            fix = "give the whole command again to start over"
            raise UsageError("E287", "there is no job to resume", where=str(self.path), fix=fix)
        self._asked = request
        with self._parents(), self._locked(new=not resume):
            self._read()
            if resume:
                self.request()  # one that this version understands
                self._cut(len(self.lines))
                for folder in (self.path, *(self.path / name for name in ownership.BY_BLOCK)):
                    ownership.remove_temporaries(folder)
            else:
                self._refuse_unfinished()
                self.clear()
                ownership.mark_job(self.path)
                self._note(request)
            try:
                yield
            except BaseException as error:
                self._leave(error, console, launcher)
                raise

    @contextmanager
    def _parents(self) -> Iterator[None]:
        """The folders above OUT. Those that this run made go again when nothing was published in them."""
        missing = [folder for folder in self.path.parents if not folder.exists()]
        try:
            with disk_problems(self.path):
                for folder in reversed(missing):
                    folder.mkdir(exist_ok=True)
            yield
        finally:
            with suppress(OSError):  # the first that is not empty
                for folder in missing:
                    folder.rmdir()

    def refuse_foreign(self, *, resume: bool = False) -> None:
        """UsageError E224 where OUT.job is there and is not marlinctl's, ResourceProblem E503 for its lock. Nothing is changed.

        resume: foreign files beside those of the job are allowed then, because they stay.
        """
        if not os.path.lexists(self.path):
            return
        refuse_unusable(self.path / _LOCK)
        if resume and ownership.is_job(self.path):
            strangers = ownership.misfits_in_job(self.path)
        else:
            strangers = ownership.strangers_in_job(self.path)
        what = "the job's folder would lie here, and there is what marlinctl did not write"
        ownership.refuse_strangers(what, self.path, strangers, "move it away, or name another output")

    def refuse_taken(self) -> None:
        """What `held` refuses of a new job, before it takes the lock: E224, E285 and E503, as there. Nothing is changed."""
        self.refuse_foreign()
        if held_by(self.path) is not None:
            raise self._at_work()
        self._read()
        self._refuse_unfinished()

    def _at_work(self) -> ResourceProblem:
        what = f"another run is at work on this output{_by(self.path)}"
        return ResourceProblem("E503", what, where=str(self.path), fix="wait until it ends, or stop it")

    @contextmanager
    def _locked(self, *, new: bool) -> Iterator[None]:
        with disk_problems(self.path):
            if new:
                self.path.mkdir(exist_ok=True)
            if new and not any(self.path.iterdir()):
                ownership.mark_job(self.path)
        try:
            with lock(self.path / _LOCK, wait=False):
                try:
                    with suppress(OSError), whole_file(self.path / _RUNNING) as file:  # for people; nothing depends on it
                        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
                    yield
                finally:
                    with suppress(OSError):
                        (self.path / _RUNNING).unlink(missing_ok=True)
                    if ownership.is_job(self.path) and not (self.path / JOB).exists():  # refused before it began: nothing to resume
                        self.remove()
        except Held:
            raise self._at_work() from None

    def _refuse_unfinished(self) -> None:
        if (self.path / JOB).exists() and self.progress and not self.published:
            again = shlex.quote(str(self._shown))
            fix = (
                f"`marlinctl resume {again}` continues it, and takes other --tasks, --text or --window where those were wrong; "
                f"to start again, `marlinctl jobs rm {again}` first"
            )
            raise UsageError("E285", "an unfinished job for this output is there", where=str(self.path), fix=fix)

    def _leave(self, error: BaseException, console: Console, launcher: str) -> None:
        """After a run that did not get through: keep the folder and say how to resume, or remove it."""
        if not (self.path / JOB).exists():
            return
        if not self.progress and not (self.begun and isinstance(error, (ResourceProblem, OSError))):
            if self._is_whole and (isinstance(error, _REFUSALS) or (isinstance(error, MarlinctlError) and not self.begun)):
                console.withdraw_log()
            self.remove()
        elif self._is_whole:
            resume = f"{launcher}marlinctl resume {shlex.quote(str(self._shown))}"
            if self._measures:
                resume += "; to change the measurement add --tasks, --text, --window, --limit, ..., or --no-eval"
            if self._measures or not isinstance(error, _REFUSALS):
                console.error(resume, label="to resume:")

    @property
    def _is_whole(self) -> bool:
        """Not a stage of another job, which is resumed with the whole and has no log of its own."""
        return self.path.parent.suffix != ENDING

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """While the finished result is measured: where that fails, the message says how to change it on resuming."""
        self._measures = True
        yield
        self._measures = False

    # What was asked for, and whether it is the same now

    @property
    def progress(self) -> bool:
        """Whether anything is finished that took long."""
        return any(line["step"] != "begun" for line in self.lines)

    def has_progress(self) -> bool:
        """`progress`, of a folder that is not locked yet. Reads the journal."""
        self._read()
        return self.progress

    def request(self) -> Request:
        """UsageError E287 for a folder of a newer marlinctl; BadInput E374 for a damaged one."""
        document = self.document(JOB)
        if document.get("format") != FORMAT:
            what = f"the job is in format {document.get('format')!r}, and this marlinctl writes format {FORMAT}"
            fix = "continue with the version of marlinctl that began it, or start again"
            raise UsageError("E287", what, where=str(self.path / JOB), fix=fix)
        verb, arguments, folder = document.get("verb"), document.get("arguments"), document.get("folder")
        if not isinstance(verb, str) or not isinstance(arguments, dict) or not isinstance(folder, str):
            raise self.damaged("it does not say what was asked for", self.path / JOB)
        return Request(verb, arguments, Path(folder))

    def _note(self, request: Request) -> None:
        asked = {"verb": request.verb, "arguments": request.arguments, "folder": str(Path.cwd())}
        write_document(self.path / JOB, {"format": FORMAT, **asked})
        (self.path / JOB).chmod(0o600)  # it has the arguments as they were typed, to ask for them again

    def begin(self, fingerprint: Mapping[str, Any], **more: Any) -> None:
        """Note what decides the numbers; on resuming, compare it instead (`check`)."""
        self.append({"step": "begun", "fingerprint": fingerprint, **more})

    def noted(self, name: str, console: Console) -> Noted | None:
        """What a job that is resumed knows of the weights of `name` in its fingerprint; None where nothing was begun."""
        if not self.begun:
            return None
        fingerprint = self.lines[0]["fingerprint"].get(name)
        if not any(key.endswith(_CONTENTS) for key, _ in _flat(fingerprint)):
            console.warn(f"an earlier marlinctl began this job and noted no digests: changes in the weights of the {name} are not seen")
        return Noted.of(fingerprint, self.lines[0].get("inputs", {}).get(name))

    def watch(self, contents: Contents) -> None:
        """From now on nothing is noted as finished unless these files are what they were when they were read."""
        self._inputs.append(contents)

    def require_inputs_unchanged(self) -> None:
        """BadInput E306. Asks stat, and reads what has another stamp."""
        for contents in self._inputs:
            contents.require_unchanged()

    def check(self, fingerprint: Mapping[str, Any]) -> None:
        """UsageError E286 that lists every difference between the job that was begun and the one asked for now.

        What may differ, and does (how the result is measured), is noted for the next time that the job is resumed. A digest of contents
        that the job did not note is not compared (`noted` says so).
        """
        begun = dict(_flat(self.lines[0]["fingerprint"]))
        now = dict(_flat(json.loads(json.dumps(fingerprint))))
        fix = "put back what the job was begun with, or start over: " + f"marlinctl jobs rm {shlex.quote(str(self._shown))}"
        problems = [
            Problem(f"{key} was {begun.get(key)!r} and is now {now.get(key)!r}", str(self.path), fix)
            for key in sorted(begun.keys() | now.keys())
            if begun.get(key) != now.get(key) and not key.startswith(_MEASURED) and (key in begun or not key.endswith(_CONTENTS))
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
            raise self.damaged("it is not a JSON object", self.path / name)
        return found

    def damaged(self, what: str, where: Path | str) -> BadInput:
        fix = f"start over: marlinctl jobs rm {shlex.quote(str(self._shown))}, then the whole command"
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
        with suppress(FileRefused):  # there is none, or `jobs ls` came upon what only looks like a job
            end = 0
            for raw in read_plain(self.path / JOURNAL, limit=_MOST_BYTES).splitlines(keepends=True):
                end += len(raw)
                try:
                    line = json.loads(raw)
                except (ValueError, RecursionError):
                    break
                if not raw.endswith(b"\n") or not self._is_line(line) or (line["step"] == "begun") != (not self.lines):
                    break
                self.lines.append(line)
                self._ends.append(end)

    def _is_line(self, line: Any) -> bool:
        """Whether a line has the form of ours, as far as it is used here; what is noted of a block is checked in oneshot/resume.py."""
        if not isinstance(line, dict) or not isinstance(line.get("step"), str):
            return False
        if line["step"] == "begun":
            return isinstance(line.get("fingerprint"), dict) and isinstance(line.get("inputs", {}), dict)
        return line["step"] != "publishing" or (isinstance(line.get("folders"), list) and all(map(self._is_folder, line["folders"])))

    def _is_folder(self, item: Any) -> bool:
        named = isinstance(item, dict) and all(isinstance(item.get(key), str) for key in ("from", "to", "manifest"))
        return named and ownership.is_place(item["to"], self.out.name)

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
        """Give checked folders of this job their names, all or none; then the job is over. BadInput E306 where an input has changed."""
        self.require_inputs_unchanged()
        places = [{"from": stage.path.name, "to": stage.out.name, "manifest": manifest.digest(stage.path)} for stage in stages]
        self.append({"step": "publishing", "folders": places})
        publish_together(stages, aside_in=self.path, later=self._again)
        self._over(keep)

    def publish_again(self, *, overwrite: bool, keep: bool) -> list[Path]:
        """Finish an interrupted publication; returns the published folders. Nothing is computed again."""
        line = self.publishing
        assert line is not None
        waiting: list[Place] = []
        places = [self.out.with_name(item["to"]) for item in line["folders"]]
        for item, place in zip(line["folders"], places, strict=True):
            folder = self.path / Path(item["from"]).name
            if _digest(folder) == item["manifest"]:
                waiting.append(Place(folder, place, overwrite))
            elif _digest(place) != item["manifest"]:
                raise self.damaged("the checked result is neither in the job's folder nor in its place", folder)
        publish_together(waiting, aside_in=self.path, later=self._again)
        self._over(keep)
        return places

    @property
    def _again(self) -> str:
        return f"marlinctl resume {shlex.quote(str(self._shown))}"

    def _over(self, keep: bool) -> None:
        if keep:
            self.append({"step": "published"})
            if (self.path / "staged").is_dir():  # the pieces of a run that was killed behind `publishing`
                ownership.remove_tree(self.path / "staged")
        else:
            self.remove()

    # Going

    def clear(self) -> None:
        """Start over: nothing of an earlier run stays, except an output that it had set aside."""
        self._put_back()
        with disk_problems(self.path):
            ownership.empty_job(self.path)
        self.lines, self._ends = [], []

    def remove(self) -> None:
        """Remove what marlinctl wrote; the folder stays if foreign files are in it."""
        if ownership.is_job(self.path):
            with suppress(OSError, ResourceProblem):  # of an earlier version: a removal that is cut short leaves a folder that is ours
                ownership.mark_job(self.path)
            self._put_back()
            ownership.remove_job(self.path)

    def _put_back(self) -> None:
        """An output that was set aside, and whose successor never came, returns to its place: it may be the only copy.

        Where something else has that place meanwhile, it gets out of the folder under the name that it has there.
        """
        for old in self.path.iterdir():
            aside = ownership.set_aside(old.name, self.out.name)
            if aside is None or old.is_symlink() or not old.is_dir():
                continue
            place = self.out.with_name(aside)
            if not os.path.lexists(place):
                old.rename(place)
            elif not self._stands(place):
                old.rename(self.out.with_name(old.name))

    def _stands(self, place: Path) -> bool:
        """Whether what this job made has got its place."""
        if not self.lines:
            self._read()
        made = self.publishing["folders"] if self.publishing is not None else []
        return any(item["to"] == place.name and item["manifest"] == _digest(place) for item in made)


def held_by(path: Path) -> dict[str, Any] | None:
    """The process at work in a job's folder: {"pid", "host"}, {} where it is not known, None where there is none."""
    if not (path / _LOCK).is_file():
        return None
    try:
        with lock(path / _LOCK, wait=False):
            return None
    except ResourceProblem:
        return None
    except Held:
        with suppress(FileRefused):
            found = read_plain_json(path / _RUNNING)
            if isinstance(found, dict):
                return found
        return {}


def _by(path: Path) -> str:
    found = held_by(path) or {}
    return f" (process {found['pid']} on {found['host']})" if {"pid", "host"} <= found.keys() else ""


def _digest(folder: Path) -> str | None:
    """The SHA-256 of a folder's manifest, None where there is none."""
    try:
        return manifest.digest(folder)
    except (OSError, FileRefused):
        return None


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
