"""Before the long work: find the model, look at all of it, resolve the rules, count memory and disk. Nothing is written.

Whatever is wrong with a checkpoint is listed at once. Weights are looked at too: the scan for NaN and infinity reads each once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from marlinctl.checkpoint.config import check_remote_code, check_tokenizer, refuse_quantized
from marlinctl.checkpoint.finite import scan_finite
from marlinctl.checkpoint.hub import check_hub_digests
from marlinctl.checkpoint.reader import Checkpoint, check_expected, open_checkpoint
from marlinctl.checkpoint.source import Source, resolve_model
from marlinctl.checkpoint.writer import require_space
from marlinctl.console import Console
from marlinctl.devices import choose_device, forward_dtype
from marlinctl.errors import BadInput, Problem, ResourceProblem, UsageError
from marlinctl.memory import predicted_peak
from marlinctl.models import Architecture, Experts, LinearSpec, architecture
from marlinctl.pattern import MASK_FILE, Known, of_source
from marlinctl.recipe import Recipe
from marlinctl.rules import Plan, plan
from marlinctl.walk import CHUNK_TOKENS


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


@dataclass(frozen=True, slots=True)
class Opened:
    """A model that has passed every check, and what will be done to it."""

    source: Source
    checkpoint: Checkpoint
    architecture: Architecture
    plan: Plan
    pattern: Known  # 2:4 that the source has already
    matches: bool  # whether the original walks along (walk.py)
    device: torch.device
    dtype: torch.dtype  # of the forward pass


def open_model(model: str, out: Path, recipe: Recipe, options: Options, console: Console) -> Opened:
    """All checks, from cheap to dear."""
    if recipe.quantize.bits == 16 and recipe.sparsify.pattern == "none":
        raise UsageError("E272", "16 bits and no pattern: nothing would change", where="--bits 16", fix="--bits 4, or `marlinctl sparsify`")
    device = torch.device(choose_device(options.device))
    dtype = forward_dtype(device, options.dtype)
    source = resolve_model(model, revision=options.revision, cache_dir=options.cache_dir, offline=options.offline, console=console)
    if source.note:
        console.say(source.note)
    checkpoint = open_checkpoint(source.folder)
    refuse_quantized(checkpoint)
    for note in (*checkpoint.notes, *check_remote_code(source.folder, checkpoint.config)):
        console.warn(note)
    known = architecture(checkpoint.config, options.module_map)
    check_together(
        lambda: check_expected(checkpoint, known.expected),
        lambda: refuse_unexpected(checkpoint, known, checkpoint.tensors),
        lambda: check_tokenizer(source.folder, checkpoint.config),
    )
    # At 16 bits there are no groups, unless the recipe distils: then int4 comes last, and must not fail after hours of work.
    groups = recipe.quantize.bits == 4 or recipe.distill.tokens > 0
    rules = plan(
        known,
        group_size=recipe.quantize.group_size if groups else -1,
        skip=recipe.quantize.skip,
        overrides={pattern: override.group_size if groups else -1 for pattern, override in recipe.quantize.overrides.items()},
        include=recipe.quantize.include,
    )
    shapes = {name: (spec.out_features, spec.in_features) for name, spec in _planned(known, rules).items()}
    if recipe.sparsify.pattern == "2:4":
        _refuse_odd_widths(shapes)
    pattern = of_source(checkpoint, shapes, console)
    _say_pattern(pattern, len(shapes), recipe, console)
    _refuse_dense_tiles(pattern, shapes, recipe)
    matches = recipe.quantize.match > 0
    if matches and any(isinstance(block.mlp, Experts) for block in known.blocks):
        console.warn("a model with experts: their router sends other tokens than the original's, so nothing is matched (--match 0)")
        matches = False
    opened = Opened(source, checkpoint, known, rules, pattern, matches, device, dtype)
    _require_room(opened, out, recipe, options)
    if source.kind == "hub":
        with console.progress("compare with the hub's digests", len(checkpoint.files)) as progress:
            check_hub_digests(checkpoint, progress)
    with console.progress("look for NaN and infinity", len(checkpoint.tensors)) as progress:
        scan_finite(checkpoint, known.expected, progress)
    return opened


def _planned(known: Architecture, rules: Plan) -> dict[str, LinearSpec]:
    specs = dict(known.linears) | ({rules.head.name: rules.head} if rules.head is not None else {})
    return {name: specs[name] for name in rules.group_sizes}


def _refuse_odd_widths(shapes: Mapping[str, tuple[int, int]]) -> None:
    odd = [Problem(f"K={k} of {name} is not a multiple of 4", "--pattern 2:4", "--skip it") for name, (_, k) in shapes.items() if k % 4]
    if odd:
        raise UsageError.from_problems("E271", odd)


def _refuse_dense_tiles(known: Known, shapes: Mapping[str, tuple[int, int]], recipe: Recipe) -> None:
    """marlin_24 holds 2:4 linears alone: found out here, and not when hours of work are to be packed."""
    dense = [name for name in shapes if name not in known.pattern.linears]
    if "marlin_24" in recipe.pack.formats and recipe.sparsify.pattern == "none" and dense:
        raise UsageError(
            "E273",
            f"the format marlin_24 needs 2:4 linears, and {len(dense)} of {len(shapes)} are not, {dense[0]} first",
            where="--format marlin_24",
            fix="--recipe sparse-int4, or prune the model first with `marlinctl sparsify`",
        )


def _say_pattern(known: Known, planned: int, recipe: Recipe, console: Console) -> None:
    """A pattern that is there already is kept, and said aloud; to prune once more is refused."""
    found = known.pattern
    if not found.linears:
        return
    origin = "its mask file" if found.origin == MASK_FILE else "the zeros of its weights"
    if recipe.sparsify.pattern != "none":
        raise UsageError(
            "E270",
            f"{len(found.linears)} of {planned} linears are 2:4 already ({origin})",
            where="--pattern 2:4",
            fix="`marlinctl quantize` keeps the pattern; start from the dense model to prune anew",
        )
    console.say(f"{len(found.linears)} of {planned} linears are 2:4, by {origin}; the pattern is kept")
    if len(found.linears) < planned:
        console.warn(f"{planned - len(found.linears)} linears are not 2:4, so the result cannot be packed to marlin_24")


def check_together(*checks: Callable[[], None]) -> None:
    """Run all checks of the checkpoint and list the problems of all of them."""
    errors: list[BadInput] = []
    for check in checks:
        try:
            check()
        except BadInput as error:
            errors.append(error)
    if errors:
        problems: list[Problem] = [problem for error in errors for problem in error.problems]
        raise BadInput.from_problems(errors[0].error_id, problems)


def refuse_unexpected(checkpoint: Checkpoint, known: Architecture, names: Iterable[str]) -> None:
    """BadInput E396 for tensors that the model has no place for."""
    extra = known.unexpected(dict.fromkeys(names))
    if extra:
        shown = ", ".join(extra[:5]) + (" ..." if len(extra) > 5 else "")
        raise BadInput(
            "E396",
            f"{len(extra)} tensors have no place in the model that config.json describes: {shown}",
            where=str(checkpoint.folder),
            fix="config.json and the weights do not belong together (fewer layers than weights?); download both again",
        )


def _require_room(opened: Opened, out: Path, recipe: Recipe, options: Options) -> None:
    asked = recipe.calibration
    needed = predicted_peak(
        opened.architecture,
        samples=asked.samples,
        length=asked.sequence_length,
        element=opened.dtype.itemsize,
        chunk_tokens=CHUNK_TOKENS,
        matches=opened.matches,
    )
    if options.max_memory is not None and needed > options.max_memory:
        raise ResourceProblem(
            "E520",
            f"the run needs about {needed / 2**30:.2f} GiB, --max-memory allows {options.max_memory / 2**30:.2f} GiB",
            where="memory",
            fix="fewer --samples or a smaller --sequence-length: the hidden states of all calibration tokens are held",
        )
    weights = sum(spec.out_features * spec.in_features for spec in opened.architecture.linears.values())
    total = sum(info.end - info.begin for info in opened.checkpoint.tensors.values())
    packed = weights * 5 // 8 if recipe.quantize.bits == 4 else 2 * weights
    masks = weights // 8 if recipe.sparsify.pattern != "none" or opened.pattern.pattern.linears else 0
    require_space(out, total - 2 * weights + packed + masks)
