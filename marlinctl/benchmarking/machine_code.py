"""What a cubin says about itself: registers and stack of a thread, without NVIDIA's tools and without a GPU.

A cubin is an ELF file. Its section .nv.info is a list of attributes, each four bytes and what follows them:

    byte 0  form       4: `size` bytes follow; otherwise the value is in bytes 2..3
    byte 1  attribute  0x2f: registers, 0x11: stack frame; what follows is the symbol of the function and the number, 32 bits each
    2..3    size

NVIDIA does not document it; the numbers are those that cuobjdump --dump-resource-usage prints for NVRTC 13.0's cubins of sm_80 to
sm_90a, which tests/benchmarking/test_machine_code.py compares. A cubin has one kernel here.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

SECTION_HEADER = struct.Struct("<IIQQQQIIQQ")  # name, type, flags, address, offset, size, link, info, alignment, entry size
SIZED, REGISTERS, FRAME = 4, 0x2F, 0x11


@dataclass(frozen=True, slots=True)
class Resources:
    """Of one thread. A stack is a spill, or an array that is indexed at run time: the kernels have none."""

    registers: int
    stack_bytes: int


def resources(cubin: bytes) -> Resources:
    """ValueError for bytes that are no cubin, or one without these attributes."""
    try:
        attributes = dict(_attributes(_section(cubin, b".nv.info")))
        return Resources(attributes[REGISTERS], attributes[FRAME])
    except (struct.error, KeyError, IndexError) as error:
        raise ValueError("this is not a cubin of one kernel: its ELF header names no registers") from error


def _section(cubin: bytes, wanted: bytes) -> bytes:
    if cubin[:4] != b"\x7fELF":
        raise KeyError("magic")
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [SECTION_HEADER.unpack_from(cubin, table + i * size) for i in range(count)]
    start = headers[names][4]
    for name, _, _, _, offset, length, *_ in headers:
        if cubin[start + name :].startswith(wanted + b"\0"):
            return cubin[offset : offset + length]
    raise KeyError(wanted)


def _attributes(section: bytes) -> list[tuple[int, int]]:
    """Attribute and number, of those with two 32-bit words behind them."""
    found, place = [], 0
    while place < len(section):
        form, attribute, size = struct.unpack_from("<BBH", section, place)
        place += 4
        if form == SIZED:
            if size == 8:
                found.append((attribute, struct.unpack_from("<II", section, place)[1]))
            place += size
    return found
