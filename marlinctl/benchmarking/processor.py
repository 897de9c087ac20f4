"""`marlinctl bench --device cpu`: packed linears on a CPU, checked, then timed beside torch.

    int4, int4 2:4       MarlinLinear and SparseMarlinLinear in bfloat16, as a model calls them (kernels/cpu.py)
    int4, int8-128       the first with activations that are rounded, where a folder's config.json allows it: as accurate as on a GPU, and
                         slower than 16 bits
    torch int4           torch's own operator alone, with a weight that lies as it wants: what the module adds is the difference
    torch bfloat16       F.linear with the decoded weight: the baseline

Candidates take turns. A CPU is seldom one's own, so the least of many times is the result and the median shows how disturbed the run was.
Each call takes another copy of the weights, so that they come from memory and not from a cache.
"""

from __future__ import annotations

import datetime
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from marlinctl.benchmarking.cases import Kind, Shape, operator_name
from marlinctl.benchmarking.table import as_text, text_table
from marlinctl.benchmarking.weights import random_packed
from marlinctl.errors import CheckFailed, Problem, number_of
from marlinctl.kernels.cpu import few_rows, for_cpu
from marlinctl.kernels.linear import packed_module
from marlinctl.kernels.ops import decode
from marlinctl.pack.types import PackedSparseLinear
from marlinctl.quantize.scheme import Rounding
from marlinctl.system.console import Console
from marlinctl.verify.kernels import in_float64

DEFAULT_TOKENS = (1, 4, 8, 16, 64)
DEFAULT_SHAPE = (4096, 4096)
GATE = 5e-3  # relative error, Frobenius, of bfloat16
ROTATED_BYTES = 96 * 2**20  # of weights between two uses of one: more than one core of a server caches
TURNS, FEWEST_TURNS = 25, 5
MOST_SECONDS = 6.0  # of all candidates for one M, after which the fewest turns do
BASELINE, OPERATOR = "torch bfloat16", "torch int4"
ROWS_AT_ONCE = 1024  # of the weight in float64

Call = Callable[[Tensor], Tensor]


def run(
    shapes: Sequence[Shape], tokens: Sequence[int], kinds: Sequence[Kind], console: Console, *,
    only_check: bool, rounding: Rounding = "none", rounded: frozenset[Shape] = frozenset(),
) -> dict[str, Any]:  # fmt: skip
    """The document. CheckFailed E113 where a product is further off than bfloat16 is; nothing is timed then.

    rounding: of the activations of dense linears of the shapes `rounded`, beside 16-bit ones.
    """
    load, cases, problems = _load(), [], []
    with torch.inference_mode(), console.progress("measure", len(shapes) * len(tokens)) as progress:
        for shape in shapes:
            generator = torch.Generator().manual_seed(shape.n * shape.k)
            calls, weights = _candidates(shape, kinds, rounding if shape in rounded else "none", generator)
            for m in tokens:
                x = torch.randn(m, shape.k, generator=generator).to(torch.bfloat16)
                errors = {name: _error(calls[name](x), in_float64(x, kind), weight) for name, (weight, kind) in weights.items()}
                for name, error in errors.items():
                    if not error < GATE:
                        what = f"{name} is off by {error:.1e} for {shape}, M={m}; at most {GATE:.0e} is right in bfloat16"
                        problems.append(
                            Problem(what, f"bench --device cpu, {name}", "report it with the output of `marlinctl doctor --json`")
                        )
                times = {} if only_check or problems else _take_turns(calls, x)
                timed = [{"name": name, "ms": min(taken), "median_ms": statistics.median(taken)} for name, taken in times.items()]
                cases.append({"n": shape.n, "k": shape.k, "m": m, "group_size": shape.group_size, "errors": errors, "timed": timed})
                note = ", ".join(f"{one['name']} {one['ms']:.2f} ms" for one in timed)
                progress.advance(note=f"{shape}, M={m}: {note or 'right'}")
    if problems:
        raise CheckFailed.from_problems("E113", problems)
    return {"kind": "cpu", "cpu_version": 1, **_machine(), "load": {"before": load, "after": _load()}, "cases": cases}


