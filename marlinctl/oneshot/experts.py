"""The experts of one block: each is solved for the tokens that the router sends it, many of them together on a GPU.

    all tokens of the layer ─► inputs, experts, shares ─► sorted by expert: each has a range of rows (routing.py)
        ─► for each batch of experts: Gram matrices ─► solve gate up ─► middle ─► Gram matrices ─► solve down ─► rows of the output

An expert is two Hessians over its own tokens. One that saw fewer than a trustworthy number of tokens is blended with the layer:
H = a H_expert + (1 - a) H_all, a = tokens / trustworthy, where H_all comes from tokens of the whole layer as this expert would see them.
The weights of one batch of experts are in memory at a time; the model's own module of experts is never run.

Drift is corrected over the tokens that the compressed model sends to an expert, whatever the reference model's router did with them:
x' is what the reference model's experts are given at the same token, and m' what this expert, with its original weights, makes of x'.
docs/decisions has the reasons, also why there is no residual term.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from marlinctl.errors import number_of
from marlinctl.models.architectures import Block, Experts
from marlinctl.oneshot.gram import Gram, SolveStages, StageInput, settle
from marlinctl.oneshot.one_expert import OneExpert, Routed
from marlinctl.oneshot.reference_stream import ReferenceExperts
from marlinctl.oneshot.routing import Routing, sort_by_expert
from marlinctl.quantize.types import Hessian
from marlinctl.system.offload import Scratch, Slot, rows_of, set_rows
from marlinctl.system.processes import ALONE, Processes

_MOST_BORROWED = 8192  # tokens of other experts that a poorly fed one is shown


@dataclass(slots=True)
class _Expert:
    """One expert of the batch at hand."""

    number: int
    first: tuple[str, ...]  # gate and up, or up alone
    last: tuple[str]  # down
    rows: slice  # of the sorted order
    weights: list[Tensor]  # of `first`, as they are solved
    trusted: int = 0
    remark: str = ""


class ExpertsPipeline:
    """The tokens of one layer of experts, T = S * L of them, and the linears of each expert."""

    def __init__(
        self, block: Block, experts: Experts, module: nn.Module, counted: Tensor, *,
        device: torch.device, dtype: torch.dtype, scratch: Scratch, step: int,
        together: int = 1, reference: ReferenceExperts | None = None, replay: bool = False, processes: Processes = ALONE,
    ) -> None:  # fmt: skip
        """module: of transformers, for its activation. counted: [S, L] bool. step: samples in flight. together: experts that are solved
        together. reference: of drift correction. replay: the experts are solved, and nothing is collected."""
        self.prefix, self.experts = block.prefix, experts
        self.device, self.dtype, self.scratch = device, dtype, scratch
        self.samples, self.length = counted.shape
        self.tokens = counted.numel()
        self.replay, self.together, self.reference = replay, together, None if replay else reference
        self.processes = processes
        self.at_once = step * self.length
        self.one = OneExpert(experts, module)
        down = block.linears[f"{block.prefix}.{experts.last.format(e=0)}"]
        width, hidden = down.in_features, down.out_features
        self.most_rows = self.tokens * max(1, hidden // width)  # of "between"; an expert never has more than all tokens
        self.inputs = scratch.tensor("branch input", (self.tokens, hidden), dtype)
        home = self.inputs.device if isinstance(self.inputs, Tensor) else torch.device("cpu")  # tokens are sorted where they are
        self.routed = torch.empty(self.tokens, experts.top_k, dtype=torch.int32, device=home)  # the experts of each token
        self.shares = torch.empty(self.tokens, experts.top_k, dtype=torch.float32, device=home)
        self.sample = counted.reshape(-1).nonzero().squeeze(-1)[:_MOST_BORROWED].to(home)
        self.counted = counted.reshape(-1).to(home)

    def run(self, calls: Iterable[tuple[slice, Routed]], solve: SolveStages) -> Slot:
        """Solve all experts; returns their summed output [S, L, hidden].

        calls: samples, and what the block hands to its experts for them: input [B * L, hidden], experts and shares [B * L, top_k].
        """
        hidden = self.inputs.shape[1]
        everyone = self._gram(hidden)
        for part, (x, ids, weights) in calls:
            rows = slice(part.start * self.length, part.stop * self.length)
            self.inputs[rows] = x
            self.routed[rows], self.shares[rows] = ids.to(torch.int32), weights.float()
            everyone.add(x, self.counted[rows])
            if self.reference is not None:
                everyone.add_drift(x, self.reference.inputs[rows].to(self.device), self.counted[rows])
        h_all = everyone.hessian((f"{self.prefix}.{self.experts.module}",), self.processes)
        routing = sort_by_expert(self.routed, self.shares, self.experts.count)
        output = self.scratch.tensor("experts output", (self.tokens, hidden), self.dtype).zero_()
        for batch in self._batches(routing):
            self._run_batch(batch, routing, h_all, output, solve)
        return self.scratch.tensor("experts output", (self.samples, self.length, hidden), self.dtype)

    def _batches(self, routing: Routing) -> Iterator[list[_Expert]]:
        """Experts in their order, as many as are solved together and as `between` holds the tokens of, in every process."""
        batch: list[_Expert] = []
        places = self.processes.gather((routing.first, self.most_rows))  # of each process
        for e in range(self.experts.count):
            first, (last,) = (tuple(f"{self.prefix}.{name.format(e=e)}" for name in stage) for stage in self.experts.stages)
            rows = routing.rows(e)
            if batch and (
                len(batch) == self.together or any(rows_from[e + 1] - rows_from[batch[0].number] > most for rows_from, most in places)
            ):
                yield batch
                batch = []
            batch.append(_Expert(e, first, (last,), rows, []))
        yield batch

    def _run_batch(self, batch: list[_Expert], routing: Routing, h_all: Hessian | None, output: Slot, solve: SolveStages) -> None:
        """Solve gate and up of all, then down of all; add what they make of their tokens to `output` [T, hidden]."""
        grams = [self._gram_of_inputs(expert, routing) for expert in batch]
        hessians = self._hessians(grams, [expert.first for expert in batch])
        del grams
        first: list[StageInput] = []
        for expert, own in zip(batch, hessians, strict=True):
            blended = own
            if own is not None and h_all is not None:
                expert.trusted = _trustworthy(own, h_all, self.experts)
                blended, expert.remark = _blend(own, h_all, expert.trusted)
            first.append(StageInput(expert.first, blended, expert.remark))
        del hessians
        for expert, found in zip(batch, solve(first), strict=True):
            expert.weights = [found[name].to(self.device, self.dtype) for name in expert.first]
        del first

        width = batch[0].weights[0].shape[0]
        start = batch[0].rows.start
        between = self.scratch.tensor("between", (batch[-1].rows.stop - start, width), self.dtype)
        grams = []
        for expert in batch:
            own_gram = self._gram(width)
            for part in self._parts(expert.rows):
                rows = routing.tokens[part]
                middle = self._middle(expert, rows)
                between[part.start - start : part.stop - start] = middle
                own_gram.add(middle, self.counted[rows])
                self._add_drift(own_gram, middle, expert, rows)
            grams.append(own_gram)
        hessians = self._hessians(grams, [expert.last for expert in batch])
        del grams
        last: list[StageInput] = []
        for expert, own in zip(batch, hessians, strict=True):
            blended, remark = own, expert.remark
            if own is not None and remark:
                blended, remark = _blend(own, self._borrowed(expert, width), expert.trusted)
            last.append(StageInput(expert.last, blended, remark))
        del hessians
        for expert, found in zip(batch, solve(last), strict=True):
            weight = found[expert.last[0]].to(self.device, self.dtype)
            for part in self._parts(expert.rows):
                x = between[part.start - start : part.stop - start].to(self.device)
                y = self.one.output(expert.number, x, weight) * routing.shares[part].to(self.device, self.dtype).unsqueeze(-1)
                rows = routing.tokens[part]
                set_rows(output, rows, rows_of(output, rows).to(self.device) + y)

    def _gram_of_inputs(self, expert: _Expert, routing: Routing) -> Gram:
        own = self._gram(self.inputs.shape[1])
        if self.replay:
            return own
        for part in self._parts(expert.rows):
            rows = routing.tokens[part]
            x = self._input(rows)
            own.add(x, self.counted[rows])
            if self.reference is not None:
                own.add_drift(x, self._reference_input(rows), self.counted[rows])
        return own

    def _gram(self, k: int) -> Gram:
        return Gram(k, self.device, collects=not self.replay, drifts=self.reference is not None)

    def _borrowed(self, expert: _Expert, width: int) -> Hessian:
        """Of what the expert, as it is solved so far, makes of tokens of the whole layer."""
        borrowed = self._gram(width)
        for part in self._parts(slice(0, len(self.sample))):
            rows = self.sample[part]
            middle = self._middle(expert, rows)
            borrowed.add(middle, self.counted[rows])
            self._add_drift(borrowed, middle, expert, rows)
        everybody = borrowed.hessian(expert.last, self.processes)
        assert everybody is not None
        return everybody

    def _middle(self, expert: _Expert, rows: Tensor) -> Tensor:
        return self.one.middle(expert.number, self._input(rows), expert.weights)

    def _add_drift(self, gram: Gram, middle: Tensor, expert: _Expert, rows: Tensor) -> None:
        if self.reference is not None:
            weights = self.reference.first(expert.number)
            gram.add_drift(middle, self.one.middle(expert.number, self._reference_input(rows), weights), self.counted[rows])

    def _input(self, rows: Tensor) -> Tensor:
        return rows_of(self.inputs, rows).to(self.device)

    def _reference_input(self, rows: Tensor) -> Tensor:
        assert self.reference is not None
        return rows_of(self.reference.inputs, rows).to(self.device)

    def _hessians(self, grams: Sequence[Gram], names: Sequence[tuple[str, ...]]) -> list[Hessian | None]:
        settle(grams)
        return [gram.hessian(named, self.processes) for gram, named in zip(grams, names, strict=True)]

    def _parts(self, rows: slice) -> Iterator[slice]:
        """Chunks of a range."""
        for first in range(rows.start, rows.stop, self.at_once):
            yield slice(first, min(first + self.at_once, rows.stop))


def _trustworthy(own: Hessian, everyone: Hessian, experts: Experts) -> int:
    """Tokens below which an expert's own Hessian is not trusted alone: K / 8, or half a percent of its fair share."""
    fair = everyone.tokens * experts.top_k // experts.count
    return max(own.matrix.shape[0] // 8, fair // 200, 1)


def _blend(own: Hessian, everyone: Hessian, trusted: int) -> tuple[Hessian, str]:
    if own.tokens >= trusted:
        return own, ""
    share = own.tokens / trusted
    matrix = own.matrix.mul(share).add_(everyone.matrix, alpha=1.0 - share)
    drift = own.drift
    if drift is not None and everyone.drift is not None:
        drift = drift.mul(share).add_(everyone.drift, alpha=1.0 - share)
    return Hessian(matrix, own.tokens, drift), f"{number_of(own.tokens, 'token')}, blended with the layer's Hessian"
