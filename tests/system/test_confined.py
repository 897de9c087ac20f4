"""marlinctl/system/confined.py: work on hostile data costs so much and no more, and says why it was stopped."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from marlinctl.errors import BadInput, Problem
from marlinctl.system.confined import Bounds, Exceeded, confined

BOUNDS = Bounds(memory=256 << 20, cpu=10, wait=10)


def memory() -> Iterator[Any]:
    yield "x" * (1 << 30)


def processor() -> Iterator[Any]:
    while True:
        pass


def one_number() -> Iterator[Any]:
    yield 10 ** (10**9)  # in C, where no signal handler of Python's is asked


@pytest.mark.parametrize(
    ("work", "bounds", "said"),
    [
        (memory, BOUNDS, "256 MiB of memory"),
        (processor, Bounds(256 << 20, cpu=1, wait=30), "1 s of processor time"),
        (one_number, Bounds(256 << 20, cpu=30, wait=1), "more than 1 s"),
        (lambda: iter([os._exit(3)]), BOUNDS, "ended with 3"),
    ],
    ids=["memory", "processor", "one number", "died"],
)
def test_a_bound_that_is_reached_is_said(work: Any, bounds: Bounds, said: str) -> None:
    """A chat template or a parquet file would take all memory or all time of the machine."""
    started = time.monotonic()
    with pytest.raises(Exceeded, match=said):
        list(confined(work, bounds))
    assert time.monotonic() - started < 15


def test_one_item_has_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """A template that writes a gigabyte in bounded memory of its own would take ours."""
    monkeypatch.setattr("marlinctl.system.confined.MOST_BYTES", 1 << 20)
    items = confined(lambda: iter(["x", "x" * (2 << 20)]), BOUNDS)
    assert next(items) == "x"
    with pytest.raises(Exceeded, match="more than 1 MiB came out of one piece"):
        next(items)


def test_items_and_errors_come_across() -> None:
    """What the child found wrong would reach the person as another error, or as none."""

    def work() -> Iterator[Any]:
        yield {"text": "Grüße \u2028", "n": [1, None]}
        raise BadInput.from_problems("E385", [Problem("one", "here", "so"), Problem("two", "there", "so")])

    items = confined(work, BOUNDS)
    assert next(items) == {"text": "Grüße \u2028", "n": [1, None]}
    with pytest.raises(BadInput) as caught:
        next(items)
    assert caught.value.error_id == "E385"
    assert [problem.where for problem in caught.value.problems] == ["here", "there"]
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        list(confined(lambda: iter([1 // 0]), BOUNDS))


def test_who_stops_reading_stops_the_work() -> None:
    """The child would continue reading a corpus of which two rows were wanted, and stay behind as a zombie."""
    asked: list[int] = []

    def work() -> Iterator[Any]:
        while True:
            yield os.getpid()

    items = confined(work, BOUNDS)
    asked.append(next(items))
    assert asked[0] != os.getpid()
    items.close()
    with pytest.raises(ProcessLookupError):
        os.kill(asked[0], 0)


def test_a_child_that_hangs_at_a_lock_is_replaced() -> None:
    """A good tokenizer would be refused where another thread held a lock of some library at the moment of the fork."""
    lock = threading.Lock()

    def work() -> Iterator[Any]:
        with lock:
            yield 7

    lock.acquire()
    threading.Timer(0.3, lock.release).start()  # in the first child it stays locked
    assert list(confined(work, Bounds(256 << 20, cpu=10, wait=1))) == [7]


def test_a_child_that_hangs_twice_is_given_up() -> None:
    """A run would wait for ever, or try for ever."""
    lock = threading.Lock()
    lock.acquire()
    started = time.monotonic()
    with pytest.raises(Exceeded, match=r"more than 0\.5 s"):
        list(confined(lambda: iter([lock.acquire()]), Bounds(256 << 20, cpu=10, wait=0.5)))
    assert 1 <= time.monotonic() - started < 10


def test_a_child_that_dies_at_once_is_replaced(tmp_path: Path) -> None:
    """The dynamic loader may end a fork of a process with many threads with 127, before it has done anything."""
    tries = tmp_path / "tries"

    def work() -> Iterator[Any]:
        with tries.open("a") as file:
            file.write("x")
        if tries.read_text() == "x":
            os._exit(127)
        yield 7

    assert list(confined(work, BOUNDS)) == [7]
    assert tries.read_text() == "xx"
