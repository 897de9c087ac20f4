"""Files that are there as a whole, on the disk, or not at all; and what is said when the disk refuses.

    temporary name ─► write ─► fsync ─► rename (─► fsync of the folder)       a file with its final name is a whole file
    a journal:        append a line ─► fsync                                  a line without its end was never finished

No link is followed, because a folder may come from a stranger: the temporary file is new and has a name that cannot be guessed, a link with
the final name is replaced by the file, and what is appended to is a regular file or refused.

The shards of a checkpoint (writer.py) and everything in a job's folder (jobs/journal.py) are written here. Not by safetensors' save_file:
that makes files with mode 0600, does not fsync, and needs all tensors of a shard in memory, while untouched tensors are copied from the
mapped source as bytes. The format is eight bytes of header length, the header as JSON, and the tensors without gaps, widest dtype
first so that each is aligned.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marlinctl.errors import ResourceProblem

if TYPE_CHECKING:
    from torch import Tensor

_CHUNK = 64 << 20
_TEMPORARY = re.compile(r"\.marlinctl-[0-9a-f]{16}\.part")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a shard: what the header says, and its bytes when they are asked for."""

    name: str
    dtype: str  # safetensors spelling
    shape: tuple[int, ...]
    size: int
    data: Callable[[], memoryview]
    lies: tuple[Path, int] | None = None  # file and first byte, where it is written already and need not be read to be copied


def temporary_name() -> str:
    """A name for a file that is being written. A run that is killed leaves it behind; no loader takes it for anything."""
    return f".marlinctl-{secrets.token_hex(8)}.part"


def is_temporary(name: str) -> bool:
    return _TEMPORARY.fullmatch(name) is not None


def canonical(document: Mapping[str, Any], *, finite: bool = True) -> bytes:
    """JSON with one spelling: equal documents are equal bytes. ValueError for NaN and infinity, unless it need not be `finite`.

    A path whose bytes are no UTF-8 is half of a surrogate pair to Python; JSON spells that \\udcff.
    """
    text = json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=not finite) + "\n"
    return text.encode("utf-8", "backslashreplace")


def write_tensors(target: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file outside of a checkpoint: there as a whole, on the disk, or not at all."""
    entries = [tensor_entry(name, tensor) for name, tensor in tensors.items()]
    write_entries(target, in_file_order(entries))
    with disk_problems(target):
        sync_folder(target.parent)


def write_document(target: Path, document: Mapping[str, Any]) -> None:
    """The same for a JSON document."""
    write_bytes(target, canonical(document))


def write_bytes(target: Path, data: bytes) -> None:
    """The same for anything else."""
    with disk_problems(target, len(data)), whole_file(target) as file:
        file.write(data)
    with disk_problems(target):
        sync_folder(target.parent)


def append_line(target: Path, document: Mapping[str, Any]) -> None:
    """One JSON document as a further line of a file; on the disk when this returns."""
    data = json.dumps(document, separators=(",", ":"), allow_nan=False).encode() + b"\n"
    new = not os.path.lexists(target)
    with disk_problems(target, len(data)), os.fdopen(open_regular(target, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        if new:
            sync_folder(target.parent)


def in_file_order(entries: Iterable[Entry]) -> list[Entry]:
    """Widest dtype first, then by name."""
    return sorted(entries, key=lambda entry: (-DTYPE_BYTES[entry.dtype], entry.name))


def write_entries(target: Path, entries: Sequence[Entry]) -> None:
    needed = sum(entry.size for entry in entries)
    with disk_problems(target, needed), whole_file(target) as file:
        file.write(header_of(entries))
        for entry in entries:
            data = entry.data().cast("B")
            if len(data) != entry.size:
                raise ValueError(f"tensor {entry.name} has {len(data)} bytes, its shape says {entry.size}")
            for begin in range(0, len(data), _CHUNK):
                file.write(data[begin : begin + _CHUNK])


def header_of(entries: Iterable[Entry]) -> bytes:
    return safetensors_header((entry.name, entry.dtype, entry.shape, entry.size) for entry in entries)


def tensor_entry(name: str, tensor: Tensor) -> Entry:
    import torch

    names = {
        torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
        torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
        torch.float8_e4m3fn: "F8_E4M3",
    }  # fmt: skip
    if tensor.dtype not in names:
        raise ValueError(f"tensor {name} has dtype {tensor.dtype}, which is not written")

    def data() -> memoryview:
        flat = tensor.detach().contiguous().cpu().reshape(-1)
        return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")  # type: ignore[arg-type]  # numpy's stubs

    return Entry(name, names[tensor.dtype], tuple(tensor.shape), tensor.numel() * tensor.element_size(), data)


def read_part(path: Path, begin: int, size: int) -> memoryview:
    with path.open("rb") as file:
        file.seek(begin)
        return memoryview(file.read(size))


def safetensors_header(tensors: Iterable[tuple[str, str, Sequence[int], int]]) -> bytes:
    """Length and header of a file of tensors (name, dtype, shape, bytes), which follow it in this order without gaps."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses a shard that does not say so
    begin = 0
    for name, dtype, shape, size in tensors:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, begin + size]}
        begin += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@contextmanager
def whole_file(target: Path) -> Iterator[Any]:
    """A file that gets its name only when all of it is on the disk. Permissions follow the umask."""
    temporary = target.with_name(temporary_name())
    try:
        with temporary.open("xb") as file:  # O_EXCL: neither a file that is there nor what a link leads to
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def open_regular(path: Path, flags: int) -> int:
    """A descriptor for writing into a file that stays where it is. OSError for a link and for what is not a regular file."""
    if path.is_symlink():  # O_NOFOLLOW refuses it too, and speaks of too many levels
        raise OSError(errno.ELOOP, "what is there is a link, which is not followed", str(path))
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)  # a FIFO would wait for a reader
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "what is there is not a regular file", str(path))
    return descriptor


def make_folder(path: Path) -> None:
    """A folder, or the one that is there already. NotADirectoryError for a link to one: what is written would lie elsewhere."""
    try:
        path.mkdir()
    except FileExistsError:
        if path.is_symlink() or not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "what is there is not a folder, or a link to one", str(path)) from None


def sync_folder(folder: Path) -> None:
    """The names of the files in a folder are on the disk when this returns; of a file its contents."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def disk_problems(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn a failing disk into a ResourceProblem that says how much was needed and how much is free."""
    try:
        yield
    except OSError as problem:
        free = None
        with suppress(OSError):
            free = shutil.disk_usage(path.parent).free
        if problem.errno in FULL:
            raise disk_full(path, needed, free) from problem
        raise ResourceProblem(
            "E500",
            f"writing failed: {problem.strerror or problem}",
            where=str(path),
            fix="check the disk or choose another output folder; nothing was published",
        ) from problem


def disk_full(path: Path, needed: int | None, free: int | None) -> ResourceProblem:
    numbers = [f"{needed:,} bytes were needed"] if needed else []
    numbers += [f"{free:,} are free"] if free is not None else []
    return ResourceProblem(
        "E500",
        "the disk is full, or a quota or file-size limit is reached" + (f": {', '.join(numbers)}" if numbers else ""),
        where=str(path),
        fix="free some space or choose another disk; nothing was published and an existing output is untouched",
    )
