"""How long a run takes, from counted operations and the rates of machines that were measured. An estimate, and reported as one.

    products     forward pass 2 N K a token, Gram matrix K² a token (both twice with drift correction), sweeps R K² a stack
    columns      a step of the sweep for each column of each stack: what a GPU waits for
    elements     the scale search and the columns' arithmetic, a few passes over each weight for each candidate
    bytes        read for the scan, read again, written, read back

Rates are those of docs/comparison.md and docs/log (SmolLM2-135M, 2026-11): a core of an AMD EPYC without matrix units, a core of an Intel
Xeon with AMX, an NVIDIA H200 (Llama-3-8B's shape, int4, all blocks: 55 s predicted without text, 64 s measured,
docs/log/2026-11-29-compression-speed.md). Other machines differ; the order of magnitude is what the figure is for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from marlinctl.data.calibration_size import SELF_BATCH
from marlinctl.models.architectures import Architecture, Block, Experts
from marlinctl.planning.memory import Stage, Work, experts_together, parameters, stages, stages_of_block
from marlinctl.recipes.schema import Distill, Recipe


@dataclass(frozen=True, slots=True)
class Machine:
    """Rates of one machine, all threads together."""

    title: str
    products: float  # operations a second in the dtype of the forward pass, a multiplication and an addition being two
    gram: float  # the same of Gram matrices
    full: float  # the same in float32, which solves use
    column: float  # seconds of overhead for a step of the sweep
    elements: float  # a second, in element-wise passes
    memory: float  # bytes a second, for reading the whole model once a token
    layer: float  # seconds of overhead for a block of one token
    files: float = 5e8  # bytes a second, through checks and digests; on a GPU the solver does not wait for them
    solves: float = 1.0  # seconds that a solve took, over seconds that were counted for it


_START = 10.0  # seconds until torch and transformers are imported and the model is built
_PASSES = 2 * 9 * 8  # the scale search: two signs, nine candidates, eight passes each


def machine(device: str, cores: int, element: int, *, matrix_units: bool) -> Machine:
    """The measured machine that comes closest."""
    if device.startswith("cuda"):
        return Machine("NVIDIA H200", 4e14, 2.6e14, 1.2e14, 2e-6, 2e11, 2e12, 5e-4, files=2.8e9)
    kind = "Intel Xeon with AMX" if matrix_units and element == 2 else "AMD EPYC"
    rate = 2.35e11 if matrix_units and element == 2 else 9e10 if element == 2 else 3.5e10
    return Machine(f"{cores} cores of an {kind}", cores * rate, cores * rate, cores * 3.5e10, 4e-6, cores * 1e9, 1.5e10, 1e-3)


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What oneshot/probe.py measured: one solve of a recipe, and the products beside it."""

    stage: Stage
    seconds: float  # of the solve
    products: float  # operations a second
    gram: float  # operations a second
    device_peak: int | None  # bytes that were alive on the CUDA device at the fullest moment
    device_reserved: int | None  # with what torch's allocator kept beside them


def largest_stage(architecture: Architecture, compressed: Mapping[str, int], recipe: Recipe, speed: Machine) -> Stage:
    """The solve that takes longest."""
    return max(stages(architecture, compressed), key=lambda stage: (_seconds(speed, *_solve(stage, recipe)), stage.k))


def machine_of_probe(speed: Machine, measured: ProbeResult, recipe: Recipe) -> Machine:
    """`speed` with the rates that this machine has shown. Disk, start-up and one token at a time keep theirs."""
    stage = measured.stage
    return replace(
        speed,
        title=f"this machine, whose largest solve ({stage.rows} x {stage.k}) took {measured.seconds:.2f} s",
        products=measured.products,
        gram=measured.gram,
        solves=measured.seconds / _seconds(speed, *_solve(stage, recipe)),
    )


def seconds_of_blocks(
    architecture: Architecture, compressed: Mapping[str, int], work: Work, recipe: Recipe, speed: Machine, model_bytes: int
) -> dict[str, float]:
    """Seconds of each part of one pass over the blocks."""
    tokens = work.samples * work.length
    together = experts_together(architecture, compressed, work)
    forward = gram = sweeps = columns = elements = 0.0
    for block in architecture.blocks:
        share = _share_of_tokens(block)
        for stage, count in stages_of_block(block, compressed).items():
            seen = tokens * (share if stage.experts > 1 else 1.0)
            rows = stage.rows + stage.other_rows
            # The reference model's pass, and what experts make of its inputs.
            times = 1 if not work.corrects_drift else 3 if stage.experts > 1 else 2
            forward += count * 2 * rows * stage.k * seen * times
            gram += count * stage.k**2 * seen * (3 if work.corrects_drift else 1)
            s, c, e = _solve(stage, recipe)
            launched = -(-count // min(together, count))  # experts that are solved together share the steps of a sweep
            sweeps, columns, elements = sweeps + count * s, columns + launched * c, elements + count * e
    parts = {
        "start": _START,
        "forward": forward / speed.products,
        "gram": gram / speed.gram,
        "solve": speed.solves * _seconds(speed, sweeps, columns, elements),
        "files": 3.5 * model_bytes / speed.files,
    }
    if work.writes_text:
        parts["text"] = _writing(architecture, work, speed)
    return parts


def _seconds(speed: Machine, sweeps: float, columns: float, elements: float) -> float:
    return sweeps / speed.full + columns * speed.column + elements / speed.elements


def _share_of_tokens(block: Block) -> float:
    """The part of the tokens that one expert sees."""
    return block.mlp.top_k / block.mlp.count if isinstance(block.mlp, Experts) else 1.0


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
        passes += _PASSES + 8 * rounds
    if prunes:
        iterative = recipe.sparsify.method == "iterative"
        operations += sweep + (2 * sweep * (recipe.sparsify.ls_iterations + recipe.sparsify.mask_sweeps) if iterative else 0)
        columns += k * (1 + (recipe.sparsify.mask_sweeps * 2 if iterative else 0))
        passes += 8 + (recipe.sparsify.mask_sweeps * 12 + recipe.sparsify.ls_iterations * 8 if iterative else 0)
    return operations, columns, passes * rows * k


def _writing(architecture: Architecture, work: Work, speed: Machine) -> float:
    """The model reads all its weights for each token that a batch of samples writes."""
    batches = -(-work.samples // SELF_BATCH)
    weights = parameters(architecture)
    together = min(SELF_BATCH, work.samples)
    step = max(weights * work.element / speed.memory, 2 * weights * together / speed.products) + len(architecture.blocks) * speed.layer
    return batches * (work.length - 1) * step


def seconds_of_training(architecture: Architecture, asked: Distill, speed: Machine) -> float:
    """Student forward and backward, and the teacher's forward: 8 operations a weight and token, 10 with checkpointing."""
    return asked.tokens * parameters(architecture) * (10 if asked.checkpointing else 8) / speed.products
