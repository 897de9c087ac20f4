"""Is a kernel right? Asked before anything is timed, and answered with the float64 product of the weights that reference.py decodes, and
of what activations are rounded to where a kernel rounds them.

    odd shapes     N, K and M that fill no tile, every group size, through the packer: padding, edges, bias
    identity       activations that pick out single weights: bit for bit the decoded weight, rounded once; not of rounded activations
    timed shapes   every linear and M that will be timed, the first, middle and last columns and rows: an index could overflow

Activations, codes, metadata and scales of both signs are random. Activations lie between NaNs, and outputs are NaNs between NaNs: what is
read beyond the one, left out of the other, or written beyond it, shows. Every launch is made three times and must give equal bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from marlinctl.benchmarking.cases import Kind, Shape
from marlinctl.benchmarking.documents import Accuracy, Worst
from marlinctl.benchmarking.weights import Packed, columns, random_packed
from marlinctl.errors import CheckFailed, Problem
from marlinctl.kernels.reference import dequantize, dequantize_sparse
from marlinctl.pack.marlin import pack_marlin
from marlinctl.pack.sparse_marlin import pack_sparse_marlin
from marlinctl.pack.types import PackedSparseLinear
from marlinctl.quantize.types import QuantizedLinear
from marlinctl.sparsify.mask import two_largest
from marlinctl.sparsify.types import SparseQuantizedLinear
from marlinctl.verify.kernels import on_device

GATES = {torch.float16: 1e-3, torch.bfloat16: 5e-3}  # relative error, Frobenius
MEAN_RATIO_GATE = 1e-3  # of the original MARLIN, mean |error| / mean |value|; in bfloat16 rounding the output alone exceeds it
LAUNCHES = 3
GUARD = 1024  # NaNs before and after
ODD_SHAPES = (  # N, K, group size
    (64, 48, -1),
    (80, 64, -1),
    (192, 64, 32),
    (576, 576, 64),
    (896, 896, 128),
    (192, 160, 32),
    (576, 18432, 128),
    (896, 18432, -1),
)
ODD_TOKENS = (1, 7, 17, 65, 129, 1000)
IDENTITY = (448, 640)  # N, K
WINDOW = 256  # columns and rows of a timed shape that are compared, three times
MOST_SHOWN = 40


class Implementation(Protocol):
    """Something that multiplies: an operator, or a configuration with a number of CTAs."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> Kind: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def run(self, activations: Tensor, p: Packed, bias: Tensor | None, out: Tensor) -> Tensor:
        """The product [M, N]: in `out`, or in a tensor of its own."""
        ...

    def rounded(self, activations: Tensor, n: int) -> Tensor | None:
        """What it multiplies by a weight of N outputs in place of the activations, in float64; None where it takes them as they are."""
        ...

    def is_worth_timing(self, m: int, n: int, k: int) -> bool:
        """Whether it may be the fastest for this product."""
        ...


@dataclass(slots=True)
class Tally:
    """The largest errors of one implementation, and what was wrong."""

    implementation: Implementation
    checks: int = 0
    relative: float = 0.0
    mean_ratio: float = 0.0
    wrong: list[str] = field(default_factory=list)

    @property
    def gate(self) -> float:
        return GATES[self.implementation.dtype]

    def compare(self, where: str, found: Tensor, exact: Tensor) -> None:
        """found [rows, columns] in the type of the output, exact in float64."""
        error = found.double() - exact
        relative = float(error.norm() / exact.norm())
        ratio = float(error.abs().mean() / exact.abs().mean())
        self.checks += 1
        self.relative, self.mean_ratio = _larger(self.relative, relative), _larger(self.mean_ratio, ratio)
        limit = MEAN_RATIO_GATE if self.implementation.dtype == torch.float16 else self.gate
        if not (relative <= self.gate and ratio <= limit):  # NaN fails too
            size = error.abs().nan_to_num(torch.inf)
            row, column = (size == size.max()).nonzero()[0].tolist()
            self.wrong.append(f"{where}: relative error {relative:.2e}, mean ratio {ratio:.2e}, worst at row {row}, column {column}")


