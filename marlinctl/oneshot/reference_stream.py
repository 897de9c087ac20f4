"""The reference model: the unquantized model, run beside the compressed one, block by block. Drift correction compares the two.

    original block, original weights:    h' ─► x'(q k v) ─► x'(o) ─► r' = h' + attention ─► x'(gate up) ─► x'(down) ─► next h'
                                               kept in scratch until the compressed block has passed the same place

Where a branch is added to the residual stream as it is, the stream is normalised before anything reads it. So what an error of the branch
does at a token is measured against the length of the stream there, and tokens are weighted by the inverse of its mean square
(`token_scale`). Otherwise the few tokens with massive activations (arXiv 2402.17762), whose stream is hundreds of times longer,
would dominate the mean.

It takes one more forward pass, one more copy of the hidden states and, on disk, the inputs of a block's stages. A block with experts runs
with its own routing and all experts in memory; what they are given is kept, and their weights until the block is left (experts.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from marlinctl.models.architectures import Block, Branch, Experts
from marlinctl.models.meta_model import bound, set_parameter
from marlinctl.models.places import expert_places
from marlinctl.oneshot.one_expert import routed
from marlinctl.system.offload import Scratch, Slot
from marlinctl.system.processes import ALONE, Processes

_SAME_SUM = 0.02  # relative difference up to which a block's output is the sum of its input and its branches' outputs: bfloat16 rounds


@dataclass(frozen=True, slots=True)
class ReferenceExperts:
    """What drift correction needs to know of the experts of one block."""

    inputs: Slot  # [T, H] what the reference model's experts are given, all tokens
    first: Callable[[int], Sequence[Tensor]]  # original weights of gate and up of an expert, or of up alone, [I, H] each


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
        self.slots: dict[str, tuple[str, int]] = {}  # place in the block -> slot, and width of what it holds
        self.columns: Mapping[str, Tensor] = {}  # of places that are read in another order than that of the slot

    def run_block(self, block: Block, layer: nn.Module, parts: Iterable[slice], call: Callable[[Tensor, int, slice], Tensor]) -> None:
        """Take the hidden states through `layer`, whose norms and biases are in place; its linears hold the original's weights then."""
        places = [stage[0] for part in block.parts if not isinstance(part, Experts) for stage in part.stages]
        for one in block.parts:
            if isinstance(one, Experts):
                self._set_experts(layer, block, one)
                continue
            for name in (name for stage in one.stages for name in stage):
                set_parameter(layer, f"{name}.weight", self._weight(block.linear(name)))
        self.slots, self.columns = {}, {}
        seen: dict[str, Tensor] = {}
        handles = []
        for place in places:
            module = layer.get_submodule(place)
            handles.append(module.register_forward_pre_hook(lambda _, args, place=place: seen.__setitem__(place, args[0])))
        homes = [home for home in block.homes if home]
        for home in homes:
            handles.append(layer.get_submodule(home).register_forward_hook(_store(seen, home)))
        for experts in block.experts:
            module = layer.get_submodule(experts.module)
            handles.append(module.register_forward_pre_hook(_store_input(seen, module, experts), with_kwargs=True))
        streams = block.streams
        summed = len(homes) == len(block.homes)
        adds = torch.ones((), dtype=torch.bool, device=self.device)  # asked for at the end, so that no chunk waits
        try:
            for part in parts:
                before = self.hidden[part].to(self.device)
                after = call(before, block.index, part)
                for place in places:
                    self._keep(place, seen[place], part)
                for experts in block.experts:
                    self._keep(_given(experts), seen[_given(experts)], part)
                total = before
                for home in homes if summed else ():
                    if seen[home].numel() != before.numel():
                        summed = False
                        break
                    if home in streams:
                        self._keep(_residual(home), total, part)
                    total = total + seen[home].view_as(before)
                    if home in streams:
                        stream = after if home == homes[-1] else total
                        self.energy.setdefault(home, torch.empty(self.hidden.shape[:2], device=before.device))[part] = (
                            stream.float().square().mean(-1)
                        )
                adds &= (total - after).float().norm() <= _SAME_SUM * (after - before).float().norm()
                self.hidden[part] = after
            self.adds = all(self.processes.gather(bool(adds) and summed))
            self.mean = {name: mean_energy(self.energy[name], self.processes) for name in streams if summed}
        finally:
            for handle in handles:
                handle.remove()

    def input(self, place: str, part: slice) -> Tensor:
        """What the linear `place` of the block (name relative to it) reads in the original model, [B, L, width]."""
        kept = self._kept(place)[part].to(self.device)
        order = self.columns.get(place)
        return kept if order is None else kept.index_select(-1, order.to(self.device))

    def reorder(self, columns: Mapping[str, Tensor]) -> None:
        """Until the block is left, these places are read with their channels in another order."""
        self.columns = columns

    def experts(self, block: Block, layer: nn.Module, experts: Experts) -> ReferenceExperts:
        """Of the block that was run last, whose module is `layer`."""
        slot, width = self.slots[_given(experts)]
        inputs = self.scratch.tensor(slot, (self.hidden.shape[0] * self.hidden.shape[1], width), self.dtype)
        module = layer.get_submodule(experts.module)
        first = getattr(module, experts.parameters[0])

        def weights(e: int) -> Sequence[Tensor]:
            places = expert_places(block, experts, e)
            return [places[name.format(e=e)].of(first) for name in experts.first]

        return ReferenceExperts(inputs, weights)

    def _weight(self, name: str) -> Tensor:
        return self.read(f"{name}.weight").to(self.device, self.dtype)

    def _set_experts(self, layer: nn.Module, block: Block, experts: Experts) -> None:
        """The module of experts, whose parameters hold all of them."""
        for name in experts.parameters:
            shape = getattr(layer.get_submodule(experts.module), name).shape
            set_parameter(layer, f"{experts.module}.{name}", torch.empty(shape, dtype=self.dtype, device=self.device))
        for e in range(experts.count):
            for name, place in expert_places(block, experts, e).items():
                whole = layer.get_parameter(place.parameter[len(block.prefix) + 1 :])
                place.of(whole.data).copy_(self._weight(f"{block.prefix}.{name}"))

    def residual(self, branch: Branch, part: slice) -> Tensor:
        """The original's residual stream where `branch` begins, [B, L, hidden]."""
        return self._kept(_residual(branch.module))[part].to(self.device)

    def token_scale(self, branch: Branch, part: slice) -> Tensor:
        """What the inputs of the branch's last linear are multiplied by, [B, L, 1] float32; the weight of a token is its square."""
        energy, mean = self.energy[branch.module], self.mean[branch.module]
        floor = torch.finfo(torch.float32).eps * mean
        return (mean / energy[part].clamp_min(floor)).sqrt().unsqueeze(-1).to(self.device)

    def _keep(self, place: str, x: Tensor, part: slice) -> None:
        """x: [B, L, width] or [B * L, width], or with dimensions of 1 between. Slots are numbered: blocks share them, and call places
        otherwise."""
        width = x.shape[-1]
        self.slots.setdefault(place, (f"original {len(self.slots)}", width))
        self._kept(place)[part] = x.reshape(part.stop - part.start, -1, width)

    def _kept(self, place: str) -> Slot:
        slot, width = self.slots[place]
        return self.scratch.tensor(slot, (*self.hidden.shape[:2], width), self.dtype)


def scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    """x [B, L, K] or [B * L, K] times scale [B, L, 1] float32, multiplied in float32 and rounded once to the dtype of x. None: x itself."""
    return x if scale is None else torch.mul(x, scale.reshape(*x.shape[:-1], 1), out=torch.empty_like(x))


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


def _residual(branch: str) -> str:
    return f"{branch} residual"


def _store(seen: dict[str, Tensor], module: str) -> Callable[[nn.Module, Any, Any], None]:
    def hook(_: nn.Module, __: Any, output: Any) -> None:
        returned = output[0] if isinstance(output, tuple) else output
        seen[module] = returned.clone()  # blocks of Falcon add to it in place

    return hook


def _store_input(seen: dict[str, Tensor], module: nn.Module, experts: Experts) -> Callable[..., None]:
    def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
        seen[_given(experts)] = routed(experts, bound(module, args, kwargs))[0]

    return hook
