"""Before any work: are student and teacher what they must be, and do they belong together? Nothing is written.

    student   dense, 2:4      a mask file, or else zeros that show the pattern               modes full and blockwise
              dense           not pruned                                                     mode full with a renewed mask
              ct, 4 bits      with a mask file or without                                    mode scales
    teacher   dense           as deep, as wide and with the vocabulary of the student        folder, hub id or GGUF file

Every weight is looked at: for NaN and infinity, and for a value where the mask prunes. All that is wrong is listed, by linear.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from marlinctl.checkpoint import findings, sparsity
from marlinctl.checkpoint import mask as masks
from marlinctl.checkpoint.contents import Contents, Noted, read_contents
from marlinctl.checkpoint.folder import examine
from marlinctl.checkpoint.formats.base import FormatInfo
from marlinctl.checkpoint.formats.registry import detect, read_parts
from marlinctl.checkpoint.reader import Checkpoint, open_checkpoint
from marlinctl.checkpoint.rotated import rotated_as
from marlinctl.checkpoint.source import Source, resolve_model
from marlinctl.checkpoint.source_digests import check_known_digests
from marlinctl.checkpoint.transformers_model import dense_tensors, model_from
from marlinctl.data.calibration import load_tokenizer
from marlinctl.errors import BadInput, Problem, UsageError, number_of
from marlinctl.models.architectures import Architecture
from marlinctl.oneshot.open import Options
from marlinctl.planning.training_settings import refuse_blockwise
from marlinctl.recipes.schema import Distill
from marlinctl.sparsify.mask import two_largest, two_of_four
from marlinctl.sparsify.types import QUAD
from marlinctl.system.console import Console

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SPARSIFY = "make it 2:4 first: marlinctl sparsify MODEL OUT"


class Pattern:
    """The masks of the student: from its mask file, or found from its zeros, or, of masks that are renewed, from its magnitudes."""

    def __init__(self, checkpoint: Checkpoint, known: Architecture, opened: masks.Masks | None, *, found: bool, renewed: bool) -> None:
        self._checkpoint, self._masks = checkpoint, opened
        self._trained: Mapping[str, Tensor] = {}
        specs = {name: (spec.out_features, spec.in_features) for name, spec in known.linears.items()}
        if known.head is not None:
            specs[known.head.name] = (known.head.out_features, known.head.in_features)
        self.from_file = opened is not None
        self.largest = renewed and not self.from_file
        layers = opened.layers if opened is not None else tuple(known.linears) if found else ()
        self.shapes: Mapping[str, tuple[int, int]] = {layer: specs[layer] for layer in layers if layer in specs}
        self.strangers = [layer for layer in layers if layer not in specs]

    def mask(self, layer: str) -> Tensor:
        """[N, K] bool, True = kept."""
        if layer in self._trained:
            return masks.unpack_bits(self._trained[layer], self.shapes[layer][1])
        if self._masks is not None:
            return self._masks.keep(layer, *self.shapes[layer])
        if self.largest:
            return two_largest(self._checkpoint.read(f"{layer}.weight").abs().T).T
        mask = two_of_four(self._checkpoint.read(f"{layer}.weight"))
        if mask is None:
            raise BadInput(
                "E356",
                f"{layer} is not 2:4: some four neighbours along K hold more than two weights",
                where=str(self._checkpoint.tensors[f"{layer}.weight"].file),
                fix=f"the folder has no {masks.NAME}, so every linear must show the pattern; {_SPARSIFY}",
            )
        return mask

    def after(self, trained: Mapping[str, Tensor]) -> Pattern:
        """With the masks that a training ended with, as `pack_bits` has them."""
        found = copy(self)
        found._trained = trained
        return found


@dataclass(frozen=True, slots=True)
class Model:
    """One of the two models, checked. The teacher's checkpoint is rotated as the student is: hidden states are compared."""

    source: Source
    checkpoint: Checkpoint
    architecture: Architecture
    info: FormatInfo
    notes: tuple[str, ...]  # what the person should know of the folder

    def load(self, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        """The whole model in eval mode, every linear dense."""
        return model_from(self.checkpoint, dense_tensors(self.checkpoint), dtype=dtype, device=device)


@dataclass(frozen=True, slots=True)
class TrainingInputs:
    student: Model
    teacher: Model
    pattern: Pattern
    contents: Mapping[str, Contents]  # of "student" and "teacher"
    warnings: tuple[str, ...]  # what looks wrong and can be worked with; for the report


def open_models(
    student: str, teacher: str, asked: Distill, options: Options, console: Console, stack: ExitStack,
    noted: Callable[[str], Noted | None] = lambda name: None,
    before_weights: Callable[[Model], None] = lambda student: None,
) -> TrainingInputs:  # fmt: skip
    """All checks, cheap ones first. What is opened is closed by `stack`. noted: what a resumed job knows of the weights.
    before_weights: those of the caller that need none.
    """
    pupil = _open_student(_resolve(student, None, options, console), asked, options, console, stack)
    original = _open_teacher(_resolve(teacher, options.revision, options, console), options, console, stack)
    refuse_blockwise(asked, pupil.architecture)
    _check_kinship(pupil, original)
    before_weights(pupil)
    pattern = _open_pattern(pupil, asked, console, stack)
    contents: dict[str, Contents] = {}
    warnings: list[str] = []
    for name, model in (("student", pupil), ("teacher", original)):
        checkpoint = model.checkpoint
        read = read_contents(checkpoint, console, scan=checkpoint.tensors, noted=noted(name), title=f"read all weights of the {name}")
        check_known_digests(checkpoint, read)
        read.require_finite()
        for warning in (zeros := findings.of_weights(read, strict=False)):
            console.warn(f"{name}: {warning}")
        contents[name] = read
        warnings += [f"{name}: {warning}" for warning in (*model.notes, *zeros)]
    _check_pattern(pupil, pattern, console)
    original = replace(original, checkpoint=rotated_as(pupil.checkpoint.folder, original.checkpoint, original.architecture))
    return TrainingInputs(pupil, original, pattern, contents, tuple(warnings))


def _resolve(name: str, revision: str | None, options: Options, console: Console) -> Source:
    source = resolve_model(name, revision=revision, cache_dir=options.cache_dir, offline=options.offline, console=console)
    if source.note:
        console.say(source.note)
    return source


# ---- each by itself ------------------------------------------------------------------------------------------------------------------


def _open_student(source: Source, asked: Distill, options: Options, console: Console, stack: ExitStack) -> Model:
    checkpoint = stack.enter_context(open_checkpoint(source.folder, weight_files="auto"))
    _check_form(source, detect(checkpoint.config, checkpoint.tensors), asked)
    return _examined(source, checkpoint, options, console)


def _check_form(source: Source, info: FormatInfo, asked: Distill) -> None:
    where = str(source.folder)
    if rounding := next((layer for layer, grid in info.grids.items() if grid.rounds_activations), None):
        kind = info.grid(rounding).activations
        what = f"{rounding} has {kind} activations, and such a student is not trained: their rounding has no gradient"
        raise BadInput("E313", what, where=where, fix="train a student with 16-bit activations: --override without activations")
    if info.format.trains == "weights" and asked.mode == "scales":
        fix = "--mode full or --mode blockwise trains its weights"
        raise UsageError("E288", "the student is 16-bit and has no scales to train", where=where, fix=fix)
    if info.format.trains == "scales" and asked.mode != "scales":
        fix = "--mode scales trains its scales and norms, and leaves the codes alone"
        if asked.mask == "renewed":
            fix = "renew the mask of the 16-bit model, and quantize the result"
        raise UsageError("E288", f"the student is quantized: --mode {asked.mode} would change its codes", where=where, fix=fix)
    if not info.format.trains:
        fix = "marlinctl pack STUDENT OUT --format ct, and distill that"
        raise BadInput("E313", f"a student in the format {info.name} is not trained", where=where, fix=fix)


def _open_teacher(source: Source, options: Options, console: Console, stack: ExitStack) -> Model:
    checkpoint = stack.enter_context(open_checkpoint(source.folder))
    return _examined(source, checkpoint, options, console, dense=True)


def _examined(source: Source, checkpoint: Checkpoint, options: Options, console: Console, *, dense: bool = False) -> Model:
    examined = examine(checkpoint, structure="needed", dense=dense, tokenizer=True, module_map=options.module_map)
    for note in examined.notes:
        console.warn(note)
    assert examined.architecture is not None  # "needed"
    return Model(source, examined.checkpoint, examined.architecture, examined.info, examined.notes)


# ---- together ------------------------------------------------------------------------------------------------------------------------


def _check_kinship(student: Model, teacher: Model) -> None:
    """Hidden states are compared block by block and predictions token by token, so both must be built alike."""
    ours, theirs = student.architecture, teacher.architecture
    pairs = [
        ("blocks", len(ours.blocks), len(theirs.blocks)),
        ("hidden size", ours.hidden_size, theirs.hidden_size),
        ("vocabulary", ours.vocab_size, theirs.vocab_size),
    ]
    where = f"{teacher.source.name} (teacher of {student.source.name})"
    fix = "the teacher is the model that the student was made from, or one of the same size and vocabulary"
    problems = [Problem(f"{what}: the student has {mine}, the teacher {other}", where, fix) for what, mine, other in pairs if mine != other]
    if not problems:
        mine, other = (load_tokenizer(model.source.folder).get_vocab() for model in (student, teacher))
        moved = sorted(token for token in mine.keys() & other.keys() if mine[token] != other[token])
        if moved:
            count = number_of(len(moved), "token has another id", "tokens have other ids")
            what = f"{count} in the teacher's tokenizer, {moved[0]!r} among them"
            problems.append(Problem(what, where, fix))
    if problems:
        raise BadInput.from_problems("E371", problems)


def _open_pattern(student: Model, asked: Distill, console: Console, stack: ExitStack) -> Pattern:
    opened = stack.enter_context(masks.open_masks(student.source.folder))
    dense = not student.info.format.quantized
    pattern = Pattern(student.checkpoint, student.architecture, opened, found=dense, renewed=asked.mask == "renewed")
    if pattern.strangers:
        where = str(student.source.folder / masks.NAME)
        raise BadInput.from_problems(
            "E356",
            [
                Problem(f"there is a mask for {layer}, but the model has no such linear", where, "take mask and weights from one folder")
                for layer in pattern.strangers
            ],
        )
    if opened is None and dense:
        how = "begins with the two largest weights of each four" if asked.mask == "renewed" else "is found from the zeros of its weights"
        console.say(f"the student has no {masks.NAME}: its 2:4 pattern {how}")
    return pattern


def _check_pattern(student: Model, pattern: Pattern, console: Console) -> None:
    """Every mask is 2:4, and what it prunes is zero. Lists all linears where that does not hold."""
    problems = sparsity.contradictions(pattern.shapes, lambda layer: _check_layer(student, pattern, layer), console)
    if problems and not pattern.from_file and not pattern.largest and len(problems) == len(pattern.shapes):
        what = f"the student is not pruned: none of its {number_of(len(problems), 'linear')} is 2:4"
        fix = f"{_SPARSIFY}; or, with billions of tokens, --mask renewed"
        raise BadInput("E356", what, where=str(student.source.folder), fix=fix)
    sparsity.refuse(problems)


def _check_layer(student: Model, pattern: Pattern, layer: str) -> None:
    if pattern.largest:
        _require_fours(layer, pattern.shapes[layer][1], student.checkpoint.folder)
        return
    mask = pattern.mask(layer)
    if not pattern.from_file:
        return
    packed = layer in student.info.layers
    values = read_parts(student.checkpoint, student.info, layer).codes if packed else student.checkpoint.read(f"{layer}.weight")
    alive = (values != 0) & ~mask
    if bool(alive.any()):
        row, column = alive.nonzero()[0].tolist()
        count = number_of(int(alive.sum()), "weight is", "weights are")
        raise BadInput(
            "E356",
            f"{layer}: {count} not zero although the mask prunes them; the first is [{row}, {column}]",
            where=str(student.source.folder / masks.NAME),
            fix=f"mask and weights do not belong together; write or fetch the checkpoint again, or {_SPARSIFY}",
        )


def _require_fours(layer: str, k: int, folder: Path) -> None:
    """BadInput E356 where a linear that is to become 2:4 has no fours."""
    if k % QUAD:
        what = f"{layer} cannot become 2:4: K={k} is not a multiple of {QUAD}"
        fix = f"prune the model without it, and distill the result: marlinctl sparsify MODEL OUT --skip {layer}"
        raise BadInput("E356", what, where=str(folder), fix=fix)
