"""How a checkpoint is published: whole or not at all.

    OUT.tmp-1f0c9a2e/        pieces: one shard for each block of the model; temporary name ─► write ─► fsync ─► rename
    OUT.tmp-1f0c9a2e.whole/  beside OUT, on the same filesystem, so that the last step is one rename
        in this order: companions ─► weights, merged from the pieces (shards.py) ─► index ─► mask ─► config.json
        then:          read everything back and check it, while it gets to the disk and is hashed ─► manifest ─► rename to OUT

config.json comes last of the model's files, because a folder with config.json looks like a model: a save that was killed must not.
An old OUT is renamed aside, and deleted only after the new one stands; any failure puts it back. A body that raises (Ctrl-C too)
leaves no staging folder, unless the folder belongs to a job: then it stays, and `restore` takes up what the job's journal vouches for
(marlinctl/jobs/journal.py).
"""

from __future__ import annotations

import os
import secrets
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate, takewhile
from math import prod
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from marlinctl.checkpoint import manifest as manifests
from marlinctl.checkpoint import mask as masks
from marlinctl.checkpoint import ownership, shards
from marlinctl.checkpoint.formats.base import MODEL_FILES, Format
from marlinctl.checkpoint.model_files import ORDER_FILE, companion_names
from marlinctl.checkpoint.safetensors_header import read_header
from marlinctl.checkpoint.shards import Published
from marlinctl.errors import BadInput, ResourceProblem, UsageError
from marlinctl.models.switches import cleaned
from marlinctl.system.atomic import (
    FULL,
    Entry,
    canonical,
    disk_full,
    disk_problems,
    header_of,
    in_file_order,
    make_folder,
    open_regular,
    read_part,
    sync_folder,
    tensor_entry,
    whole_file,
    write_entries,
)
from marlinctl.system.background import begun
from marlinctl.system.files import FileRefused, exists, open_member
from marlinctl.system.page_locked import to_host

if TYPE_CHECKING:
    from torch import Tensor

    from marlinctl.checkpoint.reader import Checkpoint
    from marlinctl.checkpoint.safetensors_header import TensorInfo

_MAX_COMPANION_BYTES = 500 << 20


# ---- before any work -----------------------------------------------------------------------------------------------------------------


def check_output(out: Path, *, overwrite: bool, sources: Sequence[Path], rejects: bool = False) -> None:
    """Refuse an output place that cannot work (UsageError), before anything is read or computed.

    rejects: whether the result may be kept as OUT.rejected, which then must be free, or one of ours.
    """
    real = out.resolve()
    for source in sources:
        origin = source.resolve()
        if real == origin or origin in real.parents:
            raise _overlap("the output is the input" if real == origin else "the output lies inside the input", out, source)
        if real in origin.parents:
            raise _overlap("the input lies inside the output", out, source)
    if out.is_symlink() and not out.exists():
        raise UsageError("E244", "the output is a link that leads nowhere", where=str(out), fix="remove the link or name a new folder")
    if real.exists() and not real.is_dir():
        raise UsageError("E244", "the output exists and is not a folder", where=str(out), fix="name a new folder")
    ownership.refuse_protected(real)
    if real.is_dir() and any(real.iterdir()):
        if not overwrite:
            raise UsageError("E222", "the output exists and is not empty", where=str(out), fix="name a new folder, or pass --overwrite")
        what = "--overwrite would delete what is neither marlinctl's nor part of a model"
        fix = "name a new folder, or move these files out of this one"
        ownership.refuse_strangers(what, real, ownership.strangers_in_output(real), fix)
    rejected = _rejected(real)
    if rejects and os.path.lexists(rejected):
        what = "a result that is not good enough is kept here, and there is what marlinctl did not write"
        ownership.refuse_strangers(what, rejected, ownership.strangers_in_rejected(rejected), "move it away, or name another output")
    parent = next(folder for folder in real.parents if os.path.lexists(folder))  # the others are made once the inputs are accepted
    if not parent.is_dir():
        what = "the output folder would lie in what is no folder"
        raise UsageError("E244", what, where=str(parent), fix="name another place")
    probe = parent / f".{real.name}.probe-{secrets.token_hex(4)}"
    try:  # asking os.access would not notice a read-only mount on every system
        probe.mkdir()
        probe.rmdir()
    except OSError as problem:
        if problem.errno in FULL:
            raise disk_full(probe, None, shutil.disk_usage(parent).free) from problem
        raise UsageError(
            "E244",
            f"the output folder's parent cannot be written to: {problem.strerror}",
            where=str(parent),
            fix="name another place",
        ) from problem


