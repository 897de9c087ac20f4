"""How a checkpoint is published: whole or not at all.

    OUT.tmp-1f0c9a2e/  beside OUT, on the same filesystem, so that the last step is one rename
        every file:    temporary name ─► write ─► fsync ─► rename          a file with its final name is a whole file
        in this order: shards ─► index ─► mask ─► tokenizer and other companions ─► config.json ─► manifest
        then:          fsync the folder ─► read everything back and check it ─► rename to OUT ─► fsync the parent

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from marlinctl.checkpoint import manifest as manifests
from marlinctl.checkpoint import mask as masks
from marlinctl.checkpoint import ownership
from marlinctl.checkpoint.formats.base import Format
from marlinctl.checkpoint.model_files import companion_names
from marlinctl.checkpoint.safetensors_header import read_header
from marlinctl.errors import BadInput, ResourceProblem, UsageError
from marlinctl.models.switches import cleaned
from marlinctl.system.atomic import (
    FULL,
    Entry,
    canonical,
    disk_full,
    disk_problems,
    in_file_order,
    make_folder,
    open_regular,
    read_part,
    sync_folder,
    tensor_entry,
    whole_file,
    write_entries,
)
from marlinctl.system.files import FileRefused, open_member
from marlinctl.system.page_locked import to_host

if TYPE_CHECKING:
    from torch import Tensor

    from marlinctl.checkpoint.reader import Checkpoint

MAX_SHARD_BYTES = 5 * 10**9
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

    path: the folder it is built in, which then stays when something goes wrong; without it, a new one beside `out`.
    A native folder calls its weights marlin-*.safetensors, so that plain transformers finds no model in it.
    """

    def __init__(self, out: Path, *, overwrite: bool, fmt: Format, path: Path | None = None) -> None:
        self.out = out.resolve()  # a link to a folder is followed: the folder is replaced, the link stays
        self.overwrite = overwrite
        self.stem = fmt.files
        self.path = path or self.out.with_name(f"{self.out.name}.tmp-{secrets.token_hex(4)}")
        self.spool = self.path.with_name(self.path.name + ".masks")  # the header of a file comes first, but is known last
        self._stays = path is not None
        self._shards: list[list[Entry]] = []
        self._masks: list[Entry] = []
        self._ahead = _copied(self.path)
        self._written_ahead: dict[int, Path] = {}

    def __enter__(self) -> StagedCheckpoint:
        with disk_problems(self.path):
            remove_copied(self.path)  # of a run that was killed
            make_folder(self.path) if self._stays else self.path.mkdir()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with suppress(OSError):
            remove_copied(self.path)
        if not self._stays:
            shutil.rmtree(self.path, ignore_errors=True)  # gone already after a publish
            self.spool.unlink(missing_ok=True)

    def restore(self, shards: Sequence[str], layers: Sequence[tuple[str, int, int]]) -> None:
        """Take up what an earlier run left: these shards, as they were called while staged, and the masks of these linears [N, K].

        Everything else in the folder is removed. What is taken up must have been compared with its digest.
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
            for name in shards:
                for renamed in self.path.glob(f"{name.removesuffix('.safetensors')}-of-*.safetensors"):
                    renamed.replace(self.path / name)  # it had its final name already
            for path in self.path.iterdir():
                if path.name not in shards:
                    ownership.remove(path)
        for name in shards:
            found, problems = read_header(self.path, name)
            if problems:
                raise BadInput.from_problems("E374", problems)
            in_order = sorted(found.values(), key=lambda info: info.begin)
            self._shards.append([Entry(info.name, info.dtype, info.shape, info.nbytes, _no_data) for info in in_order])

    def write_shard(self, tensors: Mapping[str, Tensor]) -> str:
        """Write the next shard; returns its name while staged (the final one says how many there are)."""
        return self._write_entries([tensor_entry(name, tensor) for name, tensor in tensors.items()])

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
        """Make shards and masks written so far durable, names included; returns the bytes of the masks."""
        with disk_problems(self.path):
            sync_folder(self.path)
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
        """Copy tensors byte by byte into shards of their own, streaming; order and shard borders depend on the names alone."""
        for number, entries in enumerate(_copies(checkpoint, names)):
            self._write_entries(entries, ahead=self._written_ahead.get(number))

    def copy_ahead(self, checkpoint: Checkpoint, names: Sequence[str], over: threading.Event) -> None:
        """Write the shards that `copy_tensors` of the same names is going to write, beside the folder, and leave them for it to move. Meant
        for a thread, while other shards are written; it ends early once `over` is set.
        """
        with disk_problems(self._ahead):
            make_folder(self._ahead)

        def unless_over(entry: Entry) -> memoryview:
            if over.is_set():
                raise _Over
            return entry.data()

        for number, entries in enumerate(_copies(checkpoint, names)):
            path = self._ahead / f"{number}.safetensors"
            watched = [replace(entry, data=partial(unless_over, entry)) for entry in entries]
            try:
                write_entries(path, in_file_order(watched))
            except _Over:
                return
            self._written_ahead[number] = path

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
        self._name_shards()
        self._finish_masks()
        for name, data in report_files.items():
            self.write_file(name, data)
        self.write_file("config.json", canonical(config, finite=False))  # limits of a list may be infinite
        self.write_file(manifests.NAME, canonical(manifests.build(self.path, manifest)))
        with disk_problems(self.path):
            for folder, _, _ in os.walk(self.path):
                sync_folder(Path(folder))
        verify(self.path)

    def set_aside(self) -> Path:
        """Keep the staged folder as OUT.rejected, instead of removing it."""
        return keep_rejected(self.path, self.out)

    def _write_entries(self, entries: list[Entry], ahead: Path | None = None) -> str:
        """The next shard. ahead: where it is written already."""
        taken = {entry.name for shard in self._shards for entry in shard}
        twice = [entry.name for entry in entries if entry.name in taken]
        if twice:
            raise ValueError(f"tensor {twice[0]} was written before")
        entries = in_file_order(entries)
        name = f"{self.stem}-{len(self._shards) + 1:05d}.safetensors"
        if ahead is None:
            write_entries(self.path / name, entries)
        else:
            with disk_problems(self.path):
                ahead.replace(self.path / name)
        self._shards.append([Entry(e.name, e.dtype, e.shape, e.size, _no_data) for e in entries])
        return name

    def _finish_masks(self) -> None:
        if self._masks:
            write_entries(self.path / masks.NAME, sorted(self._masks, key=lambda entry: entry.name))

    def _name_shards(self) -> None:
        """Give the shards their final names and write the index."""
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for i, shard in enumerate(self._shards, start=1):
            final = f"{self.stem}-{i:05d}-of-{count:05d}.safetensors"
            with disk_problems(self.path / final):
                (self.path / f"{self.stem}-{i:05d}.safetensors").replace(self.path / final)
            weight_map |= {entry.name: final for entry in shard}
        total = sum(entry.size for shard in self._shards for entry in shard)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        self.write_file(f"{self.stem}.safetensors.index.json", canonical(index))


class _Over(Exception):
    """Copying ahead is not wanted any more."""


def _copied(staged: Path) -> Path:
    return staged.with_name(staged.name + ".copied")


def remove_copied(staged: Path) -> None:
    """What `StagedCheckpoint.copy_ahead` left beside the folder that a job builds its checkpoint in."""
    if _copied(staged).is_dir():
        ownership.remove_tree(_copied(staged))


def _copies(checkpoint: Checkpoint, names: Sequence[str]) -> Iterator[list[Entry]]:
    """Shards of these tensors, by name and up to MAX_SHARD_BYTES."""
    pending: list[Entry] = []
    size = 0
    for name in sorted(names):
        info = checkpoint.tensors[name]
        if pending and size + info.nbytes > MAX_SHARD_BYTES:
            yield pending
            pending, size = [], 0
        pending.append(Entry(name, info.dtype, info.shape, info.nbytes, partial(checkpoint.raw, name)))
        size += info.nbytes
    if pending:
        yield pending


def _no_data() -> memoryview:
    raise AssertionError("a written shard keeps no data")


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
        try:
            with open_member(folder, name) as file:
                size = os.fstat(file.fileno()).st_size
                if size > _MAX_COMPANION_BYTES:
                    raise FileRefused(f"{name} has {size:,} bytes, too many for its kind", folder / name, "restore the real file")
                yield name, file.readall()
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
