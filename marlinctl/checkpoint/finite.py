"""Is there a NaN or an infinity in the weights? Found before the job, not after it.

One NaN in one weight turns a Hessian solve, and with it a whole layer, into NaN; loaders do not look. The scan streams: a
chunk is read into one reused buffer, viewed as integers, and its sign bits are cleared. What is left orders like the numbers
themselves, and everything from the bit pattern of infinity upwards is infinity or NaN, so the largest integer of the chunk
answers for all of it. The chunk stays in the processor's cache between the two passes: 4.1 GB/s on one core of a server
processor, against 0.5 GB/s for torch.isfinite on the same chunks (fp16, file in the page cache, 2026-11).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from marlinctl.checkpoint.files import shown
from marlinctl.checkpoint.reader import torch_dtype
from marlinctl.errors import NumericalProblem, Problem

if TYPE_CHECKING:
    from torch import Tensor

    from marlinctl.checkpoint.header import TensorInfo
    from marlinctl.checkpoint.reader import Checkpoint
    from marlinctl.console import Progress

CHUNK_BYTES = 1 << 20
# dtype -> (integer of the same width, the bit pattern of +infinity)
_INFINITY = {"F16": ("int16", 0x7C00), "BF16": ("int16", 0x7F80), "F32": ("int32", 0x7F80_0000), "F64": ("int64", 0x7FF0_0000_0000_0000)}


def scan_finite(checkpoint: Checkpoint, names: Iterable[str], progress: Progress | None = None) -> None:
    """NumericalProblem that names every tensor with a NaN or infinity, with the first index. One progress step per tensor.

    Tensors of integers are finite by nature and are stepped over.
    """
    import torch

    buffer = torch.empty(CHUNK_BYTES, dtype=torch.uint8)
    problems: list[Problem] = []
    for name in names:
        info = checkpoint.tensors[name]
        if info.dtype in _INFINITY:
            flat = _first_nonfinite(checkpoint, info, buffer)
            if flat is not None:
                problems.append(_problem(checkpoint, info, flat))
        if progress is not None:
            progress.advance()
    if problems:
        raise NumericalProblem.from_problems("E620", problems)


def _first_nonfinite(checkpoint: Checkpoint, info: TensorInfo, buffer: Tensor) -> int | None:
    """Flat index of the first NaN or infinity."""
    import torch

    integer_name, infinity = _INFINITY[info.dtype]
    integer = getattr(torch, integer_name)
    magnitude_bits = torch.iinfo(integer).max  # all but the sign
    for start in range(info.begin, info.end, CHUNK_BYTES):
        stop = min(start + CHUNK_BYTES, info.end)
        chunk = buffer[: stop - start]
        checkpoint.read_into(info, start, memoryview(chunk.numpy()))
        magnitudes = chunk.view(integer).bitwise_and_(magnitude_bits)
        if int(magnitudes.max()) >= infinity:
            return (start - info.begin) // magnitudes.itemsize + int((magnitudes >= infinity).nonzero()[0, 0])
    return None


def _problem(checkpoint: Checkpoint, info: TensorInfo, flat: int) -> Problem:
    import torch

    value = torch.empty(1, dtype=torch_dtype(info))
    position = info.begin + flat * value.itemsize
    checkpoint.read_into(info, position, memoryview(value.view(torch.uint8).numpy()))
    return Problem(
        f"{shown(info.name)}{_unravel(flat, info.shape)} is {float(value)}",
        f"{info.file}, byte {position}",
        "the checkpoint is damaged or its training diverged; download it again or choose another one",
    )


def _unravel(flat: int, shape: tuple[int, ...]) -> list[int]:
    place = []
    for size in reversed(shape):
        flat, index = divmod(flat, size)
        place.append(index)
    return place[::-1]
