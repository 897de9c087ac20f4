"""Opening files of an untrusted checkpoint.

A checkpoint folder may come from anywhere. Three things must not happen before we have judged it: a path in an index must
not lead out of the folder, a FIFO or a device must not be opened (reading a FIFO waits for a writer, forever), and a small
file must not make us use a lot of memory. So a path is resolved first, its kind is read with stat, and only a regular file
is opened (with O_NONBLOCK, in case it is swapped between the two steps, and fstat asks again). `open_plain` does the same for a
file that the person named, or that marlinctl wrote itself and finds again.

Symbolic links are followed inside the folder. One more place is allowed: the hub cache, whose snapshots are links,

    models--org--name/snapshots/<commit>/model.safetensors -> ../../blobs/<sha256>

so a folder of that form may point into the `blobs` beside its own `snapshots`.

JSON is read strictly: a duplicate key means that two readers may see two different files, so it is refused.
"""

from __future__ import annotations

import json
import os
import stat
from io import FileIO
from pathlib import Path, PurePosixPath
from typing import Any

from marlinctl.errors import Problem, UsageError
from marlinctl.system.console import printable

MAX_JSON_BYTES = 64_000_000  # the largest index seen in the wild is below 20 MB
MAX_JSON_VALUES = 2_000_000  # that index names 300,000 tensors
MAX_OWN_BYTES, MAX_OWN_VALUES = 512_000_000, 24_000_000  # manifests and reports of marlinctl: 600 bytes and 25 values for each linear
_TEMPLATES = ("additional_chat_templates", "chat_templates")  # folders in which transformers looks for templates
_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe (FIFO)"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)


class FileRefused(Exception):
    """A file of the checkpoint cannot be used; `problem` says why. Callers collect these into one BadInput."""

    def __init__(self, what: str, where: Path | str, fix: str) -> None:
        super().__init__(what)
        self.problem = Problem(what, printable(str(where), one_line=True), fix)


def shown(text: str, limit: int = 200) -> str:
    """A name or value from a checkpoint as it may appear in an error: one line, no control characters, not megabytes long."""
    return printable(text if len(text) <= limit else text[:limit] + "...", one_line=True)


def brief(value: object) -> str:
    """A value as JSON, short."""
    return shown(json.dumps(value, default=str), 80)


def member(folder: Path, name: str) -> Path:
    """The real path of `name` inside `folder`, after following links, or FileRefused. Nothing is opened."""
    where = folder / name.replace("\0", "\\0")
    pure = PurePosixPath(name)
    if not name or "\0" in name or "\\" in name or pure.is_absolute() or ".." in pure.parts or pure.name in ("", "."):
        raise FileRefused(
            f"the path {shown(name)!r} may leave the checkpoint folder",
            where,
            "a file of a checkpoint is named by its plain name, or by a path below the folder; get the checkpoint from a source you trust",
        )
    try:
        real = Path(os.path.realpath(folder / name, strict=True))
    except FileNotFoundError:
        raise FileRefused("the file is missing", where, "download it again, or copy the complete folder") from None
    except OSError as error:  # ELOOP, ENAMETOOLONG, EACCES, ENOTDIR
        raise FileRefused(f"the path cannot be followed: {error.strerror}", where, "replace the link by the file itself") from None
    if not any(real.is_relative_to(place) for place in _allowed_places(folder)):
        raise FileRefused(
            f"the link leads out of the checkpoint folder, to {shown(str(real))}",
            where,
            "copy the file into the folder (only links into the hub cache's own blobs folder are followed)",
        )
    return real


def open_member(folder: Path, name: str) -> FileIO:
    """Open a regular file of the checkpoint for reading; FileRefused for anything else. Never blocks."""
    return open_plain(member(folder, name), shown_as=folder / name)


def open_plain(path: Path, *, shown_as: Path | None = None) -> FileIO:
    """Open a regular file for reading, links followed; FileRefused for anything else. Never blocks."""
    where = shown_as or path
    try:
        _refuse_special(path.stat().st_mode, where)
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise FileRefused("the file is missing", where, "check the path") from None
    except ValueError:  # a zero byte in the path
        raise FileRefused("this cannot be the path of a file", where, "check the path") from None
    except OSError as error:
        fix = f"check its owner and mode (chmod u+r {shown(where.name)})"
        raise FileRefused(f"the file cannot be read: {error.strerror}", where, fix) from None
    handle = os.fdopen(descriptor, "rb", buffering=0)
    try:
        _refuse_special(os.fstat(descriptor).st_mode, where)
    except FileRefused:
        handle.close()
        raise
    return handle


def read_plain(path: Path, *, limit: int) -> bytes:
    """The bytes of a regular file of at most `limit` of them, or FileRefused."""
    with open_plain(path) as handle:
        return _whole(handle, path, limit)


