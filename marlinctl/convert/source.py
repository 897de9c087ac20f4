"""What `pack` reads: a packed checkpoint, one linear at a time. No model; nothing is rounded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from marlinctl.checkpoint import sparsity
from marlinctl.checkpoint.folder import examine
from marlinctl.checkpoint.formats import registry
from marlinctl.checkpoint.formats.base import Format, FormatInfo, LinearParts, Packed
from marlinctl.checkpoint.formats.gptq import labelled_version_2
from marlinctl.checkpoint.mask import Masks
from marlinctl.checkpoint.reader import open_checkpoint
from marlinctl.errors import BadInput
from marlinctl.models.config import CONFIG

if TYPE_CHECKING:
    from torch import Tensor

    from marlinctl.checkpoint.reader import Checkpoint


@dataclass(frozen=True, slots=True)
class Source:
    """A packed checkpoint, understood and found fit for the targets."""

    checkpoint: Checkpoint
    info: FormatInfo
    shapes: Mapping[str, tuple[int, int]]  # layer -> (N, K)
    untouched: tuple[str, ...]  # tensors that no packed linear owns
    masks: Masks | None = None
    carried: tuple[str, ...] = ()  # linears that stayed 16-bit and have a mask all the same: it travels with them
    notes: tuple[str, ...] = ()  # what the person should know of the folder
    from_zeros: bool = False  # the target needs a 2:4 pattern and none is stated: it is derived from codes that are zero

    @property
    def origin(self) -> str | None:
        """Who states the 2:4 pattern; None where the model is dense, as far as anybody says."""
        return sparsity.ZEROS if self.from_zeros else sparsity.origin(self.info, self.masks)

    def parts(self, layer: str) -> LinearParts:
        """One packed linear with its mask. BadInput where it is not the 2:4 linear that it must be."""
        parts = registry.read_parts(self.checkpoint, self.info, layer, self.masks)
        if not self.from_zeros:
            return parts
        from marlinctl.sparsify.mask import two_of_four

        mask = two_of_four(parts.codes)
        if mask is None:
            raise BadInput.from_problems("E356", [sparsity.crowded(layer, parts.codes)])
        return replace(parts, keep=mask)

    def mask(self, layer: str) -> Tensor | None:
        """The mask of a linear, packed or carried, compared with its weight."""
        if layer in self.info.layers:
            return self.parts(layer).keep
        return sparsity.weight_and_mask(self.checkpoint, self.info, layer, self.masks)[1]

    def masked(self, fmt: Format) -> set[str]:
        """The linears that the mask file of a target names: metadata is one already."""
        packed = {layer for layer in self.info.layers if self.masks is None or self.info.format.needs_mask or layer in self.masks}
        return {*self.carried, *(packed if self.origin and not fmt.needs_mask else ())}

    @property
    def ignore(self) -> list[str]:
        return registry.sixteen_bit_linears({name: self.checkpoint.tensors[name].shape for name in self.untouched}, self.info.layers)

    def packed(self, fmt: Format) -> Packed:
        """What a target will be to its clients."""
        sizes = self.info.layers if fmt.quantized else {}
        ignore = [*self.ignore, *(() if fmt.quantized else self.info.layers)]
        shapes = {layer: self.shapes[layer] for layer in sizes}
        return Packed(fmt, shapes, sizes, ignore, self.checkpoint.config, fmt.variant_of(self.info.used_grids), self.info.grids)


def open_source(folder: Path, masks: Masks | None = None, *, gptq_v2: bool = False) -> Source:
    """Open a packed checkpoint; `masks` is its mask file. BadInput when it is dense, damaged, or in no format that can be read exactly.

    gptq_v2: its zero points are those of GPTQ version 2, whatever its config.json says. UsageError E288 for another format.
    """
    checkpoint = open_checkpoint(folder, weight_files="auto")
    if gptq_v2:
        checkpoint = replace(checkpoint, config=labelled_version_2(checkpoint.config, str(folder / CONFIG)))
    examined = examine(checkpoint, structure="known")
    info = examined.info
    if not info.format.quantized:
        raise BadInput(
            "E313",
            "the model is not quantized; pack turns one packed format into another",
            where=str(folder),
            fix=f"marlinctl quantize {folder} OUT",
        )
    owned = {*info.owned, *examined.idle}
    shapes = {layer: registry.layer_shape(checkpoint, info, layer) for layer in info.layers}
    untouched = tuple(name for name in checkpoint.tensors if name not in owned)
    carried = () if masks is None else tuple(layer for layer in masks.layers if f"{layer}.weight" in checkpoint.tensors)
    return Source(checkpoint, info, shapes, untouched, masks, carried, notes=examined.notes)
