"""Which channels share a group of four: an order of the columns that lets a 2:4 pattern keep more.

A 2:4 pattern keeps two of each four neighbours in every row. Where the columns may be reordered (models/folds.py), channels are put
together so that the two largest scores of each row's four are as large as they can be in sum. Scores are Wanda's, |W| sqrt(H_kk)
(arXiv 2306.11695).

    deal channels, sorted by their total score, so that each group has one of every quarter
    in each round, for each of the four places: take the channel at that place out of every group, and hand all of them out again, by the
    best assignment; channel c adds sum over rows of max(0, s_rc - second largest of the three left) to a group

PermLLM (arXiv 2510.10136) learns such orders for every input, at the cost of a gather when the model runs; here they cost nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from marlinctl.sparsify.types import QUAD

ROUNDS = 2
MOST_ROWS = 256  # of the weight, evenly spread, that decide
GROUPS_TOGETHER = 512  # that exchange channels: assignment takes the third power of it
_ELEMENTS = 1 << 24  # of the comparison of scores at once


def channel_order(scores: Tensor, rounds: int = ROUNDS) -> Tensor:
    """scores: [R, C] float32, not negative; C a multiple of four. Returns [C] int64: the channel that comes to each place.

    ValueError where four does not divide C.
    """
    rows, channels = scores.shape
    if channels % QUAD:
        raise ValueError(f"{channels} channels are not a multiple of {QUAD}")
    if rows > MOST_ROWS:
        scores = scores[torch.linspace(0, rows - 1, MOST_ROWS, device=scores.device).round().long()]
    by_total = torch.argsort(scores.sum(0), descending=True, stable=True)
    groups = by_total.reshape(QUAD, -1).T.contiguous()  # [C/4, 4]
    for turn in range(rounds):
        parts = -(-len(groups) // GROUPS_TOGETHER)
        for part in range(parts):
            # By turns neighbours and groups that lie far apart, so that channels can come everywhere.
            which = torch.arange(len(groups), device=scores.device)
            which = which[part::parts] if turn % 2 == 0 else which.tensor_split(parts)[part]
            groups[which] = _exchanged(scores, groups[which])
    return groups.flatten()


def kept_score(scores: Tensor, order: Tensor) -> float:
    """The sum of what a 2:4 pattern keeps of scores [R, C] in this order of the channels."""
    fours = scores[:, order].reshape(len(scores), -1, QUAD)
    return float(fours.topk(QUAD // 2, dim=-1).values.double().sum())


def _exchanged(scores: Tensor, groups: Tensor) -> Tensor:
    """groups [G, 4] after one exchange of each place."""
    from scipy.optimize import linear_sum_assignment

    for place in range(QUAD):
        leaving = groups[:, place]
        a, b, c = (scores[:, groups[:, other]] for other in range(QUAD) if other != place)  # [R, G] each
        second = torch.maximum(torch.minimum(a, b), torch.minimum(torch.maximum(a, b), c))  # torch's median is not deterministic on CUDA
        gains = torch.zeros(len(groups), len(groups), dtype=torch.float32, device=scores.device)
        step = max(1, _ELEMENTS // len(groups) ** 2)
        for offered, needed in zip(torch.split(scores[:, leaving], step), torch.split(second, step), strict=True):
            gains += (offered.unsqueeze(1) - needed.unsqueeze(2)).clamp_min_(0).sum(0)
        _, chosen = linear_sum_assignment(gains.cpu().numpy(), maximize=True)
        groups = groups.clone()
        groups[:, place] = leaving[torch.as_tensor(chosen, device=leaving.device)]
    return groups
