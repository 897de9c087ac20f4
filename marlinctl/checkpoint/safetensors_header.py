"""The header of a safetensors file, parsed strictly and one entry at a time.

    8 bytes   length of the header, little endian
    header    {"name": {"dtype": "F16", "shape": [576, 64], "data_offsets": [0, 73728]}, ..., "__metadata__": {"k": "v"}}
    data      the tensors, back to back; data_offsets count from the first byte after the header

The file decides how long its header is (the format allows 100 MB), so a hostile one could make a JSON parser build
gigabytes of objects before we see what it describes. The grammar is small, and so is this scanner: it reads the mapped
bytes with two regular expressions and keeps nothing but the entries that are well formed. A wrong header fails at its
first wrong byte, in a few kilobytes of memory.

What is refused, though other readers take it: a duplicate key, and everything that leaves a byte of the file unclaimed or
claimed twice (a gap can hide data, an overlap makes two tensors share storage).
"""

from __future__ import annotations

import codecs
import json
import math
import mmap
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from marlinctl.errors import Problem
from marlinctl.system.atomic import DTYPE_BYTES
from marlinctl.system.files import DuplicateKey, FileRefused, open_member, shown, unique_keys

MAX_HEADER_BYTES = 100_000_000
MAX_RANK = 8
MAX_ELEMENTS = 2**48  # half a petabyte of F16; beyond it a size is a mistake or an attack
MAX_PROBLEMS = 20  # per file; a file with more is simply not a checkpoint

MAX_NAME_BYTES = 4096
MAX_METADATA_KEYS = 10_000

_TEXT = rb'"[^"\\\x00-\x1f]*+(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})[^"\\\x00-\x1f]*+)*+"'
_STRING = re.compile(_TEXT)
_KEY = re.compile(rb"(" + _TEXT + rb")[ \t\r\n]*:[ \t\r\n]*")
_ENTRY = re.compile(rb"\{[^{}]{0,4096}\}")  # an entry has no inner objects; 4 KB hold more than 100 dimensions
_SPACE = re.compile(rb"[ \t\r\n]*+")
_DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)
_LFS = b"version https://git-lfs"
_AGAIN = "download the file again"


