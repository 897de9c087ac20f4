"""What a checkpoint holds, by SHA-256: every shard is read once, in the order of the file, and judged on the way.

    shard ─► 256 KiB ─┬─► SHA-256 of the file
                      └─► the tensor they belong to: NaN, infinity, too large for 4 bits, constant columns, all zero (finite.py)

Two training checkpoints have the same names, shapes and sizes. A job that was begun with one and resumed with the other would publish a
mixture of two models, so it notes the digests when it begins (jobs/journal.py). Comparing them means reading all weights again, so each
digest has a stamp, what stat says of the file: device, inode, size, and the times of the last change of contents and of inode. No program
can set the last one back. A file whose stamp is the noted one has the noted digest; any other is read again. What a stamp does not show is
a bit that the disk itself loses.

SHA-256 makes 1.1 to 1.4 GB/s on one core and the scan 4.3 (server processor with SHA instructions, 2026-11), so both in one pass take about
1 GB/s of processor time, and up to four shards are read at once. A thread of its own for the hash of each shard was slower (0.57 GB/s
against 0.77, two busy cores).
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marlinctl.checkpoint import manifest, mask
from marlinctl.checkpoint.finite import CHUNK_BYTES, TensorScan
from marlinctl.checkpoint.safetensors_header import header_bytes
from marlinctl.errors import BadInput, NumericalProblem, Problem, ResourceProblem
from marlinctl.system.digests import sha256_of_member
from marlinctl.system.files import FileRefused, exists

if TYPE_CHECKING:
    from marlinctl.checkpoint.reader import Checkpoint
    from marlinctl.checkpoint.safetensors_header import TensorInfo
    from marlinctl.system.console import Console

SHARDS_AT_ONCE = 4
SETTLED_NS = 2 * 10**9  # the coarsest clock of a file system that is in use (FAT) ticks every two seconds
ALL_ZERO = -1
_STEP_BYTES = 1 << 24  # bytes between two steps of the progress bar
_STEPS = 1000  # of it that a process of its own reports
_SMALL = (".json", ".jinja", ".txt", ".model", ".tiktoken")
_REPORTS = manifest.OUTSIDE - {manifest.NAME}  # they hold times, so two equal folders would have two fingerprints

Stamp = tuple[int, ...]  # device, inode, bytes, mtime and ctime in nanoseconds


@dataclass(frozen=True, slots=True)
class Noted:
    """What a journal says of a folder's shards: their digests, their stamps, and what is odd about their tensors."""

    digests: Mapping[str, str]
    stamps: Mapping[str, Stamp]
    odd: Mapping[str, Mapping[str, int]]

    @classmethod
    def of(cls, fingerprint: object, document: object) -> Noted:
        """From `Contents.fingerprint` and `Contents.document`, as a journal holds them. What is not as it must be is left out: such a
        file is read again."""
        digests, stamps, odd = {}, {}, {}
        shards = fingerprint.get("shards") if isinstance(fingerprint, dict) else None
        shards = shards if isinstance(shards, dict) else {}
        for name, noted in document.items() if isinstance(document, dict) else ():
            facts = shards.get(name)
            digest = facts.get("sha256") if isinstance(facts, dict) else None
            stamp, found = (noted.get("stamp"), noted.get("odd")) if isinstance(noted, dict) else (None, None)
            if isinstance(digest, str) and isinstance(stamp, list) and isinstance(found, dict):
                digests[name], stamps[name], odd[name] = digest, tuple(stamp), found
        return cls(digests, stamps, odd)


