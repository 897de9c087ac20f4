"""Which tokens go to which expert: all of them sorted by expert, so that the tokens of one are a range."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Routing:
    """What the router of one layer did with T tokens, P = T * top_k."""

    tokens: Tensor  # [P] int64, number of a token; those of expert e from first[e] to first[e + 1], in rising order
    shares: Tensor  # [P] float32, by which the expert's output is multiplied
    first: tuple[int, ...]

    def rows(self, e: int) -> slice:
        """The range of expert e."""
        return slice(self.first[e], self.first[e + 1])


def sort_by_expert(experts: Tensor, shares: Tensor, count: int) -> Routing:
    """experts: [T, top_k] int32, shares: [T, top_k] float32, on one device; a token names no expert twice. Waits for the device once."""
    sorted_experts, place = torch.sort(experts.reshape(-1), stable=True)
    borders = torch.arange(count + 1, dtype=sorted_experts.dtype, device=experts.device)
    first = torch.searchsorted(sorted_experts, borders).tolist()
    return Routing(place // experts.shape[1], shares.reshape(-1)[place], tuple(first))
