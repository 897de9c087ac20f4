"""Everything that a run can be refused for before its weights are read: the folder (checkpoint/folder.py) and the recipe, without torch.

A run asks it first (oneshot/open.py), and so does `plan`, so that what a plan accepts is what the run accepts. Two checks need weights and
belong to the run alone: the scan for NaN and infinity, and whether masks agree with the weights that they mask.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marlinctl.checkpoint.folder import examine
from marlinctl.checkpoint.formats.base import Format, Packed
from marlinctl.checkpoint.formats.registry import FORMATS, linear_bytes, misfits, sixteen_bit_linears
from marlinctl.checkpoint.reader import Checkpoint
from marlinctl.checkpoint.safetensors_header import TensorInfo
from marlinctl.checkpoint.sparsity import MASK_FILE, Pattern
from marlinctl.checkpoint.tied_head import with_own_head
from marlinctl.data.calibration_size import check_documents, check_length, too_few_tokens
from marlinctl.errors import BadInput, Problem, UsageError, number_of
from marlinctl.models.architectures import Architecture, LinearSpec
from marlinctl.models.module_map import check_module_map
from marlinctl.models.rotation import Stream
from marlinctl.planning.layer_rules import Plan, plan
from marlinctl.planning.rotating import refuse_idle_rotation, stream_to_rotate
from marlinctl.quantize.scheme import INT4, UINT4, Grid
from marlinctl.recipes.schema import Override, Recipe, divided
from marlinctl.system.console import Console


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """A model that fits its config and the recipe, as far as headers show."""

    architecture: Architecture
    plan: Plan
    shapes: Mapping[str, tuple[int, int]]  # the linears that are compressed -> (N, K)
    corrects_drift: bool  # whether drift from the reference model is corrected (oneshot/sequential.py)
    checkpoint: Checkpoint  # as the run reads it: a tied head that is compressed has a name of its own
    unties: bool = False  # whether there is such a head, or a tied one is copied to be rotated
    stream: Stream | None = None  # what is rotated, unless the source is 2:4
    notes: tuple[str, ...] = ()  # what the person should know of the folder: what is carried along or left out, how it is stored


def _overridden(override: Override, recipe: Recipe) -> Grid:
    """What a rule for some linears means: 8-bit codes are always symmetric."""
    if not recipe.scheme.quantizes:
        return INT4
    bits = override.bits or recipe.scheme.bits
    return Grid(bits, recipe.scheme.symmetric or bits != UINT4.bits, override.activations or "16-bit")


def refuse_zero_points(recipe: Recipe) -> None:
    """UsageError E273 for zero points where there can be none."""
    if recipe.scheme.symmetric:
        return
    if not recipe.scheme.quantizes:
        what = "weights that stay at 16 bits have no zero points"
        raise UsageError("E273", what, where="--asymmetric", fix="leave out --asymmetric, or quantize too: --bits 4 without pruning")
    if recipe.scheme.bits != UINT4.bits:
        what, fix = "8-bit codes are symmetric: vLLM and SGLang load no others", "leave out one of the two"
        raise UsageError("E273", what, where="--bits 8 --asymmetric", fix=fix)
    if recipe.scheme.prunes:
        what = "a 2:4 model has symmetric codes: what is pruned is code 0 in every format"
        raise UsageError("E273", what, where="--asymmetric", fix="leave out --asymmetric, or do not prune")


def refuse_idle_bits(recipe: Recipe) -> None:
    """UsageError E273 for other bits of single linears where nothing is quantized."""
    idle = [pattern for pattern, override in recipe.quantize.overrides.items() if override.bits is not None]
    if idle and not recipe.scheme.quantizes:
        what = "weights stay at 16 bits, and other bits for some linears would be ignored"
        raise UsageError("E273", what, where=f"--override {idle[0]}=bits:...", fix="leave it out, or quantize too: --bits 4")


def refuse_rounded_activations(recipe: Recipe) -> None:
    """UsageError E273 for 8-bit activations of single linears in a model that is pruned, or whose codes have zero points.

    What a rule alone shows to be wrong (4-bit weights, groups of weights) the recipe refuses when it is read.
    """
    rules = ((pattern, override.activations) for pattern, override in recipe.quantize.overrides.items() if override.activations)
    pattern, activations = next(rules, ("", None))
    if activations is None or not recipe.scheme.quantizes:
        return
    where = f"--override {pattern}=activations:{activations}"
    if recipe.scheme.prunes:
        what = f"a 2:4 model has 16-bit activations: no format holds 2:4 weights beside {activations} activations"
        raise UsageError("E273", what, where=where, fix="leave out activations, or do not prune")
    if not recipe.scheme.symmetric:
        what = f"weights beside {activations} activations have no zero points, and transformers loads no folder that has both"
        raise UsageError("E273", what, where=f"--asymmetric {where}", fix="leave out one of the two")


def refuse_rounded_inputs(recipe: Recipe, *, packs: bool) -> None:
    """UsageError E273 for int8 activations of the whole model where no folder says so: tiles of dense, symmetric 4-bit codes alone do.

    packs: whether the formats of the recipe are written. `quantize` writes the interchange form, which notes the choice for `pack`.
    """
    scheme = recipe.scheme
    if scheme.rounding == "none":
        return
    where = f"--activations {scheme.activations}"
    idle = "leave out --activations: products of 16-bit activations are all there are"
    if scheme.prunes:
        what = "a 2:4 model has 16-bit activations: no folder of 2:4 weights says that they may be rounded"
        raise UsageError("E273", what, where=where, fix="leave out --activations, or do not prune")
    if scheme.bits != INT4.bits:
        fix = "--override 'PATTERN=bits:8,activations:int8' for the format ct" if scheme.quantizes else idle
        raise UsageError("E273", f"it goes with 4-bit weights, and these have {scheme.bits} bits", where=where, fix=fix)
    if not scheme.symmetric:
        what = "the format marlin, which alone says that activations may be rounded, holds symmetric codes"
        raise UsageError("E273", what, where=f"--asymmetric {where}", fix="leave out one of the two")
    for pattern, override in recipe.quantize.overrides.items():
        if override.bits not in (None, INT4.bits):
            what = "the format marlin, which alone says that activations may be rounded, holds 4-bit codes alone"
            raise UsageError("E273", what, where=f"--override {pattern}=bits:{override.bits} {where}", fix="leave out one of the two")
    silent = [fmt.name for fmt in formats_of(recipe) if not fmt.rounds]
    if packs and silent:
        what = f"{silent[0]} folders have 16-bit activations: only marlin says that they may be rounded"
        raise UsageError("E273", what, where=f"--format {silent[0]} {where}", fix="--format marlin, or the recipe int4-a8")


def refuse_integer_scales(recipe: Recipe) -> None:
    """UsageError E273 for integer group scales of other codes than symmetric int4: code * factor must fit int8."""
    if recipe.quantize.group_scales == "integer" and recipe.scheme.grid != INT4:
        what = f"integer group scales go with symmetric 4-bit codes, and these are {recipe.scheme.grid} ones"
        raise UsageError("E273", what, where="--group-scales integer", fix="leave it out, or --bits 4 without --asymmetric")


def refuse_lone_tuning(recipe: Recipe) -> None:
    """UsageError E288 for tuning without the reference model, whose output is its aim."""
    if recipe.tunes and recipe.quantize.drift_correction == 0.0:
        what = "a block is tuned toward the original model's output, which is computed for drift correction alone"
        raise UsageError(
            "E288", what, where="--tune-steps", fix="--drift-correction 0.5 as well, or the recipe int4-best; or --tune-steps 0"
        )


def refuse_token_weights(recipe: Recipe, architecture: Architecture) -> None:
    """UsageError E288 for gradients through a model whose blocks cannot be run back one at a time with all their weights.

    Experts of a block are never in memory together without drift correction, and what a block leaves for later ones would have to take
    their gradients back to it.
    """
    if not recipe.weighs_tokens:
        return
    reason = ""
    if any(block.experts for block in architecture.blocks):
        reason = "has experts, which are not in memory together"
    elif architecture.shared:
        reason = "has blocks that read what earlier ones leave for them"
    elif architecture.head is None and architecture.tied is None:
        reason = "has no output head, whose predictions the loss is made of"
    if reason:
        what = f"{architecture.model_type} {reason}: gradients do not go back through it"
        raise UsageError("E288", what, where="--token-weights gradient", fix="--token-weights uniform")


def refuse_no_change(recipe: Recipe) -> None:
    if not recipe.scheme.quantizes and not recipe.scheme.prunes:
        raise UsageError("E273", "16 bits and no pattern: nothing would change", where="--bits 16", fix="--bits 4, or `marlinctl sparsify`")


# ---- what needs no model, and what needs its config alone ----------------------------------------------------------------------------


def check_arguments(recipe: Recipe, module_map: Path | None, *, distils: bool) -> None:
    """What needs no model, before one is fetched. UsageError or BadInput, as the work would raise hours later.

    distils: whether a recipe that trains is divided into stages and packed, as `compress` does.
    """
    refuse_no_change(recipe)
    refuse_zero_points(recipe)
    refuse_idle_bits(recipe)
    refuse_rounded_activations(recipe)
    refuse_rounded_inputs(recipe, packs=distils)
    refuse_integer_scales(recipe)
    refuse_lone_tuning(recipe)
    refuse_idle_rotation(recipe)
    check_module_map(module_map)
    asked = recipe.calibration
    if (most := asked.samples * asked.sequence_length) < asked.minimum_tokens:
        raise too_few_tokens(asked, f"at most {most}")
    if distils and divided(recipe) is not None:
        from marlinctl.planning.training_settings import check_settings

        check_settings(recipe.distill, 1)
        if recipe.distill.mode == "scales":
            fix = "full or blockwise; `marlinctl distill --mode scales` trains the scales of the result"
            raise UsageError("E288", "a pruned model has no scales to train yet", where="distill.mode of the recipe", fix=fix)


def check_texts(recipe: Recipe, *, distils: bool) -> None:
    """The files of text that the recipe names: they are there, and their first row is what it must be."""
    check_documents(recipe.calibration.source)
    if distils and divided(recipe) is not None:
        check_documents(recipe.distill.data)


def check_lengths(recipe: Recipe, config: Mapping[str, Any], *, distils: bool) -> None:
    """Samples and rows that the model cannot read: UsageError E246."""
    check_length(recipe.calibration, config)
    if distils and divided(recipe) is not None:
        from marlinctl.planning.training_settings import check_sizes

        check_sizes(recipe.distill, config, 1, where="--distill-sequence-length")


def require_samples(samples: int, processes: int) -> None:
    """UsageError E288 where a process that shares the calibration samples would have none."""
    if samples < processes:
        what = f"{samples} calibration samples cannot be spread over {processes} processes: each needs one at least"
        fix = f"--samples {processes} or more, or fewer processes ({max(samples, 1)} at most)"
        raise UsageError("E288", what, where="--samples", fix=fix)


# ---- what needs the headers ----------------------------------------------------------------------------------------------------------


def look(
    checkpoint: Checkpoint, recipe: Recipe, module_map: Path | None, console: Console | None, *,
    files: bool = True, weights: bool = True, drop_unexpected: bool = False,
) -> ModelPlan:  # fmt: skip
    """The folder (checkpoint/folder.py) and the rules. BadInput and UsageError list all that is wrong of a kind; notes are said,
    where there is a console.

    files: False where there is no folder yet, because it will be made from a GGUF file, tokenizer and all. weights: False where it holds
    headers alone. drop_unexpected: tensors beside the model (models/guests.py) are not part of the result.
    """
    examined = examine(
        checkpoint, structure="needed", dense=True, tokenizer=True, module_map=module_map, files=files, weights=weights and files,
        drop_unexpected=drop_unexpected,
    )  # fmt: skip
    if console is not None:
        for note in examined.notes:
            console.warn(note)
    known, checkpoint = examined.architecture, examined.checkpoint
    assert known is not None  # "needed"
    refuse_token_weights(recipe, known)
    if recipe.distill.tokens:
        from marlinctl.planning.training_settings import refuse_blockwise

        refuse_blockwise(recipe.distill, known)
    # At 16 bits there are no groups, unless the recipe distils: then int4 comes last, and must not fail after hours of work.
    groups = recipe.scheme.quantizes or recipe.distill.tokens > 0
    rules = plan(
        known,
        group_size=recipe.quantize.group_size if groups else -1,
        skip=recipe.quantize.skip,
        overrides={
            pattern: override.group_size if groups else -1
            for pattern, override in recipe.quantize.overrides.items()
            if override.group_size is not None
        },
        include=recipe.quantize.include,
        grid=recipe.scheme.grid,
        grids={
            pattern: _overridden(override, recipe) for pattern, override in recipe.quantize.overrides.items() if override.bits is not None
        },
    )
    if console is not None:
        for pattern in rules.idle:
            console.say(f"--skip {pattern} changes nothing: the output head stays 16-bit anyway")
    shapes = {name: (spec.out_features, spec.in_features) for name, spec in _planned(known, rules).items()}
    if recipe.scheme.prunes:
        _refuse_odd_widths(shapes)
    if problems := misfits(shapes, formats_of(recipe), rules.grids):
        raise BadInput.from_problems("E349", problems)
    stream = stream_to_rotate(checkpoint, known, recipe)
    unties = known.head is None and (stream is not None or (rules.head is not None and rules.head.name in rules.group_sizes))
    if unties:
        checkpoint, known = with_own_head(checkpoint, known), known.untied()
    return ModelPlan(known, rules, shapes, recipe.quantize.drift_correction > 0, checkpoint, unties, stream, examined.notes)


def said_of_untied_head(looked: ModelPlan, fmt: Format) -> str:
    """What it costs to compress a tied head, in the folder and for each token."""
    head, embedding = looked.architecture.head, looked.checkpoint.tensors[f"{looked.architecture.embedding}.weight"]
    assert head is not None  # untied
    if head.name not in looked.shapes:
        return (
            f"{head.name} is tied to the embedding, and each is rotated in another way: a 16-bit copy of it is written, and config.json "
            f"says tie_word_embeddings false; the folder is {_mebibytes(embedding.nbytes)} larger than without --rotate"
        )
    n, k = looked.shapes[head.name]
    size = linear_bytes(fmt, n, k, looked.plan.group_sizes[head.name], looked.plan.grid(head.name)) if fmt.quantized else embedding.nbytes
    copy = f"a {looked.plan.grid(head.name)} copy" if fmt.quantized else "a copy"
    reads = f", and a token reads {_mebibytes(size)} in place of {_mebibytes(embedding.nbytes)}" if fmt.quantized else ""
    return (
        f"{head.name} is tied to the embedding: {copy} of it is written, the embedding stays 16-bit, and config.json says "
        f"tie_word_embeddings false; the folder is {_mebibytes(size)} larger than with the 16-bit tied head{reads}"
    )


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.2f} MiB"


def formats_of(recipe: Recipe) -> list[Format]:
    return [FORMATS[name] for name in recipe.pack.formats]


def folders_of(recipe: Recipe, out: Path) -> dict[str, Path]:
    """Where `compress` publishes each format of a recipe: OUT in the first, OUT-<format> for each further one."""
    first, *others = recipe.pack.formats
    return {str(first): out} | {str(fmt): out.with_name(f"{out.name}-{fmt}") for fmt in others}


def wants_mask(recipe: Recipe) -> Format | None:
    """The format of a recipe that holds 2:4 linears alone, where the recipe does not prune."""
    return next((fmt for fmt in formats_of(recipe) if fmt.needs_mask and not recipe.scheme.prunes), None)


def stored_once(checkpoint: Checkpoint, known: Architecture) -> dict[str, TensorInfo]:
    """All tensors, a tied head only under the name of the embedding: some tools store it twice."""
    copies = known.tied_copies(checkpoint.tensors)
    return {name: info for name, info in checkpoint.tensors.items() if name not in copies}


def as_published(looked: ModelPlan, fmt: Format) -> Packed:
    """What a published folder will be to its clients (checkpoint/runtimes.py)."""
    quantized = looked.plan.group_sizes if fmt.quantized else {}
    shapes = {name: looked.shapes[name] for name in quantized}
    ignore, grids = sixteen_bit(looked.checkpoint, looked.architecture, quantized), looked.plan.grids if fmt.quantized else {}
    return Packed(fmt, shapes, quantized, ignore, looked.checkpoint.config, fmt.variant_of(grids.values()), grids)


def sixteen_bit(checkpoint: Checkpoint, known: Architecture, quantized: Iterable[str]) -> list[str]:
    """The linears of a 16-bit checkpoint that stay as they are, by the names of tensors and of modules."""
    chosen = set(quantized)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items() if name.removesuffix(".weight") not in chosen}
    return known.sixteen_bit(sixteen_bit_linears(shapes, chosen), chosen)


def check_pattern(found: Pattern, looked: ModelPlan, recipe: Recipe, console: Console) -> None:
    """A 2:4 pattern that the source has already: kept and said aloud, or refused where the recipe makes another or needs one."""
    _say_pattern(found, len(looked.shapes), looked.plan.grids, recipe, console)
    refuse_dense_tiles(found, looked.shapes, recipe)


def _planned(known: Architecture, rules: Plan) -> dict[str, LinearSpec]:
    specs = dict(known.linears) | ({rules.head.name: rules.head} if rules.head is not None else {})
    return {name: specs[name] for name in rules.group_sizes}


def _refuse_odd_widths(shapes: Mapping[str, tuple[int, int]]) -> None:
    odd = [Problem(f"K={k} of {name} is not a multiple of 4", "--pattern 2:4", "--skip it") for name, (_, k) in shapes.items() if k % 4]
    if odd:
        raise UsageError.from_problems("E255", odd)


def _in_part(found: Pattern, planned: int) -> str:
    return f"{len(found.linears)} of {number_of(planned, 'linear')} {'is' if len(found.linears) == 1 else 'are'} 2:4"


def _say_pattern(found: Pattern, planned: int, grids: Mapping[str, Grid], recipe: Recipe, console: Console) -> None:
    """A pattern that is there already is kept, and said aloud; to prune once more is refused."""
    if not found.linears:
        return
    origin = "its mask file" if found.origin == MASK_FILE else "the zeros of its weights"
    if recipe.scheme.quantizes and not recipe.scheme.symmetric:
        what = f"{_in_part(found, planned)} already ({origin}), and 2:4 linears have symmetric codes"
        raise UsageError("E273", what, where="--asymmetric", fix="leave out --asymmetric: the pattern is kept then")
    if recipe.sparsify.pattern != "none":
        raise UsageError(
            "E273",
            f"{_in_part(found, planned)} already ({origin})",
            where="--pattern 2:4",
            fix="`marlinctl quantize` keeps the pattern; start from the dense model to prune again",
        )
    if recipe.scheme.rounding != "none":
        what = f"{_in_part(found, planned)} already ({origin}), and 2:4 linears have 16-bit activations"
        raise UsageError("E273", what, where=f"--activations {recipe.scheme.activations}", fix="leave out --activations")
    if rounding := next((name for name in found.linears if grids.get(name, INT4).rounds_activations), None):
        what = f"{rounding} is 2:4 already ({origin}), and 2:4 linears have 16-bit activations"
        raise UsageError("E273", what, where="--override ...=activations:...", fix="leave out activations for the linears that are 2:4")
    console.say(f"{_in_part(found, planned)}, by {origin}; the pattern is kept")
    if len(found.linears) < planned:
        console.warn(
            f"{number_of(planned - len(found.linears), 'linear is', 'linears are')} not 2:4, so the result cannot be packed to marlin_24"
        )


def refuse_dense_tiles(found: Pattern, shapes: Mapping[str, tuple[int, int]], recipe: Recipe) -> None:
    """marlin_24 holds 2:4 linears alone: found out here, and not when hours of work are to be packed."""
    dense = [name for name in shapes if name not in found.linears]
    if dense and (sparse := wants_mask(recipe)) is not None:
        raise UsageError(
            "E273",
            f"the format {sparse.name} needs 2:4 linears, and {len(dense)} of {len(shapes)} are not, {dense[0]} first",
            where=f"--format {sparse.name}",
            fix="--recipe sparse-int4, or prune the model first with `marlinctl sparsify`",
        )
