"""Before the long work: find the model, look at all of it, resolve the rules, count memory and disk. Nothing is written.

Whatever is wrong with a checkpoint is listed at once. Weights are looked at too: one pass reads each once, for digests, NaN and infinity.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marlinctl.checkpoint import findings
from marlinctl.checkpoint.contents import Contents, Noted, reading_contents
from marlinctl.checkpoint.formats.base import Format
from marlinctl.checkpoint.formats.registry import working_format
from marlinctl.checkpoint.reader import Checkpoint, open_checkpoint
from marlinctl.checkpoint.rotated import Rotation, drawn, rotated_checkpoint
from marlinctl.checkpoint.runtimes import loads
from marlinctl.checkpoint.safetensors_header import TensorInfo
from marlinctl.checkpoint.shards import MAX_SHARD_BYTES
from marlinctl.checkpoint.source import Source, resolve_model
from marlinctl.checkpoint.source_digests import check_known_digests
from marlinctl.checkpoint.sparsity import SourcePattern, from_headers, of_source
from marlinctl.checkpoint.writer import require_space
from marlinctl.errors import ResourceProblem
from marlinctl.models.architectures import Architecture
from marlinctl.planning import disk
from marlinctl.planning.layer_rules import Plan
from marlinctl.planning.memory import Work, predicted_peak
from marlinctl.planning.preflight import (
    ModelPlan,
    as_published,
    check_arguments,
    check_pattern,
    check_texts,
    look,
    refuse_dense_tiles,
    refuse_no_change,
    said_of_untied_head,
    stored_once,
    wants_mask,
)
from marlinctl.planning.rotating import refuse_rotated_pattern
from marlinctl.recipes.schema import Recipe
from marlinctl.system.console import Console, gibibytes
from marlinctl.system.devices import choose_device, forward_dtype, set_up_allocator
from marlinctl.system.host import available_memory

if TYPE_CHECKING:
    import torch

    from marlinctl.evaluation.gate import Measurement


@dataclass(frozen=True, slots=True)
class Options:
    """How the job runs, as against what it computes (the recipe)."""

    revision: str | None = None
    device: str = "cpu"
    dtype: str = "auto"
    cache_dir: Path | None = None
    offline: bool = False
    overwrite: bool = False
    strict: bool = False
    deterministic: bool = False
    threads: int | None = None
    max_memory: int | None = None  # bytes
    device_memory: int | None = None  # bytes of the GPU that the run may take; None: what is free
    module_map: Path | None = None
    drop_unexpected: bool = False  # tensors beside the model are left out, and not carried
    command: str = "marlinctl quantize"
    keep_job: bool = False
    max_shard_bytes: int = MAX_SHARD_BYTES  # of a published weight file
    tracker: str | None = None  # of distill: tensorboard or wandb
    base_model: str | None = None  # a hub id, for the card: what the original is called there
    license: str | None = None  # an id that the hub knows, for the card; None: what stands beside the original
    resume: bool = False  # continue the job that is there
    redo_from: int | None = None  # with `resume`: the first block to solve again

    def document(self) -> dict[str, Any]:
        """For the job's folder: everything but how this one run goes about it."""
        apart = ("resume", "redo_from")
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items() if key not in apart}


@dataclass(frozen=True, slots=True)
class RunInputs:
    """A model that has passed every check, and what will be done to it."""

    source: Source
    checkpoint: Checkpoint  # a tied head that is compressed has a name of its own (checkpoint/tied_head.py)
    architecture: Architecture
    plan: Plan
    tensors: Mapping[str, TensorInfo]  # of the checkpoint, a tied head once
    pattern: SourcePattern  # 2:4 that the source has already
    corrects_drift: bool  # whether drift from the reference model is corrected (sequential.py)
    device: torch.device
    dtype: torch.dtype  # of the forward pass
    contents: Contents  # what its files hold
    warnings: tuple[str, ...]  # what looks wrong and can be worked with; for the report
    rotation: Rotation | None = None  # of the checkpoint


def check_request(recipe: Recipe, options: Options, measure: Measurement | None, *, distils: bool, texts_known: bool = False) -> None:
    """What needs no model, before one is fetched. UsageError or BadInput, as the work would raise hours later.

    distils: a recipe that trains is divided into stages (`compress`). texts_known: the job has its texts already.
    """
    check_arguments(recipe, options.module_map, distils=distils)
    if not texts_known:
        check_texts(recipe, distils=distils)
    choose_device(options.device)
    if measure is not None:
        measure.check_arguments()


