"""What transformers' module of experts is given, and what one expert of it computes.

    x [T, H] ─► gate, up: x Wᵀ (+ bias) ─► the module's own gate: act(gate) * up, mostly ─► middle [T, I] ─► down: middle Wᵀ (+ bias)

The module itself is never run: it wants all experts in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from marlinctl.models.architectures import Experts

Routed = tuple[Tensor, Tensor, Tensor]  # input [T, H], experts [T, top_k], shares [T, top_k]


def routed(experts: Experts, arguments: Mapping[str, Any]) -> Routed:
    """What a call of the module means. arguments: by name, in the order in which the module declares them."""
    first, *others = arguments.values()
    if not experts.shares_first:
        ids, shares = others[:2]
        return first, ids, shares
    rows = first.view(experts.count, -1, first.shape[-1])  # zero but for one expert
    ids = rows.ne(0).any(-1).to(torch.int32).argmax(0, keepdim=True).T
    return rows.sum(0), ids, torch.ones_like(ids, dtype=torch.float32)


class OneExpert:
    """The arithmetic of an expert whose weights are given; activation and biases are those of the module."""

    def __init__(self, experts: Experts, module: nn.Module) -> None:
        from transformers.integrations.moe import _default_apply_gate

        self.experts, self.module = experts, cast(Any, module)
        own = getattr(type(module), "_apply_gate", _default_apply_gate)
        self.plain = own is _default_apply_gate

    def middle(self, e: int, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """What down reads, [tokens, I], of x [tokens, H]. weights: gate and up, or up alone, as they are now."""
        biases = self._biases(e, len(weights))
        parts = [linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
        if self.plain or len(parts) == 1:
            y: Tensor = self.module.act_fn(parts[0])
            return y if len(parts) == 1 else y * parts[1]
        joined = torch.stack(parts, -1).flatten(-2) if self.experts.interleaved else torch.cat(parts, -1)
        y = self.module._apply_gate(joined)
        return y

    def output(self, e: int, middle: Tensor, weight: Tensor) -> Tensor:
        bias = getattr(self.module, f"{self.experts.parameters[1]}_bias")[e] if self.experts.biased else None
        return linear(middle, weight, bias)

    def _biases(self, e: int, parts: int) -> Sequence[Tensor | None]:
        if not self.experts.biased:
            return [None] * parts
        bias = getattr(self.module, f"{self.experts.parameters[0]}_bias")[e]
        return [bias[i::parts] for i in range(parts)] if self.experts.interleaved else bias.chunk(parts)
