"""What `pack` has written, read back from disk and compared with what it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from marlinctl.checkpoint import sparsity
from marlinctl.checkpoint.formats import registry
from marlinctl.checkpoint.formats.base import Format, FormatInfo
from marlinctl.checkpoint.mask import Masks, open_masks
from marlinctl.checkpoint.reader import open_checkpoint
from marlinctl.convert.source import Source
from marlinctl.errors import CheckFailed
from marlinctl.system.console import Console

if TYPE_CHECKING:
    from torch import Tensor

    from marlinctl.checkpoint.reader import Checkpoint


def check_written(source: Source, fmt: Format, folder: Path, console: Console) -> None:
    """Read the staged folder back: same tensors, codes, scales and masks, same untouched bytes. CheckFailed names the first difference."""
    written = open_checkpoint(folder, weight_files="auto")
    info = registry.detect(written.config, written.tensors)
    kinds = {layer: (*shape, source.info.layers[layer], source.info.grid(layer)) for layer, shape in source.shapes.items()}
    expected = {*source.untouched, *(f"{layer}.{suffix}" for layer, kind in kinds.items() for suffix in fmt.shapes(*kind))}
    if info.format is not fmt or set(written.tensors) != expected:
        different = sorted(set(written.tensors) ^ expected)
        raise _unequal(folder, f"the written tensors are not the expected ones ({info.name}; {', '.join(different[:5])})")
    compare = _same_parts if fmt.quantized else _same_weight
    with open_masks(folder) as masks:
        different = sorted(source.masked(fmt) ^ set(masks.layers if masks else ()))
        if different:
            raise _unequal(folder, f"the written masks are not the expected ones ({', '.join(different[:5])})")
        with console.progress("check from disk", len(source.info.layers)) as progress:
            for layer in source.info.layers:
                compare(source, written, info, layer, masks)
                progress.advance()
        for layer in source.carried:
            _same_mask(folder, layer, source.mask(layer), sparsity.weight_and_mask(written, info, layer, masks)[1])
    for name in source.untouched:
        if written.raw(name) != source.checkpoint.raw(name):
            raise _unequal(folder, f"{name} differs from the source")


def _same_parts(source: Source, written: Checkpoint, info: FormatInfo, layer: str, masks: Masks | None) -> None:
    import torch

    want, got = source.parts(layer), registry.read_parts(written, info, layer, masks)
    same_scales = torch.equal(want.scales.to(torch.float32), got.scales.to(torch.float32))
    same_zeros = want.zeros is None if got.zeros is None else want.zeros is not None and torch.equal(want.zeros, got.zeros)
    if not torch.equal(want.codes, got.codes) or not same_scales or not same_zeros or want.group_size != got.group_size:
        raise _unequal(written.folder, f"{layer}: codes or scales read back differ from what was packed")
    _same_mask(written.folder, layer, want.keep, got.keep)


def _same_weight(source: Source, written: Checkpoint, info: FormatInfo, layer: str, masks: Masks | None) -> None:
    import torch

    parts = source.parts(layer)
    weight, mask = sparsity.weight_and_mask(written, info, layer, masks)
    if not torch.equal(parts.weight().to(torch.float16), weight):
        raise _unequal(written.folder, f"{layer}: the weight read back differs from what was written")
    _same_mask(written.folder, layer, parts.keep, mask)


def _same_mask(folder: Path, layer: str, want: Tensor | None, got: Tensor | None) -> None:
    import torch

    if want is not None and (got is None or not torch.equal(want, got)):
        raise _unequal(folder, f"{layer}: the kept weights read back differ from those that were packed")


def _unequal(folder: Path, what: str) -> CheckFailed:
    fix = "the disk or memory of this machine corrupts data, or this is a defect of marlinctl; nothing was published"
    return CheckFailed("E103", what, where=str(folder), fix=fix)