def open_model(
    model: str, out: Path, recipe: Recipe, options: Options, console: Console,
    published: Sequence[Format] = (), noted: Callable[[], Noted | None] = lambda: None,
    before_weights: Callable[[Source, Checkpoint], None] = lambda source, checkpoint: None, shared: Contents | None = None,
    writes: bool = True,
) -> RunInputs:  # fmt: skip
    """All checks, cheap ones first. published: the formats that come of it in the end; who will refuse them is said. noted: what a
    resumed job knows of the weights. before_weights: the caller's checks that need config.json and tokenizer alone. shared: what the files
    hold, where another process has read them. writes: False for a process that needs no disk.

    With --strict, what is a warning without it is BadInput E307 or NumericalProblem E605 (checkpoint/findings.py).
    """
    import torch

    refuse_no_change(recipe)
    device = torch.device(choose_device(options.device))
    set_up_allocator(device)
    dtype = forward_dtype(device, options.dtype)
    source = resolve_model(model, revision=options.revision, cache_dir=options.cache_dir, offline=options.offline, console=console)
    if source.note:
        console.say(source.note)
    checkpoint = open_checkpoint(source.folder)
    looked = look(checkpoint, recipe, options.module_map, console, drop_unexpected=options.drop_unexpected)
    findings.refuse_notes(checkpoint, strict=options.strict)
    warnings = list(looked.notes)
    if looked.unties:
        console.say(said_of_untied_head(looked, published[0] if published else working_format(recipe.scheme)))
    for fmt in published:
        for line in loads(as_published(looked, fmt)).warnings(fmt):
            console.warn(line)
    if wants_mask(recipe) is not None:  # one row shows it, before a text is read
        refuse_dense_tiles(from_headers(looked.checkpoint, looked.shapes, weights=True), looked.shapes, recipe)
    packed = {f"{name}.weight" for name in looked.plan.group_sizes} if recipe.scheme.quantizes else set()
    if looked.unties and looked.plan.head is not None and f"{looked.plan.head.name}.weight" in packed:
        packed.add(f"{looked.architecture.embedding}.weight")
    stored = replace(checkpoint, parts=looked.checkpoint.parts)
    reading = reading_contents(stored, console, scan=looked.architecture.expected, for_4_bits=packed, noted=noted())
    with reading if shared is None else nullcontext(lambda: shared) as contents_read:
        before_weights(source, checkpoint)
        pattern = of_source(looked.checkpoint, looked.shapes, console)
        check_pattern(pattern.pattern, looked, recipe, console)
        refuse_rotated_pattern(pattern.pattern, recipe)
        tensors = stored_once(looked.checkpoint, looked.architecture)
        work = Work.of(recipe, element=dtype.itemsize, corrects_drift=looked.corrects_drift, on_device=device.type == "cuda")
        _require_resources(looked, tensors, pattern, work, out if writes else None, options)
        contents = contents_read()
    check_known_digests(checkpoint, contents)
    contents.require_finite()
    for warning in findings.of_weights(contents, strict=options.strict):
        console.warn(warning)
        warnings.append(warning)
    known, worked_on, rotation = looked.architecture, looked.checkpoint, None
    if looked.stream is not None and not pattern.pattern.linears:
        rotation = drawn(looked.stream)
        worked_on = rotated_checkpoint(worked_on, looked.stream, rotation, device)
        console.say("the residual stream and the value heads are rotated; --rotate never leaves them as they are")
    return RunInputs(
        source, worked_on, known, looked.plan, tensors, pattern, looked.corrects_drift, device, dtype, contents, tuple(warnings), rotation
    )


def _require_resources(
    looked: ModelPlan, tensors: Mapping[str, TensorInfo], pattern: SourcePattern, work: Work, out: Path | None, options: Options
) -> None:
    """Memory against --max-memory or what is free, disk against what is free beside OUT. `marlinctl plan` says the same before."""
    needed = predicted_peak(looked.architecture, looked.plan.group_sizes, work)
    allowed = available_memory() if options.max_memory is None else options.max_memory
    if needed > allowed:
        raise ResourceProblem(
            "E522",
            f"the run needs about {gibibytes(needed)}, "
            + (f"{gibibytes(allowed)} are free" if options.max_memory is None else f"--max-memory allows {gibibytes(allowed)}"),
            where="memory",
            fix="fewer --samples, a smaller --sequence-length, or --calibration FILE in place of self (`marlinctl plan` shows what takes "
            "how much); a larger --max-memory starts all the same",
        )
    if out is None:
        return
    masked = looked.shapes if work.scheme.prunes else pattern.pattern.linears
    fmt = working_format(work.scheme)
    first = disk.output(fmt, tensors, looked.shapes, looked.plan, masked)
    scratch = 0 if work.on_device else disk.scratch_bytes(looked.architecture, work)
    require_space(out, disk.needed_by_blocks(first, scratch, disk.state_bytes(looked.architecture, work)))
