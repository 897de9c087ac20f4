"""The largest solve of a run, once, on random numbers and before the long part: does it fit into memory, and how fast is this machine.

    x [T, K] random ─► Gram matrix, timed ─► H ─┐
    W [R, K] random ─► x Wᵀ, timed              ├─► the run's own solve (solve.py), timed;   peak of the CUDA device
                       the recipe ──────────────┘

Time and memory of a solve depend on shapes and recipe alone, not on values, so random ones will do. What it costs is one solve of the many
that follow. The forward pass has attention and norms beside its products. On a CPU its rate is that of products times what the measured
machines keep of it; on a GPU they are counted apart (planning/gpu_time.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from marlinctl.errors import ResourceProblem
from marlinctl.models.architectures import Architecture
from marlinctl.oneshot.open import RunInputs
from marlinctl.oneshot.solve import StackedSolver, steps_on
from marlinctl.planning.memory import CHUNK_TOKENS, Stage, Work
from marlinctl.planning.preflight import ModelPlan
from marlinctl.planning.time import ProbeResult, largest_stage, machine, machine_of_probe, seconds_of_blocks
from marlinctl.quantize.hessian import add_gram, mirror
from marlinctl.quantize.types import Hessian
from marlinctl.recipes.schema import Recipe
from marlinctl.sparsify.steps import TORCH, PruneSteps
from marlinctl.system.console import Console, duration
from marlinctl.system.devices import choose_device, device_peaks, forget_device_peaks, has_matrix_units, set_up_allocator, threads
from marlinctl.system.host import release_heap

_SEED = 0
_FEW_ROWS = 8
_FORWARD_SHARE = 0.7  # of the rate of products that a forward pass through a block keeps on a CPU


def run_probe(
    architecture: Architecture,
    compressed: Mapping[str, int],
    recipe: Recipe,
    *,
    corrects_drift: bool,
    device: torch.device,
    dtype: torch.dtype,
    steps: PruneSteps = TORCH,
) -> ProbeResult:
    """One solve of the stage that takes longest. compressed: linear -> group size. steps: those of the run.

    Raises:
        ResourceProblem: E522, it does not fit into memory.
    """
    speed = machine(device.type, torch.get_num_threads(), dtype.itemsize, matrix_units=False)
    stage = largest_stage(architecture, compressed, recipe, speed, corrects_drift=corrects_drift)
    solver = StackedSolver.of(recipe, corrects_drift=corrects_drift, bfloat16_exact=False, steps=steps)
    forget_device_peaks(device)
    try:
        with torch.no_grad():
            measured = _measure(stage, solver, architecture.hidden_size, device, dtype)
    except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError) and "can't allocate" not in str(error):
            raise
        raise ResourceProblem(
            "E522",
            f"the largest solve, {stage.rows} rows of {stage.k} inputs, does not fit: {str(error).splitlines()[0]}",
            where=f"memory of {device}",
            fix="free memory there (`marlinctl plan` says how much is needed), or --device cpu",
        ) from error
    finally:
        release_heap()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return measured


def probe_on(device: str, threads_asked: int | None, console: Console) -> Callable[[ModelPlan, Recipe, str], ProbeResult]:
    """What `plan --probe` calls: one solve of each pass over the blocks, on the device that the run would use."""

    def probe(looked: ModelPlan, recipe: Recipe, dtype: str) -> ProbeResult:
        place = torch.device(choose_device(device))
        set_up_allocator(place)
        with threads(threads_asked):
            return run_probe(
                looked.architecture,
                looked.plan.group_sizes,
                recipe,
                corrects_drift=looked.corrects_drift,
                device=place,
                dtype=getattr(torch, dtype),
                steps=steps_on(place, console),
            )

    return probe


def probe_before(opened: RunInputs, recipe: Recipe, steps: PruneSteps, console: Console, *, device_memory: int | None, ranks: int) -> None:
    """The largest solve once, so that a machine whose memory does not hold it says so in seconds and not after hours. device_memory: bytes
    that the run may take of a GPU. ranks: processes that share the run; each probes alone."""
    sizes = opened.plan.group_sizes
    measured = run_probe(
        opened.architecture, sizes, recipe, corrects_drift=opened.corrects_drift, device=opened.device, dtype=opened.dtype, steps=steps
    )
    on_device = opened.device.type == "cuda"
    work = Work.of(recipe, element=opened.dtype.itemsize, corrects_drift=opened.corrects_drift, on_device=on_device, ranks=ranks)
    counted_at = machine(opened.device.type, torch.get_num_threads(), opened.dtype.itemsize, matrix_units=has_matrix_units())
    speed = machine_of_probe(counted_at, measured, recipe, corrects_drift=opened.corrects_drift)
    size = sum(tensor.nbytes for tensor in opened.checkpoint.tensors.values())
    left = sum(seconds_of_blocks(opened.architecture, sizes, work, recipe, speed, size, device_memory).values())
    stage = measured.stage
    console.say(
        f"probed the largest solve, {stage.rows} rows of {stage.k} inputs: {measured.seconds:.2f} s; the whole run will take about "
        f"{duration(left)}"
    )


def _measure(stage: Stage, solver: StackedSolver, hidden: int, device: torch.device, dtype: torch.dtype) -> ProbeResult:
    generator = torch.Generator(device).manual_seed(_SEED)
    x = torch.randn(CHUNK_TOKENS, stage.k, generator=generator, device=device).to(dtype)
    weight = torch.randn(stage.rows, stage.k, generator=generator, device=device)
    narrow = weight.to(dtype)
    gram = torch.zeros(stage.k, stage.k, device=device)
    seconds_gram = _timed(lambda: add_gram(gram, x), device)
    seconds_forward = _timed(lambda: x @ narrow.T, device)
    matrix = mirror(gram) / CHUNK_TOKENS
    matrix.diagonal().add_(0.1)  # fewer tokens than inputs leave it singular; a run has more
    drift = residual = None
    if solver.drift is not None:
        drift = 0.01 * matrix
        residual = torch.zeros(stage.k, stage.rows, device=device) if stage.rows == hidden else None
    hessian = Hessian(matrix, CHUNK_TOKENS, drift, residual)
    group_size = -1 if stage.groups <= 1 else stage.k // stage.groups
    if device.type == "cuda":  # kernels are compiled and libraries initialised at the first call
        few = None if residual is None else residual[:, :_FEW_ROWS].contiguous()
        solver.solve(weight[:_FEW_ROWS], None, Hessian(matrix, CHUNK_TOKENS, drift, few), group_size)
        _wait(device)
    started = time.monotonic()
    solver.solve(weight, None, hessian, group_size)
    _wait(device)
    seconds, peaks = time.monotonic() - started, device_peaks(device)
    return ProbeResult(
        stage=stage,
        seconds=seconds,
        products=(1.0 if device.type == "cuda" else _FORWARD_SHARE) * 2 * stage.rows * stage.k * CHUNK_TOKENS / seconds_forward,
        gram=stage.k**2 * CHUNK_TOKENS / seconds_gram,
        device_peak=peaks["peak_device_memory_bytes"],
        device_reserved=peaks["peak_device_reserved_bytes"],
    )


def _timed(work: Callable[[], Tensor | None], device: torch.device) -> float:
    """Seconds of the second of two calls: the first one initialises libraries."""
    work()
    _wait(device)
    started = time.monotonic()
    work()
    _wait(device)
    return max(time.monotonic() - started, 1e-9)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
