"""marlinctl_manifest.json: what was published, as digests, and the facts that decided the numbers.

Written last, so its existence means that the folder is complete. It holds the SHA-256 and the size of every published file, and
nothing that differs from run to run (no times, host names or output paths), so two equal runs give two equal manifests.

Outside it lie the files that may be rewritten later without touching the model: the card, the report, the log; and what a killed
rewrite leaves, under a name that no loader takes for anything. Any other file that the manifest does not name fails the check: an
extra shard beside the right ones is how mixed weights are loaded by accident.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from marlinctl.errors import CheckFailed, Problem
from marlinctl.system.atomic import canonical, is_temporary, whole_file
from marlinctl.system.digests import sha256_of_member
from marlinctl.system.files import MAX_OWN_BYTES, MAX_OWN_VALUES, FileRefused, exists, open_plain, read_json, shown
from marlinctl.system.log import printable

NAME = "marlinctl_manifest.json"
OUTSIDE = frozenset(
    {NAME, "README.md", "marlinctl_report.json", "marlinctl_report.md", "marlinctl_report.html", "run.log", ".gitattributes"}
)
TUNED = "tuned"  # norms and biases that are not the source's: --tune-steps changed them with their block, or distill --mode scales
UPDATE = "update marlinctl to read it (pip install --upgrade marlinctl)"
SCHEMA = 1  # of the manifest; a greater one was written by a newer marlinctl, whose keys are unknown here
_FILES_AT_ONCE = 4  # that are hashed; 1.6 GB in four files take 0.65 instead of 1.22 s on two cores


def build(folder: Path, facts: Mapping[str, Any], known: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Any]:
    """The manifest of a finished folder. `facts`: recipe and its hash, source digests, versions, layer records, ... known: what
    `described` found of some files."""
    from marlinctl import __version__

    known = known or {}
    files = {**known, **described(folder, [name for name in _published(folder) if name not in known])}
    return {"schema_version": SCHEMA, "tool": {"name": "marlinctl", "version": __version__}, **facts, "files": files}


def described(folder: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Size and digest of these files of a folder, as the manifest lists them."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:  # hashing leaves the interpreter alone
        return dict(zip(names, pool.map(lambda name: _describe(folder / name), names), strict=True))


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a folder; CheckFailed when there is none or it is not a manifest."""
    path = folder / NAME
    if not exists(folder, NAME):
        raise CheckFailed(
            "E101",
            f"there is no {NAME}",
            where=str(folder),
            fix="only folders that marlinctl published can be verified; if this one was, it is incomplete: fetch or write it again",
        )
    try:
        document = read_json(folder, NAME, limit=MAX_OWN_BYTES, values=MAX_OWN_VALUES)
    except FileRefused as refused:
        raise _damaged(path, refused.problem.what) from None
    if isinstance(document, dict) and (newer := written_by_newer(document, SCHEMA)):
        raise CheckFailed("E101", f"the manifest cannot be used: {newer}", where=str(path), fix=UPDATE)
    files = document.get("files") if isinstance(document, dict) else None
    if not isinstance(files, dict) or not files:
        raise _damaged(path, "it lists no files")
    if not all(isinstance(d, dict) and isinstance(d.get("sha256"), str) and isinstance(d.get("bytes"), int) for d in files.values()):
        raise _damaged(path, "an entry lacks its digest or size")
    return document


def written_by_newer(document: Mapping[str, Any], known: int) -> str | None:
    """What to say of a document of ours whose schema is newer than `known`, or is not a number; None where it can be read."""
    from marlinctl import __version__

    schema = document.get("schema_version", 1)
    if type(schema) is int and 1 <= schema <= known:
        return None
    tool, versions = document.get("tool"), document.get("versions")
    writer = tool.get("version") if isinstance(tool, dict) else versions.get("marlinctl") if isinstance(versions, dict) else None
    by = f" by marlinctl {printable(str(writer), one_line=True)[:40]}" if writer else ""
    return f"it was written{by} in schema {printable(str(schema), one_line=True)[:40]}; this is {__version__}, which reads up to {known}"


