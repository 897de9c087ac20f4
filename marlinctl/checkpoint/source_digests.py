"""Has a file of weights changed since its SHA-256 was recorded? Asked before anything is computed from it.

    the hub's client   calls the blob that holds the file by it
    marlinctl          lists it in the manifest of what it publishes

A flipped bit turns a weight into another weight, and a new manifest would confirm it: no later check can find it. Of other local
folders no digest is known: of those is promised only that a job ends with what it was begun with (checkpoint/contents.py, which
takes the digests that are compared here).

The small files of a published folder (config, tokenizer, chat template, index) cost nothing and are compared by every verb that opens one
(folder.py): what is copied from it would be vouched for again.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marlinctl.checkpoint import manifest, mask
from marlinctl.checkpoint.model_files import companion_names
from marlinctl.errors import BadInput, Problem
from marlinctl.models.config import CONFIG
from marlinctl.system.files import FileRefused, exists, open_member, shown

if TYPE_CHECKING:
    from marlinctl.checkpoint.contents import Contents
    from marlinctl.checkpoint.reader import Checkpoint


def check_known_digests(checkpoint: Checkpoint, contents: Contents) -> int:
    """How many files had a known digest. BadInput E304 names all that differ; CheckFailed E101 for a manifest that cannot be used."""
    known, found = _known(checkpoint), contents.digests
    problems = [
        Problem(f"{path.name} is not what {who}: its SHA-256 differs", str(path), fix)
        for path, (digest, who, fix) in known.items()
        if found[str(path.relative_to(checkpoint.folder))] != digest
    ]
    if problems:
        raise BadInput.from_problems("E304", problems)
    return len(known)


def check_small_files(folder: Path) -> None:
    """Every file but the weights, in a folder that has a manifest: BadInput E304 names each that is missing, differs, or is not listed and
    would be read or copied all the same. CheckFailed E101 for a manifest that cannot be used."""
    if not exists(folder, manifest.NAME):
        return
    listed = manifest.read(folder)["files"]
    fix = f"fetch or write the folder again; if the file was changed on purpose, remove {manifest.NAME}"
    used = {*companion_names(folder), CONFIG}
    problems = []
    for name in sorted({name for name in listed if not name.endswith(".safetensors")} | used):
        difference = _difference(folder, name, listed.get(name))
        if difference:
            problems.append(Problem(f"{shown(name)} {difference}", str(folder / shown(name)), fix))
    if problems:
        raise BadInput.from_problems("E304", problems)


def _difference(folder: Path, name: str, entry: dict[str, Any] | None) -> str | None:
    """What of a file is not as its entry says, None where all is. A file of another size is not read."""
    if entry is None:
        return "is not in the manifest"
    if not exists(folder, name):
        return "is missing, and the manifest lists it"
    try:
        with open_member(folder, name) as file:
            same = os.fstat(file.fileno()).st_size == entry["bytes"] and hashlib.file_digest(file, "sha256").hexdigest() == entry["sha256"]
    except FileRefused as refused:
        return f"cannot be compared with the manifest: {refused.problem.what}"
    return None if same else "is not what the manifest says: its SHA-256 differs"


def _known(checkpoint: Checkpoint) -> dict[Path, tuple[str, str, str]]:
    """File -> digest, who says so, and what to do where it differs. A weight file that the manifest does not name has the digest ''."""
    folder, known = checkpoint.folder, {}
    for path in checkpoint.files:
        blob = path.resolve()
        if blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name):
            known[path] = (blob.name, "the hub holds", f"delete {blob} and start again; it is then downloaded again")
    if (folder / manifest.NAME).is_file():
        listed = manifest.read(folder)["files"]
        masks = [folder / mask.NAME] if (folder / mask.NAME).is_file() else []
        fix = f"fetch or write the folder again; if weights were changed on purpose, remove {manifest.NAME}"
        for path in [*checkpoint.files, *masks]:
            known[path] = (listed.get(path.name, {"sha256": ""})["sha256"], "the manifest says", fix)
    return known
