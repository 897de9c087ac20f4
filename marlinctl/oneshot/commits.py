"""Finished blocks on their way to the disk, while the next ones are computed.

    the GPU computes block i + 1          the thread: digests and tensors of block i ─► shard ─► masks ─► (states) ─► line of the journal

One thread takes blocks in their order, so the journal is that of a run without it. A few may wait, by number and by size; then the pipeline
does. Hidden states are large (2.1 GB for 128 x 2,048 tokens of Llama-3-8B, 4 s of hashing and writing on the H200's machine, where a block
takes one), so those behind a block are kept only now and then (`Pace`): a resumed run replays the blocks between (run.py).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import TracebackType

import torch

from marlinctl.planning.memory import QUEUED_BLOCKS, QUEUED_BYTES


class Commits:
    """Use as a context manager. Work that fails raises at the next `submit`, `wait`, or at the end; what waits behind it is not begun."""

    def __init__(self, device: torch.device) -> None:
        """On a GPU in a thread; on a CPU, where thread and solver would want the same cores, `submit` does the work."""
        self._device = device
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="commits") if device.type == "cuda" else None
        self._queue: deque[tuple[Future[None], int]] = deque()  # and the bytes that each holds
        self._failed = False

    @property
    def idle(self) -> bool:
        """Whether nothing waits or is in work."""
        while self._queue and self._queue[0][0].done():
            self._take()
        return not self._queue

    def submit(self, work: Callable[[], None], size: int = 0) -> None:
        """size: bytes of the device's memory that the work holds until it is done."""
        if self._pool is None:
            work()
            return
        while not self.idle and (len(self._queue) >= QUEUED_BLOCKS or size + sum(held for _, held in self._queue) > QUEUED_BYTES):
            self._take()
        made = torch.cuda.Event()
        made.record(torch.cuda.current_stream(self._device))
        self._queue.append((self._pool.submit(self._run, work, made), size))

    def wait(self) -> None:
        """Until everything is on the disk."""
        while self._queue:
            self._take()

    def _take(self) -> None:
        """Wait for the first of the queue; raises what it raised."""
        self._queue.popleft()[0].result()

    def _run(self, work: Callable[[], None], made: torch.cuda.Event) -> None:
        """made: when what the work reads is computed. It is copied on a stream of its own, beside the next block's work."""
        if self._failed:
            return  # the journal has no holes
        try:
            stream = torch.cuda.Stream(self._device)
            stream.wait_event(made)
            with torch.cuda.stream(stream), torch.no_grad():
                work()
        except BaseException:
            self._failed = True
            raise

    def __enter__(self) -> Commits:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """What is whole is written, after an error too. An error of the work itself is raised if the body raised none."""
        if self._pool is not None:
            try:
                self._pool.shutdown(wait=True)
            except BaseException:  # a signal: nothing may be written once the job's lock is released, so what is in work ends first
                self._failed = True
                self._pool.shutdown(wait=True, cancel_futures=True)
                raise
        if kind is None:
            self.wait()


class Pace:
    """When hidden states are kept: they take a tenth of the time at most. Replaying a block takes a fraction of solving it."""

    def __init__(self, size: int) -> None:
        """size: bytes of the states."""
        self._seconds = size / 0.5e9  # as a slow disk would take, until it is measured
        self._since = time.monotonic()

    @property
    def due(self) -> bool:
        return time.monotonic() - self._since > 10 * self._seconds

    @property
    def overdue(self) -> bool:
        """Worth waiting for the blocks in the queue, which a slow disk never empties."""
        return time.monotonic() - self._since > 20 * self._seconds

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Around the keeping of states."""
        started = time.monotonic()
        yield
        self._since = time.monotonic()
        self._seconds = self._since - started
