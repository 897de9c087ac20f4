"""Has a file of weights changed since somebody wrote down its SHA-256? Asked before anything is computed from it.

    the hub's client   calls the blob that holds the file by it
    marlinctl          lists it in the manifest of what it publishes

A bit that flipped on a disk makes a weight of a weight, and a new manifest would vouch for it: nothing later can tell. Of other local
folders nobody wrote anything down: of those is promised only that a job ends with what it was begun with (checkpoint/contents.py, which
takes the digests that are compared here).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from marlinctl import manifest
from marlinctl.checkpoint import mask
from marlinctl.errors import BadInput, Problem

if TYPE_CHECKING:
    from marlinctl.checkpoint.contents import Contents
    from marlinctl.checkpoint.reader import Checkpoint


def check_known_digests(checkpoint: Checkpoint, contents: Contents) -> int:
    """How many files had a known digest. BadInput E304 names all that differ; CheckFailed E102 for a manifest that cannot be used."""
    known, found = _known(checkpoint), contents.digests
    problems = [
        Problem(f"{path.name} is not what {who}: its SHA-256 differs", str(path), fix)
        for path, (digest, who, fix) in known.items()
        if found[str(path.relative_to(checkpoint.folder))] != digest
    ]
    if problems:
        raise BadInput.from_problems("E304", problems)
    return len(known)


def _known(checkpoint: Checkpoint) -> dict[Path, tuple[str, str, str]]:
    """File -> digest, who says so, and what to do where it differs. A weight file that the manifest does not name has the digest ''."""
    folder, known = checkpoint.folder, {}
    for path in checkpoint.files:
        blob = path.resolve()
        if blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name):
            known[path] = (blob.name, "the hub holds", f"delete {blob} and start again; it is then downloaded anew")
    if (folder / manifest.NAME).is_file():
        listed = manifest.read(folder)["files"]
        masks = [folder / mask.NAME] if (folder / mask.NAME).is_file() else []
        fix = f"fetch or write the folder again; if weights were changed on purpose, remove {manifest.NAME}"
        for path in [*checkpoint.files, *masks]:
            known[path] = (listed.get(path.name, {"sha256": ""})["sha256"], "the manifest says", fix)
    return known
