"""Before the long work: find the model, look at all of it, resolve the rules, count memory and disk. Nothing is written.

Whatever is wrong with a checkpoint is listed at once. Weights are looked at too: the scan for NaN and infinity reads each once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from marlinctl import room
from marlinctl.checkpoint.finite import scan_finite
from marlinctl.checkpoint.header import TensorInfo
from marlinctl.checkpoint.reader import Checkpoint, open_checkpoint
from marlinctl.checkpoint.source import Source, resolve_model
from marlinctl.checkpoint.writer import require_space
from marlinctl.console import Console
from marlinctl.devices import choose_device, forward_dtype, grow_segments
from marlinctl.errors import BadInput, ResourceProblem
from marlinctl.known_digests import check_known_digests
from marlinctl.memory import Work, available_memory, predicted_peak
from marlinctl.models import Architecture
from marlinctl.pattern import Known, from_headers, of_source
from marlinctl.preflight import check_pattern, look, refuse_dense_tiles, refuse_no_change, stored_once
from marlinctl.recipe import Recipe
from marlinctl.rules import Plan


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
    module_map: Path | None = None
    command: str = "marlinctl quantize"
    keep_job: bool = False
    resume: bool = False  # go on with the job that is there
    redo_from: int | None = None  # with `resume`: the first block to solve again

    def document(self) -> dict[str, Any]:
        """For the job's folder: everything but how this one run goes about it."""
        apart = ("resume", "redo_from")
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items() if key not in apart}

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Options:
        """The inverse of `document`."""
        paths = {key: Path(document[key]) for key in ("cache_dir", "module_map") if document[key] is not None}
        return cls(**{**document, **paths})


@dataclass(frozen=True, slots=True)
class Opened:
    """A model that has passed every check, and what will be done to it."""

    source: Source
    checkpoint: Checkpoint
    architecture: Architecture
    plan: Plan
    tensors: Mapping[str, TensorInfo]  # of the checkpoint, a tied head once
    pattern: Known  # 2:4 that the source has already
    matches: bool  # whether the original walks along (walk.py)
    device: torch.device
    dtype: torch.dtype  # of the forward pass


def open_model(
    model: str, out: Path, recipe: Recipe, options: Options, console: Console,
    before_weights: Callable[[Source, Checkpoint], None] = lambda _source, _checkpoint: None,
) -> Opened:  # fmt: skip
    """All checks, from cheap to dear. before_weights: those of the caller that need config.json and tokenizer alone."""
    refuse_no_change(recipe)
    device = torch.device(choose_device(options.device))
    grow_segments(device)
    dtype = forward_dtype(device, options.dtype)
    source = resolve_model(model, revision=options.revision, cache_dir=options.cache_dir, offline=options.offline, console=console)
    if source.note:
        console.say(source.note)
    checkpoint = open_checkpoint(source.folder)
    looked = look(checkpoint, recipe, options.module_map, console)
    refuse_dense_tiles(from_headers(checkpoint, looked.shapes, weights=True), looked.shapes, recipe)  # a row tells, before a text is read
    before_weights(source, checkpoint)
    pattern = of_source(checkpoint, looked.shapes, console)
    check_pattern(pattern.pattern, looked, recipe, console)
    tensors = stored_once(checkpoint, looked.architecture)
    opened = Opened(source, checkpoint, looked.architecture, looked.plan, tensors, pattern, looked.matches, device, dtype)
    _require_room(opened, looked.shapes, out, recipe, options)
    check_known_digests(checkpoint, console)
    _refuse_two_heads(checkpoint, looked.architecture)
    with console.progress("look for NaN and infinity", len(checkpoint.tensors)) as progress:
        packed = {f"{name}.weight" for name in looked.plan.group_sizes} if recipe.quantize.bits == 4 else set()
        scan_finite(checkpoint, looked.architecture.expected, progress, for_4_bits=packed)
    return opened


def _refuse_two_heads(checkpoint: Checkpoint, known: Architecture) -> None:
    """BadInput E375: transformers would compute with the stored head, vLLM with the embedding, and the walk with what is tied."""
    for name in known.tied_copies(checkpoint.tensors):
        if checkpoint.raw(name) != checkpoint.raw(f"{known.embedding}.weight"):
            what = f"config.json ties the output head to the embedding, and {name} is another matrix"
            fix = 'write "tie_word_embeddings": false into config.json if the model has a head of its own'
            raise BadInput("E375", what, where=str(checkpoint.tensors[name].file), fix=fix)


def _require_room(opened: Opened, shapes: Mapping[str, tuple[int, int]], out: Path, recipe: Recipe, options: Options) -> None:
    """Memory against --max-memory or what is free, disk against what is free beside OUT. `marlinctl plan` says the same before."""
    work = Work.of(recipe, element=opened.dtype.itemsize, matches=opened.matches, on_device=opened.device.type == "cuda")
    needed = predicted_peak(opened.architecture, opened.plan.group_sizes, work)
    allowed = available_memory() if options.max_memory is None else options.max_memory
    if needed > allowed:
        raise ResourceProblem(
            "E520",
            f"the run needs about {needed / 2**30:.2f} GiB, "
            + (f"{allowed / 2**30:.2f} GiB are free" if options.max_memory is None else f"--max-memory allows {allowed / 2**30:.2f} GiB"),
            where="memory",
            fix="fewer --samples, a smaller --sequence-length, or --calibration FILE in place of self (`marlinctl plan` shows what takes "
            "how much); a larger --max-memory starts all the same",
        )
    masked = shapes if work.prunes else opened.pattern.pattern.linears
    fmt = "ct" if work.bits == 4 else "dense"
    walked = room.output(fmt, opened.tensors, shapes, opened.plan.group_sizes, masked)
    scratch = 0 if work.on_device else room.scratch_bytes(opened.architecture, work)
    require_space(out, room.needed_by_walk(walked, scratch, room.state_bytes(opened.architecture, work)))
