"""The 2:4 pattern of a checkpoint folder: who states it, and what the weights say themselves.

    metadata     native marlin_24: its tiles cannot be read without it
    mask file    beside any other form (checkpoint/mask.py); a linear that it does not name is dense
    zeros        nothing states a pattern, yet two of each four weights are zero: a 2:4 model of another tool

The first two are trusted, and checked. Zeros are a guess: a kept weight may be zero too, and then the mask is ambiguous. So a pattern that
is derived from zeros is always reported.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from marlinctl.checkpoint.formats import registry
from marlinctl.checkpoint.formats.base import FormatInfo
from marlinctl.checkpoint.mask import open_masks
from marlinctl.errors import BadInput, Problem

if TYPE_CHECKING:
    from torch import Tensor

    from marlinctl.checkpoint.mask import Masks
    from marlinctl.checkpoint.reader import Checkpoint
    from marlinctl.system.console import Console

METADATA, MASK_FILE, ZEROS = "metadata", "mask file", "zeros"
REFUSED = "E356"  # a mask of the wrong shape, not 2:4, needed and not there, or contradicted by the weight


@dataclass(frozen=True, slots=True)
class Pattern:
    """Which linears are 2:4, and who says so: METADATA, MASK_FILE, ZEROS, or None."""

    origin: str | None
    linears: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class KeptWeights:
    """What the weights of a folder's 2:4 linears hold."""

    pattern: Pattern
    kept: int
    zero: int  # kept weights that are 0: only the mask distinguishes them from pruned weights


@dataclass(frozen=True, slots=True)
class SourcePattern:
    """The pattern that a 16-bit source brings along, checked before any work; each mask is read when its linear is solved."""

    checkpoint: Checkpoint
    pattern: Pattern

    def origin(self, name: str) -> str | None:
        return self.pattern.origin if name in self.pattern.linears else None

    def mask(self, name: str, weight: Tensor) -> Tensor:
        """[N, K] bool of a linear that the pattern names."""
        if self.pattern.origin == MASK_FILE:
            with open_masks(self.checkpoint.folder) as masks:
                assert masks is not None
                return masks.keep(name, *weight.shape)
        from marlinctl.sparsify.mask import two_of_four

        mask = two_of_four(weight)
        assert mask is not None
        return mask


def of_source(checkpoint: Checkpoint, linears: Mapping[str, tuple[int, int]], console: Console) -> SourcePattern:
    """Which of these linears (name -> (N, K)) of a 16-bit checkpoint are 2:4. BadInput lists every mask that does not belong to its weight.

    Without a mask file the first linear decides whether the others are looked at: no dense model has such zeros by accident.
    """
    from marlinctl.sparsify.mask import two_of_four

    def shown(name: str) -> bool:
        return two_of_four(checkpoint.read(f"{name}.weight")) is not None

    with open_masks(checkpoint.folder) as masks:
        if masks is not None:
            problems = strangers(linears, FormatInfo(registry.DENSE), masks)
            found = tuple(name for name in linears if name in masks)
            opened = masks
            problems += contradictions(found, lambda name: opened.checked_keep(name, checkpoint.read(f"{name}.weight")), console)
            refuse(problems)
            return SourcePattern(checkpoint, Pattern(MASK_FILE, found))
    names = list(linears)
    if not names or not shown(names[0]):
        return SourcePattern(checkpoint, Pattern(None, ()))
    with console.progress("look for the 2:4 pattern", len(names)) as progress:
        found_in_zeros = []
        for name in names:
            found_in_zeros += [name] if shown(name) else []
            progress.advance()
    return SourcePattern(checkpoint, Pattern(ZEROS, tuple(found_in_zeros)))


def from_headers(checkpoint: Checkpoint, linears: Mapping[str, tuple[int, int]], *, weights: bool) -> Pattern:
    """What `of_source` will most likely find in a 16-bit checkpoint, without torch: the mask file's names; else, for all linears, what one
    row of the first one shows, where there are weights to read. No mask is compared with its weights."""
    with open_masks(checkpoint.folder) as masks:
        if masks is not None:
            problems = strangers(linears, FormatInfo(registry.DENSE), masks)
            refuse(problems)
            return Pattern(MASK_FILE, tuple(name for name in linears if name in masks))
    first = next(iter(linears))
    return Pattern(ZEROS, tuple(linears)) if weights and _row_is_two_of_four(checkpoint, f"{first}.weight") else Pattern(None, ())


def _row_is_two_of_four(checkpoint: Checkpoint, name: str) -> bool:
    """Whether each aligned four of the first row has two zeros. False for a row of zeros alone, which shows nothing."""
    tensor = checkpoint.tensors[name]
    n, k = tensor.shape
    width = tensor.nbytes // (n * k)
    row = bytes(checkpoint.raw(name)[: k * width])
    alive = [any(row[i : i + width - 1]) or row[i + width - 1] & 0x7F != 0 for i in range(0, len(row), width)]  # -0.0 is zero too
    return k % 4 == 0 and any(alive) and all(sum(alive[i : i + 4]) <= 2 for i in range(0, k, 4))


