"""From what the person typed to a folder: a local folder, a GGUF file, or a model on the hub.

    ./llama            a folder                       taken as it is
    ./llama.gguf       a file that begins with GGUF   turned into a folder in our cache (checkpoint/gguf/convert.py)
    org/llama          nothing of that name here      downloaded into the hub's cache, at one commit (hub.py)

Something that exists locally is never looked up on the hub. What comes back is a folder that is not checked yet:
`open_checkpoint` (reader.py) does that.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from marlinctl.checkpoint.hub import fetch, require_hub_id
from marlinctl.errors import BadInput, EnvironmentProblem, UsageError
from marlinctl.system.atomic import temporary_name

if TYPE_CHECKING:
    from marlinctl.system.console import Console


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model lies, and what it was called."""

    folder: Path
    kind: Literal["folder", "hub", "gguf"]
    name: str  # as the person typed it
    revision: str | None  # the commit, for a model from the hub
    note: str  # what the person should know about it; may be empty


def is_local(model: str, revision: str | None) -> bool:
    """Whether the text names something on this machine; UsageError E288 where a revision was asked for as well."""
    path = Path(model).expanduser() if model.startswith("~") else Path(model)
    if not model or "\0" in model or not os.path.lexists(path):
        return False
    if revision is not None:
        what = "--revision names a version on the hub, but the model is a local path"
        raise UsageError("E288", what, where=str(path), fix="leave --revision out")
    return True


def resolve_model(model: str, *, revision: str | None, cache_dir: Path | None, offline: bool, console: Console) -> Source:
    """The folder behind what the person typed; downloads or converts if need be."""
    path = Path(model).expanduser() if model.startswith("~") else Path(model)
    if is_local(model, revision):
        return _local(path, model, cache_dir, console)
    require_hub_id(model)
    hub_cache = writable_cache(cache_dir) / "hub" if cache_dir is not None else None
    folder, commit, note = fetch(model, revision=revision, cache_dir=hub_cache, offline=offline, console=console)
    return Source(folder, "hub", model, commit, note)


def cache_root(cache_dir: Path | None) -> Path:
    """--cache-dir, else MARLINCTL_CACHE, else the user's cache folder. Nothing is made."""
    if cache_dir is not None:
        return Path(cache_dir)
    if os.environ.get("MARLINCTL_CACHE"):
        return Path(os.environ["MARLINCTL_CACHE"])
    import platformdirs

    return platformdirs.user_cache_path("marlinctl")


def writable_cache(cache_dir: Path | None) -> Path:
    """The cache root, made and proved to be writable."""
    root = cache_root(cache_dir)
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe = root / temporary_name()
        probe.open("xb").close()
        probe.unlink()
    except OSError as error:
        fix = "name another place with --cache-dir or MARLINCTL_CACHE"
        raise EnvironmentProblem("E490", f"the cache folder cannot be written: {error.strerror}", where=str(root), fix=fix) from None
    return root


def is_gguf(model: str) -> bool:
    """Whether a local path is a GGUF file. BadInput E301 for what is neither that nor a folder."""
    from marlinctl.checkpoint.gguf.header import MAGIC

    path = Path(model).expanduser() if model.startswith("~") else Path(model)
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            return False
        magic = b""
        if stat.S_ISREG(mode):  # a FIFO would wait for a writer
            with path.open("rb") as handle:
                magic = handle.read(len(MAGIC))
    except OSError as error:
        fix = "check the path, its links and its permissions"
        raise BadInput("E301", f"the path cannot be read: {error.strerror}", where=str(path), fix=fix) from None
    if magic != MAGIC:
        part = path.suffix in (".safetensors", ".json")
        fix = "name the folder that holds it" if part else "name a model folder, a GGUF file or a hub id"
        raise BadInput("E301", "this is neither a folder nor a GGUF file", where=str(path), fix=fix)
    return True


def _local(path: Path, model: str, cache_dir: Path | None, console: Console) -> Source:
    if not is_gguf(model):
        return Source(path, "folder", model, None, "")
    from marlinctl.checkpoint.gguf.convert import gguf_folder

    folder, note = gguf_folder(path, writable_cache(cache_dir), console)
    return Source(folder, "gguf", model, None, note)
