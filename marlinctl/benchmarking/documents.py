"""Measurements as one JSON document, `bench.json`: what a run writes, what tables and pictures are made from, what --from reads back.

    {"kind": "bench", "bench_version": 1,
     "machine":  {gpu, architecture, multiprocessors, l2_bytes, memory_bytes, torch, cuda, cublas, driver, nvrtc, clocks at start and end},
     "settings": {dtype, group_size, tokens, ...},
     "ceilings": {"read": bytes per second, "matmul": operations per second of the type},
     "kernels":  [what was compiled and loaded, and how long it took],
     "accuracy": {"checks", "worst": [the largest error of each implementation]},
     "peers":    [measured, absent or other than expected],
     "cases":    [one linear times M tokens: every candidate's time, and the ideal],
     "sets":     [linears of a block, and their sums],
     "drift":    the first case measured again at the end,
     "fixed_costs": [what a call costs beside reading, fitted over the linears]}

Times are microseconds. The baseline of a case is the faster of torch's two layouts; speedup is baseline over time. The ideal is the time to
read and write everything once at the measured read rate, or to multiply at the measured rate of torch.matmul (twice that for 2:4, which no
library reaches), whichever is longer.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from marlinctl.benchmarking.cases import LayerSet, Shape
from marlinctl.benchmarking.timing import Sample
from marlinctl.errors import BadInput, Problem
from marlinctl.system.atomic import write_bytes
from marlinctl.system.files import FileRefused, read_plain_json

FIT_LINEARS = 3  # through fewer a line says nothing
BITS = {"dense": 4, "sparse": 3}  # of a weight, metadata included, scales not
Family = Literal["torch", "dense", "sparse", "peer"]


@dataclass(frozen=True, slots=True)
class Clocks:
    """As nvidia-smi reads them; None where it is not there. Nothing is ever set."""

    sm_mhz: float | None = None
    memory_mhz: float | None = None
    power_watts: float | None = None
    temperature: float | None = None


@dataclass(frozen=True, slots=True)
class Machine:
    gpu: str
    architecture: str
    multiprocessors: int
    l2_bytes: int
    memory_bytes: int
    torch: str
    cuda: str | None
    cublas: str | None
    driver: str | None
    nvrtc: str | None
    date: str
    clocks_at_start: Clocks
    clocks_at_end: Clocks


@dataclass(frozen=True, slots=True)
class Settings:
    dtype: str
    kinds: list[str]
    tokens: list[int]
    group_size: int
    every_configuration: bool
    replays: int
    command: str
    rounding: str = "none"  # that the folder's config.json allows


@dataclass(frozen=True, slots=True)
class Ceilings:
    read: float
    matmul: float


@dataclass(frozen=True, slots=True)
class Kernel:
    name: str
    kind: str
    dtype: str
    seconds: float
    registers: int
    local_bytes: int
    shared_bytes: int
    resident: int


@dataclass(frozen=True, slots=True)
class Worst:
    name: str
    kind: str
    dtype: str
    checks: int
    relative: float
    mean_ratio: float
    gate: float


@dataclass(frozen=True, slots=True)
class Accuracy:
    checks: int
    worst: list[Worst]


@dataclass(frozen=True, slots=True)
class PeerNote:
    name: str
    version: str | None
    status: Literal["measured", "absent", "differs", "failed"]
    why: str


@dataclass(frozen=True, slots=True)
class Timed:
    name: str
    family: Family
    us: float
    p20: float
    p80: float
    calls: int
    speedup: float
    bytes_per_second: float
    flops_per_second: float
    of_read: float  # share of the read rate
    of_matmul: float  # share of the matmul rate


@dataclass(frozen=True, slots=True)
class Case:
    n: int
    k: int
    m: int
    group_size: int
    baseline: str
    ideal: dict[str, float]  # kind -> microseconds
    candidates: list[Timed]

    @property
    def shape(self) -> Shape:
        return Shape(self.n, self.k, self.group_size)

    def named(self, name: str) -> Timed | None:
        return next((one for one in self.candidates if one.name == name), None)


@dataclass(frozen=True, slots=True)
class SetLayer:
    name: str
    n: int
    k: int
    group_size: int
    count: int


@dataclass(frozen=True, slots=True)
class Sum:
    m: int
    name: str
    family: Family
    us: float
    speedup: float
    shares: list[float]  # of each layer, in their order; they add up to 1


@dataclass(frozen=True, slots=True)
class Ideal:
    """What reading at the read rate and multiplying at the matmul rate would give for the whole set."""

    kind: str
    m: int
    speedup: float


@dataclass(frozen=True, slots=True)
class Set:
    name: str
    layers: list[SetLayer]
    sums: list[Sum]
    ideal: list[Ideal]


@dataclass(frozen=True, slots=True)
class FixedCost:
    """The line us = fixed + bytes / rate through the linears of the smallest M, by least squares: what a call costs before it reads."""

    name: str
    m: int
    linears: int
    us: float
    bytes_per_second: float


@dataclass(frozen=True, slots=True)
class Drift:
    n: int
    k: int
    m: int
    ratios: dict[str, float]  # candidate -> its time at the end over its time at the start


@dataclass(frozen=True, slots=True)
class Document:
    __pydantic_config__: ClassVar = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)  # holds for what it consists of, too
    machine: Machine
    settings: Settings
    ceilings: Ceilings | None
    kernels: list[Kernel]
    accuracy: Accuracy
    peers: list[PeerNote]
    cases: list[Case]
    sets: list[Set]
    drift: Drift | None
    fixed_costs: list[FixedCost] = field(default_factory=list)
    kind: Literal["bench"] = "bench"
    bench_version: Literal[1] = 1

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def read_document(path: Path) -> Document:
    """BadInput E374 for a file that is not what a run writes; it names every field that is wrong."""
    again = "give the bench.json that `marlinctl bench --out DIR` wrote"
    try:
        content = read_plain_json(path)
    except FileRefused as refused:
        raise BadInput("E374", f"this cannot be read: {refused.problem.what}", where=str(path), fix=again) from None
    if isinstance(content, dict):
        content.pop("schema_version", None)  # of the console, where --json was redirected into a file
    try:
        return TypeAdapter(Document).validate_json(json.dumps(content))
    except ValidationError as error:
        wrong = [Problem(_as_text(item), str(path), again) for item in error.errors(include_url=False)[:10]]
    raise BadInput.from_problems("E374", wrong)


def _as_text(item: Any) -> str:
    """`machine.l2_bytes cannot be 'x': input should be a valid integer`."""
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in item["loc"]).lstrip(".") or "the document"
    if item["type"] in ("missing", "unexpected_keyword_argument"):
        return f"{place} is {'missing' if item['type'] == 'missing' else 'no field of this document'}"
    return f"{place} cannot be {str(item['input'])[:40]!r}: {item['msg'][0].lower()}{item['msg'][1:]}"


def write_document(document: Document, path: Path) -> None:
    write_bytes(path, (json.dumps(document.as_json(), indent=1, allow_nan=False) + "\n").encode())


def weight_bytes(shape: Shape, bits: int) -> int:
    """Words, metadata and float16 scales; 16 bits have no scales."""
    groups = 0 if bits == 16 else 1 if shape.group_size == -1 else shape.k // shape.group_size
    return shape.n * shape.k * bits // 8 + 2 * groups * shape.n


def moved_bytes(shape: Shape, m: int, bits: int) -> int:
    """Weights, activations and output, each once."""
    return weight_bytes(shape, bits) + 2 * m * (shape.k + shape.n)


def ideal_us(shape: Shape, m: int, kind: str, ceilings: Ceilings) -> float:
    faster = 2 if kind == "sparse" else 1
    reading = moved_bytes(shape, m, BITS[kind]) / ceilings.read
    multiplying = 2 * m * shape.n * shape.k / (faster * ceilings.matmul)
    return max(reading, multiplying) * 1e6


def make_case(shape: Shape, m: int, samples: Mapping[str, tuple[Family, Sample]], ceilings: Ceilings, kinds: Sequence[str]) -> Case:
    """samples: name -> family and times; at least one of family torch, of which the faster is the baseline."""
    torches = {name: taken.median for name, (family, taken) in samples.items() if family == "torch"}
    baseline = min(torches, key=lambda name: torches[name])
    timed = []
    for name, (family, taken) in samples.items():
        bits = 16 if family == "torch" else BITS.get(family, 4)
        seconds = taken.median / 1e6
        rate, flops = moved_bytes(shape, m, bits) / seconds, 2 * m * shape.n * shape.k / seconds
        timed.append(
            Timed(
                name=name,
                family=family,
                us=taken.median,
                p20=taken.p20,
                p80=taken.p80,
                calls=taken.calls,
                speedup=torches[baseline] / taken.median,
                bytes_per_second=rate,
                flops_per_second=flops,
                of_read=rate / ceilings.read,
                of_matmul=flops / ceilings.matmul,
            )
        )
    ideal = {kind: ideal_us(shape, m, kind, ceilings) for kind in kinds}
    return Case(n=shape.n, k=shape.k, m=m, group_size=shape.group_size, baseline=baseline, ideal=ideal, candidates=timed)


def make_set(one: LayerSet, cases: Iterable[Case], otherwise: Mapping[str, str] | None = None) -> Set:
    """Sums over the set, of every candidate that was measured for each of its shapes; the baseline is the sum of the baselines.

    otherwise: candidate -> the one that takes as long for shapes that it was not measured for.
    """
    instead = otherwise or {}
    by_place = {(case.shape, case.m): case for case in cases}
    layers = [
        SetLayer(name=layer.name, n=layer.shape.n, k=layer.shape.k, group_size=layer.shape.group_size, count=layer.count)
        for layer in one.layers
    ]
    ideal: list[Ideal] = []
    sums: list[Sum] = []
    for m in sorted({m for _, m in by_place}):
        parts = [(by_place.get((layer.shape, m)), layer.count) for layer in one.layers]
        there = [(case, count) for case, count in parts if case is not None]
        if len(there) < len(parts):
            continue
        baseline = _weighted([(case.named(case.baseline), count) for case, count in there])
        assert baseline is not None  # every case has its baseline
        sums.append(_sum("torch", "torch", m, baseline, baseline))
        for name in dict.fromkeys(timed.name for case, _ in there for timed in case.candidates if timed.family != "torch"):
            times = _weighted([(case.named(name) or case.named(instead.get(name, name)), count) for case, count in there])
            if times is not None:
                family = next(timed.family for case, _ in there for timed in case.candidates if timed.name == name)
                sums.append(_sum(name, family, m, times, baseline))
        for kind in there[0][0].ideal:
            ideal.append(Ideal(kind=kind, m=m, speedup=sum(baseline) / sum(case.ideal[kind] * count for case, count in there)))
    return Set(name=one.name, layers=layers, sums=sums, ideal=ideal)


def make_drift(first: Case, again: Mapping[str, Sample]) -> Drift:
    ratios = {timed.name: again[timed.name].median / timed.us for timed in first.candidates if timed.name in again}
    return Drift(n=first.n, k=first.k, m=first.m, ratios=ratios)


def fixed_costs(cases: Sequence[Case]) -> list[FixedCost]:
    """Of every candidate that was measured for three linears or more, of different sizes, where reading is what takes the time."""
    found = []
    least = min((case.m for case in cases), default=0)
    for name in dict.fromkeys(timed.name for case in cases for timed in case.candidates):
        points = [  # bytes, microseconds
            (timed.bytes_per_second * timed.us / 1e6, timed.us)
            for case in cases
            if case.m == least and (timed := case.named(name)) is not None
        ]
        if len({moved for moved, _ in points}) < FIT_LINEARS:
            continue
        slope, us = statistics.linear_regression([moved for moved, _ in points], [us for _, us in points])
        if slope > 0:
            found.append(FixedCost(name=name, m=least, linears=len(points), us=us, bytes_per_second=1e6 / slope))
    return found


def _weighted(parts: Sequence[tuple[Timed | None, int]]) -> list[float] | None:
    """Microseconds of each layer, as often as the set has it; None where one was not measured."""
    times = [timed.us * count for timed, count in parts if timed is not None]
    return times if len(times) == len(parts) else None


def _sum(name: str, family: Family, m: int, times: Sequence[float], baseline: Sequence[float]) -> Sum:
    total = sum(times)
    return Sum(m=m, name=name, family=family, us=total, speedup=sum(baseline) / total, shares=[time / total for time in times])
