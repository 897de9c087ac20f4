"""How long a call takes: many calls in a row, weights that come from memory, candidates in turns, medians.

    copy 0 │ copy 1 │ ... │ copy c-1 │ copy 0 │ ...        one candidate's run: `calls` calls, recorded once, replayed as a whole
    torch ─► int4 ─► 2:4 ─► torch ─► int4 ─► 2:4 ─► ...      replays take turns, so that a clock that drifts drifts for all

A copy of the weights is used again when more than five times the L2 cache has passed (FlashInfer's rule), or a small linear would be read
from L2 and flattered. Activations and outputs stay warm, as they do behind the layer before. The time of a call is the run's time
over `calls`; launching costs the first call alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

L2_TIMES = 5
REPLAYS = 20
RUN_MICROSECONDS = 4000.0  # of one run: far above what starting it costs
MOST_CALLS = 50
HOPELESS = 1.7  # times as slow as the fastest of its rivals
TRIES = 3  # to learn how long a call takes, roughly
LONG_MICROSECONDS = 20_000.0  # a call beyond this moves more than any cache holds: it needs no rotation


@dataclass(frozen=True, slots=True)
class Candidate:
    """call(i) computes with copy i % copies of its weights. Of those with equal `rivals` the hopeless are not timed to the end."""

    call: Callable[[int], object]
    copies: int
    rivals: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """Microseconds of a call: median, and the 20th and 80th of a hundred."""

    median: float
    p20: float
    p80: float
    replays: int
    calls: int


class Clock(Protocol):
    """What timing needs of a device; gpu.py has the real one."""

    def record(self, call: Callable[[int], object], calls: int) -> Callable[[], None]: ...

    def microseconds(self, run: Callable[[], object]) -> float: ...


def copies_for(weight_bytes: int, l2_bytes: int) -> int:
    """So many that more than L2_TIMES the cache lies between two uses of one."""
    return -(-L2_TIMES * l2_bytes // weight_bytes) + 1


def calls_for(one_call: float, copies: int) -> int:
    """How many calls a run has, given the microseconds of one: whole rounds over the copies."""
    if one_call >= LONG_MICROSECONDS:
        return 1
    wanted = min(MOST_CALLS, max(1, round(RUN_MICROSECONDS / max(one_call, 1e-3))))
    return -(-wanted // copies) * copies


def sample(times: list[float], calls: int) -> Sample:
    """times: microseconds of a call, one for each replay."""
    if len(times) < 2:
        return Sample(times[0], times[0], times[0], 1, calls)
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return Sample(statistics.median(times), fifths[0], fifths[3], len(times), calls)


def take_turns(clock: Clock, candidates: Mapping[str, Candidate], *, replays: int = REPLAYS) -> dict[str, Sample]:
    """A sample of each candidate that is not hopeless; the first turn warms up and is not counted."""
    roughly: dict[str, float] = {}  # microseconds of a single call, launching included
    for name, candidate in candidates.items():
        one = partial(candidate.call, 0)
        one()  # what is compiled, loaded or allocated once
        roughly[name] = min(clock.microseconds(one) for _ in range(TRIES))
    runs: dict[str, tuple[Callable[[], None], int]] = {}
    for name, candidate in candidates.items():
        rivals = [roughly[other] for other, its in candidates.items() if candidate.rivals and its.rivals == candidate.rivals]
        if rivals and roughly[name] > HOPELESS * min(rivals):
            continue
        calls = calls_for(roughly[name], candidate.copies)
        runs[name] = clock.record(candidate.call, calls), calls
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(1 + replays):
        for name, (run, calls) in runs.items():
            taken = clock.microseconds(run) / calls
            if turn:
                times[name].append(taken)
    return {name: sample(times[name], runs[name][1]) for name in runs}
