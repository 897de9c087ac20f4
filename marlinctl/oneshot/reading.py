"""The tensors of the model, with what the run has folded into them (permutation.py, equalization.py).

On a GPU a thread reads those of the next block ahead and copies them there, while the GPU computes.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import TracebackType

import torch
from torch import Tensor

from marlinctl.checkpoint.orders import Orders, reordered
from marlinctl.checkpoint.reader import Checkpoint


@dataclass(slots=True)
class _Expected:
    tensor: Future[Tensor]
    reads: int  # left


class Reader:
    """What the pipeline needs of a checkpoint. Use as a context manager."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, *, ahead: bool) -> None:
        """device: where tensors that were read ahead lie; the others are in host memory."""
        self._checkpoint, self._device = checkpoint, device
        self._there = replace(checkpoint, device=device) if device.type == "cuda" else checkpoint
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="read ahead") if ahead else None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._expected: dict[str, _Expected] = {}
        self._orders: Orders = {}

    def expect(self, names: Iterable[str], *, reads: int = 1) -> None:
        """These are asked for next, each `reads` times."""
        if self._pool is not None:
            new = [name for name in names if name not in self._expected]
            self._expected |= {name: _Expected(self._pool.submit(self._fetch, name), reads) for name in new}

    def forget(self) -> None:
        """What was expected and not asked for."""
        for expected in self._expected.values():
            expected.tensor.cancel()
        self._expected.clear()

    def reorder(self, orders: Orders) -> None:
        """From now on tensors are read with these folded into them alone (checkpoint/orders.py)."""
        self._orders = orders

    def read(self, name: str) -> Tensor:
        """The tensor, not to be changed: another `read` may give the same one."""
        return reordered(name, self._read(name), self._orders)

    def _read(self, name: str) -> Tensor:
        expected = self._expected.get(name)
        if expected is None:
            return self._checkpoint.read(name)
        expected.reads -= 1
        if not expected.reads:
            del self._expected[name]
        tensor = expected.tensor.result()
        if tensor.is_cuda:  # its memory may be used again once the current stream has used it
            tensor.record_stream(torch.cuda.current_stream(self._device))
        return tensor

    def rows(self, name: str, row_ids: Tensor) -> Tensor:
        return self._checkpoint.rows(name, row_ids)

    def _fetch(self, name: str) -> Tensor:
        if self._stream is None:
            return self._there.read(name)
        with torch.cuda.stream(self._stream):
            tensor = self._there.read(name)
            self._stream.synchronize()
        return tensor

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