def check(
    implementations: Sequence[Implementation],
    work: Iterable[tuple[Shape, Sequence[int]]],  # what will be timed: linears, and M of each
    device: torch.device,
    *,
    thorough: bool,
) -> tuple[Accuracy, list[Problem]]:
    """All of it; `thorough` False leaves the odd shapes and the identity out. Nothing is raised: see `refuse`."""
    work = list(work)
    tallies = [Tally(one) for one in implementations]
    for kind in dict.fromkeys(one.kind for one in implementations):
        mine = [tally for tally in tallies if tally.implementation.kind == kind]
        if thorough:
            _odd(mine, kind, device)
            _identity(mine, kind, device)
        for shape, tokens in work:
            _timed(mine, kind, shape, tokens, device)
    worst = [
        Worst(
            name=tally.implementation.name,
            kind=tally.implementation.kind,
            dtype=str(tally.implementation.dtype).removeprefix("torch."),
            checks=tally.checks,
            relative=tally.relative,
            mean_ratio=tally.mean_ratio,
            gate=tally.gate,
        )
        for tally in tallies
    ]
    fix = "do not use this kernel here; report it with `marlinctl doctor --json`"
    problems = [Problem(line, tally.implementation.name, fix) for tally in tallies for line in tally.wrong]
    return Accuracy(checks=sum(tally.checks for tally in tallies), worst=worst), problems


def refuse(problems: Sequence[Problem]) -> None:
    """CheckFailed E113 where anything was wrong: what gives wrong products is not timed."""
    if problems:
        raise CheckFailed.from_problems("E113", problems[:MOST_SHOWN])


def _odd(tallies: Sequence[Tally], kind: Kind, device: torch.device) -> None:
    for n, k, group_size in ODD_SHAPES:
        p = through_the_packer(kind, n, k, group_size, seed=n + k, device=device)
        weight = decoded(p).double()  # [N, K]
        for m, with_bias, (dtype, mine) in itertools.product(ODD_TOKENS, (False, True), _by_dtype(tallies)):
            inner = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
            activations = between_nans(inner.to(device, dtype))
            bias = torch.linspace(-3, 3, n, device=device).to(dtype) if with_bias else None
            shift = 0 if bias is None else bias.double()
            plain = activations.double() @ weight.T + shift
            case = f"M={m} N={n} K={k} group_size={group_size}{' with bias' if with_bias else ''}"
            for tally in mine:
                where, rounded = f"{tally.implementation.name}: {case}", tally.implementation.rounded(activations, n)
                exact = plain if rounded is None else rounded @ weight.T + shift
                tally.compare(where, _three(tally, where, activations, p, bias), exact)


def _identity(tallies: Sequence[Tally], kind: Kind, device: torch.device) -> None:
    n, k = IDENTITY
    for group_size in (32, 64, 128, -1):
        p = through_the_packer(kind, n, k, group_size, seed=abs(group_size), device=device)
        weight = decoded(p)
        for tally in tallies:
            dtype = tally.implementation.dtype
            where, identity = f"{tally.implementation.name}: identity, group_size={group_size}", torch.eye(k, device=device, dtype=dtype)
            if tally.implementation.rounded(identity, n) is not None:  # 1 is 127 times its scale, to the last bit but one
                continue
            found = _three(tally, where, identity, p, None)
            expected = weight.T.to(dtype)
            tally.checks += 1
            if not torch.equal(found, expected):
                column, row = (found != expected).nonzero()[0].tolist()
                values = f"{float(found[column, row])} instead of {float(expected[column, row])}"
                tally.wrong.append(f"{where}: weight n={row} k={column} is {values}")


