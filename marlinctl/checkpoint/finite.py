"""Is there a NaN or an infinity in the weights, a number too large for 4 bits, or nothing at all? Found before the job, not after it.

One NaN in one weight turns a Hessian solve, and with it a whole layer, into NaN; loaders do not look. The scan streams: a chunk is
viewed as integers, without their sign bits. What is left orders like the numbers themselves, and everything from the bit pattern of
infinity upwards is infinity or NaN, so the largest integer of the chunk answers for all of it. A tensor whose largest is 0 holds nothing
but zeros. Columns that hold one value in every row are those of the first row that no later row contradicts; of a trained matrix the
second row leaves almost none, so looking on costs nothing. The chunk stays in the processor's cache between the passes; contents.py reads
it, and hashes it there too.

4.3 GB/s on one core of a server processor (fp16, file in the page cache, 2026-11); torch.isfinite gives 0.5. numpy rather than
torch: these loops are short, and torch's thread pool makes them 30 times slower as soon as another process wants the cores.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import TYPE_CHECKING

from marlinctl.errors import NumericalProblem, Problem
from marlinctl.system.files import shown

if TYPE_CHECKING:
    import numpy as np

    from marlinctl.checkpoint.reader import Checkpoint
    from marlinctl.checkpoint.safetensors_header import TensorInfo

CHUNK_BYTES = 1 << 18  # stays in the processor's cache; a multiple of every dtype's width
_FEWEST_ROWS = 8  # two bfloat16 weights are equal by chance once in a few hundred times, eight never
LARGEST_IN_4_BITS = 7 * 65280.0  # the largest positive code times the largest scale that float16 and bfloat16 hold
# dtype -> (unsigned integer of the same width, the bit pattern of +infinity)
_INFINITY = {"F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80), "F32": ("<u4", 0x7F80_0000), "F64": ("<u8", 0x7FF0_0000_0000_0000)}


def scan_finite(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """NumericalProblem E620 that names every one of these tensors with a NaN or infinity. Reads them alone, and takes no digests."""
    import numpy as np

    buffer, scratch = np.empty(CHUNK_BYTES, dtype=np.uint8), np.empty(CHUNK_BYTES, dtype=np.uint8)
    problems: list[Problem] = []
    for info in filter(TensorScan.reads, (checkpoint.tensors[name] for name in names)):
        look = TensorScan(info, for_4_bits=False)
        for start in range(info.begin, info.end, CHUNK_BYTES):
            chunk = buffer[: min(CHUNK_BYTES, info.end - start)]
            checkpoint.read_into(info, start, chunk.data)
            look.see(chunk, start, scratch)
        if look.problem is not None:
            problems.append(look.problem[1])
    if problems:
        raise NumericalProblem.from_problems("E620", problems)


class TensorScan:
    """One tensor, chunk by chunk in the order of the file. `problem` is the first NaN or infinity, or else the first weight beyond 4 bits.

    problem: (error id, Problem); E620 for a NaN or infinity, E604 for a weight that no scale reaches, where `for_4_bits` asks for it.
    zero: there are weights, and all seen so far are zero. constant: columns with one value in every row, of a matrix that is not zero and
    has enough rows to decide.
    """

    def __init__(self, info: TensorInfo, *, for_4_bits: bool) -> None:
        integer, self._infinity = _INFINITY[info.dtype]
        self._info, self._integer = info, integer
        self._limit = _limit(info.dtype) if for_4_bits else self._infinity
        self.problem: tuple[str, Problem] | None = None
        self.zero = info.nbytes > 0
        self._columns = _Columns(info.shape[1]) if len(info.shape) == 2 and info.shape[0] >= _FEWEST_ROWS else None

    @property
    def constant(self) -> int:
        return len(self._columns.left) if self._columns is not None and not self.zero else 0

    @staticmethod
    def reads(info: TensorInfo) -> bool:
        """Integers are finite by nature and are stepped over."""
        return info.dtype in _INFINITY

    def see(self, chunk: np.ndarray, position: int, scratch: np.ndarray) -> None:
        """chunk: uint8, whole numbers of the tensor, from `position` of the file on; scratch: uint8, at least as long, is written over."""
        import numpy as np

        if self.problem is not None and self.problem[0] == "E620":
            return
        numbers = chunk.view(self._integer)
        sign = 1 << (8 * numbers.itemsize - 1)
        if self._columns is not None and len(self._columns.left):
            self._columns.see(numbers, (position - self._info.begin) // numbers.itemsize, sign)
        magnitudes = np.bitwise_and(numbers, sign - 1, out=scratch[: chunk.nbytes].view(self._integer))
        largest = magnitudes.max()
        self.zero = self.zero and largest == 0
        if largest < self._limit or (self.problem is not None and largest < self._infinity):
            return
        first = int(np.argmax(magnitudes >= (self._infinity if largest >= self._infinity else self._limit)))  # the first True
        self.problem = self._describe(int(numbers[first]), position + first * numbers.itemsize, numbers.itemsize)

    def _describe(self, bits: int, position: int, itemsize: int) -> tuple[str, Problem]:
        info, sign = self._info, 1 << (8 * itemsize - 1)
        name = f"{shown(info.name)}{_unravel((position - info.begin) // itemsize, info.shape)}"
        where = f"{info.file}, byte {position}"
        if bits & (sign - 1) >= self._infinity:
            value = "nan" if bits & (sign - 1) > self._infinity else "-inf" if bits & sign else "inf"
            fix = "the checkpoint is damaged or its training diverged; download it again or choose another one"
            return "E620", Problem(f"{name} is {value}", where, fix)
        what = f"{name} is {_value(bits, info.dtype):.4g}; 4 bits with a float16 scale hold up to {LARGEST_IN_4_BITS:,.0f}"
        return "E604", Problem(what, where, f"leave this linear 16-bit: --skip {shown(info.name).removesuffix('.weight')}")


class _Columns:
    """Which columns of a matrix [N, K] have held one value so far."""

    def __init__(self, k: int) -> None:
        import numpy as np

        self.left = np.arange(k)  # in order
        self._k, self._first = k, np.zeros(k, dtype=np.uint64)

    def see(self, numbers: np.ndarray, begin: int, sign: int) -> None:
        """numbers: bit patterns of the weights, as they lie in the file; begin: how many lie before them."""
        import numpy as np

        done = 0
        while done < len(numbers) and len(self.left):
            row, column = divmod(begin + done, self._k)
            part = numbers[done : done + self._k - column]
            done += len(part)
            low, high = np.searchsorted(self.left, (column, column + len(part)))
            mine = self.left[low:high]
            values = part[mine - column]
            values = np.where(values == sign, 0, values)  # minus zero
            if row == 0:
                self._first[mine] = values
            elif len(moved := mine[values != self._first[mine]]):
                self.left = np.setdiff1d(self.left, moved, assume_unique=True)


def _limit(dtype: str) -> int:
    """The bit pattern behind that of the largest weight that 4 bits hold, or of infinity where that comes first."""
    double, single = struct.pack("<d", LARGEST_IN_4_BITS), struct.pack("<f", LARGEST_IN_4_BITS)
    patterns = {"F32": single, "BF16": single[2:], "F64": double}  # cut for bfloat16: the largest that it has below
    return int.from_bytes(patterns[dtype], "little") + 1 if dtype in patterns else _INFINITY[dtype][1]


def _value(bits: int, dtype: str) -> float:
    widened = bits << 16 if dtype == "BF16" else bits
    number: float = struct.unpack("<d" if dtype == "F64" else "<f", widened.to_bytes(8 if dtype == "F64" else 4, "little"))[0]
    return number


def _unravel(flat: int, shape: tuple[int, ...]) -> list[int]:
    place = []
    for size in reversed(shape):
        flat, index = divmod(flat, size)
        place.append(index)
    return place[::-1]
