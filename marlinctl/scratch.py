"""Activations that need not be in memory: tensors over unnamed files that the system pages in and out.

A named slot is reused by every block. On a CUDA device, slots that fit stay on the device instead.
"""

from __future__ import annotations

import math
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

    def tensor(self, slot: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of this shape with arbitrary contents; an earlier tensor of the same slot becomes invalid."""
        count = math.prod(shape)
        flat = self._slots.get(slot)
        if flat is None or flat.dtype != dtype or flat.numel() < count:
            self._slots.pop(slot, None)
            flat = self._allocate(count, dtype)
            self._slots[slot] = flat
        return flat[:count].view(shape)

    def _allocate(self, count: int, dtype: torch.dtype) -> Tensor:
        size = count * dtype.itemsize
        if size <= self._budget:
            self._budget -= size
            return torch.empty(count, dtype=dtype, device=self._device)
        with tempfile.NamedTemporaryFile(dir=self._folder, prefix="scratch-") as file:
            file.truncate(max(size, 1))
            return torch.from_file(file.name, shared=True, size=count, dtype=dtype)
