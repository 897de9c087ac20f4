"""Which weights survive: finding the 2:4 pattern that somebody else has already put into a weight."""

from __future__ import annotations

import torch
from torch import Tensor

from marlinctl.sparsify.types import QUAD, SURVIVORS


def two_of_four(weight: Tensor) -> Tensor | None:
    """The keep mask [N, K] of a weight or of codes [N, K] that are zero wherever 2:4 must prune; None if they are not.

    Nonzeros survive. A quad with fewer than two is filled up with its zeros, lowest column first, so that the mask
    always keeps exactly two and the same weight always gives the same mask. -0.0 is a zero, NaN is not.
    """
    if weight.ndim != 2:
        raise ValueError(f"a weight is [N, K], got {list(weight.shape)}")
    if weight.shape[1] % QUAD:
        return None
    zero = (weight == 0).reshape(weight.shape[0], -1, QUAD)  # [N, K/4, 4]
    zeros_up_to_here = zero.cumsum(-1, dtype=torch.uint8)  # inclusive
    zeros = zeros_up_to_here[..., -1:]  # [N, K/4, 1]
    if bool((zeros < QUAD - SURVIVORS).any()):
        return None
    to_fill = zeros - (QUAD - SURVIVORS)  # zeros beyond the two that are pruned
    keep: Tensor = ~zero | (zeros_up_to_here <= to_fill)
    return keep.reshape(weight.shape)
