"""Ctrl-C, SIGTERM and SIGHUP, answered when a piece of work is whole: a block, or a step of training.

The first signal is remembered, so that the piece is finished and saved, and one line says so; a second one acts at once. After saving,
`raise_again` lets the signal do what it does everywhere in marlinctl: the command line turns it into exit code 130, 143 or 129. A signal
that the process was started to ignore, as a shell does for what it runs in the background and nohup for SIGHUP, stays ignored.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopping:
    """Use as a context manager around the loop; `asked` is the number of the signal that came, or 0."""

    def __init__(self, piece: str = "step") -> None:
        self.asked = 0
        self._piece = piece
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stopping:
        for number in SIGNALS:
            if signal.getsignal(number) is signal.SIG_IGN:
                continue
            try:
                self._before[number] = signal.signal(number, self._remember)
            except ValueError:  # not the main thread: the embedding program owns the signals
                break
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()

    def raise_again(self) -> None:
        self._restore()
        signal.raise_signal(signal.Signals(self.asked))

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.asked = number
        self._restore()
        # Past sys.stderr: the signal may have come in the middle of its own write, which it does not bear.
        with suppress(OSError):
            os.write(2, f"\nfinishing the current {self._piece}; press again to stop at once and lose it\n".encode())

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)
