"""The front part of a GGUF file: metadata and the list of tensors, read without trusting a single count in it.

    "GGUF"  version u32  tensor count u64  pair count u64
    pairs   key: text, type: u32, value                           text = length u64 and bytes; array = type u32, count u64, values
    tensors name: text, dimensions: u32, sizes: u64 each (fastest first), quantization type: u32, offset: u64
    padding to the alignment, then the data, to which the offsets refer

Every count says how much a reader should allocate, so each is compared with the bytes that are left in the file before
anything is built. The gguf package's own reader maps the file and believes the counts; we use only its tables of block sizes
and its dequantization.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from marlinctl.errors import BadInput
from marlinctl.system.files import shown

MAGIC = b"GGUF"
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_TEXT, _ARRAY = 8, 9
_MAX_NAME = 1 << 16
_MAX_TEXT = 1 << 26
_MAX_ARRAY = 1 << 23  # entries; the largest vocabularies have 2^18 tokens and 2^19 merges
_MAX_ELEMENTS = 2**44
_AGAIN = "the file is damaged or cut; download it again"


@dataclass(frozen=True, slots=True)
class GgufTensor:
    name: str
    shape: tuple[int, ...]  # as torch writes it: slowest dimension first
    kind: int  # gguf.GGMLQuantizationType
    kind_name: str  # "Q4_K"
    offset: int  # absolute, in the file
    nbytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    path: Path
    facts: dict[str, Any]  # the metadata: numbers, texts and lists of these
    tensors: dict[str, GgufTensor]


def read_gguf_header(path: Path) -> GgufHeader:
    """Metadata and tensor list; BadInput for everything that does not add up."""
    with path.open("rb") as handle:
        cursor = _Cursor(handle, path, os.fstat(handle.fileno()).st_size)
        if cursor.take(4, "the magic number") != MAGIC:
            raise cursor.wrong("this is not a GGUF file")
        version = cursor.scalar("<I")
        if version not in (2, 3):
            raise cursor.wrong(f"GGUF version {version}; versions 2 and 3 are supported (little-endian)")
        tensor_count, pair_count = cursor.scalar("<Q"), cursor.scalar("<Q")
        cursor.require(tensor_count, 24, "tensors")
        cursor.require(pair_count, 13, "metadata pairs")
        facts: dict[str, Any] = {}
        for _ in range(pair_count):
            key = cursor.text(_MAX_NAME)
            if key in facts:
                raise cursor.wrong(f"the key {shown(key)!r} appears twice")
            facts[key] = cursor.value(cursor.scalar("<I"))
        return GgufHeader(path, facts, _tensors(cursor, tensor_count, facts.get("general.alignment", 32)))


def _tensors(cursor: _Cursor, count: int, alignment: object) -> dict[str, GgufTensor]:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise cursor.wrong(f"the alignment {shown(repr(alignment))} is not a power of two up to 2^20")
    listed: dict[str, tuple[tuple[int, ...], GGMLQuantizationType, int]] = {}
    for _ in range(count):
        name = cursor.text(_MAX_NAME)
        rank = cursor.scalar("<I")
        if not 1 <= rank <= 4:
            raise cursor.wrong(f"the tensor {shown(name)!r} has {rank} dimensions; 1 to 4 are possible")
        shape = tuple(cursor.scalar("<Q") for _ in range(rank))[::-1]
        kind, offset = cursor.scalar("<I"), cursor.scalar("<Q")
        if name in listed:
            raise cursor.wrong(f"the tensor {shown(name)!r} appears twice")
        if kind not in GGMLQuantizationType._value2member_map_:
            raise cursor.wrong(f"the tensor {shown(name)!r} has the unknown quantization type {kind}")
        if min(shape) < 1 or math.prod(shape) > _MAX_ELEMENTS:
            raise cursor.wrong(f"the tensor {shown(name)!r} has the impossible shape {list(shape)}")
        listed[name] = shape, GGMLQuantizationType(kind), offset
    base = -(-cursor.position // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    reached = base
    for name, (shape, kind, offset) in sorted(listed.items(), key=lambda item: item[1][2]):
        per_block, block_bytes = GGML_QUANT_SIZES[kind]
        if shape[-1] % per_block:
            raise cursor.wrong(f"the rows of {shown(name)!r} have {shape[-1]} numbers, no multiple of {kind.name}'s block of {per_block}")
        nbytes = math.prod(shape) // per_block * block_bytes
        if base + offset < reached or offset % alignment:
            raise cursor.wrong(f"the tensor {shown(name)!r} overlaps another one, or does not begin at a multiple of {alignment}")
        reached = base + offset + nbytes
        if reached > cursor.size:
            raise cursor.wrong(f"truncated: the tensor {shown(name)!r} ends at byte {reached:,}, the file has {cursor.size:,}")
        tensors[name] = GgufTensor(name, shape, int(kind), kind.name, base + offset, nbytes)
    return {name: tensors[name] for name in listed}


class _Cursor:
    """Reads forward through the file and knows how many bytes are left."""

    def __init__(self, handle: BinaryIO, path: Path, size: int) -> None:
        self.handle, self.path, self.size, self.position = handle, path, size, 0

    def take(self, count: int, what: str) -> bytes:
        data = self.handle.read(count) if count <= self.size - self.position else b""
        if len(data) != count:
            raise self.wrong(f"truncated: the file has {self.size:,} bytes and ends inside {what}")
        self.position += count
        return data

    def scalar(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form), "the header"))[0]

    def text(self, limit: int) -> str:
        length = self.scalar("<Q")
        if length > limit:
            raise self.wrong(f"a text of {length:,} bytes; at most {limit:,} are possible here")
        raw = self.take(length, "a text")
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.wrong("a text that is not UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _TEXT:
            return self.text(_MAX_TEXT)
        if kind != _ARRAY:
            raise self.wrong(f"the unknown value type {kind}")
        inner, count = self.scalar("<I"), self.scalar("<Q")
        if count > _MAX_ARRAY:
            raise self.wrong(f"an array of {count:,} entries; at most {_MAX_ARRAY:,} are possible")
        if inner == _TEXT:
            self.require(count, 8, "texts")
            return [self.text(_MAX_TEXT) for _ in range(count)]
        if inner not in _SCALARS:
            raise self.wrong(f"an array of values of type {inner}")
        form = _SCALARS[inner]
        self.require(count, struct.calcsize(form), "numbers")
        return list(struct.unpack(f"<{count}{form[1]}", self.take(count * struct.calcsize(form), "an array")))

    def require(self, count: int, at_least: int, what: str) -> None:
        """`count` things of `at_least` bytes each must still fit into the file."""
        if count * at_least > self.size - self.position:
            raise self.wrong(f"truncated or damaged: {count:,} {what} cannot lie in the {self.size - self.position:,} bytes that are left")

    def wrong(self, what: str) -> BadInput:
        return BadInput("E320", what, where=f"{self.path}, byte {self.position}", fix=_AGAIN)