@dataclass(frozen=True, slots=True)
class Contents:
    """What `read_contents` found in a folder.

    fingerprint: identifies it; two equal folders have the same one, wherever they lie.
    odd: shard -> tensor -> how many of its columns hold one value in every row, ALL_ZERO where it holds nothing but zeros.
    problems: error id -> what `require_finite` refuses.
    """

    folder: Path
    fingerprint: Mapping[str, Any]
    odd: Mapping[str, Mapping[str, int]]
    problems: Mapping[str, tuple[Problem, ...]]
    _stamps: dict[str, Stamp | None] = field(repr=False, compare=False)  # name -> None where it was too new to be believed

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of every file that was read, by its name in the folder."""
        shards = {name: facts["sha256"] for name, facts in self.fingerprint["shards"].items()}
        masks = {mask.NAME: self.fingerprint["masks"]["sha256"]} if "masks" in self.fingerprint else {}
        return {**self.fingerprint["files"], **shards, **masks}

    @property
    def identity(self) -> str:
        """The fingerprint as one digest."""
        return hashlib.sha256(json.dumps(self.fingerprint, sort_keys=True).encode()).hexdigest()

    @property
    def zero_tensors(self) -> list[str]:
        return [name for found in self.odd.values() for name, count in found.items() if count == ALL_ZERO]

    @property
    def constant_columns(self) -> dict[str, int]:
        return {name: count for found in self.odd.values() for name, count in found.items() if count != ALL_ZERO}

    def document(self) -> dict[str, Any]:
        """For a journal, beside the fingerprint: what holds on this machine only, and what the scan would find again."""
        shards = self.fingerprint["shards"]
        stamps = {name: self._stamps[name] for name in shards}
        return {name: {"stamp": None if s is None else list(s), "odd": dict(self.odd[name])} for name, s in stamps.items()}

    def require_finite(self) -> None:
        """NumericalProblem E620 that names every tensor with a NaN or infinity, E604 for those with a weight that 4 bits cannot hold."""
        for error_id in ("E620", "E604"):
            if error_id in self.problems:
                raise NumericalProblem.from_problems(error_id, self.problems[error_id])

    def require_unchanged(self) -> None:
        """BadInput E306 where a file is not what it was when it was read. Only files whose stamp is another one are read for it."""
        problems: list[Problem] = []
        for name, digest in self.digests.items():
            stamp = _stamp(self.folder / name)
            if stamp is not None and stamp == self._stamps[name]:
                continue
            fix = "put back what was there and resume, or start again with a copy that nothing changes"
            try:
                now = sha256_of_member(self.folder, name)
            except FileRefused as refused:
                problems.append(Problem(f"{name} is gone or replaced: {refused.problem.what}", refused.problem.where, fix))
                continue
            if now != digest:
                problems.append(Problem(f"{name} was changed while this run was at work with it", str(self.folder / name), fix))
            else:
                self._stamps[name] = stamp
        if problems:
            raise BadInput.from_problems("E306", problems)


def read_contents(
    checkpoint: Checkpoint,
    console: Console,
    *,
    scan: Collection[str] = (),
    for_4_bits: Collection[str] = (),
    noted: Noted | None = None,
    title: str = "read all weights",
) -> Contents:
    """Digests of everything that makes the folder what it is. A shard that has the stamp in `noted` is not read.

    scan: tensors to look at for NaN, infinity and what is odd; for_4_bits: those of them that will be quantized. What is found does not
    stop the pass: `Contents.require_finite` refuses it, so that a file with a known digest can be called damaged first (source_digests.py).
    BadInput E301 where a shard cannot be read to its end, and for a small file that may not be followed.
    """
    with reading_contents(checkpoint, console, scan=scan, for_4_bits=for_4_bits, noted=noted, title=title, apart_from=None) as read:
        return read()


@contextmanager
def reading_contents(
    checkpoint: Checkpoint,
    console: Console,
    *,
    scan: Collection[str] = (),
    for_4_bits: Collection[str] = (),
    noted: Noted | None = None,
    title: str = "read all weights",
    apart_from: int | None = 1 << 28,
) -> Iterator[Callable[[], Contents]]:
    """What is yielded waits for the result of `read_contents`. From `apart_from` bytes on they are read meanwhile, in a process of its own:
    the threads of this one would wait 5 ms for the interpreter at every chunk while it imports and makes tokens.
    """
    parts = {name: info.name for name, info in checkpoint.parts.items()}
    scan, for_4_bits = ({parts.get(name, name) for name in names} for names in (scan, for_4_bits))
    folder = checkpoint.folder
    shards = {str(path.relative_to(folder)): path for path in checkpoint.files}
    small = _small_files(folder)
    masks = [mask.NAME] if exists(folder, mask.NAME) else []
    stamps = {name: _stamp(folder / name) for name in (*shards, *small, *masks)}  # before reading: a later change gives another one
    known = noted or Noted({}, {}, {})
    untouched = {name for name in shards if stamps[name] is not None and stamps[name] == known.stamps.get(name)}
    work = _Work(checkpoint, {name: path for name, path in shards.items() if name not in untouched}, scan, for_4_bits)

    def contents(read: Mapping[str, _Shard]) -> Contents:
        digests = {name: known.digests[name] if name in untouched else read[name].sha256 for name in shards}
        problems: dict[str, tuple[Problem, ...]] = {}
        for name in shards:
            for error_id, problem in read[name].problems if name in read else ():
                problems[error_id] = (*problems.get(error_id, ()), problem)
        fingerprint: dict[str, Any] = {
            "files": {name: _digest_of(folder, name) for name in small},
            "shards": {
                name: {
                    "bytes": path.stat().st_size,
                    "header_sha256": hashlib.sha256(header_bytes(folder, name)).hexdigest(),
                    "sha256": digests[name],
                }
                for name, path in shards.items()
            },
        }
        if masks:
            fingerprint["masks"] = {"sha256": _digest_of(folder, mask.NAME)}
        odd = {name: known.odd[name] if name in untouched else read[name].odd for name in shards}
        return Contents(folder, fingerprint, odd, problems, stamps)

    if apart_from is None or work.size < apart_from:
        yield lambda: contents(_read_here(work, console, title))
        return
    from marlinctl.system.confined import Bounds, Exceeded, confined

    trusted = Bounds(memory=4 << 30, cpu=1 << 30, wait=3600.0)  # it is our own work that runs there
    with closing(confined(work.documents, trusted)) as documents:
        try:
            next(documents)  # the process is there: made by this thread, while no other one runs
        except (Exceeded, OSError):  # the system gives no second process: all is read here, later
            yield lambda: contents(_read_here(work, console, title))
            return
        yield lambda: contents(_read_apart(work, documents, console, title))


# ---- all shards ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Work:
    """Shards to read, and what to look for in them."""

    checkpoint: Checkpoint
    shards: Mapping[str, Path]
    scan: set[str]
    for_4_bits: set[str]

    @property
    def size(self) -> int:
        return sum(path.stat().st_size for path in self.shards.values())

    def read(self, advance: Callable[[int], None]) -> dict[str, _Shard]:
        """Several at a time. The first error ends all of them, and so does Ctrl-C. advance: called with bytes that were read."""
        if not self.shards:
            return {}
        tensors: dict[Path, list[TensorInfo]] = {path: [] for path in self.shards.values()}
        parts, stored = self.checkpoint.parts, self.checkpoint.stored
        if stored is None:
            stored = {name: info for name, info in self.checkpoint.tensors.items() if name not in parts}
            stored |= {info.name: info for info in parts.values()}
        for info in sorted(stored.values(), key=lambda info: info.begin):
            if info.file in tensors:
                tensors[info.file].append(info)
        shared = _SharedProgress(advance)
        with ThreadPoolExecutor(min(SHARDS_AT_ONCE, os.cpu_count() or 1, len(self.shards)), "read") as pool:
            try:
                begun = {
                    name: pool.submit(_read_shard, self.checkpoint, path, tensors[path], self.scan, self.for_4_bits, shared)
                    for name, path in self.shards.items()
                }
                return {name: future.result() for name, future in begun.items()}
            finally:
                shared.over.set()

    def documents(self) -> Iterator[Any]:
        """The same for another process: None, numbers of bytes read, and what was found; few enough for a pipe that is not read yet."""
        from queue import SimpleQueue

        yield None
        steps: SimpleQueue[int | None] = SimpleQueue()
        found: list[dict[str, _Shard]] = []
        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(lambda: found.append(self.read(steps.put)))
            reading.add_done_callback(lambda _: steps.put(None))
            unreported, step = 0, self.size // _STEPS
            while (count := steps.get()) is not None:
                unreported += count
                if unreported >= step:
                    yield unreported
                    unreported = 0
            reading.result()
        yield {name: shard.document() for name, shard in found[0].items()}


def _read_here(work: _Work, console: Console, title: str) -> dict[str, _Shard]:
    if not work.shards:
        return {}
    with console.progress(title, work.size) as progress:
        return work.read(progress.advance)


def _read_apart(work: _Work, documents: Iterator[Any], console: Console, title: str) -> dict[str, _Shard]:
    from marlinctl.system.confined import Exceeded

    with console.progress(title, work.size) as progress:
        try:
            for document in documents:
                if isinstance(document, dict):
                    return {name: _Shard.of(shard) for name, shard in document.items()}
                progress.advance(document)
        except Exceeded as reason:
            what = f"the process that reads the weights was ended: {reason}"
            raise ResourceProblem("E522", what, where=str(work.checkpoint.folder), fix="free some memory, then run again") from None
    raise AssertionError("its last document is what it found")


# ---- one shard -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Shard:
    sha256: str
    problems: list[tuple[str, Problem]]
    odd: dict[str, int]

    def document(self) -> list[Any]:
        return [self.sha256, [[error_id, *astuple(problem)] for error_id, problem in self.problems], self.odd]

    @classmethod
    def of(cls, document: list[Any]) -> _Shard:
        sha256, problems, odd = document
        return cls(sha256, [(error_id, Problem(*parts)) for error_id, *parts in problems], odd)


class _SharedProgress:
    """Progress from several threads; `over` stops them."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance, self._lock, self.over = advance, threading.Lock(), threading.Event()

    def advance(self, count: int) -> None:
        with self._lock:
            self._advance(count)


