"""Activations that need not be in memory: tensors in unnamed files, read and written by the chunk.

A named slot is reused by every block. On a CUDA device, slots that fit stay on the device instead, and those that do not in page-locked
host memory, as far as that suffices; all kinds are indexed alike. Files are read and written, not mapped, where whole ranges are wanted: a
mapping would count as memory of this process and cost a page fault every 4 KiB (5 s of 66 on SmolLM2-135M, two cores). Their blocks are
reserved beforehand, so a full disk is an error where the slot is made and never a SIGBUS later.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import tempfile
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from marlinctl.errors import ResourceProblem
from marlinctl.system.console import gibibytes


class FileTensor:
    """A tensor [n, ...] in a file. `t[a:b]` is a copy in memory; `t[a:b] = x` writes; an index tensor gathers or scatters rows."""

    def __init__(self, file: BinaryIO, mapped: mmap.mmap, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._file, self._mapped, self.shape, self.dtype = file, mapped, shape, dtype
        self._row = math.prod(shape[1:]) * dtype.itemsize

    def __getitem__(self, key: slice | Tensor) -> Tensor:
        if isinstance(key, Tensor):
            return self._all()[key]
        out = torch.empty((key.stop - key.start, *self.shape[1:]), dtype=self.dtype)
        data = _bytes(out)
        done = 0
        while done < len(data):
            done += os.preadv(self._file.fileno(), [data[done:]], key.start * self._row + done)
        return out

    def __setitem__(self, key: slice | Tensor, value: Tensor) -> None:
        if isinstance(key, Tensor):
            self._all()[key] = value.to(self.dtype)
            self._mapped.madvise(mmap.MADV_DONTNEED)  # leaves memory, stays in the file
            return
        data = _bytes(value.to("cpu", self.dtype).contiguous())
        done = 0
        while done < len(data):
            done += os.pwrite(self._file.fileno(), data[done:], key.start * self._row + done)

    def zero_(self) -> FileTensor:
        for start in range(0, self.shape[0], 1024):
            stop = min(start + 1024, self.shape[0])
            self[start:stop] = torch.zeros((stop - start, *self.shape[1:]), dtype=self.dtype)
        return self

    def _all(self) -> Tensor:
        return torch.frombuffer(self._mapped, dtype=self.dtype, count=math.prod(self.shape)).view(self.shape)


class PinnedTensor:
    """A tensor [n, ...] in page-locked host memory, for a GPU: `t[a:b]` is a copy on the device. Copies in either direction are enqueued on
    its current stream. An index tensor gathers or scatters rows in host memory.
    """

    def __init__(self, memory: Tensor, device: torch.device) -> None:
        self._memory, self._device, self.shape, self.dtype = memory, device, tuple(memory.shape), memory.dtype

    def __getitem__(self, key: slice | Tensor) -> Tensor:
        if isinstance(key, Tensor):
            self._wait()
            return self._memory[key]
        return self._memory[key].to(self._device, non_blocking=True)

    def __setitem__(self, key: slice | Tensor, value: Tensor) -> None:
        if isinstance(key, Tensor):
            self._wait()
            self._memory[key] = value.to("cpu", self.dtype)
        else:
            self._memory[key].copy_(value, non_blocking=True)

    def zero_(self) -> PinnedTensor:
        self._wait()
        self._memory.zero_()
        return self

    def _wait(self) -> None:
        torch.cuda.current_stream(self._device).synchronize()


Slot = Tensor | PinnedTensor | FileTensor


def rows_of(x: Slot, rows: Tensor) -> Tensor:
    """x[rows], a copy where x is. rows: [J] int64 on any device."""
    return x[rows.to(x.device if isinstance(x, Tensor) else "cpu")]


def set_rows(x: Slot, rows: Tensor, value: Tensor) -> None:
    """x[rows] = value."""
    if isinstance(x, Tensor):
        x[rows.to(x.device)] = value.to(x.device)
    else:
        x[rows.to("cpu")] = value.to("cpu")


class Scratch:
    """Slots of activations on `device` while `device_budget` bytes last, in page-locked memory while `host_budget` does, or in `folder`."""

    def __init__(self, folder: Path, device: torch.device, device_budget: int = 0, host_budget: int = 0) -> None:
        """host_budget: 0 on a CPU, whose memory is the solver's."""
        self._folder = folder
        self._device, self._budget, self._host_budget = device, device_budget, host_budget
        self._on_device: dict[str, Tensor] = {}
        self._on_host: dict[str, Tensor] = {}
        self._files: dict[str, tuple[BinaryIO, mmap.mmap]] = {}

    def tensor(self, slot: str, shape: tuple[int, ...], dtype: torch.dtype) -> Slot:
        """A tensor of this shape with arbitrary contents; an earlier tensor of the same slot becomes invalid."""
        size = max(math.prod(shape), 1) * dtype.itemsize
        if (held := self._on_device.get(slot)) is not None and held.numel() >= size:
            return _seen_as(held, shape, dtype)
        if (held := self._on_host.get(slot)) is not None and held.numel() >= size:
            return PinnedTensor(_seen_as(held, shape, dtype), self._device)
        if slot not in self._files and size <= self._budget:
            self._budget -= size
            self._on_device[slot] = torch.empty(size, dtype=torch.uint8, device=self._device)
            return self.tensor(slot, shape, dtype)
        if slot not in self._files and (pinned := self._page_locked(size)) is not None:
            self._on_host[slot] = pinned
            return self.tensor(slot, shape, dtype)
        if slot not in self._files or len(self._files[slot][1]) < size:
            self._files.pop(slot, None)
            self._files[slot] = self._new_file(size)
        file, mapped = self._files[slot]
        return FileTensor(file, mapped, shape, dtype)

    def resident(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor that every pass reads and writes: on the device while the budget lasts, else in host memory."""
        size = math.prod(shape) * dtype.itemsize
        if size <= self._budget:
            self._budget -= size
            return torch.empty(shape, dtype=dtype, device=self._device)
        pinned = self._page_locked(size)
        return torch.empty(shape, dtype=dtype) if pinned is None else _seen_as(pinned, shape, dtype)

    def _page_locked(self, size: int) -> Tensor | None:
        """Bytes of page-locked memory while its budget lasts; None where it does not, or the system gives no more."""
        taken = 1 << max(size - 1, 0).bit_length()  # torch rounds such blocks up to a power of two
        if taken > self._host_budget:
            return None
        try:
            pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError:  # also where the limit of locked memory is reached: the disk holds the same
            self._host_budget = 0
            return None
        self._host_budget -= taken
        return pinned

    def _new_file(self, size: int) -> tuple[BinaryIO, mmap.mmap]:
        file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115  # lives as long as the slot, without a name
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            file.close()
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise ResourceProblem(
                "E500",
                f"activations need {gibibytes(size)} of disk during the run, and that is not free",
                where=str(self._folder),
                fix="free some space, use fewer --samples, or put OUT on another disk",
            ) from error
        return file, mmap.mmap(file.fileno(), size)


def _seen_as(held: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The beginning of a tensor of bytes."""
    count = math.prod(shape)
    return held[: count * dtype.itemsize].view(dtype).view(shape)


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor. Through uint8, because numpy knows no bfloat16."""
    return memoryview(tensor.view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]
