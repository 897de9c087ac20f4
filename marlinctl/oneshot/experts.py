"""The experts of one block, one after another: each is solved for the tokens that the router sends it.

    all tokens of the layer ─► inputs, experts, shares ─► for each expert: its rows ─► solve gate up ─► solve down ─► rows of the output

An expert is two Hessians over its own tokens. One that saw fewer than a trustworthy number of tokens is blended with the layer:
H = a H_expert + (1 - a) H_all, a = tokens / trustworthy, where H_all comes from tokens of the whole layer as this expert would see them.
The weights of one expert are in memory at a time; the model's own module of experts is never run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from marlinctl.models.architectures import Block, Experts
from marlinctl.oneshot.gram import Gram, SolveStage
from marlinctl.quantize.types import Hessian
from marlinctl.system.offload import Scratch, Slot
from marlinctl.system.processes import ALONE, Processes

_MOST_BORROWED = 8192  # tokens of other experts that a poorly fed one is shown


class ExpertsPipeline:
    """The tokens of one layer of experts, T = S * L of them, and the linears of each expert."""

    def __init__(
        self, block: Block, experts: Experts, counted: Tensor, *,
        hidden: int, device: torch.device, dtype: torch.dtype, scratch: Scratch, step: int, replay: bool = False,
        processes: Processes = ALONE,
    ) -> None:  # fmt: skip
        """counted: [S, L] bool. hidden: width of input and output. step: samples in flight. replay: the experts are
        solved, and nothing is collected."""
        from transformers.activations import ACT2FN

        self.prefix, self.experts, self.counted = block.prefix, experts, counted.reshape(-1)
        self.device, self.dtype, self.scratch = device, dtype, scratch
        self.samples, self.length = counted.shape
        self.replay, self.processes = replay, processes
        self.at_once = step * self.length
        self.activation = ACT2FN[experts.activation]
        self.inputs = scratch.tensor("branch input", (len(self.counted), hidden), dtype)
        self.routed = torch.empty(len(self.counted), experts.top_k, dtype=torch.int32)  # the experts of each token
        self.shares = torch.empty(len(self.counted), experts.top_k, dtype=torch.float32)
        self.sample = self.counted.nonzero().squeeze(-1)[:_MOST_BORROWED]

    def run(self, calls: Iterable[tuple[slice, tuple[Any, ...]]], solve: SolveStage) -> Slot:
        """Solve all experts; returns their summed output [S, L, hidden].

        calls: samples, and what the block hands to its experts for them: input [B * L, hidden], experts and shares [B * L, top_k].
        """
        hidden = self.inputs.shape[1]
        everyone = Gram(hidden, self.device, collects=not self.replay)
        for part, (x, ids, weights) in calls:
            rows = slice(part.start * self.length, part.stop * self.length)
            self.inputs[rows], self.routed[rows], self.shares[rows] = x, ids.to(torch.int32), weights.float()
            everyone.add(x, self.counted[rows])
        h_all = everyone.hessian((f"{self.prefix}.{self.experts.module}",), self.processes)
        output = self.scratch.tensor("experts output", (len(self.counted), hidden), self.dtype).zero_()
        for e in range(self.experts.count):
            self._run_expert(e, h_all, output, solve)
        return self.scratch.tensor("experts output", (self.samples, self.length, hidden), self.dtype)

    def _run_expert(self, e: int, h_all: Hessian | None, output: Slot, solve: SolveStage) -> None:
        """Solve gate and up, then down; add what the expert makes of its tokens to `output` [T, hidden]."""
        gate, up, down = (f"{self.prefix}.{name.format(e=e)}" for name in (*self.experts.first, self.experts.last))
        where = (self.routed == e).any(-1).nonzero().squeeze(-1)
        share = self.shares[where].masked_fill(self.routed[where] != e, 0.0).sum(-1)

        own = Gram(self.inputs.shape[1], self.device, collects=not self.replay)
        for _, rows in self._pieces(where):
            own.add(self.inputs[rows].to(self.device), self.counted[rows])
        h_own = own.hessian((gate, up), self.processes)
        trusted, blended, remark = 0, h_own, ""
        if h_own is not None and h_all is not None:
            trusted = _trustworthy(h_own, h_all, self.experts)
            blended, remark = _blend(h_own, h_all, trusted)
        weights = {name: w.to(self.device, self.dtype) for name, w in solve((gate, up), blended, remark).items()}

        def middle(rows: Tensor) -> Tensor:
            x = self.inputs[rows].to(self.device)
            y: Tensor = self.activation(linear(x, weights[gate])) * linear(x, weights[up])
            return y

        width = weights[gate].shape[0]
        between = self.scratch.tensor("between", (len(where), width), self.dtype)
        own = Gram(width, self.device, collects=not self.replay)
        for part, rows in self._pieces(where):
            between[part] = m = middle(rows)
            own.add(m, self.counted[rows])
        h_down = own.hessian((down,), self.processes)
        if h_down is not None and remark:
            borrowed = Gram(width, self.device)
            for _, rows in self._pieces(self.sample):
                borrowed.add(middle(rows), self.counted[rows])
            everybody = borrowed.hessian((down,), self.processes)
            assert everybody is not None
            h_down, remark = _blend(h_down, everybody, trusted)
        weight = solve((down,), h_down, remark)[down].to(self.device, self.dtype)
        for part, rows in self._pieces(where):
            y = linear(between[part].to(self.device), weight) * share[part].to(self.device, self.dtype).unsqueeze(-1)
            output[rows] = output[rows].to(self.device) + y

    def _pieces(self, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Chunks of an index tensor, with their place in it."""
        for first in range(0, len(rows), self.at_once):
            part = slice(first, min(first + self.at_once, len(rows)))
            yield part, rows[part]


def _trustworthy(own: Hessian, everyone: Hessian, experts: Experts) -> int:
    """Tokens below which an expert's own Hessian is not trusted alone: K / 8, or half a percent of its fair share."""
    fair = everyone.tokens * experts.top_k // experts.count
    return max(own.matrix.shape[0] // 8, fair // 200, 1)


def _blend(own: Hessian, everyone: Hessian, trusted: int) -> tuple[Hessian, str]:
    if own.tokens >= trusted:
        return own, ""
    share = own.tokens / trusted
    matrix = own.matrix.mul(share).add_(everyone.matrix, alpha=1.0 - share)
    return Hessian(matrix, own.tokens), f"{own.tokens} tokens, blended with the layer's Hessian"
