"""Result of pruning with int4: codes and the 2:4 mask."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from marlinctl.quantize.types import QuantizedLinear

QUAD = 4  # the group of four neighbours along K
SURVIVORS = 2  # weights kept in it
ROWS_AT_ONCE = 256  # of a check: its steps stay in the cache. With all rows at once, checking took four times as long as packing


@dataclass(frozen=True, slots=True)
class SparseQuantizedLinear(QuantizedLinear):
    """A quantized linear in the 2:4 pattern. `keep` is the mask, and is data: a kept weight may have code 0.

    So a packer must not derive the mask from the codes.
    """

    keep: Tensor  # [N, K] bool, True = kept; exactly two True in each aligned four of a row

    def __post_init__(self) -> None:
        QuantizedLinear.__post_init__(self)  # super() does not work in a dataclass with slots before Python 3.14
        check_mask(self.keep)
        if self.keep.shape != self.codes.shape:
            raise ValueError(f"the mask is {list(self.keep.shape)} but codes are {list(self.codes.shape)}")
        slabs = zip(torch.split(self.codes, ROWS_AT_ONCE), torch.split(self.keep, ROWS_AT_ONCE), strict=True)
        if any(any(map(int, torch.aminmax(codes & keep.view(torch.int8) - 1))) for codes, keep in slabs):  # keep - 1: all bits where pruned
            row, column = (self.codes.masked_fill(self.keep, 0) != 0).nonzero()[0].tolist()
            raise ValueError(f"codes[{row}, {column}] = {int(self.codes[row, column])} although the mask says it was pruned")


def check_mask(mask: Tensor) -> None:
    """Refuses a mask that does not keep exactly two of each aligned four."""
    if mask.dtype != torch.bool or mask.ndim != 2 or mask.shape[1] % QUAD:
        raise ValueError(f"a mask must be bool [N, K] with K a multiple of {QUAD}, got {mask.dtype} {list(mask.shape)}")
    if not all(_two_of_each_four(slab) for slab in torch.split(mask, ROWS_AT_ONCE)):
        kept = mask.reshape(mask.shape[0], -1, QUAD).sum(-1)  # [N, K/4]
        wrong = kept != SURVIVORS
        row, four = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"{int(wrong.sum())} of {wrong.numel()} groups of four do not keep exactly {SURVIVORS}: the first, row {row}, "
            f"columns {QUAD * four}..{QUAD * four + QUAD - 1}, keeps {int(kept[row, four])}"
        )


def _two_of_each_four(mask: Tensor) -> bool:
    fours = mask.to(torch.uint8).reshape(-1).view(torch.int32)  # four bytes of 0 or 1, which the top byte of the product sums
    low, high = torch.aminmax(fours.mul_(0x01010101).bitwise_right_shift_(24)) if fours.numel() else (SURVIVORS, SURVIVORS)
    return int(low) == int(high) == SURVIVORS
