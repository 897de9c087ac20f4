"""The reference model: the unquantized model, run beside the compressed one, block by block. Drift correction compares the two.

    original block, original weights:    h' ─► x'(q k v) ─► x'(o) ─► r' = h' + attention ─► x'(gate up) ─► x'(down) ─► next h'
                                               kept in scratch until the compressed block has passed the same place

Where a branch is added to the residual stream as it is, the stream is normalised before anything reads it. So what an error of the branch
does at a token is measured against the length of the stream there, and tokens are weighted by the inverse of its mean square
(`token_scale`). Otherwise the few tokens with massive activations (arXiv 2402.17762), whose stream is hundreds of times longer,
would dominate the mean.

It takes one more forward pass, one more copy of the hidden states and, on disk, the inputs of four linears. A block with experts runs with
its own routing and all experts in memory; what the experts are given is kept, and their weights until the block is left (experts.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from marlinctl.models.architectures import Block, Branch, Experts
from marlinctl.models.meta_model import set_parameter
from marlinctl.system.offload import Scratch, Slot
from marlinctl.system.processes import ALONE, Processes

_SAME_SUM = 0.02  # relative difference up to which a block's output is the sum of its input and its branches' outputs: bfloat16 rounds


_GATE_UP, _DOWN = "gate_up_proj", "down_proj"  # of transformers' modules of experts: [E, 2 I, H], gate first, and [E, H, I]


@dataclass(frozen=True, slots=True)
class ReferenceExperts:
    """What drift correction needs to know of the experts of one block."""

    inputs: Slot  # [T, H] what the reference model's experts are given, all tokens
    gate_up: Tensor  # [E, 2 I, H] original weights

    def gate_and_up(self, e: int) -> tuple[Tensor, Tensor]:
        """[I, H] each."""
        gate, up = self.gate_up[e].chunk(2)
        return gate, up


class ReferenceModel:
    """The reference model's hidden states, block by block."""

    def __init__(
        self, hidden: Tensor, read: Callable[[str], Tensor], scratch: Scratch, device: torch.device, processes: Processes = ALONE
    ) -> None:
        self.hidden = hidden  # [S, L, hidden] before the block that comes next
        self.read, self.scratch, self.device, self.dtype = read, scratch, device, hidden.dtype
        self.processes = processes
        self.adds = False  # whether the block adds its branches to the residual stream as they are
        self.energy: dict[str, Tensor] = {}  # branch -> [S, L] float32, mean square of the stream that it has been added to
        self.mean: dict[str, Tensor] = {}  # of each over all tokens

    def run_block(self, block: Block, layer: nn.Module, parts: Iterable[slice], call: Callable[[Tensor, int], Tensor]) -> None:
        """Take the hidden states through `layer`, whose norms and biases are in place; its linears hold the original's weights then."""
        branches = [branch for branch in (block.attention, block.mlp) if isinstance(branch, Branch)]
        for branch in branches:
            for name in (*branch.first, branch.last):
                set_parameter(layer, f"{name}.weight", self._weight(f"{block.prefix}.{name}"))
        experts = block.mlp if isinstance(block.mlp, Experts) else None
        if experts is not None:
            self._set_experts(layer, block, experts)
        seen: dict[str, Tensor] = {}
        handles = []
        for branch in branches:
            for place in (branch.first[0], branch.last):
                module = layer.get_submodule(place)
                handles.append(module.register_forward_pre_hook(lambda _, args, place=place: seen.__setitem__(place, args[0])))
            module = layer.get_submodule(branch.module)
            handles.append(module.register_forward_hook(_store(seen, branch.module, branch.returns_tuple)))
        if experts is not None:
            module = layer.get_submodule(experts.module)
            handles.append(module.register_forward_pre_hook(lambda _, args: seen.__setitem__(_given(experts), args[0])))
            handles.append(module.register_forward_hook(_store(seen, experts.module, False)))
        adds = torch.ones((), dtype=torch.bool, device=self.device)  # asked for at the end, so that no chunk waits
        try:
            for part in parts:
                before = self.hidden[part].to(self.device)
                after = call(before, block.index)
                for branch in branches:
                    for place in (branch.first[0], branch.last):
                        self._slot(place, seen[place].shape[-1])[part] = seen[place]
                middle = before + seen[block.attention.module]
                streams = (before, middle, after)
                if experts is not None:
                    self._slot(_given(experts), before.shape[-1])[part] = seen[_given(experts)].view_as(before)
                for branch, stream in zip(branches, streams, strict=False):
                    self._slot(f"{branch.module} residual", before.shape[-1])[part] = stream
                for branch, stream in zip(branches, streams[1:], strict=False):
                    self.energy.setdefault(branch.module, torch.empty(self.hidden.shape[:2], device=before.device))[part] = (
                        stream.float().square().mean(-1)
                    )
                total = middle + seen[block.mlp.module].view_as(middle)
                adds &= (total - after).float().norm() <= _SAME_SUM * (after - before).float().norm()
                self.hidden[part] = after
            self.adds = all(self.processes.gather(bool(adds)))
            self.mean = {name: mean_energy(energy, self.processes) for name, energy in self.energy.items()}
        finally:
            for handle in handles:
                handle.remove()

    def input(self, place: str, width: int, part: slice) -> Tensor:
        """What the linear `place` of the block (name relative to it) reads in the original model, [B, L, width]."""
        return self._slot(place, width)[part].to(self.device)

    def experts(self, layer: nn.Module, experts: Experts) -> ReferenceExperts:
        """Of the block that was run last, whose module is `layer`."""
        hidden = self.hidden.shape[-1]
        inputs = self.scratch.tensor(f"original {_given(experts)}", (self.hidden.shape[0] * self.hidden.shape[1], hidden), self.dtype)
        return ReferenceExperts(inputs, getattr(layer.get_submodule(experts.module), _GATE_UP))

    def _weight(self, name: str) -> Tensor:
        return self.read(f"{name}.weight").to(self.device, self.dtype)

    def _set_experts(self, layer: nn.Module, block: Block, experts: Experts) -> None:
        """The module of experts, whose parameters hold all of them."""
        down_spec = block.linears[f"{block.prefix}.{experts.last.format(e=0)}"]
        hidden, width = down_spec.out_features, down_spec.in_features
        gate_up = torch.empty(experts.count, 2 * width, hidden, dtype=self.dtype, device=self.device)
        down = torch.empty(experts.count, hidden, width, dtype=self.dtype, device=self.device)
        for e in range(experts.count):
            gate, up, last = (f"{block.prefix}.{name.format(e=e)}" for name in (*experts.first, experts.last))
            gate_up[e, :width], gate_up[e, width:], down[e] = self._weight(gate), self._weight(up), self._weight(last)
        set_parameter(layer, f"{experts.module}.{_GATE_UP}", gate_up)
        set_parameter(layer, f"{experts.module}.{_DOWN}", down)

    def residual(self, branch: Branch, part: slice) -> Tensor:
        """The original's residual stream where `branch` begins, [B, L, hidden]."""
        return self._slot(f"{branch.module} residual", self.hidden.shape[-1])[part].to(self.device)

    def token_scale(self, branch: Branch, part: slice) -> Tensor:
        """What the inputs of the branch's last linear are multiplied by, [B, L, 1] float32; the weight of a token is its square."""
        energy, mean = self.energy[branch.module], self.mean[branch.module]
        floor = torch.finfo(torch.float32).eps * mean
        return (mean / energy[part].clamp_min(floor)).sqrt().unsqueeze(-1).to(self.device)

    def _slot(self, place: str, width: int) -> Slot:
        return self.scratch.tensor(f"original {place}", (*self.hidden.shape[:2], width), self.dtype)


def scaled(x: Tensor, scale: Tensor) -> Tensor:
    """x [B, L, K] times scale [B, L, 1] float32, multiplied in float32 and rounded once to the dtype of x."""
    return torch.mul(x, scale, out=torch.empty_like(x))


def mean_energy(energy: Tensor, processes: Processes = ALONE) -> Tensor:
    """Over all tokens but those whose stream overflowed: they are lost, and take no other along."""
    finite = energy[torch.isfinite(energy)]
    if processes.count == 1:
        return finite.mean()
    total, count = processes.sum(torch.stack([finite.double().sum(), torch.tensor(finite.numel(), device=finite.device).double()]))
    return (total / count).float()


def _given(experts: Experts) -> str:
    """The place of what the experts are given."""
    return f"{experts.module} input"


def _store(seen: dict[str, Tensor], module: str, returns_tuple: bool) -> Callable[[nn.Module, Any, Any], None]:
    def hook(_: nn.Module, __: Any, output: Any) -> None:
        seen[module] = output[0] if returns_tuple else output

    return hook