def check(folder: Path) -> dict[str, Any]:
    """The manifest, after every file was found as it says. CheckFailed names all missing, altered and extra files at once."""
    document = read(folder)
    listed = document["files"]
    present = _published(folder)
    problems = [_problem(folder, name, "is missing", "fetch or write the checkpoint again") for name in sorted(set(listed) - set(present))]
    for name in sorted(set(listed) & set(present)):
        found = _describe(folder / name)
        if found["bytes"] != listed[name]["bytes"]:
            what = f"has {found['bytes']} bytes, the manifest says {listed[name]['bytes']}"
            problems.append(_problem(folder, name, what, "it was cut or replaced; fetch or write it again"))
        elif found["sha256"] != listed[name]["sha256"]:
            what = f"has SHA-256 {found['sha256'][:16]}…, the manifest says {listed[name]['sha256'][:16]}…"
            problems.append(_problem(folder, name, what, "its contents changed; fetch or write it again"))
    problems += [
        _problem(folder, name, "is not in the manifest", "move it out of the folder; loaders may pick it up")
        for name in sorted(set(present) - set(listed))
    ]
    if problems:
        raise CheckFailed.from_problems("E101", problems)
    return document


def describes(folder: Path, name: str, data: bytes) -> bool:
    """Whether the folder holds this file with these contents, and its manifest says so."""
    listed = read(folder)["files"].get(name)
    wanted = _described(data)
    return listed == wanted and _describe(folder / name) == wanted


def replace_files(folder: Path, files: Mapping[str, bytes], **facts: Any) -> None:
    """Give a folder that is not published yet other small files of these names, and its manifest their digests and these facts, last."""
    document = read(folder)
    document |= facts
    document["files"] |= {name: _described(data) for name, data in files.items()}
    for name, data in (*files.items(), (NAME, canonical(document))):
        with whole_file(folder / name) as file:
            file.write(data)


def made_from(folder: Path) -> dict[str, Any]:
    """What a folder that marlinctl published says it was made from: `source`, and `teacher` of a distilled one.

    Empty for any other folder, and for a manifest that cannot be used: whether it is sound is `verify`'s question.
    """
    try:
        document = read(folder)
        found = {key: document[key] for key in ("source", "teacher") if isinstance(document.get(key), dict)}
        canonical(found)  # without NaN, and no deeper than can be written again
    except (CheckFailed, ValueError, RecursionError):
        return {}
    return found


def tuned_of(document: Mapping[str, Any]) -> frozenset[str]:
    """The tensors besides linears that a run changed; nothing where the list is damaged, so that they must be the source's."""
    found = document.get(TUNED)
    return frozenset(name for name in found if isinstance(name, str)) if isinstance(found, list) else frozenset()


def digest(folder: Path) -> str:
    """SHA-256 of the manifest: one name for everything that was published. FileRefused where there is none that can be read."""
    return sha256_of_member(folder, NAME)


def _published(folder: Path) -> list[str]:
    """Every file below the folder that belongs into the manifest, as posix paths. Links count: they can be followed by loaders."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(name for name in names if name not in OUTSIDE and not (is_temporary(name) and _is_regular(folder / name)))


def _is_regular(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _describe(path: Path) -> dict[str, Any]:
    if not _is_regular(path):  # a FIFO would hang the reader, a link may lead anywhere
        return {"bytes": -1, "sha256": "not a regular file"}
    with open_plain(path) as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _described(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _problem(folder: Path, name: str, what: str, fix: str) -> Problem:
    return Problem(f"{shown(name)} {what}", str(folder / shown(name)), fix)


def _damaged(path: Path, reason: str) -> CheckFailed:
    return CheckFailed("E101", f"the manifest cannot be used: {reason}", where=str(path), fix="fetch or write the checkpoint again")
