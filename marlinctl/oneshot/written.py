"""What a run writes, as far as it is known before: names, dtypes and shapes. And the check from disk: what was written is read back and
compared with what was solved.

On a GPU codes and masks are unpacked there, by the functions that a CPU runs: a core takes 0.2 s for 59 million codes, and 7 s with four
for an 8B. SHA-256 takes 0.03 s.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from marlinctl.checkpoint.formats.base import Format, FormatInfo
from marlinctl.checkpoint.formats.registry import detect, read_linear
from marlinctl.checkpoint.mask import Masks, open_masks
from marlinctl.checkpoint.reader import Checkpoint, open_checkpoint
from marlinctl.errors import CheckFailed
from marlinctl.models.architectures import Block
from marlinctl.oneshot.layers import LayerRecord, linear_digest, weight_digest
from marlinctl.oneshot.open import RunInputs
from marlinctl.sparsify.types import SparseQuantizedLinear
from marlinctl.system.atomic import DTYPE_BYTES, Entry
from marlinctl.system.console import Console

_MOST_AT_ONCE = 8  # linears on a GPU; each takes a few bytes a weight of both memories


def expected_pieces(opened: RunInputs, fmt: Format, changed: Callable[[Block], list[str]]) -> list[list[Entry]]:
    """The tensors of each piece, that of a block or of the head, without their bytes. changed: what else is written with a block."""
    architecture, head = opened.architecture, opened.plan.head
    pieces = [list(block.linears) for block in architecture.blocks] + ([[head.name]] if head is not None else [])
    planned = opened.plan.group_sizes
    found = [[entry for name in names if name in planned for entry in _expected(opened, fmt, name)] for names in pieces]
    for block in architecture.blocks:
        others = (opened.checkpoint.tensors[name] for name in changed(block))
        found[block.index] += [Entry(info.name, info.dtype, info.shape, info.nbytes, _not_yet) for info in others]
    return found


def _expected(opened: RunInputs, fmt: Format, name: str) -> list[Entry]:
    weight = opened.checkpoint.tensors[f"{name}.weight"]
    if not fmt.quantized:
        return [Entry(weight.name, weight.dtype, weight.shape, weight.nbytes, _not_yet)]
    n, k = weight.shape
    shapes = fmt.shapes(n, k, opened.plan.group_sizes[name], opened.plan.grid(name))
    return [
        Entry(f"{name}.{suffix}", dtypes[0], shape, prod(shape) * DTYPE_BYTES[dtypes[0]], _not_yet)
        for suffix, (dtypes, shape) in shapes.items()
    ]


def _not_yet() -> memoryview:
    raise AssertionError("what is expected has no bytes")


def verify_written(folder: Path, records: list[LayerRecord], console: Console, device: torch.device) -> None:
    """Every linear holds what was solved, and its mask. CheckFailed E103 names one that does not."""
    at_once = min(_MOST_AT_ONCE, len(os.sched_getaffinity(0))) if device.type == "cuda" else 1  # a CPU's memory holds one linear at a time
    with (
        open_checkpoint(folder, device=device) as written,
        open_masks(folder, device=device) as masks,
        console.progress("check from disk", len(records)) as progress,
        ThreadPoolExecutor(at_once) as pool,
    ):
        info = detect(written.config, written.tensors)
        for record, digest in zip(records, pool.map(lambda record: _digest_on_disk(written, info, masks, record), records), strict=True):
            if digest != record.digest:
                raise CheckFailed(
                    "E103",
                    "weights, scales or mask on disk differ from those that were solved",
                    where=record.name,
                    fix="check the disk, then run again",
                )
            progress.advance()


def _digest_on_disk(written: Checkpoint, info: FormatInfo, masks: Masks | None, record: LayerRecord) -> str:
    keep: Tensor | None = None
    if record.pattern is not None:
        if masks is None:
            return "no mask file"
        keep = masks.keep(record.name, *record.shape)
    if record.group_size is None:
        return weight_digest(written.read(f"{record.name}.weight"), keep)
    linear = read_linear(written, info, record.name)
    if keep is not None:
        linear = SparseQuantizedLinear(linear.codes, linear.scales, linear.group_size, keep, grid=linear.grid)
    return linear_digest(linear)
