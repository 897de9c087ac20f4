"""2:4 masks, True = kept: the two largest of each four, or the pattern of a weight that is pruned already."""

from __future__ import annotations

import torch
from torch import Tensor

from marlinctl.sparsify.types import QUAD, SURVIVORS


def best_two(score: Tensor) -> Tensor:
    """[4, ...] float -> [4, ...] bool, True for the two highest along the first axis; among equals the lower index wins."""
    first = torch.arange(QUAD, device=score.device).reshape(-1, 1, *[1] * (score.ndim - 1))
    ahead = (score.unsqueeze(0) > score.unsqueeze(1)) | ((score.unsqueeze(0) == score.unsqueeze(1)) & (first.transpose(0, 1) < first))
    kept: Tensor = ahead.sum(1, dtype=torch.uint8) < SURVIVORS  # [i, j]: j is ahead of i
    return kept


def two_largest(score: Tensor) -> Tensor:
    """[..., K, R] float -> [..., K, R] bool: the two highest of each aligned four along K."""
    fours = score.reshape(*score.shape[:-2], -1, QUAD, score.shape[-1])
    return best_two(fours.movedim(-2, 0)).movedim(0, -2).reshape(score.shape)


def two_of_four(weight: Tensor) -> Tensor | None:
    """The mask [N, K] of a weight or of codes [N, K] that are zero wherever 2:4 must prune; None if they are not.

    Nonzeros are kept. A group of four with fewer than two is filled up with zeros, lowest column first, so that the mask
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
    mask: Tensor = ~zero | (zeros_up_to_here <= to_fill)
    return mask.reshape(weight.shape)
