"""Activations as Hopper's copy engine knows them: maps by address and size, which kernels are given in the place of a pointer."""

from __future__ import annotations

from typing import Any

from marlinctl.kernels.driver import done, driver

MOST_MAPS = 4096  # that a thread keeps


class TensorMaps:
    """Those of one thread: made once, and kept for a while, as allocators hand out the same addresses again and again. A launch copies the
    map, so a CUDA graph has its own.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, int, int, int, int], Any] = {}

    def of(self, address: int, m: int, k: int, tokens: int, size: int) -> int:
        """Activations [M, K] at an address, `size` bytes each, in boxes of `tokens` x 128 bytes: the address of their map, which is there
        until the next call."""
        key = (address, m, k, tokens, size)
        known = self._known.get(key)
        if known is None:
            if len(self._known) == MOST_MAPS:
                self._known.clear()
            known = self._known[key] = _tensor_map(*key)
        return int(known.getPtr())


def _tensor_map(address: int, m: int, k: int, tokens: int, size: int) -> Any:
    """A matrix of numbers of 1 or 2 bytes, rows of multiples of 16; zeros outside, 128-byte swizzle (CUDA driver API,
    cuTensorMapEncodeTiled)."""
    cuda = driver()
    kinds = cuda.CUtensorMapDataType
    sizes, strides = [cuda.cuuint64_t(k), cuda.cuuint64_t(m)], [cuda.cuuint64_t(size * k)]
    box, steps = [cuda.cuuint32_t(128 // size), cuda.cuuint32_t(tokens)], [cuda.cuuint32_t(1), cuda.cuuint32_t(1)]
    return done(
        cuda.cuTensorMapEncodeTiled(
            kinds.CU_TENSOR_MAP_DATA_TYPE_UINT8 if size == 1 else kinds.CU_TENSOR_MAP_DATA_TYPE_UINT16,
            2,
            address,
            sizes,
            strides,
            box,
            steps,
            cuda.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            cuda.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            cuda.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            cuda.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )
