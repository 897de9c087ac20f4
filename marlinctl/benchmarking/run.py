"""`marlinctl bench`: are the kernels right, and how fast are they? This order, in one process, on one GPU.

    1 accuracy    operators, and configurations where asked for, against float64; anything wrong ends the run (E113)
    2 ceilings    how fast this GPU reads, and multiplies
    3 cases       each linear times each M: torch in both layouts, the operators, configurations, peers, taking turns
    4 drift       the first case once more
    5 document    everything as JSON (benchmarking/documents.py), from which tables and pictures are made

docs/bench.md says how each is done, and why.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from marlinctl.benchmarking import accuracy, peers
from marlinctl.benchmarking.cases import OPERATORS, Kind, LayerSet, Shape, distinct
from marlinctl.benchmarking.cubins import kernel_folder, telling
from marlinctl.benchmarking.documents import (
    Case,
    Ceilings,
    Clocks,
    Document,
    Drift,
    Family,
    Kernel,
    Machine,
    PeerNote,
    Settings,
    fixed_costs,
    make_case,
    make_drift,
    make_set,
)
from marlinctl.benchmarking.implementations import Dequantized, Operator, RoundedOperator, configured, fewest, overlaps
from marlinctl.benchmarking.timing import REPLAYS, Candidate, Clock, copies_for, take_turns
from marlinctl.benchmarking.weights import Packed, packed_bytes, random_packed
from marlinctl.errors import UsageError, number_of
from marlinctl.kernels import jit
from marlinctl.quantize.scheme import Rounding
from marlinctl.system.console import gibibytes

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from marlinctl.system.console import Console

__all__ = ["Asked", "run"]

MEMORY_SHARE = 0.8  # of the device's memory that a product may take


class Device(Clock, Protocol):
    """What a run needs of the machine; benchmarking/gpu.py is the one of CUDA."""

    device: torch.device
    name: str
    architecture: str
    multiprocessors: int
    l2_bytes: int
    memory_bytes: int

    @property
    def driver(self) -> str | None: ...
    @property
    def cublas(self) -> str | None: ...
    def current(self) -> AbstractContextManager[None]: ...
    def generator(self, seed: int) -> torch.Generator: ...
    def settle(self) -> None: ...
    def free(self) -> None: ...
    def ceilings(self, dtype: torch.dtype) -> Ceilings: ...
    def clocks(self) -> Clocks: ...


@dataclass(frozen=True, slots=True)
class Asked:
    """One run. `every` measures each configuration beside the operator's own choice; `only_check` times nothing."""

    sets: tuple[LayerSet, ...]
    tokens: tuple[int, ...]
    dtype: torch.dtype
    group_size: int
    kinds: tuple[Kind, ...]
    rounding: Rounding = "none"  # of activations, that a folder allows
    rounded: frozenset[Shape] = frozenset()  # for these linears
    every: bool = False
    only_check: bool = False
    with_peers: bool = True
    replays: int = REPLAYS
    command: str = ""


@dataclass(slots=True)
class _Bench:
    """What a run carries along."""

    asked: Asked
    gpu: Device
    console: Console
    implementations: list[accuracy.Implementation]
    peers: list[peers.Peer] = field(default_factory=list)
    notes: dict[str, PeerNote] = field(default_factory=dict)


def run(asked: Asked, gpu: Device, console: Console) -> Document:
    """CheckFailed E113 where a product is wrong; what compiling and loading raise (E403, E490)."""
    if gpu.architecture in jit.BLACKWELL:
        report = "please report what `marlinctl bench --check --configurations` and `marlinctl doctor --json` say"
        console.warn(f"the kernels for {gpu.architecture} have been compiled and never run by us: {report}")
    with gpu.current():
        clocks = gpu.clocks()
        ways = (False, True) if overlaps(gpu.architecture) else (False,)
        ours: list[accuracy.Implementation] = [Operator(kind, asked.dtype, way) for kind in asked.kinds for way in ways]
        rounding = _rounding(asked, gpu, ways)
        ours += rounding
        checked = list(ours)
        kernels: list[Kernel] = []
        if asked.every:
            every, kernels = configured(gpu.device, gpu.architecture, asked.kinds, asked.dtype, console)
            plain = [Dequantized(kind, asked.dtype) for kind in asked.kinds]
            ours += [*plain, *every]
            checked += [*plain, *fewest(every)]
        work = _work(asked, gpu, console)
        if rounding and not any(rounding[0].is_worth_timing(m, shape.n, shape.k) for shape, tokens in work for m in tokens):
            what = f"config.json allows {asked.rounding} activations, and {gpu.name} multiplies none of these products in 8 bits"
            console.say(f"{what}: 16 bits are faster, or all that there is")
        console.say(f"accuracy: {number_of(len(checked), 'kernel')}, {number_of(len(work), 'linear')}, against float64")
        with telling(kernel_folder(None), f"the operators on {gpu.name}"):  # they compile what they choose
            found, problems = accuracy.check(checked, work, gpu.device, thorough=True)
        accuracy.refuse(problems)
        console.say(f"accuracy: {found.checks} products are right")
        gpu.free()
        bench = _Bench(asked, gpu, console, ours)
        ceilings: Ceilings | None = None
        cases: list[Case] = []
        drift: Drift | None = None
        if not asked.only_check:
            if asked.with_peers:
                bench.peers, absent = peers.find_peers(gpu.architecture)
                bench.notes = {note.name: note for note in absent}
            ceilings = gpu.ceilings(asked.dtype)
            console.say(f"this GPU reads {ceilings.read / 1e12:.2f} TB/s, torch.matmul reaches {ceilings.matmul / 1e12:.0f} TFLOP/s")
            cases, drift = _measure(bench, work, ceilings)
        return Document(
            machine=_machine(gpu, clocks),
            settings=_settings(asked),
            ceilings=ceilings,
            kernels=kernels,
            accuracy=found,
            peers=list(bench.notes.values()),
            cases=cases,
            sets=[made for one in asked.sets if (made := make_set(one, cases, {one.name: one.otherwise for one in rounding})).sums],
            drift=drift,
            fixed_costs=fixed_costs(cases),
        )


def _rounding(asked: Asked, gpu: Device, ways: Sequence[bool]) -> list[RoundedOperator]:
    """The operator with rounded activations, where a folder allows them; in these ways of overlapping."""
    if asked.rounding == "none" or "dense" not in asked.kinds:
        return []
    shapes = frozenset((shape.n, shape.k) for shape in asked.rounded)
    return [RoundedOperator(asked.dtype, asked.rounding, shapes, gpu.architecture, way) for way in ways]


def _work(asked: Asked, gpu: Device, console: Console) -> list[tuple[Shape, list[int]]]:
    """Each linear and its values of M, without those that do not fit into the device's memory. UsageError E202 if nothing does."""
    shapes = distinct(asked.sets)
    work = [
        (shape, [m for m in asked.tokens if needed_bytes(shape, m, gpu.l2_bytes) <= MEMORY_SHARE * gpu.memory_bytes]) for shape in shapes
    ]
    work = [(shape, tokens) for shape, tokens in work if tokens]
    left_out = len(shapes) * len(asked.tokens) - sum(len(tokens) for _, tokens in work)
    if left_out:
        console.warn(f"{left_out} products do not fit into the {gibibytes(gpu.memory_bytes, 0)} of {gpu.name} and are left out")
    if not work:
        fix = "take a smaller linear, or fewer tokens"
        raise UsageError("E202", f"nothing that was asked for fits into the memory of {gpu.name}", where="--shape, --tokens", fix=fix)
    return work


