"""How long a run takes, from counted operations and the rates of machines that were measured. An estimate, and reported as one.

A GPU's is made phase by phase (gpu_time.py). On a CPU:

    products     forward pass 2 N K a token, Gram matrix K² a token (both twice with drift correction), sweeps R K² a stack
    columns      a step of the sweep for each column of each stack
    elements     the scale search and the columns' arithmetic, a few passes over each weight for each candidate
    bytes        read for the scan, read again, written, read back

Rates are those of docs/comparison.md and docs/log (SmolLM2-135M, 2026-11): a core of an AMD EPYC without matrix units, a core of an Intel
Xeon with AMX. Other machines differ; the order of magnitude is what the figure is for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from marlinctl.data.calibration_size import SELF_BATCH
from marlinctl.errors import number_of
from marlinctl.models.architectures import Architecture
from marlinctl.planning import gpu_time
from marlinctl.planning.gpu_time import Gpu
from marlinctl.planning.memory import CHUNK_TOKENS, Stage, Work, parameters, stages, stages_of_block
from marlinctl.recipes.schema import Distill, Recipe


@dataclass(frozen=True, slots=True)
class Machine:
    """Rates of one machine without a GPU, all threads together."""

    title: str
    products: float  # operations a second in the dtype of the forward pass, a multiplication and an addition being two
    gram: float  # the same of Gram matrices
    full: float  # the same in float32, which solves use
    column: float  # seconds of overhead for a step of the sweep
    elements: float  # a second, in element-wise passes
    memory: float  # bytes a second, for reading the whole model once a token
    layer: float  # seconds of overhead for a block of one token
    files: float = 5e8  # bytes a second, through checks and digests
    solves: float = 1.0  # seconds that a solve took, over seconds that were counted for it


_GPU_PRODUCTS, _GPU_MEMORY, _GPU_LAYER = 4e14, 2e12, 5e-4  # an H200's, of training and of writing text, which are not counted by phase
_LINK = 2e9  # bytes a second between processes on one CPU: a guess
_START = 10.0  # seconds until torch and transformers are imported and the model is built
_PASSES_OF_LOGIT = 12  # softmax, sums of it, and its gradient
_PASSES = 2 * 9 * 8  # the scale search: two signs, nine candidates, eight passes each; integer scales are tried for nine, two of each


def machine(device: str, cores: int, element: int, *, matrix_units: bool) -> Machine | Gpu:
    """The measured machine that comes closest. cores: of one process."""
    if device.startswith("cuda"):
        return gpu_time.H200
    kind = "Intel Xeon with AMX" if matrix_units and element == 2 else "AMD EPYC"
    rate = 2.35e11 if matrix_units and element == 2 else 9e10 if element == 2 else 3.5e10
    return Machine(f"{number_of(cores, 'core')} of an {kind}", cores * rate, cores * rate, cores * 3.5e10, 4e-6, cores * 1e9, 1.5e10, 1e-3)


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What oneshot/probe.py measured: one solve of a recipe, and the products beside it."""

    stage: Stage
    seconds: float  # of the solve
    products: float  # operations a second
    gram: float  # K² of a token a second
    device_peak: int | None  # bytes that were alive on the CUDA device at the fullest moment
    device_reserved: int | None  # with what torch's allocator kept beside them


def largest_stage(
    architecture: Architecture, compressed: Mapping[str, int], recipe: Recipe, speed: Machine | Gpu, *, corrects_drift: bool
) -> Stage:
    """The solve that takes longest."""
    return max(
        stages(architecture, compressed),
        key=lambda stage: (_seconds_of_solve(stage, recipe, speed, corrects_drift=corrects_drift), stage.k),
    )


def machine_of_probe(speed: Machine | Gpu, measured: ProbeResult, recipe: Recipe, *, corrects_drift: bool) -> Machine | Gpu:
    """`speed` with the rates that this machine has shown. Disk, start-up and one token at a time keep theirs."""
    stage = measured.stage
    title = f"this machine, whose largest solve ({stage.rows} x {stage.k}) took {measured.seconds:.2f} s"
    solves = measured.seconds / _seconds_of_solve(stage, recipe, speed, corrects_drift=corrects_drift)
    if isinstance(speed, Gpu):
        gram = measured.gram * gpu_time.gram_operations(stage.k) / stage.k**2
        return gpu_time.with_probe(speed, title, forward=measured.products, gram=gram, solves=solves)
    return replace(speed, title=title, products=measured.products, gram=measured.gram, solves=solves)


def seconds_of_blocks(
    architecture: Architecture, compressed: Mapping[str, int], work: Work, recipe: Recipe, speed: Machine | Gpu, model_bytes: int,
    device_memory: int | None = None,
) -> dict[str, float]:  # fmt: skip
    """Seconds of each part of one pass over the blocks, in the rank that has most to do. device_memory: of a GPU (gpu_time.counts)."""
    if isinstance(speed, Gpu):
        counted = gpu_time.counts(architecture, compressed, work, recipe, model_bytes, device_memory)
        parts = gpu_time.seconds_of_phases(counted, speed)
    else:
        parts = _seconds_of_parts(architecture, compressed, work, recipe, speed, model_bytes)
    if work.writes_text:
        parts["text"] = _writing(architecture, work, speed)
    return parts