def _timed(tallies: Sequence[Tally], kind: Kind, shape: Shape, tokens: Sequence[int], device: torch.device) -> None:
    p = random_packed(kind, shape, torch.Generator(device).manual_seed(shape.n + shape.k))
    windows = list(_windows(shape.n, 64))
    weights = [decoded(columns(p, first, last)).double() for first, last in windows]
    for m, (dtype, mine) in itertools.product(tokens, _by_dtype(tallies)):
        activations = torch.randn(m, shape.k, device=device, generator=torch.Generator(device).manual_seed(m)).to(dtype)

        def exact(wide: Tensor, m: int = m) -> dict[tuple[tuple[int, int], tuple[int, int]], Tensor]:
            """Rows and columns -> their product."""
            return {
                (rows, between): wide[rows[0] : rows[1]].double() @ weight.T
                for rows in _windows(m, 1)
                for between, weight in zip(windows, weights, strict=True)
            }

        plain = exact(activations)
        for tally in mine:
            if not tally.implementation.is_worth_timing(m, shape.n, shape.k):
                continue
            rounded = tally.implementation.rounded(activations, shape.n)
            where = f"{tally.implementation.name}: M={m} N={shape.n} K={shape.k} group_size={shape.group_size}"
            found = _three(tally, where, activations, p, None)
            for (rows, between), product in (plain if rounded is None else exact(rounded)).items():
                part = f"{where}, rows from {rows[0]}, columns from {between[0]}"
                tally.compare(part, found[rows[0] : rows[1], between[0] : between[1]], product)


def _by_dtype(tallies: Sequence[Tally]) -> list[tuple[torch.dtype, list[Tally]]]:
    """Those that share activations and products."""
    dtypes = dict.fromkeys(tally.implementation.dtype for tally in tallies)
    return [(dtype, [tally for tally in tallies if tally.implementation.dtype == dtype]) for dtype in dtypes]


def _three(tally: Tally, where: str, activations: Tensor, p: Packed, bias: Tensor | None) -> Tensor:
    """The product, after three launches that must agree and must have stayed inside of their outputs."""
    first: Tensor | None = None
    for _ in range(LAUNCHES):
        out, guards = guarded(len(activations), p.out_features, activations)
        found = tally.implementation.run(activations, p, bias, out)
        if not all(bool(guard.isnan().all()) for guard in guards):
            tally.wrong.append(f"{where}: written outside of the output")
        if first is None:
            first = found
        elif not torch.equal(first, found):
            tally.wrong.append(f"{where}: three launches differ")
    assert first is not None
    return first


def through_the_packer(kind: Kind, n: int, k: int, group_size: int, *, seed: int, device: torch.device) -> Packed:
    """Every code, scales of both signs, all six choices of kept weights, packed and padded as a checkpoint would be."""
    generator = torch.Generator().manual_seed(seed)
    size = k if group_size == -1 else group_size
    codes = torch.randint(-8, 8, (n, k), dtype=torch.int8, generator=generator)
    scales = (torch.randn(n, k // size, generator=generator) * 0.02).to(torch.float16)
    if kind == "dense":
        return on_device(pack_marlin(QuantizedLinear(codes, scales, size)), device)
    mask = two_largest(torch.rand(k, n, generator=generator)).T.contiguous()
    return on_device(pack_sparse_marlin(SparseQuantizedLinear(codes * mask, scales, size, mask)), device)


def decoded(p: Packed) -> Tensor:
    """[N, K] float32."""
    return dequantize_sparse(p) if isinstance(p, PackedSparseLinear) else dequantize(p)


def between_nans(inner: Tensor) -> Tensor:
    guarded = torch.full((inner.numel() + 2 * GUARD,), torch.nan, dtype=inner.dtype, device=inner.device)
    return guarded[GUARD:-GUARD].view(inner.shape).copy_(inner)


def guarded(m: int, n: int, like: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """An output full of NaN, and the NaNs before and after it. An operator that allocates its own gets memory that held NaNs."""
    guarded = torch.full((m * n + 2 * GUARD,), torch.nan, dtype=like.dtype, device=like.device)
    poison = torch.full((m, n), torch.nan, dtype=like.dtype, device=like.device)
    del poison  # the allocator hands this memory out next
    return guarded[GUARD:-GUARD].view(m, n), (guarded[:GUARD], guarded[-GUARD:])


def _windows(size: int, step: int) -> Iterator[tuple[int, int]]:
    """All of it where it is small, otherwise its beginning, middle and end; borders are multiples of `step`."""
    if size <= 3 * WINDOW:
        yield 0, size
        return
    middle = (size - WINDOW) // 2 // step * step
    for first in (0, middle, size - WINDOW):
        yield first, first + WINDOW


def _larger(a: float, b: float) -> float:
    """NaN stays NaN."""
    return b if not b <= a else a
