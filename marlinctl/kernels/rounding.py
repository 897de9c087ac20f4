"""Activations rounded to int8 on a GPU: csrc/round_activations.cu, and its launch on torch's current stream.

The result is that of activations.round_activations_for_tiles, bit for bit. A token is one CTA and stays in its registers up to K = 32,768;
of groups 128 threads take 32 at a time.
"""

from __future__ import annotations

import threading
from functools import lru_cache

import torch
from torch import Tensor

from marlinctl.kernels import jit
from marlinctl.kernels.activations import SCALES_IN_16_BYTES, RoundedActivations, check_group
from marlinctl.kernels.configurations import NUMBERS
from marlinctl.kernels.functions import Arguments, Function, checked_architecture, enqueue, load_function
from marlinctl.pack.types import padded
from marlinctl.quantize.scheme import ACTIVATION_GROUP

ROW = 8  # numbers in 16 bytes: K is a multiple of it
ALIGNMENT = 16  # bytes, of x
PIECE = 16  # codes that a thread writes at once
MOST_THREADS = 512  # of a CTA
GROUP_THREADS, GROUP_PIECES = 128, 2
SHARED_BYTES = MOST_THREADS // 32 * 4  # a maximum of each warp
MOST_UNITS = 2**32 - GROUP_THREADS  # groups of all tokens, which the kernel counts in 32 bits


def round_on_gpu(x: Tensor, group: int | None, overlap: bool = False, sparse: bool = False) -> RoundedActivations:
    """x [M, K], float16 or bfloat16, contiguous and aligned to 16 bytes, on a GPU. K: a multiple of 8; M > 0.

    group: None for one scale a token, or 128.
    overlap: on Hopper the kernel may be put on the GPU before the one before it on the stream has ended. It waits for it before it reads x.

    sparse: codes in the order of 2:4 tiles.

    ValueError for other tensors and groups; what functions.load_function raises.
    """
    check_group(group)
    if x.ndim != 2 or x.dtype not in NUMBERS or not x.is_contiguous() or x.shape[1] % ROW or x.numel() == 0 or x.data_ptr() % ALIGNMENT:
        what = f"{x.dtype} {list(x.shape)} at {x.data_ptr() % ALIGNMENT} bytes beyond a multiple of {ALIGNMENT}, strides {x.stride()}"
        raise ValueError(f"activations must be [M, K] float16 or bfloat16, contiguous, aligned, K a multiple of {ROW}, got {what}")
    if x.shape[0] * -(-x.shape[1] // ACTIVATION_GROUP) > MOST_UNITS:
        raise ValueError(f"activations {list(x.shape)} are more than {MOST_UNITS} groups of {ACTIVATION_GROUP}")
    if torch.cuda.current_device() != x.device.index:
        with torch.cuda.device(x.device):
            return round_on_gpu(x, group, overlap, sparse)
    return launch(_loaded(x.device.index, x.dtype, x.shape[1], group, sparse), x, group, overlap)


def launch(function: Function, x: Tensor, group: int | None, overlap: bool) -> RoundedActivations:
    """round_on_gpu without its checks, with the function for this type, K and group."""
    m, k = x.shape
    groups = 1 if group is None else -(-k // ACTIVATION_GROUP)
    codes = torch.empty(m, padded(k), dtype=torch.int8, device=x.device)
    scales = torch.empty(groups, -(-m // SCALES_IN_16_BYTES) * SCALES_IN_16_BYTES, dtype=torch.float32, device=x.device)
    ctas = m if group is None else -(-m * groups * (ACTIVATION_GROUP // PIECE) // (GROUP_THREADS * GROUP_PIECES))
    arguments = _mine.arguments
    arguments.pack(x.data_ptr(), codes.data_ptr(), scales.data_ptr(), m, k)
    stream = torch.cuda.current_stream(x.device).cuda_stream
    enqueue(function, ctas, stream, arguments, overlap=overlap and function.overlaps)
    return RoundedActivations(codes, scales)


def shape_of(k: int, group: int | None) -> tuple[int, int]:
    """Threads of a CTA, and pieces of 16 codes that each of them holds."""
    if group is not None:
        return GROUP_THREADS, GROUP_PIECES
    of_token = padded(k) // PIECE
    pieces = 2 if of_token <= 2 * MOST_THREADS else 4
    return min(-(-of_token // (32 * pieces)) * 32, MOST_THREADS), pieces


def defines(dtype: torch.dtype, k: int, group: int | None, sparse: bool = False) -> tuple[str, ...]:
    threads, pieces = shape_of(k, group)
    return (
        f"NUMBER={NUMBERS[dtype]}",
        f"GROUP={int(group is not None)}",
        f"THREADS={threads}",
        f"PIECES={pieces}",
        f"SHARED_BYTES={SHARED_BYTES}",
        *(("QUADS=1",) if sparse else ()),
    )


def prepare_rounding(device: torch.device, dtype: torch.dtype, k: int, group: int | None, sparse: bool = False) -> None:
    """Compiles and loads what round_on_gpu needs for activations [.., K]. Raises what functions.load_function raises."""
    _loaded(torch.cuda.current_device() if device.index is None else device.index, dtype, k, group, sparse)


@lru_cache(maxsize=1024)
def _loaded(index: int, dtype: torch.dtype, k: int, group: int | None, sparse: bool) -> Function:
    return _loaded_with(index, defines(dtype, k, group, sparse), shape_of(k, group)[0])


@lru_cache(maxsize=1024)
def _loaded_with(index: int, given: tuple[str, ...], threads: int) -> Function:
    """Once for all K that have the same."""
    device = torch.device("cuda", index)
    return load_function(jit.SOURCES, "round_activations", given, checked_architecture, threads, SHARED_BYTES, device, jit.default_folder())


class _Mine(threading.local):
    """What each thread has for itself: the driver reads arguments while other threads run."""

    def __init__(self) -> None:
        self.arguments = Arguments(3, 1)


_mine = _Mine()
