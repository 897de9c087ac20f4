"""The tensors of the model, those of the next block read ahead by a thread while the GPU computes."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from torch import Tensor

from marlinctl.checkpoint.reader import Checkpoint


class Reader:
    """What the pipeline needs of a checkpoint. Use as a context manager."""

    def __init__(self, checkpoint: Checkpoint, *, ahead: bool) -> None:
        self._checkpoint = checkpoint
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="read ahead") if ahead else None
        self._expected: dict[str, Future[Tensor]] = {}

    def expect(self, names: Iterable[str]) -> None:
        """These are asked for next, each once."""
        if self._pool is not None:
            self._expected |= {name: self._pool.submit(self._checkpoint.read, name) for name in names if name not in self._expected}

    def read(self, name: str) -> Tensor:
        """A copy in host memory."""
        expected = self._expected.pop(name, None)
        return self._checkpoint.read(name) if expected is None else expected.result()

    def rows(self, name: str, row_ids: Tensor) -> Tensor:
        return self._checkpoint.rows(name, row_ids)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
