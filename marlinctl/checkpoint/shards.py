"""The weight files of a published folder, merged from what a run wrote piece by piece.

    pieces       model-00001.safetensors   block 0          source   embedding, norms, ...
                 model-00002.safetensors   block 1            │
                         └── copied in the kernel ──┬─────────┘
    published    model.safetensors                       where everything fits into one file
                 model-00001-of-00002.safetensors, ...   and model.safetensors.index.json, where it does not

A file is filled with whole linears in the order in which they were written, up to the size that was asked for; within it the widest dtype
comes first, so that each tensor is aligned. A linear larger than that size has a file of its own. Names, dtypes and shapes decide where
each tensor lies, so a run that knows them merges each piece while it computes the next, and has nothing to copy in the end.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import accumulate
from pathlib import Path

from marlinctl.errors import UsageError
from marlinctl.system.atomic import Entry, disk_problems, header_of, in_file_order, open_regular
from marlinctl.system.sizes import size_in_bytes

MAX_SHARD_BYTES = 5 * 10**9  # as the tools of the hub
_CHUNK = 64 << 20
_NO_COPY = (errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL)  # of copy_file_range: the kernel or file system has none


def max_shard_bytes(asked: str | int | None) -> int:
    """`--max-shard-size` in bytes: 2GB, 500MB; None: the default. UsageError E202."""
    size = size_in_bytes(None if asked is None else str(asked), "--max-shard-size")
    if size == 0:
        raise UsageError("E202", f"{str(asked)!r}: a file holds something", where="--max-shard-size", fix="--max-shard-size 5GB")
    return MAX_SHARD_BYTES if size is None else size


def divided(shards: Sequence[Sequence[Entry]], most: int) -> list[list[Entry]]:
    """The tensors of each published file. shards: those of each piece, then what is copied; `most`: bytes of a file."""
    files: list[list[Entry]] = [[]]
    filled = 0
    for linear in _linears(shards):
        size = sum(entry.size for entry in linear)
        if files[-1] and filled + size > most:
            files.append([])
            filled = 0
        files[-1] += linear
        filled += size
    return [in_file_order(entries) for entries in files]


def _linears(shards: Sequence[Sequence[Entry]]) -> Iterator[list[Entry]]:
    """The tensors of one module, as far as they are in one shard; within a shard by name."""
    for shard in shards:
        modules: dict[str, list[Entry]] = {}
        for entry in shard:
            modules.setdefault(entry.name.rpartition(".")[0], []).append(entry)
        yield from (modules[name] for name in sorted(modules))


class Published:
    """Files that are filled in any order, from several threads too. Nothing takes them for whole before a manifest names them."""

    def __init__(self, folder: Path, stem: str, files: Sequence[Sequence[Entry]]) -> None:
        """files: the tensors of each; `divided` makes them."""
        count = len(files)
        several = [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        self.files: Mapping[str, Sequence[Entry]] = dict(zip(several if count > 1 else [f"{stem}.safetensors"], files, strict=True))
        self._folder = folder
        self._places: dict[str, tuple[str, int]] = {}  # tensor -> file, first byte
        for name, entries in self.files.items():
            begins = accumulate((entry.size for entry in entries), initial=len(header_of(entries)))
            self._places |= {entry.name: (name, begin) for entry, begin in zip(entries, begins, strict=False)}
        self._filled: set[str] = set()

    def create(self) -> None:
        for name, entries in self.files.items():
            header, size = header_of(entries), sum(entry.size for entry in entries)
            with disk_problems(self._folder / name, len(header) + size), (self._folder / name).open("xb") as file:
                file.write(header)
                file.truncate(len(header) + size)

    def require(self, files: Sequence[Sequence[Entry]]) -> None:
        """ValueError unless these are the tensors that it was made for, in the same files."""
        if [_described(entries) for entries in self.files.values()] != [_described(entries) for entries in files]:
            raise ValueError("what was written is not what was expected")

    def put(self, entries: Iterable[Entry], *, durable: bool = False) -> None:
        """Fill in tensors. durable: wait until the disk has them."""
        with ExitStack() as stack:
            targets: dict[str, int] = {}
            sources: dict[Path, int] = {}
            for entry in entries:
                if entry.name not in self._places:
                    raise ValueError(f"tensor {entry.name} was not expected")
                name, at = self._places[entry.name]
                with disk_problems(self._folder / name, entry.size):
                    if name not in targets:
                        targets[name] = open_regular(self._folder / name, os.O_RDWR)
                        stack.callback(os.close, targets[name])
                    if entry.lies is None:
                        _write(targets[name], entry, at)
                        continue
                    path, begin = entry.lies
                    if path not in sources:
                        sources[path] = stack.enter_context(path.open("rb", buffering=0)).fileno()
                    _copy(sources[path], begin, entry.size, targets[name], at)
                self._filled.add(entry.name)
            for name, target in targets.items():
                if durable:
                    with disk_problems(self._folder / name):
                        os.fdatasync(target)

    def forget(self, kept: Iterable[str]) -> None:
        """Only these tensors count as filled in."""
        self._filled &= set(kept)

    def fill(self, entries: Iterable[Entry]) -> None:
        """Those of these tensors that are not there yet."""
        self.put(entry for entry in entries if entry.name not in self._filled)

    def make_durable(self) -> None:
        for name in self.files:
            with disk_problems(self._folder / name), (self._folder / name).open("rb") as file:
                os.fsync(file.fileno())


def _described(entries: Sequence[Entry]) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(entry.name, entry.dtype, tuple(entry.shape)) for entry in entries]


def _write(target: int, entry: Entry, at: int) -> None:
    data = entry.data().cast("B")
    if len(data) != entry.size:
        raise ValueError(f"tensor {entry.name} has {len(data)} bytes, its shape says {entry.size}")
    while data:
        done = os.pwrite(target, data[:_CHUNK], at)
        data, at = data[done:], at + done


def _copy(source: int, begin: int, size: int, target: int, at: int) -> None:
    """Within the kernel, where the file system can do that: 0.8 s for a gigabyte on two cores, and 2.1 s through the process."""
    while size:
        try:
            done = os.copy_file_range(source, target, size, begin, at)
        except OSError as problem:
            if problem.errno not in _NO_COPY:
                raise
            done = os.pwrite(target, os.pread(source, min(size, _CHUNK), begin), at)
        if not done:
            raise OSError(errno.EIO, "a piece is shorter than it was when it was written")
        begin, at, size = begin + done, at + done, size - done