def _candidates(
    shape: Shape, kinds: Sequence[Kind], rounding: Rounding, generator: torch.Generator
) -> tuple[dict[str, Call], dict[str, tuple[Tensor, Rounding]]]:
    """What is called with activations, each in copies; and of those that are checked the weight [N, K] float32, and what they round to."""
    packed = {kind: random_packed(kind, shape, generator) for kind in kinds}
    decoded = {kind: decode(p, torch.float32) for kind, p in packed.items()}
    dense = next(iter(decoded.values())).to(torch.bfloat16)
    calls = {BASELINE: _rotated([partial(linear, weight=dense.clone()) for _ in range(_copies(dense))])}
    weights: dict[str, tuple[Tensor, Rounding]] = {}
    for kind, p in packed.items():
        weight, scales = for_cpu(p)
        copies = _copies(weight)
        if not isinstance(p, PackedSparseLinear):
            group = shape.k // len(scales)
            calls[OPERATOR] = _rotated([partial(_operator, weight.clone(), group, scales.clone()) for _ in range(copies)])
        ways: tuple[Rounding, ...] = ("none",) if kind == "sparse" or rounding == "none" else ("none", rounding)
        for way in ways:
            modules = [packed_module(p, rounding=way) for _ in range(copies)]
            for module in modules:
                module.prepare()
            name = operator_name(kind, way)
            calls[name], weights[name] = _rotated(modules), (decoded[kind], way)
    return calls, weights


def _operator(weight: Tensor, group: int, scales: Tensor, x: Tensor) -> Tensor:
    out: Tensor = few_rows(x, weight, group, scales)
    return out


def _copies(weight: Tensor) -> int:
    return 1 + ROTATED_BYTES // (weight.numel() * weight.element_size())


def _rotated(calls: Sequence[Call]) -> Call:
    """Each call takes the next copy."""
    at = -1

    def call(x: Tensor) -> Tensor:
        nonlocal at
        at = (at + 1) % len(calls)
        return calls[at](x)

    return call


def _take_turns(calls: Mapping[str, Call], x: Tensor) -> dict[str, list[float]]:
    """Milliseconds of single calls; the first turn warms up and is not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    for turn in range(1 + TURNS):
        for name, call in calls.items():
            started = time.perf_counter()
            call(x)
            if turn:
                times[name].append(1e3 * (time.perf_counter() - started))
        if turn >= FEWEST_TURNS and time.perf_counter() - began > MOST_SECONDS:
            break
    return times


def _error(found: Tensor, x: Tensor, weight: Tensor) -> float:
    exact = torch.cat([x.double() @ rows.double().T for rows in torch.split(weight, ROWS_AT_ONCE)], dim=1)
    return float((found.double() - exact).norm() / exact.norm())


def _machine() -> dict[str, Any]:
    abilities = torch.cpu.get_capabilities()
    return {
        "processor": str(abilities.get("cpu_name") or abilities.get("architecture") or "unknown"),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": any(bool(abilities.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16")),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _load() -> float:
    """Processes that wanted a processor, mean of the last minute."""
    return round(os.getloadavg()[0], 2)


def table(document: dict[str, Any]) -> str:
    """For people."""
    rows = text_table("N x K", ">M", "multiplied by", ">ms", ">median ms", ">speed-up", ">error")
    for case in document["cases"]:
        timed = case["timed"] or [{"name": name, "ms": None, "median_ms": None} for name in case["errors"]]
        baseline = next((one["ms"] for one in timed if one["name"] == BASELINE), None)
        for i, one in enumerate(timed):
            error = case["errors"].get(one["name"])
            rows.add_row(
                f"{case['n']} x {case['k']}" if i == 0 else "",
                str(case["m"]) if i == 0 else "",
                one["name"],
                "" if one["ms"] is None else f"{one['ms']:.2f}",
                "" if one["ms"] is None else f"{one['median_ms']:.2f}",
                "" if one["ms"] is None else f"{baseline / one['ms']:.2f}x",
                "" if error is None else f"{error:.1e}",
            )
        rows.add_section()
    load, itself = document["load"], "multiplies bfloat16 itself" if document["bfloat16"] else "does not multiply bfloat16 itself"
    machine = f"{document['processor']}, {document['capability']}, {itself}; {number_of(document['threads'], 'thread')}"
    least = "ms: the least of the turns, weights not in cache" if any(case["timed"] for case in document["cases"]) else "checked, not timed"
    busy = f"load {load['before']} before, {load['after']} after"
    return f"{as_text(rows)}\n\n{machine}; {busy}\ntorch {document['torch']}, {document['date']}; {least}"
