"""Activations that need not be in memory: tensors over unnamed files, paged in and out by the system.

A named slot is reused by every block. `release` gives the pages back once a chunk has been dealt with; their contents stay in the file,
mostly in the page cache, so that reading them again costs little where memory is free and is possible where it is not. On a CUDA
device, slots that fit stay on the device instead.
"""

from __future__ import annotations

import math
import mmap
import tempfile
from pathlib import Path

import torch
from torch import Tensor


class Scratch:
    """Slots of activations in `folder`, or on `device` while `device_budget` bytes last."""

    def __init__(self, folder: Path, device: torch.device, device_budget: int = 0) -> None:
        self._folder = folder
        self._device, self._budget = device, device_budget
        self._slots: dict[str, Tensor] = {}  # flat, as large as the largest request so far
        self._maps: dict[str, mmap.mmap] = {}

    def tensor(self, slot: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of this shape with arbitrary contents; an earlier tensor of the same slot becomes invalid."""
        count = math.prod(shape)
        flat = self._slots.get(slot)
        if flat is None or flat.dtype != dtype or flat.numel() < count:
            self._slots.pop(slot, None)
            self._maps.pop(slot, None)
            flat = self._slots[slot] = self._allocate(slot, max(count, 1), dtype)
        return flat[:count].view(shape)

    def release(self) -> None:
        """Give back the memory of all mapped pages; nothing is lost."""
        for mapped in self._maps.values():
            mapped.madvise(mmap.MADV_DONTNEED)

    def _allocate(self, slot: str, count: int, dtype: torch.dtype) -> Tensor:
        size = count * dtype.itemsize
        if size <= self._budget:
            self._budget -= size
            return torch.empty(count, dtype=dtype, device=self._device)
        with tempfile.TemporaryFile(dir=self._folder, prefix="scratch-") as file:
            file.truncate(size)
            self._maps[slot] = mmap.mmap(file.fileno(), size)
        return torch.frombuffer(self._maps[slot], dtype=dtype)
