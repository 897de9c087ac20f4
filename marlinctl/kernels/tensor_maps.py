"""Activations and weights as Hopper's copy engine knows them: maps by address and size, which kernels are given in place of pointers."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from marlinctl.kernels.driver import done, driver

MOST_MAPS = 16384  # of activations, and of weights, that a thread keeps: 128 bytes each
BLOCK_BYTES = 512  # of words of 64 columns: 32 lanes, four words


class TensorMaps:
    """Those of one thread: made once, and kept for a while, as allocators hand out the same addresses again and again. A launch copies its
    maps, so a CUDA graph has its own.
    """

    def __init__(self) -> None:
        self._of_activations: dict[Hashable, Any] = {}
        self._of_weights: dict[Hashable, Any] = {}

    def of_activations(self, address: int, m: int, k: int, tokens: int, size: int) -> int:
        """Activations [M, K] at an address, `size` bytes each, in boxes of `tokens` x 128 bytes: the address of their map, which is there
        until the next call."""
        return _kept(self._of_activations, _activations, address, m, k, tokens, size)

    def of_weights(self, address: int, rows: int, columns: int, blocks: int, box_rows: int) -> int:
        """Words [rows, columns] int32 at an address, in boxes of `box_rows` x `blocks` blocks: as of_activations."""
        return _kept(self._of_weights, _weights, address, rows, columns * 4 // BLOCK_BYTES, blocks, box_rows)


def _kept(known: dict[Hashable, Any], make: Callable[..., Any], *key: int) -> int:
    found = known.get(key)
    if found is None:
        if len(known) == MOST_MAPS:
            del known[next(iter(known))]  # the oldest
        found = known[key] = make(*key)
    return int(found.getPtr())


def _activations(address: int, m: int, k: int, tokens: int, size: int) -> Any:
    """A matrix of numbers of 1 or 2 bytes, rows of multiples of 16, 128-byte swizzle."""
    cuda = driver()
    kinds = cuda.CUtensorMapDataType
    kind = kinds.CU_TENSOR_MAP_DATA_TYPE_UINT8 if size == 1 else kinds.CU_TENSOR_MAP_DATA_TYPE_UINT16
    return _map(kind, address, (k, m), (size * k,), (128 // size, tokens), cuda.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B)


def _weights(address: int, rows: int, row_blocks: int, blocks: int, box_rows: int) -> Any:
    """Blocks of 128 words, as they lie in memory."""
    cuda = driver()
    kind, swizzle = cuda.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_INT32, cuda.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_NONE
    sizes, strides = (BLOCK_BYTES // 4, row_blocks, rows), (BLOCK_BYTES, BLOCK_BYTES * row_blocks)
    return _map(kind, address, sizes, strides, (BLOCK_BYTES // 4, blocks, box_rows), swizzle)


def _map(kind: Any, address: int, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...], swizzle: Any) -> Any:
    """Zeros outside (CUDA driver API, cuTensorMapEncodeTiled)."""
    cuda = driver()
    return done(
        cuda.cuTensorMapEncodeTiled(
            kind,
            len(sizes),
            address,
            [cuda.cuuint64_t(size) for size in sizes],
            [cuda.cuuint64_t(stride) for stride in strides],
            [cuda.cuuint32_t(size) for size in box],
            [cuda.cuuint32_t(1) for _ in sizes],
            cuda.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle,
            cuda.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            cuda.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )
