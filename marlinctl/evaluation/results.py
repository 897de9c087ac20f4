"""The results file of an evaluation (`--out FILE.json`): rewritten whole after every finished piece, continued only when nothing differs.

    key             what                                                      must be equal to continue
    settings        everything that decides the numbers, `auto` resolved      yes
    versions        of marlinctl, torch, transformers, lm_eval                yes
    model           name, identity; perplexity; tasks                         its identity
    baseline        the same, or null                                         its identity
    text            name, SHA-256, tokens, windows                            no: follows from the settings
    comparison      KL, top-1 agreement, differences of all scores, flips     no: made at the end
    finished        false while pieces are missing

With --log-samples, prompts and answers lie in FILE.samples/SIDE.TASK.jsonl, one document a line.

A write is a temporary file beside FILE, fsync, rename: a kill at any moment leaves the old or the new file, never half of one.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from marlinctl.errors import BadInput, Problem, ResourceProblem, UsageError
from marlinctl.system.atomic import make_folder, sync_folder, whole_file
from marlinctl.system.files import MAX_OWN_BYTES, MAX_OWN_VALUES, FileRefused, read_plain_json, require_parent

Document = dict[str, Any]
OPEN_LEVELS = 3


class ResultsFile:
    """`document` is changed by the evaluation and kept by `save`. Without a path nothing is written."""

    def __init__(self, path: Path | None, fresh: Document, *, resume: bool, samples: bool = False) -> None:
        self.path = path
        self.document = fresh
        check_place(path, resume=resume, samples=samples)
        if path is None:
            return
        if resume and path.exists():
            self.document = _continued(path, fresh)
        self.save()  # a file that cannot be written shows now, not after hours

    def save(self) -> None:
        if self.path is not None:
            write_atomically(self.path, f"{render(self.document)}\n".encode())

    def save_samples(self, side: str, task: str, samples: Iterable[Document]) -> None:
        """SIDE.TASK.jsonl, before the line of the task is kept: what the results name as finished has its samples."""
        assert self.path is not None  # check_place
        folder = samples_folder(self.path)
        name = re.sub(r"[^\w.-]", "_", task)
        lines = "".join(f"{json.dumps(sample, ensure_ascii=False)}\n" for sample in samples)
        try:
            make_folder(folder)
        except OSError as error:
            raise UsageError(
                "E244", f"cannot make the folder: {error.strerror}", where=str(folder), fix="name a results file elsewhere with --out"
            ) from error
        write_atomically(folder / f"{side}.{name}.jsonl", lines.encode("utf-8", "backslashreplace"))


def samples_folder(path: Path) -> Path:
    """Beside the results: scores.samples for scores.json."""
    return path.with_name(f"{path.stem}.samples")


def check_place(path: Path | None, *, resume: bool, samples: bool = False) -> None:
    """UsageError E244 where the results cannot lie there: before a model is fetched, and again before it is loaded."""
    if path is None:
        if samples:
            raise UsageError("E244", "--log-samples writes beside the results file", where="--log-samples", fix="add --out FILE.json")
        if resume:
            raise UsageError("E244", "--resume needs the file to continue", where="--resume", fix="add --out FILE.json")
        return
    if path.exists() and not resume:
        raise UsageError("E244", f"{path} exists already", where="--out", fix="add --resume to continue it, or name another file")
    require_parent(path, "--out")
    if samples and not resume and samples_folder(path).exists():
        what = f"{samples_folder(path)} exists already, of another run"
        raise UsageError("E244", what, where="--log-samples", fix="move it away, or name another file with --out")


def render(value: Any, depth: int = 0) -> str:
    """JSON that a person can look through: what holds objects is open, down to `model.tasks`, where each task is one line."""
    is_open = isinstance(value, dict) and depth < OPEN_LEVELS and (depth == 0 or any(isinstance(item, dict) for item in value.values()))
    if not is_open:
        return json.dumps(value, allow_nan=False)
    lines = ",\n".join(f"{'  ' * (depth + 1)}{json.dumps(key)}: {render(item, depth + 1)}" for key, item in value.items())
    return f"{{\n{lines}\n{'  ' * depth}}}"


def write_atomically(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            file.write(data)
        sync_folder(path.parent)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR):
            fix = "name a file that you may write"
            raise UsageError("E244", f"cannot write the file: {error.strerror}", where=str(path), fix=fix) from error
        raise ResourceProblem(
            "E500", f"cannot write the results: {error.strerror}", where=str(path), fix="free some space, then run again with --resume"
        ) from error


def _continued(path: Path, fresh: Document) -> Document:
    old = read(path)
    problems = [
        Problem(f"{field} was {_shown(then)}, is {_shown(now)}", str(path), "make it equal again, or start over with another --out")
        for field, then, now in _differences(old, fresh)
    ]
    if problems:
        raise UsageError.from_problems("E286", problems)
    return old


def read(path: Path) -> Document:
    if not path.is_file():  # a FIFO would make us wait for ever
        raise _damaged(path, "it is not a regular file" if path.exists() else "there is no such file")
    try:
        document = read_plain_json(path, limit=MAX_OWN_BYTES, values=MAX_OWN_VALUES)
    except FileRefused as refused:
        raise _damaged(path, refused.problem.what) from None
    parts = ("settings", "versions", "model")
    if not isinstance(document, dict) or document.get("kind") != "evaluation" or not all(isinstance(document.get(p), dict) for p in parts):
        raise _damaged(path, "it holds no evaluation")
    return document


def _damaged(path: Path, reason: str) -> BadInput:
    return BadInput(
        "E374", f"not a results file of marlinctl eval: {reason}", where=str(path), fix="name the file that `marlinctl eval --out` wrote"
    )


def _differences(old: Document, new: Document) -> list[tuple[str, Any, Any]]:
    """(field, then, now) for all that must be equal and is not."""
    found = []
    for part in ("settings", "versions"):
        for key in sorted(old[part].keys() | new[part].keys()):
            if old[part].get(key) != new[part].get(key):
                found.append((f"{part}.{key}", old[part].get(key), new[part].get(key)))
    for part in ("model", "baseline"):
        then, now = ((d.get(part) or {}).get("identity") for d in (old, new))
        if then != now:
            found.append((f"{part}.identity", then, now))
    return found


def _shown(value: Any) -> str:
    text = "not there" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