def _read_shard(
    checkpoint: Checkpoint, path: Path, tensors: list[TensorInfo], scan: set[str], for_4_bits: set[str], shared: _SharedProgress
) -> _Shard:
    """Every byte of a file, the header first. `tensors` lie in it without gaps, in this order (reader.py)."""
    import numpy as np

    buffer, scratch = np.empty(CHUNK_BYTES, dtype=np.uint8), np.empty(CHUNK_BYTES, dtype=np.uint8)
    digest = hashlib.sha256()
    problems: list[tuple[str, Problem]] = []
    odd: dict[str, int] = {}
    unreported = 0

    def read(begin: int, end: int, look: TensorScan | None, where: str) -> None:
        nonlocal unreported
        for start in range(begin, end, CHUNK_BYTES):
            if shared.over.is_set():
                return
            chunk = buffer[: min(CHUNK_BYTES, end - start)]
            checkpoint.read_file_into(path, start, chunk.data, where)
            digest.update(chunk.data)  # lets other threads run
            if look is not None:
                look.see(chunk, start, scratch)
            unreported += len(chunk)
            if unreported >= _STEP_BYTES:
                shared.advance(unreported)
                unreported = 0

    read(0, tensors[0].begin if tensors else path.stat().st_size, None, f"{path}, its header")
    for info in tensors:
        look = TensorScan(info, for_4_bits=info.name in for_4_bits) if info.name in scan and TensorScan.reads(info) else None
        read(info.begin, info.end, look, f"{path}, tensor {info.name}")
        if look is not None and look.problem is not None:
            problems.append(look.problem)
        if look is not None and len(info.shape) > 1 and (look.zero or look.constant):  # many a bias is zero
            odd[info.name] = ALL_ZERO if look.zero else look.constant
    shared.advance(unreported)
    return _Shard(digest.hexdigest(), problems, odd)


# ---- files ---------------------------------------------------------------------------------------------------------------------------


def _small_files(folder: Path) -> list[str]:
    """Config, index, tokenizer and whatever else decides what the model is."""
    found = (path for path in folder.iterdir() if path.suffix in _SMALL and path.name not in _REPORTS and path.is_file())
    return sorted(path.name for path in found)


def _stamp(path: Path) -> Stamp | None:
    """None for a file that is gone, and for one whose last change is so near that another could have the same time."""
    try:
        found = path.stat()
    except OSError:
        return None
    if found.st_ctime_ns > time.time_ns() - SETTLED_NS:
        return None
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _digest_of(folder: Path, name: str) -> str:
    try:
        return sha256_of_member(folder, name)
    except FileRefused as refused:
        raise BadInput.from_problems("E301", [refused.problem]) from None