def _seconds_of_parts(
    architecture: Architecture, compressed: Mapping[str, int], work: Work, recipe: Recipe, speed: Machine, model_bytes: int
) -> dict[str, float]:
    tokens = work.own_samples * work.length
    forward = gram = sweeps = columns = elements = sent = once = 0.0
    for block in architecture.blocks:
        for stage, count in stages_of_block(block, compressed).items():
            seen = tokens * stage.share
            rows = stage.rows + stage.other_rows
            # The reference model's pass, and what experts make of its inputs.
            times = 1 if not work.corrects_drift else 3 if stage.experts > 1 else 2
            once += count * 2 * rows * stage.k * seen
            forward += count * 2 * rows * stage.k * seen * times
            gram += count * stage.k**2 * seen * (3 if work.corrects_drift else 1)
            s, c, e = _solve(replace(stage, rows=work.own_rows(stage.rows)), recipe)
            sums = 4 * stage.k**2 * (2 if work.corrects_drift else 1)
            sent += count * (2 * sums + 4 * stage.rows * stage.k) * (work.ranks - 1) / work.ranks
            sweeps, columns, elements = sweeps + count * s, columns + count * c, elements + count * e
    parts = {
        "start": _START,
        "forward": forward / speed.products,
        "gram": gram / speed.gram,
        "solve": speed.solves * _seconds(speed, sweeps, columns, elements),
        "files": 3.5 * model_bytes / speed.files,
    }
    if work.weighs_tokens:  # the head there and back. SmolLM2-135M, bfloat16, a core with AMX: forward 3.4 s, back 11.0 s, head 5.1 s
        logits = tokens * architecture.vocab_size
        operations = 4 * once + 4 * logits * architecture.hidden_size
        parts["token weights"] = operations / speed.products + _PASSES_OF_LOGIT * logits / speed.elements
    if work.tunes:
        tuning = sum(gpu_time.operations_of_tuning(block, recipe, CHUNK_TOKENS) for block in architecture.blocks if block.in_one_pass)
        parts["tune"] = tuning / speed.products
    return parts | ({"between ranks": sent / _LINK} if work.ranks > 1 else {})


def _seconds_of_solve(stage: Stage, recipe: Recipe, speed: Machine | Gpu, *, corrects_drift: bool) -> float:
    if isinstance(speed, Gpu):
        return gpu_time.seconds_of_solve(stage, recipe, speed, corrects_drift=corrects_drift)
    return _seconds(speed, *_solve(stage, recipe))


def _seconds(speed: Machine, sweeps: float, columns: float, elements: float) -> float:
    return sweeps / speed.full + columns * speed.column + elements / speed.elements


def _solve(stage: Stage, recipe: Recipe) -> tuple[float, float, float]:
    """Operations of products, columns visited, and element-wise passes of one stack."""
    k, rows = stage.k, stage.rows
    if not rows:
        return 0.0, 0.0, 0.0
    sweep = rows * k * k
    quantizes, prunes = recipe.scheme.quantizes, recipe.scheme.prunes
    operations, columns, passes = k**3 / 3.0, 0.0, 0.0
    if quantizes:
        rounds = 1 + 2 * recipe.quantize.refine
        operations += rounds * sweep + recipe.quantize.refine * (2 + 4) * sweep
        columns += rounds * k
        passes += _PASSES * (2 if recipe.quantize.group_scales == "integer" else 1) + 8 * rounds
    if prunes:
        iterative = recipe.sparsify.method == "iterative"
        operations += sweep + (2 * sweep * (recipe.sparsify.ls_iterations + recipe.sparsify.mask_sweeps) if iterative else 0)
        columns += k * (1 + (recipe.sparsify.mask_sweeps * 2 if iterative else 0))
        passes += 8 + (recipe.sparsify.mask_sweeps * 12 + recipe.sparsify.ls_iterations * 8 if iterative else 0)
    return operations, columns, passes * rows * k


def _writing(architecture: Architecture, work: Work, speed: Machine | Gpu) -> float:
    """The model reads all its weights for each token that a batch of samples writes."""
    batches = -(-work.samples // SELF_BATCH)
    weights = parameters(architecture)
    together = min(SELF_BATCH, work.samples)
    memory, layer = (_GPU_MEMORY, _GPU_LAYER) if isinstance(speed, Gpu) else (speed.memory, speed.layer)
    step = max(weights * work.element / memory, 2 * weights * together / _products(speed)) + len(architecture.blocks) * layer
    return batches * (work.length - 1) * step


def _products(speed: Machine | Gpu) -> float:
    return _GPU_PRODUCTS if isinstance(speed, Gpu) else speed.products


def seconds_of_training(architecture: Architecture, asked: Distill, speed: Machine | Gpu) -> float:
    """Student forward and backward, and the teacher's forward: 8 operations a weight and token, 10 with checkpointing."""
    return asked.tokens * parameters(architecture) * (10 if asked.checkpointing else 8) / _products(speed)
