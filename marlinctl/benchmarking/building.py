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

from marlinctl.benchmarking.cases import GROUPS
from marlinctl.benchmarking.cubins import kernel_folder, telling
from marlinctl.benchmarking.machine_code import resources
from marlinctl.benchmarking.table import as_text, text_table
from marlinctl.errors import EnvironmentProblem, UsageError
from marlinctl.kernels import jit
from marlinctl.kernels.configurations import SHARED_BYTES, Configuration, group_shift
from marlinctl.kernels.dispatch import EIGHT_BITS_FROM, FACTORED, SPARSE_FACTORED, configurations
from marlinctl.kernels.functions import architecture_of
from marlinctl.kernels.launch import unpack_defines, unpack_shared_bytes

if TYPE_CHECKING:
    from marlinctl.system.console import Console

DTYPES = ("float16", "bfloat16")
EVERYWHERE = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_110", "sm_120")  # what functions.architecture_of answers
RUNS = {"sm_90": "sm_90a", "sm_103": "sm_100", "sm_121": "sm_120"}  # which machine code such a GPU is given


@dataclass(frozen=True, slots=True)
class Built:
    """One configuration for one type and architecture. `seconds` includes reading the cache where the entry was there."""

    configuration: str
    kind: str
    group_size: int | None  # that is compiled in, as in the kernels with wgmma; None: all
    dtype: str
    architecture: str
    cached: bool
    seconds: float
    registers: int
    stack_bytes: int
    shared_bytes: int  # dynamic, of a CTA
    code_bytes: int


@dataclass(frozen=True, slots=True)
class Job:
    """One compilation."""

    name: str
    kind: str
    group_size: int | None
    source: str
    defines: tuple[str, ...]
    dtype: str
    architecture: str
    shared_bytes: int


def offered(architecture: str, kind: str = "both") -> tuple[Configuration, ...]:
    """The configurations that can run there. kind: dense, sparse or both."""
    kinds = ("dense", "sparse") if kind == "both" else (kind,)
    return tuple(c for one in kinds for c in configurations(one) if c.fits(architecture))


def build(architectures: Sequence[str], *, only: Sequence[str], console: Console, group_sizes: Sequence[int] = GROUPS) -> dict[str, Any]:
    """Every configuration (or those named in `only`) for these architectures, in both types. Returns the JSON document.

    group_sizes: of kernels that are compiled for one each; the others take all.

    UsageError E202 for an unknown architecture or configuration; EnvironmentProblem E403, E490 as cubins.telling raises them.
    """
    architectures = tuple(dict.fromkeys(RUNS.get(name, name) for name in architectures))
    _refuse_strangers(architectures, only)
    jobs = [job for a in architectures for job in _jobs(a, group_sizes) if not only or job.name in only]
    folder = kernel_folder(None)
    started = time.perf_counter()
    built: dict[int, Built] = {}
    workers = os.cpu_count() or 1
    with console.progress("compile", len(jobs)) as progress, ThreadPoolExecutor(workers) as pool:
        running = {pool.submit(_build, job, folder): i for i, job in enumerate(jobs)}
        try:
            for future in as_completed(running):
                built[running[future]] = future.result()
                progress.advance()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {
        "kind": "build",
        "nvrtc": jit.compiler_version(),
        "workers": workers,
        "seconds": round(time.perf_counter() - started, 2),
        "folder": str(folder),
        "built": [asdict(built[i]) for i in range(len(jobs))],
    }


def default_architectures() -> tuple[str, ...]:
    """Those of this machine's GPUs; without one, all that a GPU could ask for and this NVRTC knows (12.x does not know sm_110).

    EnvironmentProblem E420: one without kernels. E403 where there is no NVRTC.
    """
    import torch

    there = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    try:
        found = tuple(dict.fromkeys(architecture_of(torch.device("cuda", i)) for i in there))
    except ValueError as error:
        fix = f"name the GPUs that the kernels are for: --arch {EVERYWHERE[0]}, or another of {', '.join(EVERYWHERE)}"
        raise EnvironmentProblem("E420", str(error), where="bench --build without --arch", fix=fix) from error
    if found:
        return found
    with telling(kernel_folder(None), "NVRTC"):
        return tuple(architecture for architecture in EVERYWHERE if jit.compiles_for(architecture))


