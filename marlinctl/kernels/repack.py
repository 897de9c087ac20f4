"""The words of GPTQ and of compressed-tensors as MARLIN tiles: on a GPU by csrc/repack.cu, which moves bits at the rate of memory, else by
pack/marlin.py. Both give the same words.
"""

from __future__ import annotations

import threading
from functools import lru_cache

import torch
from torch import Tensor

from marlinctl.kernels import jit
from marlinctl.kernels.functions import Arguments, Function, checked_architecture, enqueue, load_function
from marlinctl.pack import marlin
from marlinctl.pack.tile import TILE_K, TILE_N

THREADS = 256  # of a CTA, which makes a tile with each of its warps
SHARED_BYTES = 4 * (THREADS // 16) * (TILE_N + 1)  # 16 rows of words, each a word longer than its columns
DEFINES = (f"SHARED_BYTES={SHARED_BYTES}",)


def repack(words: Tensor) -> Tensor:
    """qweight int32 [K/16, 2N] out of words int32 [K/8, N], of any strides. K and N: multiples of 64. Needs no memory beside the result.

    Raises what marlin.repack raises; on a GPU also what functions.load_function raises.
    """
    marlin.check_words(words)
    if words.device.type != "cuda":
        return marlin.repack(words)
    with torch.cuda.device(words.device):
        return _on_gpu(words, _loaded(words.device.index))


def _on_gpu(words: Tensor, function: Function) -> Tensor:
    (rows, n), (row_stride, column_stride) = words.shape, words.stride()
    qweight = torch.empty(rows // 2, 2 * n, dtype=torch.int32, device=words.device)
    arguments = _mine.arguments
    arguments.pack(words.data_ptr(), qweight.data_ptr(), n, rows, row_stride, column_stride)
    tiles, warps = 8 * rows // TILE_K, THREADS // 32
    enqueue(function, n // TILE_N * -(-tiles // warps), torch.cuda.current_stream(words.device).cuda_stream, arguments, overlap=False)
    return qweight


@lru_cache(maxsize=64)
def _loaded(index: int) -> Function:
    device = torch.device("cuda", index)
    return load_function(jit.SOURCES, "repack", DEFINES, checked_architecture, THREADS, SHARED_BYTES, device, jit.default_folder())


class _Mine(threading.local):
    """What each thread has for itself: the driver reads arguments while other threads run."""

    def __init__(self) -> None:
        self.arguments = Arguments(2, 3)


_mine = _Mine()
