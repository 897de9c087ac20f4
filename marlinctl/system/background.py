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
    with ThreadPoolExecutor(1, "background") as pool:
        future = pool.submit(work, over)
        try:
            yield future.result
        finally:
            over.set()
