"""Work of the processor and the disk beside that of the interpreter."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

Value = TypeVar("Value")


@contextmanager
def begun(work: Callable[[threading.Event], Value]) -> Iterator[Callable[[], Value]]:
    """Run `work` in a thread; what is yielded waits for its result, or raises what it raised.

    The event that `work` is given is set when the body is left, by an error too: then it returns soon, and what it returns is not used.
    """
    over = threading.Event()
    pool = ThreadPoolExecutor(1, "background")
    try:
        yield pool.submit(work, over).result
    finally:
        over.set()
        try:
            pool.shutdown(wait=True)
        except BaseException:  # a second signal: the files of the job are the thread's until it has ended
            pool.shutdown(wait=True)
            raise
