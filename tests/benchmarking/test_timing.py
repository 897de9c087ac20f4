"""Rotation, turns and medians, with a clock made of numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from marlinctl.benchmarking.timing import L2_TIMES, Candidate, calls_for, copies_for, sample, take_turns

L2 = 50 * 2**20


@pytest.mark.parametrize("weight_bytes", [2**20, 8 * 2**20, 33 * 2**20, 2**30])
def test_five_caches_lie_between_two_uses_of_a_copy(weight_bytes: int) -> None:
    """If this failed, small linears would come from L2 and be flattered."""
    copies = copies_for(weight_bytes, L2)
    assert (copies - 1) * weight_bytes >= L2_TIMES * L2
    assert (copies - 2) * weight_bytes < L2_TIMES * L2, "memory for nothing"


@pytest.mark.parametrize(("us", "copies"), [(3.0, 39), (8.0, 26), (150.0, 2), (600.0, 2), (5000.0, 2)])
def test_a_run_is_whole_rounds_over_the_copies(us: float, copies: int) -> None:
    """If this failed, the next replay would begin with a copy that is still in the cache."""
    calls = calls_for(us, copies)
    assert calls % copies == 0
    assert calls * us >= 1000 or calls >= 50, "starting the run would show in the time of a call"


def test_a_call_longer_than_any_cache_runs_alone() -> None:
    """If this failed, batch 65536 would take minutes for each candidate."""
    assert calls_for(200_000, 7) == 1


def test_the_median_and_the_fifths() -> None:
    """If this failed, one slow replay would move the figure, or p20 and p80 would be something else. 1..21: 11, 5 and 17."""
    found = sample([float(i) for i in range(21, 0, -1)], calls=3)
    assert (found.median, found.p20, found.p80, found.replays, found.calls) == (11, 5, 17, 21, 3)


class Numbers:
    """A device whose calls take as long as they say, and that gets slower with every run."""

    def __init__(self) -> None:
        self.runs: list[str] = []
        self.pending = 0.0

    def record(self, call: Callable[[int], object], calls: int) -> Callable[[], None]:
        def run() -> None:
            for i in range(calls):
                call(i)

        return run

    def microseconds(self, run: Callable[[], object]) -> float:
        self.pending = 0.0
        run()
        return self.pending


def test_candidates_take_turns_and_the_first_turn_does_not_count() -> None:
    """If this failed, a clock that drifts would favour whoever is measured first, or a cold start would be in the median."""
    clock, order, seen = Numbers(), [], []

    def call(name: str, us: float) -> Callable[[int], None]:
        def run(i: int) -> None:
            if i == 0:
                order.append(name)
            seen.append((name, i))
            clock.pending += us * (1000 if order.count(name) in (1, 2, 5) else 1)  # cold: twice alone, and in the first turn

        return run

    found = take_turns(clock, {"a": Candidate(call("a", 100.0), 2), "b": Candidate(call("b", 300.0), 3)}, replays=5)
    assert (found["a"].median, found["b"].median) == (100, 300)
    assert order[8:] == ["a", "b"] * 6
    assert {i for name, i in seen if name == "b"} == set(range(found["b"].calls))
    assert found["b"].calls % 3 == 0


def test_hopeless_rivals_drop_out_and_others_never() -> None:
    """If this failed, tuning would take hours over configurations for 8 tokens at M=1024, or lose torch because it is slow."""
    clock = Numbers()

    def call(us: float) -> Callable[[int], None]:
        def run(i: int) -> None:
            clock.pending += us

        return run

    candidates = {
        "torch": Candidate(call(1000.0), 2),
        "good": Candidate(call(10.0), 2, "dense"),
        "bad": Candidate(call(18.0), 2, "dense"),
        "so-so": Candidate(call(16.0), 2, "dense"),
        "other kind": Candidate(call(100.0), 2, "sparse"),
    }
    assert set(take_turns(clock, candidates, replays=2)) == {"torch", "good", "so-so", "other kind"}
