"""Metadata of 2:4 weights as the kernel for int8 activations takes it (csrc/sparse_marlin_a8_factored_sm90.cu).

    meta [K'/32, 2N'] int16, as on the disk ─► the same nibbles, each in another place of its 64 k x 64 n (pack/tile.py, int8_meta_place)

It takes as much memory again, a bit for each weight, so it is made only where that kernel may run: where the table of a GPU (dispatch.py)
names it for some number of tokens.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from marlinctl.kernels.dispatch import fewest_rounded
from marlinctl.kernels.factored import factored_scales
from marlinctl.kernels.functions import architecture_of
from marlinctl.pack.tile import int8_meta_place, meta_quad
from marlinctl.pack.types import PackedSparseLinear

ROWS, COLUMNS, NIBBLES = 2, 128, 4  # of meta that are exchanged among themselves: 64 of k, 64 outputs
AT_ONCE = 2**24  # bytes of meta: nibbles take 4 times as many, and as many again in their order


def int8_operands(p: PackedSparseLinear) -> tuple[Tensor, Tensor] | None:
    """Scales in the form of factored.py, and metadata, for the operator; None where the GPU that `p` is on has no use for them.

    None on a CPU too. Reads all scales: for when weights are loaded.
    """
    if not p.scales.is_cuda or fewest_rounded(architecture_of(p.scales.device), p.out_features, p.in_features, "int8", True, True) is None:
        return None
    factored = factored_scales(p)
    return None if factored is None else (factored, metadata_for_int8(p.meta))


def metadata_for_int8(meta: Tensor) -> Tensor:
    """int16 [K'/32, 2N'] -> int16 [K'/32, 2N'], on the same device. ValueError for another type or shape."""
    if meta.dtype != torch.int16 or meta.ndim != 2 or meta.shape[0] % ROWS or meta.shape[1] % COLUMNS:
        raise ValueError(f"metadata must be int16 [{ROWS} i, {COLUMNS} j], got {meta.dtype} {list(meta.shape)}")
    made = torch.empty_like(meta)
    rows = max(AT_ONCE // (2 * meta.shape[1]) // ROWS, 1) * ROWS
    source, height = _source(meta.device), torch.arange(0, 4 * NIBBLES, 4, device=meta.device, dtype=torch.int16)
    for part, into in zip(torch.split(meta, rows), torch.split(made, rows), strict=True):
        shape = (len(part) // ROWS, ROWS, meta.shape[1] // COLUMNS, COLUMNS, NIBBLES)
        nibbles = (part.unsqueeze(-1) >> height & 15).to(torch.uint8).view(shape).transpose(1, 2)
        nibbles = nibbles.flatten(2)[..., source].view(shape[0], shape[2], ROWS, COLUMNS, NIBBLES).transpose(1, 2)
        into.copy_((nibbles.to(torch.int16) << height).sum(-1, dtype=torch.int16).view(part.shape))
    return made


@lru_cache(maxsize=8)
def _source(device: torch.device) -> Tensor:
    """[1024] int64: which nibble of 64 of k x 64 outputs lies in each place."""
    row, column, nibble = torch.meshgrid(*(torch.arange(size) for size in (ROWS, COLUMNS, NIBBLES)), indexing="ij")
    there = int8_meta_place(*meta_quad(row, column, nibble))
    place = (there.row * COLUMNS + there.column) * NIBBLES + there.nibble
    return place.flatten().argsort().to(device)