def _whole(handle: FileIO, where: Path, limit: int) -> bytes:
    size = os.fstat(handle.fileno()).st_size
    data = handle.read(min(limit, max(size, 1 << 16)) + 1) if size <= limit else b""  # memory for so much is taken at once
    if max(size, len(data)) > limit:
        what = f"the file has {size:,} bytes, more than {limit:,}"
        raise FileRefused(what, where, "it is not what its name says; fetch or write it again")
    return data


def special_files(folder: Path) -> list[Problem]:
    """FIFOs, devices and sockets that lie in a model's folder: other libraries open files by their names, and would wait for ever."""
    places = [folder, *(place for name in _TEMPLATES if (place := folder / name).is_dir())]
    problems = []
    for path in (path for place in places for path in place.iterdir()):
        try:
            mode = path.stat().st_mode
            if not stat.S_ISDIR(mode):
                _refuse_special(mode, path)
        except FileRefused as refused:
            problems.append(refused.problem)
        except OSError:  # a link that leads nowhere: whoever needs the file says so
            continue
    return problems


def exists(folder: Path, name: str) -> bool:
    """Whether there is anything of that name, a dangling link included."""
    return os.path.lexists(folder / name)


def read_json(folder: Path, name: str, *, limit: int = MAX_JSON_BYTES, values: int = MAX_JSON_VALUES) -> Any:
    """The strictly parsed content of a JSON file of the checkpoint, or FileRefused."""
    with open_member(folder, name) as handle:
        data = _whole(handle, folder / name, limit)
    return parse_json(data, folder / name, values=values)


def read_plain_json(path: Path, *, limit: int = MAX_JSON_BYTES, values: int = MAX_JSON_VALUES) -> Any:
    """The same for a document that the person named or marlinctl wrote."""
    return parse_json(read_plain(path, limit=limit), path, values=values)


def parse_json(data: bytes, where: Path | str, *, values: int = MAX_JSON_VALUES) -> Any:
    """JSON without duplicate keys, of bounded depth and number of values, in UTF-8, or FileRefused.

    Four bytes (`[],`) become an object of 56, so the bytes alone bound little. Commas and brackets are counted, those in texts too.
    """
    again = "the file is damaged or cut; download it again"
    if data.count(b",") + data.count(b"[") + data.count(b"{") > values:
        raise FileRefused(f"the document holds more than {values:,} values", where, "it is not what its name says; download it again")
    if data.startswith(b"version https://git-lfs"):
        raise FileRefused("this is a git-LFS pointer, not the file itself", where, "run git lfs pull in the folder")
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=unique_keys)
    except UnicodeDecodeError as error:
        raise FileRefused(f"not UTF-8 at byte {error.start}", where, again) from None
    except json.JSONDecodeError as error:
        raise FileRefused(f"not JSON: {error.msg} at line {error.lineno}, column {error.colno}", where, again) from None
    except RecursionError:
        raise FileRefused("not usable as JSON: nested too deeply", where, again) from None
    except DuplicateKey as error:
        raise FileRefused(f"the key {shown(error.key)!r} appears twice in one object", where, again) from None
    except ValueError as error:  # a number of thousands of digits
        raise FileRefused(f"not usable as JSON: {shown(str(error))}", where, again) from None


def refuse_deep(document: Any, where: Path | str, limit: int = 100) -> None:
    """FileRefused for a document of more levels than any of its kind has: recursive readers call themselves once for each."""
    level = [document] if isinstance(document, (dict, list)) else []
    for _ in range(limit):
        items = (item for holder in level for item in (holder.values() if isinstance(holder, dict) else holder))
        level = [item for item in items if isinstance(item, (dict, list))]
        if not level:
            return
    raise FileRefused("not usable as JSON: nested too deeply", where, "the file is damaged or cut; download it again")


class DuplicateKey(Exception):
    """Raised inside the JSON parser; not a ValueError, so that it is not taken for a syntax error."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise DuplicateKey(key)
            seen.add(key)
    return found


def require_parent(path: Path, option: str) -> None:
    """UsageError E244 where no file can be made at `path`, before long work. Folders that are missing are made when it is written."""
    parent = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not parent.is_dir():
        raise UsageError("E244", f"{parent} is not a folder", where=option, fix="name a file elsewhere")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError("E244", f"{parent} cannot be written to", where=option, fix="name a file elsewhere")


def _refuse_special(mode: int, where: Path) -> None:
    if stat.S_ISREG(mode):
        return
    kind = next((text for test, text in _KINDS if test(mode)), "not a regular file")
    raise FileRefused(f"this is {kind}, not a file", where, "replace it by the file itself")


def _allowed_places(folder: Path) -> list[Path]:
    """The folder itself; for a snapshot of the hub cache also the blobs of the same repository."""
    real = Path(os.path.realpath(folder))
    places = [real]
    if real.parent.name == "snapshots":
        places.append(real.parent.parent / "blobs")
    return places
