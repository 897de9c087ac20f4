"""A model as config and headers alone: what `plan` looks at. No weight is read and nothing large is downloaded.

    folder     open_checkpoint, which reads headers anyway
    GGUF       its own header, and the tensors of the folder that it would be turned into (checkpoint/gguf/convert.py)
    hub id     the small files through the hub's cache, where a later run finds them, and of each shard its header: one ranged request.
               They become a folder of files with holes, true headers and true sizes, which passes the same checks as a real one

What is in the hub's cache already is taken from there.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from marlinctl.checkpoint.reader import Checkpoint, open_checkpoint
from marlinctl.checkpoint.safetensors_header import TensorInfo
from marlinctl.checkpoint.source import Source, cache_root, is_gguf, is_local, resolve_model

if TYPE_CHECKING:
    from marlinctl.system.console import Console


@dataclass(frozen=True, slots=True)
class Headers:
    """A checkpoint whose weights may not be there."""

    source: Source
    checkpoint: Checkpoint
    files: bool  # whether the folder holds the small files, tokenizer and all
    weights: bool  # whether weights can be read
    to_fetch: int = 0  # bytes that a run would write into a cache first
    cache: Path = field(default_factory=Path)


@contextmanager
def headers(model: str, *, revision: str | None, cache_dir: Path | None, offline: bool, console: Console) -> Iterator[Headers]:
    """The headers of what the person typed; temporary files live as long as the context."""
    if is_local(model, revision):
        if is_gguf(model):
            yield _of_gguf(model, cache_dir)
            return
        source = resolve_model(model, revision=revision, cache_dir=cache_dir, offline=offline, console=console)
        with open_checkpoint(source.folder) as checkpoint:
            yield Headers(source, checkpoint, files=True, weights=True)
        return
    from marlinctl.checkpoint.hub import fetch_headers, hub_cache, is_offline

    if is_offline(offline):
        source = resolve_model(model, revision=revision, cache_dir=cache_dir, offline=True, console=console)
        with open_checkpoint(source.folder) as checkpoint:
            yield Headers(source, checkpoint, files=True, weights=True)
        return
    with tempfile.TemporaryDirectory(prefix="marlinctl-plan-") as folder:
        where = hub_cache(cache_dir)
        commit, missing = fetch_headers(model, Path(folder), revision=revision, cache_dir=where, console=console)
        with open_checkpoint(Path(folder)) as checkpoint:
            yield Headers(
                Source(Path(folder), "hub", model, commit, ""), checkpoint, files=True, weights=False, to_fetch=missing, cache=where
            )


def _of_gguf(model: str, cache_dir: Path | None) -> Headers:
    """The folder that gguf_folder would make, as names and shapes in float16."""
    from marlinctl.checkpoint.gguf.architectures import plan_model
    from marlinctl.checkpoint.gguf.header import read_gguf_header

    path = Path(model).expanduser()
    config, planned = plan_model(read_gguf_header(path))
    tensors = {t.name: TensorInfo(t.name, "F16", t.source.shape, path, 0, 2 * prod(t.source.shape)) for t in planned}
    folder = path.with_name(path.name + ".folder")  # it is not there, and nothing is looked for in it
    source = Source(folder, "gguf", model, None, "a GGUF file is turned into a folder of float16 weights first, once, in the cache")
    size = sum(info.nbytes for info in tensors.values())
    return Headers(source, Checkpoint(folder, config, tensors, ()), files=False, weights=False, to_fetch=size, cache=cache_root(cache_dir))