@dataclass(frozen=True, slots=True)
class Cut:
    """A tensor that is a part of a stored matrix: rows first, first + step, ... of it; of its transpose, where `transposed`."""

    matrix: tuple[int, int]  # as it is stored
    transposed: bool
    first: int
    step: int


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies."""

    name: str
    dtype: str  # a key of DTYPE_BYTES
    shape: tuple[int, ...]
    file: Path
    begin: int  # absolute byte range in the file
    end: int
    cut: Cut | None = None  # what lies there is more than the tensor (fused_experts.py)

    @property
    def nbytes(self) -> int:
        return self.end - self.begin if self.cut is None else math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def read_header(folder: Path, name: str) -> tuple[dict[str, TensorInfo], list[Problem]]:
    """The tensors of one file of `folder`, and everything that is wrong with it (then the tensors are not to be used)."""
    where = folder / name
    try:
        with open_member(folder, name) as handle:
            size = os.fstat(handle.fileno()).st_size
            if size < 8:
                what = "the file is empty" if size == 0 else f"the file has {size} bytes, too few for a safetensors header"
                raise FileRefused(what, where, _AGAIN)
            with mmap.mmap(handle.fileno(), size, access=mmap.ACCESS_READ) as data:
                return _parse(data, size, where)
    except FileRefused as refused:
        return {}, [refused.problem]


def header_bytes(folder: Path, name: str) -> bytes:
    """The length prefix and header as they lie in the file; for fingerprints, after read_header has accepted the file."""
    with open_member(folder, name) as handle:
        prefix = handle.read(8)
        return prefix + handle.read(header_length(prefix))


def header_length(front: bytes) -> int:
    """Bytes of the header behind the eight that say so; `front` begins with them."""
    return int.from_bytes(front[:8], "little")


def _parse(data: mmap.mmap, size: int, where: Path) -> tuple[dict[str, TensorInfo], list[Problem]]:
    if data[: len(_LFS)] == _LFS:
        raise FileRefused("this is a git-LFS pointer, not the weights", where, "run git lfs pull in the folder")
    length = header_length(data[:8])
    if length > MAX_HEADER_BYTES:
        what = f"the header claims {length:,} bytes; the format allows {MAX_HEADER_BYTES:,}"
        raise FileRefused(what, where, f"this is not a safetensors file; {_AGAIN}")
    if length < 2:
        raise FileRefused(f"the header claims {length} bytes; the shortest has 2", where, f"this is not a safetensors file; {_AGAIN}")
    if 8 + length > size:
        raise FileRefused(f"truncated: the header alone needs {8 + length:,} bytes, the file has {size:,}", where, _AGAIN)
    _require_utf8(data, 8, 8 + length, where)
    entries = _Scanner(data, 8, 8 + length, where).entries()
    return _tensors(entries, where, base=8 + length, size=size)


def _require_utf8(data: mmap.mmap, begin: int, end: int, where: Path) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(begin, end, 1 << 20):
        stop = min(start + (1 << 20), end)
        try:
            decoder.decode(data[start:stop], final=stop == end)
        except UnicodeDecodeError:
            raise FileRefused(f"the header is not UTF-8 (in bytes {start}..{stop})", where, f"the header is damaged; {_AGAIN}") from None


class _Scanner:
    """A cursor over the header: `{ "name" : entry , ... }`. Every method stops at the first wrong byte."""

    def __init__(self, data: mmap.mmap, begin: int, end: int, where: Path) -> None:
        self.data, self.position, self.end, self.where = data, begin, end, where

    def entries(self) -> dict[str, dict[str, object]]:
        """Tensor name -> entry, as written."""
        entries: dict[str, dict[str, object]] = {}
        metadata_seen = False
        for name in self._keys():
            if name == "__metadata__":
                if metadata_seen:
                    raise self._wrong("__metadata__ appears twice")
                metadata_seen = True
                self._skip_metadata()
            elif name in entries:
                raise self._wrong(f"the tensor {shown(name)!r} appears twice")
            else:
                entries[name] = self._entry(name)
        if self.position != self.end:
            raise self._wrong("it continues after its closing brace")
        return entries

    def _keys(self) -> Iterator[str]:
        """The keys of the object at the cursor. The caller consumes each value before it asks for the next key."""
        self._expect(b"{", "it must begin with {")
        self._skip_space()
        if self._at(b"}"):
            return
        while True:
            match = _KEY.match(self.data, self.position, self.end)
            if match is None:
                raise self._wrong("expected a name in quotes and a colon")
            if match.end(1) - match.start(1) > MAX_NAME_BYTES:
                raise self._wrong(f"a name longer than {MAX_NAME_BYTES} bytes")
            name = self._text(match[1])
            self.position = match.end()
            yield name
            self._skip_space()
            if self._at(b"}"):
                return
            self._expect(b",", "expected , or }")

    def _skip_metadata(self) -> None:
        """The texts of __metadata__ are not kept, only proved to be texts."""
        seen: set[str] = set()
        for key in self._keys():
            if key in seen or len(seen) >= MAX_METADATA_KEYS:
                raise self._wrong("a key of __metadata__ appears twice, or there are too many")
            seen.add(key)
            match = _STRING.match(self.data, self.position, self.end)
            if match is None:
                raise self._wrong("__metadata__ may hold texts only")
            self.position = match.end()

    def _entry(self, name: str) -> dict[str, object]:
        match = _ENTRY.match(self.data, self.position, self.end)
        if match is None:
            raise self._wrong(f"{shown(name)!r} must be an object of dtype, shape and data_offsets")
        try:
            entry = _DECODER.decode(match[0].decode())
        except DuplicateKey as error:
            raise self._wrong(f"the key {shown(error.key)!r} appears twice") from None
        except (ValueError, RecursionError):
            raise self._wrong("an entry that is not JSON") from None
        self.position = match.end()
        return dict(entry)

    def _text(self, raw: bytes) -> str:
        text = str(json.loads(raw))
        if any("\ud800" <= c <= "\udfff" for c in text):  # half a surrogate pair is legal JSON and no text
            raise self._wrong("a name that is not text")
        return text

    def _at(self, byte: bytes) -> bool:
        """Step over `byte` if it is next and lies inside the header."""
        if self.position < self.end and self.data[self.position : self.position + 1] == byte:
            self.position += 1
            self._skip_space()
            return True
        return False

    def _expect(self, byte: bytes, otherwise: str) -> None:
        if not self._at(byte):
            raise self._wrong(otherwise)

    def _skip_space(self) -> None:
        match = _SPACE.match(self.data, self.position, self.end)
        self.position = match.end() if match else self.position

    def _wrong(self, what: str) -> FileRefused:
        return FileRefused(f"not a safetensors header: {what}, at byte {self.position}", self.where, f"the header is damaged; {_AGAIN}")


def _tensors(entries: dict[str, dict[str, object]], where: Path, *, base: int, size: int) -> tuple[dict[str, TensorInfo], list[Problem]]:
    """Check what each entry says, then that the ranges tile the data without a gap, an overlap or a rest."""
    tensors: dict[str, TensorInfo] = {}
    problems: list[Problem] = []
    for name, entry in entries.items():
        try:
            dtype, shape, begin, end = _checked(name, entry)
        except ValueError as error:
            problems.append(Problem(str(error), f"{where}, tensor {shown(name)}", f"the header is damaged; {_AGAIN}"))
            if len(problems) >= MAX_PROBLEMS:
                break
        else:
            tensors[name] = TensorInfo(name, dtype, shape, where, base + begin, base + end)
    problems = problems or _coverage_problems(tensors, where, base, size)
    return ({}, problems) if problems else (tensors, [])


def _checked(name: str, entry: dict[str, object]) -> tuple[str, tuple[int, ...], int, int]:
    """dtype, shape, begin and end of one entry; ValueError says what is wrong with it."""
    if not name:
        raise ValueError("a tensor without a name")
    if set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"an entry must hold dtype, shape and data_offsets, this one holds {shown(', '.join(sorted(entry))) or 'nothing'}")
    dtype, shape, offsets = entry["dtype"], _naturals(entry["shape"]), _naturals(entry["data_offsets"])
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise ValueError(f"the dtype {shown(repr(dtype), 60)} is unknown; supported: {', '.join(DTYPE_BYTES)}")
    if shape is None:
        raise ValueError("shape must be a list of whole numbers >= 0")
    if len(shape) > MAX_RANK:
        raise ValueError(f"the shape has {len(shape)} dimensions; at most {MAX_RANK} are supported")
    elements = math.prod(shape)
    if max(elements, *shape, 0) > MAX_ELEMENTS:
        raise ValueError(f"the shape {shown(str(list(shape)), 100)} is impossibly large")
    if offsets is None or len(offsets) != 2 or offsets[1] < offsets[0]:
        raise ValueError(f"data_offsets must be two rising whole numbers >= 0, got {shown(repr(entry['data_offsets']), 60)}")
    begin, end = offsets
    needed = elements * DTYPE_BYTES[dtype]
    if end - begin != needed:
        raise ValueError(f"{dtype} {list(shape)} needs {needed:,} bytes, data_offsets {begin}..{end} give {end - begin:,}")
    return dtype, shape, begin, end


def _naturals(value: object) -> tuple[int, ...] | None:
    if isinstance(value, list) and all(type(item) is int and item >= 0 for item in value):
        return tuple(value)
    return None


def _coverage_problems(tensors: dict[str, TensorInfo], where: Path, base: int, size: int) -> list[Problem]:
    problems: list[Problem] = []
    reached = base
    for info in sorted(tensors.values(), key=lambda t: (t.begin, t.end)):
        if info.begin != reached:
            kind = "overlaps the tensor before it" if info.begin < reached else f"leaves a gap of {info.begin - reached:,} bytes before it"
            what = f"the range {info.begin - base}..{info.end - base} of the data {kind}"
            problems.append(Problem(what, f"{where}, tensor {shown(info.name)}", f"the header is damaged; {_AGAIN}"))
        reached = max(reached, info.end)
        if len(problems) >= MAX_PROBLEMS:
            return problems
    if reached > size:
        problems.append(Problem(f"truncated: the header describes {reached:,} bytes, the file has {size:,}", str(where), _AGAIN))
    elif reached < size:
        what = f"{size - reached:,} bytes lie behind the last tensor: the header describes {reached:,} bytes, the file has {size:,}"
        problems.append(Problem(what, str(where), _AGAIN))
    return problems
