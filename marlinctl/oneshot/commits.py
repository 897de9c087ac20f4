"""Finished blocks on their way to the disk, while the next ones are computed.

    the GPU computes block i + 1          the thread: digests and tensors of block i ─► shard ─► masks ─► (states) ─► line of the journal

One thread takes blocks in their order, so the journal is that of a run without it. A few may wait; then the pipeline does. Hidden states
are large (2.1 GB for 128 x 2,048 tokens of Llama-3-8B, 4 s of hashing and writing on the H200's machine, where a block takes one), so those
behind a block are kept only where nothing is waiting: the next run replays the blocks between (run.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType


class Commits:
    """Use as a context manager. Work that fails raises at the next `submit`, `wait`, or at the end; what waits behind it is not begun."""

    def __init__(self, *, behind: bool, waiting: int = 4) -> None:
        """behind: in a thread; else `submit` does the work. waiting: blocks that may lie in memory, the one in work among them."""
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="commits") if behind else None
        self._most = waiting
        self._queue: deque[Future[None]] = deque()
        self._failed = False

    @property
    def idle(self) -> bool:
        """Whether nothing waits or is in work."""
        while self._queue and self._queue[0].done():
            self._queue.popleft().result()
        return not self._queue

    def submit(self, work: Callable[[], None]) -> None:
        if self._pool is None:
            work()
            return
        while not self.idle and len(self._queue) >= self._most:
            self._queue.popleft().result()
        self._queue.append(self._pool.submit(self._run, work))

    def wait(self) -> None:
        """Until everything is on the disk."""
        while self._queue:
            self._queue.popleft().result()

    def _run(self, work: Callable[[], None]) -> None:
        if self._failed:
            return  # the journal has no holes
        try:
            work()
        except BaseException:
            self._failed = True
            raise

    def __enter__(self) -> Commits:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """What is whole is written, after an error too. An error of the work itself is told where there is no other."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)
        if kind is None:
            self.wait()