def origin(info: FormatInfo, masks: Masks | None) -> str | None:
    """Who states the pattern of a folder."""
    return METADATA if info.format.needs_mask else None if masks is None else MASK_FILE


def stated(checkpoint: Checkpoint, info: FormatInfo, masks: Masks | None) -> Pattern:
    """From names alone, without torch: what metadata or the mask file claims."""
    in_metadata = info.layers if info.format.needs_mask else {}
    in_file = [] if masks is None else [layer for layer in shapes(checkpoint, info) if layer in masks]
    return Pattern(origin(info, masks), tuple(sorted({*in_metadata, *in_file})))


def counted(checkpoint: Checkpoint, info: FormatInfo, masks: Masks | None) -> KeptWeights:
    """From the weights of all linears. Where no pattern is stated, it is derived from zeros."""
    from marlinctl.sparsify.mask import two_of_four

    claim = stated(checkpoint, info, masks)
    linears, kept, zero = [], 0, 0
    for layer, (n, k) in shapes(checkpoint, info).items():
        weight, mask = weight_and_mask(checkpoint, info, layer, masks)
        if claim.origin is None and bool(weight.any()):  # zeros alone do not make a pattern
            mask = two_of_four(weight)
        if mask is not None:
            linears.append(layer)
            kept += n * k // 2
            zero += int(((weight == 0) & mask).sum())
    return KeptWeights(Pattern(claim.origin or (ZEROS if linears else None), tuple(linears)), kept, zero)


def contradictions(layers: Collection[str], read: Callable[[str], object], console: Console) -> list[Problem]:
    """What is wrong with the masks of these linears: `read` reads one with its mask and raises BadInput E356. All are read."""
    problems: list[Problem] = []
    with console.progress("check the 2:4 pattern", len(layers)) as progress:
        for layer in layers:
            try:
                read(layer)
            except BadInput as refused:
                if refused.error_id != REFUSED:
                    raise
                problems += refused.problems
            progress.advance()
    return problems


def refuse(problems: Sequence[Problem]) -> None:
    if problems:
        raise BadInput.from_problems(REFUSED, problems)


def weight_and_mask(checkpoint: Checkpoint, info: FormatInfo, layer: str, masks: Masks | None) -> tuple[Tensor, Tensor | None]:
    """Codes, or the 16-bit weight, [N, K] of a linear and its mask where one is stated. BadInput where the two contradict each other."""
    if layer in info.layers:
        parts = registry.read_parts(checkpoint, info, layer, masks)
        return parts.codes, parts.keep
    weight = checkpoint.read(f"{layer}.weight")
    return weight, masks.checked_keep(layer, weight) if masks is not None and layer in masks else None


def shapes(checkpoint: Checkpoint, info: FormatInfo) -> dict[str, tuple[int, int]]:
    """(N, K) of every linear, packed or 16-bit, in the order of their names."""
    others = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    dense = [layer for layer in registry.sixteen_bit_linears(others, info.layers) if f"{layer}.weight" in others]
    found = {layer: (others[f"{layer}.weight"][0], others[f"{layer}.weight"][1]) for layer in dense}
    found |= {layer: registry.layer_shape(checkpoint, info, layer) for layer in info.layers}
    return dict(sorted(found.items()))


def strangers(linears: Mapping[str, tuple[int, int]], info: FormatInfo, masks: Masks) -> list[Problem]:
    """Masks that no linear of the folder needs."""
    fix = "mask and weights do not belong together; fetch or write the checkpoint again"
    problems = [Problem(f"there is a mask of {name}, and no such linear", masks.where, fix) for name in masks.layers if name not in linears]
    if info.format.needs_mask:
        twice = [name for name in masks.layers if name in info.layers]
        problems += [Problem(f"{name} has a mask beside its metadata, which is its mask already", masks.where, fix) for name in twice]
    return problems


def crowded(layer: str, codes: Tensor) -> Problem:
    """Why codes [N, K] for which two_of_four finds no mask are not 2:4."""
    fix = "only 2:4 models become marlin_24: prune the original with marlinctl sparsify, or pack to marlin"
    n, k = codes.shape
    if k % 4:
        return Problem(f"{layer}: K={k} is not a multiple of 4, so 2:4 cannot cover it", layer, fix)
    kept = (codes != 0).reshape(n, -1, 4).sum(-1)  # [N, K/4]
    row, four = (kept > 2).nonzero()[0].tolist()
    where = f"row {row}, columns {4 * four}..{4 * four + 3}"
    what = f"{layer}: {where}: {int(kept[row, four])} of four codes are not zero, 2:4 keeps two"
    return Problem(f"{what} ({int((kept > 2).sum()):,} of {kept.numel():,} such groups)", layer, fix)
