"""Where the time of a run went: seconds of each phase, by the clock on the wall."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Phases:
    """`with phases("solve"): ...`; a phase inside of another one is not counted there too. For one thread."""

    def __init__(self, **before: float) -> None:
        """before: seconds of phases that are over."""
        self._seconds: dict[str, float] = before
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._count()
        self._open.append(name)
        try:
            yield
        finally:
            self._count()
            self._open.pop()

    def seconds(self) -> dict[str, float]:
        """Rounded, in the order in which phases were first left."""
        return {name: round(seconds, 2) for name, seconds in self._seconds.items()}

    def _count(self) -> None:
        now = time.monotonic()
        if self._open:
            self._seconds[self._open[-1]] = self._seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now