def build_table(document: dict[str, Any]) -> str:
    """A row for each configuration, type and architecture."""
    table = text_table(
        "configuration", "kernel", "arch", "dtype", ">group size", ">seconds", ">registers", ">stack", ">shared KB", ">code KB"
    )
    for one in document["built"]:
        table.add_row(
            one["configuration"],
            one["kind"],
            one["architecture"],
            one["dtype"],
            "all" if one["group_size"] is None else str(one["group_size"]),
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


def _jobs(architecture: str, group_sizes: Sequence[int] = GROUPS) -> list[Job]:
    """What an operator may ask for there: every configuration, and the kernel that makes a plain weight of tiles for many tokens."""
    import torch

    jobs = []
    for dtype in DTYPES:
        numbers = getattr(torch, dtype)
        for c in offered(architecture):
            kind, source = "sparse" if c.sparse else "dense", f"{c.kernel}.cu"
            for size in group_sizes if c.wgmma else (None,):  # -1, channel-wise, is group_shift's K here
                defines = c.defines(numbers) if size is None else c.defines(numbers, group_shift(size, -1))
                jobs.append(Job(c.name, kind, size, source, defines, dtype, architecture, c.shared_bytes))
        for c in _rounding(architecture):
            for size in group_sizes:
                for groups in (False,) if c.factored else (False, True):  # of activations that share a scale
                    defines = c.defines(numbers, group_shift(size, -1), groups)
                    name = f"{c.name}{'-groups' if groups else ''}"
                    jobs.append(
                        Job(name, "sparse" if c.sparse else "dense", size, f"{c.kernel}.cu", defines, dtype, architecture, c.shared_bytes)
                    )
        for kind in ("dense", "sparse"):
            sparse = kind == "sparse"
            defines, shared = unpack_defines(sparse, numbers), unpack_shared_bytes(sparse)
            jobs.append(Job(f"{'sparse-' if sparse else ''}unpack", kind, None, "unpack.cu", defines, dtype, architecture, shared))
    return sorted(jobs, key=lambda job: job.kind)


def _rounding(architecture: str) -> list[Configuration]:
    """Those for int8 activations that a table of `dispatch` may name there: none on Blackwell, and on Hopper those with wgmma."""
    fitting = (c for c in (*configurations(FACTORED), *configurations(SPARSE_FACTORED)) if c.fits(architecture))
    return [c for c in fitting if c.wgmma or architecture in EIGHT_BITS_FROM]


def _refuse_strangers(architectures: Sequence[str], only: Sequence[str]) -> None:
    for name in architectures:
        if name not in SHARED_BYTES:
            known = ", ".join(SHARED_BYTES)
            raise UsageError("E202", f"there are no kernels for {name}", where=f"--arch {name}", fix=f"known are {known}")
    names = list(dict.fromkeys(job.name for architecture in architectures for job in _jobs(architecture)))
    for name in only:
        if name not in names:
            what = f"there is no kernel {name} for {', '.join(architectures)}"
            raise UsageError("E202", what, where=f"--only {name}", fix=f"there are {', '.join(names)}")


def _build(job: Job, folder: Path) -> Built:
    started = time.perf_counter()
    with telling(folder, f"{job.source} for {job.architecture}"):
        cached = jit.cached(job.source, job.defines, job.architecture, folder)
        code = jit.cubin(job.source, job.defines, job.architecture, folder)
    found = resources(code)
    return Built(
        configuration=job.name,
        kind=job.kind,
        group_size=job.group_size,
        dtype=job.dtype,
        architecture=job.architecture,
        cached=cached,
        seconds=round(time.perf_counter() - started, 3),
        registers=found.registers,
        stack_bytes=found.stack_bytes,
        shared_bytes=job.shared_bytes,
        code_bytes=len(code),
    )
