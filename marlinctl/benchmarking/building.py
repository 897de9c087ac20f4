"""Compiling every configuration ahead of time, into the cache where the operators look for it. No GPU and no driver are needed.

    configurations that fit ─► two at a time ─► NVRTC ─► <cache>/kernels/*.cubin
    the architectures       ┘                           └► registers and stack, from the header of the cubin

NVRTC leaves the interpreter alone while it compiles, so threads are enough to keep the processors busy.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marlinctl.benchmarking.machine_code import resources
from marlinctl.benchmarking.table import as_text, text_table
from marlinctl.cubins import kernel_folder, telling
from marlinctl.errors import UsageError
from marlinctl.kernels import jit
from marlinctl.kernels.configurations import DENSE, SHARED_BYTES, SPARSE, Configuration

if TYPE_CHECKING:
    import torch

    from marlinctl.console import Console

DTYPES = ("float16", "bfloat16")
EVERYWHERE = ("sm_80", "sm_86", "sm_89", "sm_90a")  # what launch.architecture_of answers
RUNS = {"sm_90": "sm_90a"}  # a GPU of 9.0 is given the machine code of 90a, which may use all it has


@dataclass(frozen=True, slots=True)
class Built:
    """One configuration for one type and architecture. `seconds` includes reading the cache where the entry was there."""

    configuration: str
    kind: str
    dtype: str
    architecture: str
    cached: bool
    seconds: float
    registers: int
    stack_bytes: int
    shared_bytes: int  # dynamic, of a CTA
    code_bytes: int


def offered(architecture: str, kind: str = "both") -> tuple[Configuration, ...]:
    """The configurations that can run there. kind: dense, sparse or both."""
    every = {"dense": DENSE, "sparse": SPARSE, "both": (*DENSE, *SPARSE)}[kind]
    return tuple(c for c in every if c.fits(architecture))


def build(architectures: Sequence[str], *, only: Sequence[str], console: Console) -> dict[str, Any]:
    """Every configuration (or those named in `only`) for these architectures, in both types. Returns the JSON document.

    UsageError E291 for an unknown architecture or configuration; EnvironmentProblem E403, E404, E410 as cubins.telling raises them.
    """
    import torch

    architectures = tuple(dict.fromkeys(RUNS.get(name, name) for name in architectures))
    _refuse_strangers(architectures, only)
    dtypes = {name: getattr(torch, name) for name in DTYPES}
    jobs = [(c, name, a) for a in architectures for c in offered(a) if not only or c.name in only for name in DTYPES]
    folder = kernel_folder(None)
    started = time.perf_counter()
    built: list[Built] = []
    workers = os.cpu_count() or 1
    with console.progress("compile", len(jobs)) as progress, ThreadPoolExecutor(workers) as pool:
        running = [pool.submit(_build, c, name, dtypes[name], a, folder) for c, name, a in jobs]
        try:
            for future in as_completed(running):
                built.append(future.result())
                progress.advance()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    order = {(c.name, name, a): i for i, (c, name, a) in enumerate(jobs)}
    built.sort(key=lambda b: order[b.configuration, b.dtype, b.architecture])
    return {
        "kind": "build",
        "nvrtc": jit.compiler_version(),
        "workers": workers,
        "seconds": round(time.perf_counter() - started, 2),
        "folder": str(folder),
        "built": [asdict(one) for one in built],
    }


def default_architectures() -> tuple[str, ...]:
    """Those of this machine's GPUs; without one, all that a GPU could ask for."""
    import torch

    from marlinctl.kernels.launch import architecture_of

    there = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return tuple(dict.fromkeys(architecture_of(torch.device("cuda", i)) for i in there)) or EVERYWHERE


def build_table(document: dict[str, Any]) -> str:
    """A row for each configuration, type and architecture."""
    table = text_table("configuration", "kernel", "arch", "dtype", ">seconds", ">registers", ">stack", ">shared KB", ">code KB")
    for one in document["built"]:
        table.add_row(
            one["configuration"],
            one["kind"],
            one["architecture"],
            one["dtype"],
            "cached" if one["cached"] else f"{one['seconds']:.2f}",
            str(one["registers"]),
            str(one["stack_bytes"]),
            f"{one['shared_bytes'] / 1024:.1f}",
            f"{one['code_bytes'] / 1024:.0f}",
        )
    rows = document["built"]
    fresh = sum(not one["cached"] for one in rows)
    counts = f"{fresh} compiled, {len(rows) - fresh} in the cache already, {document['seconds']:.1f} s"
    return f"{as_text(table)}\n\n{counts} with {document['workers']} at a time, NVRTC {document['nvrtc']}; {document['folder']}"


def _refuse_strangers(architectures: Sequence[str], only: Sequence[str]) -> None:
    for name in architectures:
        if name not in SHARED_BYTES:
            known = ", ".join(SHARED_BYTES)
            raise UsageError("E291", f"there are no kernels for {name}", where=f"--arch {name}", fix=f"known are {known}")
    names = [c.name for a in architectures for c in offered(a)]
    for name in only:
        if name not in names:
            fix = f"there are {', '.join(dict.fromkeys(names))}"
            raise UsageError("E291", f"there is no configuration {name} for {', '.join(architectures)}", where="--only", fix=fix)


def _build(c: Configuration, name: str, dtype: torch.dtype, architecture: str, folder: Path) -> Built:
    source, defines = f"{c.kernel}.cu", c.defines(dtype)
    started = time.perf_counter()
    with telling(folder, f"{source} for {architecture}"):
        cached = jit.cached(source, defines, architecture, folder)
        code = jit.cubin(source, defines, architecture, folder)
    found = resources(code)
    return Built(
        configuration=c.name,
        kind="sparse" if c.sparse else "dense",
        dtype=name,
        architecture=architecture,
        cached=cached,
        seconds=round(time.perf_counter() - started, 3),
        registers=found.registers,
        stack_bytes=found.stack_bytes,
        shared_bytes=c.shared_bytes,
        code_bytes=len(code),
    )