def needed_bytes(shape: Shape, m: int, l2_bytes: int) -> int:
    """The most that is held at once, roughly: copies of the weights, a plain weight beside them, a few activations and outputs."""
    plain = 2 * shape.n * shape.k
    packed = sum(packed_bytes(kind, shape) for kind in OPERATORS)
    weights = plain * (copies_for(plain, l2_bytes) + 2) + packed * copies_for(packed // 2, l2_bytes)
    return weights + 2 * m * (4 * shape.k + 6 * shape.n)


def _measure(bench: _Bench, work: Sequence[tuple[Shape, Sequence[int]]], ceilings: Ceilings) -> tuple[list[Case], Drift]:
    asked = bench.asked
    cases: list[Case] = []
    with bench.console.progress("measure", sum(len(tokens) for _, tokens in work)) as progress:
        for shape, tokens in work:
            weights = _Weights(bench, shape)
            for m in tokens:
                samples = take_turns(bench.gpu, weights.candidates(m), replays=asked.replays)
                families = {name: (weights.family(name), taken) for name, taken in samples.items()}
                cases.append(make_case(shape, m, families, ceilings, asked.kinds))
                progress.advance(note=_line(cases[-1]))
            del weights
            bench.gpu.free()
    first = cases[0]
    again = take_turns(bench.gpu, _Weights(bench, first.shape).candidates(first.m), replays=asked.replays)
    return cases, make_drift(first, again)


class _Weights:
    """One linear, in as many copies as rotation takes, in 16 bits, in 4 and as 2:4; and what multiplies with them."""

    def __init__(self, bench: _Bench, shape: Shape) -> None:
        self._bench, self._shape = bench, shape
        gpu, generator = bench.gpu, bench.gpu.generator(shape.n * shape.k)
        copies = copies_for(2 * shape.n * shape.k, gpu.l2_bytes)
        self._dense = [
            torch.randn(shape.n, shape.k, device=gpu.device, generator=generator, dtype=bench.asked.dtype) for _ in range(copies)
        ]
        self._packed: dict[Kind, list[Packed]] = {
            kind: [random_packed(kind, shape, generator) for _ in range(copies_for(packed_bytes(kind, shape), gpu.l2_bytes))]
            for kind in bench.asked.kinds
        }
        self._peers = dict(self._open_peers())

    def candidates(self, m: int) -> dict[str, Candidate]:
        shape, gpu, dtype = self._shape, self._bench.gpu, self._bench.asked.dtype
        activations = torch.randn(m, shape.k, device=gpu.device, generator=gpu.generator(m), dtype=dtype)
        out = torch.empty(m, shape.n, device=gpu.device, dtype=dtype)
        found = {
            "torch [N, K]": Candidate(lambda i: torch.matmul(activations, self._dense[i % len(self._dense)].T, out=out), len(self._dense)),
            "torch [K, N]": Candidate(
                lambda i: torch.matmul(activations, self._dense[i % len(self._dense)].view(shape.k, shape.n), out=out), len(self._dense)
            ),
        }
        for one in self._bench.implementations:
            if not one.is_worth_timing(m, shape.n, shape.k):
                continue
            found[one.name] = _candidate(one, activations, self._packed[one.kind], out)
        for name, calls in list(self._peers.items()):
            candidate = _peer_candidate(calls, activations)
            if self._works(name, candidate):
                found[name] = candidate
        return found

    def family(self, name: str) -> Family:
        if name.startswith("torch ["):
            return "torch"
        return next((one.kind for one in self._bench.implementations if one.name == name), "peer")

    def _open_peers(self) -> Iterator[tuple[str, list[peers.Call]]]:
        """Copies of each peer's weights; one whose interface is another is noted once and left out from then on."""
        bench, shape = self._bench, self._shape
        copies = copies_for(packed_bytes("dense", shape), bench.gpu.l2_bytes)
        for peer in list(bench.peers):
            version = peers.installed_version(peer)
            try:
                calls = [peer.make(shape, bench.asked.dtype, bench.gpu.device) for _ in range(copies)]
            except peers.ApiDiffers as difference:
                bench.notes[peer.name] = PeerNote(name=peer.name, version=version, status="differs", why=str(difference))
                bench.peers.remove(peer)
            except Exception as error:  # noqa: BLE001  third-party code, which must not end the run
                self._failed(peer.name, version, error)
            else:
                bench.notes.setdefault(peer.name, PeerNote(name=peer.name, version=version, status="measured", why=""))
                yield peer.name, calls

    def _works(self, name: str, candidate: Candidate) -> bool:
        try:
            candidate.call(0)
            self._bench.gpu.settle()
        except Exception as error:  # noqa: BLE001  the same
            self._peers.pop(name)
            self._failed(name, self._bench.notes[name].version, error)
            return False
        return True

    def _failed(self, name: str, version: str | None, error: Exception) -> None:
        cause = (str(error).splitlines() or [""])[0]
        why = f"at {self._shape}: {type(error).__name__}: {cause}"
        self._bench.notes[name] = PeerNote(name=name, version=version, status="failed", why=why)


def _candidate(one: accuracy.Implementation, activations: Tensor, packed: Sequence[Packed], out: Tensor) -> Candidate:
    rivals = one.kind if "/" in one.name else ""  # configurations, of which there are many
    return Candidate(lambda i: one.run(activations, packed[i % len(packed)], None, out), len(packed), rivals)


def _peer_candidate(calls: Sequence[Callable[[Tensor], object]], activations: Tensor) -> Candidate:
    return Candidate(lambda i: calls[i % len(calls)](activations), len(calls))


def _line(case: Case) -> str:
    """One case, as a progress message: the baseline and the best of each family."""
    baseline = case.named(case.baseline)
    assert baseline is not None
    parts = [f"{case.n} x {case.k}, M={case.m}: torch {baseline.us:.1f} us"]
    for family in ("dense", "sparse", "peer"):
        mine = [timed for timed in case.candidates if timed.family == family]
        if mine:
            best = min(mine, key=lambda timed: timed.us)
            parts.append(f"{best.name} {best.us:.1f} us, {best.speedup:.2f}x")
    return "; ".join(parts)


def _machine(gpu: Device, at_start: Clocks) -> Machine:
    try:
        nvrtc: str | None = jit.compiler_version()
    except jit.CompilerMissing:
        nvrtc = None
    return Machine(
        gpu=gpu.name,
        architecture=gpu.architecture,
        multiprocessors=gpu.multiprocessors,
        l2_bytes=gpu.l2_bytes,
        memory_bytes=gpu.memory_bytes,
        torch=torch.__version__,
        cuda=torch.version.cuda,
        cublas=gpu.cublas,
        driver=gpu.driver,
        nvrtc=nvrtc,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        clocks_at_start=at_start,
        clocks_at_end=gpu.clocks(),
    )


def _settings(asked: Asked) -> Settings:
    return Settings(
        dtype=str(asked.dtype).removeprefix("torch."),
        kinds=list(asked.kinds),
        tokens=list(asked.tokens),
        group_size=asked.group_size,
        every_configuration=asked.every,
        replays=asked.replays,
        command=asked.command,
        rounding=asked.rounding,
    )
