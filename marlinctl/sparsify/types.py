"""What flows out of pruning: codes that carry the choice of survivors with them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from marlinctl.quantize.types import QuantizedLinear

QUAD = 4  # 2:4 looks at four neighbours in K at a time
SURVIVORS = 2  # and keeps two of them
ROWS_AT_ONCE = 256  # of a check: its steps stay in the cache. With all rows at once, checking took four times as long as packing


@dataclass(frozen=True, slots=True)
class SparseQuantizedLinear(QuantizedLinear):
    """A quantized linear in the 2:4 pattern. `keep` is data: a survivor whose code happens to be 0 is still a survivor.

    Ranking the codes again to find the survivors is how packers lose weights, so nobody does.
    """

    keep: Tensor  # [N, K] bool, True = survives; exactly two True in each aligned four of a row

    def __post_init__(self) -> None:
        QuantizedLinear.__post_init__(self)  # super() does not work in a dataclass with slots before Python 3.14
        check_keep(self.keep)
        if self.keep.shape != self.codes.shape:
            raise ValueError(f"keep is {list(self.keep.shape)} but codes are {list(self.codes.shape)}")
        slabs = zip(torch.split(self.codes, ROWS_AT_ONCE), torch.split(self.keep, ROWS_AT_ONCE), strict=True)
        if any(any(map(int, torch.aminmax(codes & keep.view(torch.int8) - 1))) for codes, keep in slabs):  # keep - 1: all bits where pruned
            row, column = (self.codes.masked_fill(self.keep, 0) != 0).nonzero()[0].tolist()
            raise ValueError(f"codes[{row}, {column}] = {int(self.codes[row, column])} although keep[{row}, {column}] says it was pruned")


def check_keep(keep: Tensor) -> None:
    """Refuses a mask that does not keep exactly two of each aligned four."""
    if keep.dtype != torch.bool or keep.ndim != 2 or keep.shape[1] % QUAD:
        raise ValueError(f"keep must be bool [N, K] with K a multiple of {QUAD}, got {keep.dtype} {list(keep.shape)}")
    if not all(_two_of_each_four(slab) for slab in torch.split(keep, ROWS_AT_ONCE)):
        kept = keep.reshape(keep.shape[0], -1, QUAD).sum(-1)  # [N, K/4]
        wrong = kept != SURVIVORS
        row, quad = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"{int(wrong.sum())} of {wrong.numel()} quads do not keep exactly {SURVIVORS}: the first, row {row}, "
            f"columns {QUAD * quad}..{QUAD * quad + QUAD - 1}, keeps {int(kept[row, quad])}"
        )


def _two_of_each_four(keep: Tensor) -> bool:
    quads = keep.to(torch.uint8).reshape(-1).view(torch.int32)  # four bytes of 0 or 1, which the top byte of the product sums
    low, high = torch.aminmax(quads.mul_(0x01010101).bitwise_right_shift_(24)) if quads.numel() else (SURVIVORS, SURVIVORS)
    return int(low) == int(high) == SURVIVORS
