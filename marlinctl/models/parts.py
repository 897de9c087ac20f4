"""The parts of one block, from a trace: which of its linears make a Branch, a Chain or Experts.

    linears by what they read:   [q k v] [o] [gate up] [down]     a module that the first stage's input enters and the last one's output
                                                                  leaves is a Branch; what else runs in a row in one module is a Chain

A linear stays as it is where it is a router or a gate of a few outputs, or where the model reads its weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from marlinctl.models.architectures import Branch, Chain, Experts, Part
from marlinctl.models.refusals import refused
from marlinctl.models.tracing import LENGTH, SAMPLES, Call, Trace, equal, holds_tensors, of_all_tokens, same

_SMALLEST_GROUP = 32  # inputs below which a linear has no group at all: the low rank of a gated norm
_GATE = 16  # outputs below which a linear is a gate: a 4-bit one saves nothing, and no kernel takes it


@dataclass(frozen=True, slots=True)
class _Item:
    """A stage, or a part that is whole."""

    calls: tuple[Call, ...]
    part: Branch | Experts | None = None


class BlockReader:
    """One block of a traced model. other: the trace over other tokens."""

    def __init__(self, prefix: str, layer: nn.Module, kind: str, trace: Trace, other: Trace, experts: Mapping[str, Experts]) -> None:
        """experts: of the whole model, by the full names of their modules."""
        self.prefix, self.layer, self.kind, self.trace, self.other = prefix, layer, kind, trace, other
        self.experts = {name: found for name, found in experts.items() if name.startswith(f"{prefix}.")}
        runs = [call for call in trace.linears if call.name.startswith(f"{prefix}.")]
        self.calls = [call for call in runs if call.name in self.experts or not self._stays(call)]

    def parts(self) -> tuple[Part, ...]:
        self._check()
        return self._two_branches() or tuple(self._chained(self._items()))

    # ---- which linears --------------------------------------------------------------------------------------------------------------

    def _stays(self, call: Call) -> bool:
        """Whether it is a gate or a router, or one whose weight the model reads, which a packed linear lacks."""
        linear = self._linear(call.name)
        return (
            linear.out_features < _GATE
            or linear.in_features < _SMALLEST_GROUP
            or call.name in self.trace.weights_read
            or any(self._routes(call.name, name.rpartition(".")[0], found.count) for name, found in self.experts.items())
        )

    def _routes(self, name: str, mixture: str, count: int) -> bool:
        """Whether it lies in a child of the mixture all of whose linears have an output for each expert."""
        if not name.startswith(f"{mixture}."):
            return False
        child = ".".join(name.split(".")[: mixture.count(".") + 2])[len(self.prefix) + 1 :]
        linears = [module for module in self.layer.get_submodule(child).modules() if isinstance(module, nn.Linear)]
        return all(module.out_features == count for module in linears)

    def _check(self) -> None:
        seen = set()
        for call in self.calls:
            where = call.name[len(self.prefix) + 1 :]
            if call.name in seen:
                raise refused(self.kind, f"{where} of a block runs more than once for each token")
            seen.add(call.name)
            if call.name not in self.experts and not of_all_tokens(call.given):
                shape = [] if call.given is None else list(call.given.shape)
                raise refused(
                    self.kind, f"{where} of a block is not given all tokens one by one (of {SAMPLES} times {LENGTH} tokens, {shape})"
                )

    def _linear(self, name: str) -> nn.Linear:
        found = self.layer.get_submodule(name[len(self.prefix) + 1 :])
        assert isinstance(found, nn.Linear)
        return found

    # ---- branches -------------------------------------------------------------------------------------------------------------------

    def _two_branches(self) -> tuple[Part, ...]:
        """The usual block: two branches, and nothing beside them that is solved."""
        stages = _stages([call for call in self.calls if call.name not in self.experts])
        found = [branch for first, last in pairwise(stages) if (branch := self._branch(first, last)) is not None]
        solved = [name for branch in found for stage in branch.stages for name in stage]
        return tuple(found) if len(found) == 2 and len(solved) == len(self.calls) else ()

    def _items(self) -> Iterator[_Item]:
        """Stages, branches and experts in run order."""
        waiting: list[tuple[Call, ...]] = []
        for stage in _stages(self.calls):
            if stage[0].name in self.experts:
                yield from (_Item(calls) for calls in waiting)
                waiting = []
                yield _Item(stage, self.experts[stage[0].name])
                continue
            branch = self._branch(waiting[-1], stage) if waiting else None
            if branch is None:
                waiting.append(stage)
                continue
            last = waiting.pop()
            yield from (_Item(calls) for calls in waiting)
            waiting = []
            yield _Item((*last, *stage), branch)
        yield from (_Item(calls) for calls in waiting)

    def _branch(self, first: Sequence[Call], last: Sequence[Call]) -> Branch | None:
        """The branch that two stages make, if they do: a module that the first ones' input enters and the last one's output leaves."""
        names = [call.name for call in (*first, *last)]
        module = _common(names)
        if len(last) != 1 or len(set(names)) != len(names) or len(module) <= len(self.prefix) or self._inside(module) != set(names):
            return None
        calls = self.trace.of(module)
        entered = first[0].given
        if entered is None or len(entered.shape) != 3 or not self._replayed(calls):
            return None
        if not same(calls[0].given, entered) or not same(calls[0].returned, last[0].returned) or self._given_tokens(module):
            return None
        start = len(self.prefix) + 1
        return Branch(module[start:], tuple(call.name[start:] for call in first), last[0].name[start:], calls[0].elements > 0)

    def _replayed(self, calls: Sequence[Call]) -> bool:
        """Whether a module is called once, writes nothing into its input, and returns hidden states, or those and what nothing reads."""
        if len(calls) != 1 or calls[0].elements not in (0, 2) or calls[0].name in self.trace.second_read:
            return False
        entered = self.trace.entered[calls[0].name]
        return entered is None or same(entered, calls[0].given)

    def _inside(self, module: str) -> set[str]:
        return {call.name for call in self.calls if call.name.startswith(f"{module}.")}

    def _given_tokens(self, module: str) -> bool:
        """Whether a module is given something besides its input that is of the tokens: a branch is called with one value for all."""
        others = list(self.trace.arguments[module].items())[1:]
        shared = [id(value) for value in self.trace.arguments[self.prefix].values() if holds_tensors(value)]
        return any(
            id(value) not in shared and (holds_tensors(value) or not equal(value, self.other.arguments[module].get(key)))
            for key, value in others
        )

    # ---- chains ---------------------------------------------------------------------------------------------------------------------

    def _chained(self, items: Iterator[_Item]) -> Iterator[Part]:
        """The parts: stages in a row that one child of the block holds become a chain."""
        waiting: list[Call] = []
        for item in items:
            if waiting and (item.part is not None or self._child(item.calls[0]) != self._child(waiting[0])):
                yield self._chain(waiting)
                waiting = []
            if item.part is not None:
                yield item.part
            else:
                waiting += item.calls
        if waiting:
            yield self._chain(waiting)

    def _child(self, call: Call) -> str:
        child, _, inner = call.name[len(self.prefix) + 1 :].partition(".")
        return child if inner else ""

    def _chain(self, calls: Sequence[Call]) -> Chain:
        stages: list[list[Call]] = []
        for call in calls:
            stage = next((one for one in stages if same(one[0].given, call.given)), None)
            if stage is None:
                stages.append([call])
            else:
                stage.append(call)
        start = len(self.prefix) + 1
        named = tuple(tuple(call.name[start:] for call in stage) for stage in stages)
        module = _common([call.name for call in calls])
        ends = self.trace.of(module) if len(module) > len(self.prefix) else []
        whole = self._inside(module) == {call.name for call in calls}
        if not whole or not self._replayed(ends) or not of_all_tokens(ends[0].returned):
            return Chain("", named)
        return Chain(module[start:], named, ends[0].elements > 0)


def _stages(calls: Sequence[Call]) -> list[tuple[Call, ...]]:
    """Calls in a row that read one tensor."""
    stages: list[tuple[Call, ...]] = []
    for call in calls:
        if stages and not call.arguments and same(call.given, stages[-1][0].given) and not stages[-1][0].arguments:
            stages[-1] += (call,)
        else:
            stages.append((call,))
    return stages


def _common(names: Sequence[str]) -> str:
    """The module that holds all of these."""
    parts = [name.split(".")[:-1] for name in names]
    shared = 0
    while all(len(p) > shared for p in parts) and len({p[shared] for p in parts}) == 1:
        shared += 1
    return ".".join(parts[0][:shared])