def _overlap(what: str, out: Path, source: Path) -> UsageError:
    return UsageError("E225", what, where=f"{out} (input: {source})", fix="name a new folder beside the input")


def require_space(out: Path, needed: int) -> None:
    """ResourceProblem when the disk of `out` has less than `needed` bytes free."""
    parent = next(folder for folder in out.resolve().parents if folder.is_dir())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise disk_full(parent, needed, free)


# ---- writing -------------------------------------------------------------------------------------------------------------------------


class StagedCheckpoint:
    """A checkpoint under construction. Use as a context manager; `publish` makes it real, leaving without it removes it.

    pieces: the folder for what is finished, which then stays when something goes wrong; without it, a new one beside `out`. The checkpoint
    itself is built beside it, in `path`. resumable: pieces stay until the checkpoint is published; otherwise each goes when it is merged,
    so that the disk never holds more than one published file twice.
    A native folder calls its weights marlin*.safetensors, so that plain transformers finds no model in it.
    """

    def __init__(
        self, out: Path, *, overwrite: bool, fmt: Format, pieces: Path | None = None, resumable: bool = False,
        max_shard_bytes: int = shards.MAX_SHARD_BYTES,
    ) -> None:  # fmt: skip
        self.out = out.resolve()  # a link to a folder is followed: the folder is replaced, the link stays
        self.overwrite = overwrite
        self.stem = fmt.files
        self.pieces = pieces or self.out.with_name(f"{self.out.name}.tmp-{secrets.token_hex(4)}")
        self.path = self.pieces.with_name(self.pieces.name + ".whole")
        self.spool = self.pieces.with_name(self.pieces.name + ".masks")  # the header of a file comes first, but is known last
        self._stays, self._resumable = pieces is not None, resumable
        self._max_shard_bytes = max_shard_bytes
        self._shards: list[list[Entry]] = []
        self._copies: list[Entry] = []
        self._masks: list[Entry] = []
        self._ahead: Published | None = None  # the published files, begun before all pieces are there

    def __enter__(self) -> StagedCheckpoint:
        try:
            with disk_problems(self.pieces):
                make_folder(self.pieces) if self._stays else self.pieces.mkdir()
                if os.path.lexists(self.path):
                    ownership.remove_tree(self.path)  # of a run that was killed: it is merged again
                self.path.mkdir()
        except BaseException:
            self._remove(published=False)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._remove(published=kind is None)

    def _remove(self, *, published: bool) -> None:
        if published or not self._stays:
            shutil.rmtree(self.pieces, ignore_errors=True)
        if not self._stays:
            shutil.rmtree(self.path, ignore_errors=True)  # gone already after a publish
            self.spool.unlink(missing_ok=True)

    def restore(self, pieces: Sequence[str], layers: Sequence[tuple[str, int, int]]) -> None:
        """Take up what an earlier run left: these pieces, and the masks of these linears [N, K].

        Everything else in their folder is removed. What is taken up must have been compared with its digest.
        """
        begin = 0
        self._shards.clear()
        self._masks.clear()
        for layer, n, k in layers:
            entry = self._spooled(layer + masks.SUFFIX, (n, -(-k // 8)), begin)
            self._masks.append(entry)
            begin += entry.size
        with disk_problems(self.path):
            if self.spool.exists():
                with os.fdopen(open_regular(self.spool, os.O_RDWR), "r+b") as file:
                    os.truncate(file.fileno(), begin)
            for path in self.pieces.iterdir():
                if path.name not in pieces:
                    ownership.remove(path)
        for name in pieces:
            found, problems = read_header(self.pieces, name)
            if problems:
                raise BadInput.from_problems("E374", problems)
            in_order = sorted(found.values(), key=lambda info: info.begin)
            self._shards.append([_piece(self.pieces / name, info, info.nbytes, info.begin) for info in in_order])
        if self._ahead is not None:
            self._ahead.forget(entry.name for shard in (*self._shards, self._copies) for entry in shard)

    def write_shard(self, tensors: Mapping[str, Tensor]) -> str:
        """Write the next piece: whole linears. Returns its name."""
        entries = in_file_order([tensor_entry(name, tensor) for name, tensor in tensors.items()])
        self._refuse_twice(tensors)
        name = f"{self.stem}-{len(self._shards) + 1:05d}.safetensors"
        write_entries(self.pieces / name, entries)
        begins = accumulate((entry.size for entry in entries), initial=len(header_of(entries)))
        self._shards.append([_piece(self.pieces / name, entry, entry.size, begin) for entry, begin in zip(entries, begins, strict=False)])
        if self._ahead is not None:
            self._ahead.put(self._shards[-1], durable=True)
        return name

    def expect(self, linears: Sequence[Sequence[Entry]]) -> None:
        """What each piece will hold: then it is merged as soon as it is written. What is copied must be known by now (`copy_tensors`)."""
        self._ahead = self._begun(shards.divided([*linears, self._copies], self._max_shard_bytes))

    def copy_ahead(self, over: threading.Event) -> None:
        """Copy tensors of the source into the files that are begun. Meant for a thread, while pieces are written; it ends early once `over`
        is set."""
        assert self._ahead is not None
        self._ahead.put(takewhile(lambda _: not over.is_set(), self._copies), durable=True)

    def write_mask(self, layer: str, mask: Tensor) -> None:
        """Add the mask [N, K] bool of one linear to the mask file (checkpoint/mask.py)."""
        entry = tensor_entry(layer + masks.SUFFIX, to_host(masks.pack_bits(mask)))
        begin = sum(written.size for written in self._masks)
        with disk_problems(self.spool, entry.size), os.fdopen(open_regular(self.spool, os.O_RDWR | os.O_CREAT), "r+b") as file:
            os.truncate(file.fileno(), begin)
            file.seek(begin)
            file.write(entry.data())
        self._masks.append(self._spooled(entry.name, entry.shape, begin))

    def sync(self) -> int:
        """Make pieces and masks written so far durable, names included; returns the bytes of the masks."""
        with disk_problems(self.pieces):
            sync_folder(self.pieces)
        if not self._masks:
            return 0
        with disk_problems(self.spool), self.spool.open("rb") as file:
            os.fsync(file.fileno())
            sync_folder(self.spool.parent)
        return sum(entry.size for entry in self._masks)

    def _spooled(self, name: str, shape: tuple[int, ...], begin: int) -> Entry:
        size = prod(shape)
        return Entry(name, "U8", shape, size, lambda: read_part(self.spool, begin, size))

    def copy_tensors(self, checkpoint: Checkpoint, names: Sequence[str]) -> None:
        """Tensors that are the source's, byte by byte, behind the pieces and in the order of their names. They are copied when the
        checkpoint is finished, or by `copy_ahead`, so the source stays open until then."""
        self._refuse_twice(names)
        for name in sorted(names):
            info = checkpoint.tensors[name]
            self._copies.append(Entry(name, info.dtype, info.shape, info.nbytes, partial(checkpoint.raw, name)))

    def write_file(self, name: str, data: bytes) -> None:
        """Write one small file. Existing ones are replaced: companions may be overridden."""
        target = self.path / name
        with disk_problems(target, len(data)):
            if target.parent != self.path:
                make_folder(target.parent)
            with whole_file(target) as file:
                file.write(data)

    def copy_companions(self, folder: Path) -> None:
        """Tokenizer, generation config, chat templates, licence: known names only, and of their JSON no key that chooses code."""
        for name, data in companions(folder):
            self.write_file(name, cleaned(name, data))

    def copy_orders(self, folder: Path) -> None:
        """The orders of rows and columns, where the weights of `folder` have any."""
        if exists(folder, ORDER_FILE):
            self.write_file(ORDER_FILE, _small_file(folder, ORDER_FILE))

    def publish(
        self,
        config: Mapping[str, Any],
        *,
        manifest: Mapping[str, Any],
        verify: Callable[[Path], None],
        report_files: Mapping[str, bytes],
    ) -> None:
        """Finish, check from disk, and move into place."""
        self.finish(config, manifest=manifest, verify=verify, report_files=report_files)
        publish_together([self])

    def finish(
        self,
        config: Mapping[str, Any],
        *,
        manifest: Mapping[str, Any],
        verify: Callable[[Path], None],
        report_files: Mapping[str, bytes],
    ) -> None:
        """Everything of `publish` but the last rename, for folders that appear together (`publish_together`)."""
        published = self._merge()
        large = [*published.files, *self._finish_masks()]
        for name, data in report_files.items():
            self.write_file(name, data)
        self.write_file("config.json", canonical(config, finite=False))  # limits of a list may be infinite
        with begun(lambda _: published.make_durable()) as durable, begun(lambda _: manifests.described(self.path, large)) as described:
            verify(self.path)
            durable()
            digests = described()
        self.write_file(manifests.NAME, canonical(manifests.build(self.path, manifest, digests)))
        with disk_problems(self.path):
            for folder, _, _ in os.walk(self.path):
                sync_folder(Path(folder))

    def set_aside(self) -> Path:
        """Keep the staged folder as OUT.rejected, instead of removing it."""
        return keep_rejected(self.path, self.out)

    def _refuse_twice(self, names: Iterable[str]) -> None:
        taken = {entry.name for shard in (*self._shards, self._copies) for entry in shard}
        twice = [name for name in names if name in taken]
        if twice:
            raise ValueError(f"tensor {twice[0]} was written before")

    def _merge(self) -> Published:
        """The published weight files, and their index where there are several."""
        files = shards.divided([*self._shards, self._copies], self._max_shard_bytes)
        published = self._ahead or self._begun(files)
        published.require(files)
        for number, entries in enumerate(files, start=1):
            published.fill(entries)
            if not self._resumable:
                self._drop_pieces(files[number:])
        if len(files) > 1 or self.stem != MODEL_FILES:  # transformers is given the index's name before it knows the folder
            total = sum(entry.size for entries in files for entry in entries)
            weight_map = {entry.name: name for name, entries in published.files.items() for entry in entries}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            self.write_file(f"{self.stem}.safetensors.index.json", canonical(index))
        return published

    def _begun(self, files: Sequence[Sequence[Entry]]) -> Published:
        published = Published(self.path, self.stem, files)
        published.create()
        return published

    def _drop_pieces(self, waiting: Sequence[Sequence[Entry]]) -> None:
        """Those that none of these files needs."""
        needed = {entry.lies[0] for entries in waiting for entry in entries if entry.lies is not None}
        with disk_problems(self.pieces):
            for path in list(self.pieces.iterdir()):
                if path not in needed:
                    ownership.remove(path)

    def _finish_masks(self) -> list[str]:
        if not self._masks:
            return []
        write_entries(self.path / masks.NAME, sorted(self._masks, key=lambda entry: entry.name))
        return [masks.NAME]


def _piece(path: Path, info: Entry | TensorInfo, size: int, begin: int) -> Entry:
    return Entry(info.name, info.dtype, info.shape, size, _no_data, (path, begin))


def _no_data() -> memoryview:
    raise AssertionError("a piece is copied, not read")


def keep_rejected(folder: Path, out: Path) -> Path:
    """Move a finished folder that may not be published beside its place, as OUT.rejected; an older one there is replaced.

    What was put there meanwhile stays, and the folder gets another name. Returns where it lies.
    """
    place = _rejected(out)
    with disk_problems(place):
        if os.path.lexists(place):
            if ownership.strangers_in_rejected(place):
                place = place.with_name(f"{place.name}-{secrets.token_hex(4)}")
            else:
                ownership.remove(place)
        folder.rename(place)
    return place


def _rejected(out: Path) -> Path:
    return out.with_name(f"{out.name}.rejected")


def companions(folder: Path) -> Iterator[tuple[str, bytes]]:
    """The companion files of a checkpoint folder, as (name, bytes). BadInput for a link or anything but a regular file."""
    for name in companion_names(folder):
        yield name, _small_file(folder, name)


def _small_file(folder: Path, name: str) -> bytes:
    try:
        with open_member(folder, name) as file:
            size = os.fstat(file.fileno()).st_size
            if size > _MAX_COMPANION_BYTES:
                raise FileRefused(f"{name} has {size:,} bytes, too many for its kind", folder / name, "restore the real file")
            return file.readall()
    except FileRefused as refused:
        raise BadInput.from_problems("E301", [refused.problem]) from None


# ---- moving into place ---------------------------------------------------------------------------------------------------------------


class Finished(Protocol):
    """A complete, checked folder on its way to its place."""

    @property
    def path(self) -> Path: ...
    @property
    def out(self) -> Path: ...
    @property
    def overwrite(self) -> bool: ...


def publish_together(stages: Sequence[Finished], *, aside_in: Path | None = None, later: str = "") -> None:
    """Move finished folders into place: all of them, or none and the old ones as they were.

    aside_in: where old ones wait until all new ones stand, on the same disk. Default: beside their place. later: the command that publishes
    them when something is in the way now.
    """
    for stage in stages:
        ownership.remove_temporaries(stage.path)  # of a run that was killed while it wrote into a folder that was finished
    undo: list[tuple[Path, Path]] = []  # renames done so far, as (from, to)
    aside: list[Path] = []
    try:
        for stage in stages:
            with disk_problems(stage.out):
                if os.path.lexists(stage.out) and not _is_empty(stage.out):
                    if not stage.overwrite:
                        fix = f"move it away, then: {later}" if later else "name a new folder"
                        raise UsageError("E222", "the output appeared while this ran", where=str(stage.out), fix=fix)
                    _refuse_what_appeared(stage.out, stage.out, later)
                    old = (aside_in or stage.out.parent) / f"{stage.out.name}.old-{secrets.token_hex(4)}"
                    stage.out.rename(old)
                    undo.append((stage.out, old))
                    aside.append(old)
                    _refuse_what_appeared(old, stage.out, later)  # what came between the look and the rename; nothing comes after it
                stage.path.rename(stage.out)  # an empty folder in the way is replaced
                undo.append((stage.path, stage.out))
                sync_folder(stage.out.parent)
    except BaseException:
        for source, target in reversed(undo):
            target.rename(source)
        raise
    for old in aside:
        try:
            ownership.remove_tree(old)
        except OSError as problem:
            raise ResourceProblem(
                "E500",
                f"the new checkpoint is in place, but the old one could not be deleted: {problem.strerror}",
                where=str(old),
                fix="delete it yourself; nothing else is left to do",
            ) from problem


def _refuse_what_appeared(folder: Path, out: Path, later: str) -> None:
    what = "--overwrite would delete what appeared in the output while this ran"
    fix = f"move it out of the folder{f', then: {later}' if later else ''}"
    ownership.refuse_strangers(what, out, ownership.strangers_in_output(folder), fix)


def _is_empty(path: Path) -> bool:
    """An empty folder, which a rename replaces."""
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())
