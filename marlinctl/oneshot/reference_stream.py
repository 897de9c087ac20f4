"""The reference model: the unquantized model, run beside the compressed one, block by block. Drift correction compares the two.

    original block, original weights:    h' ─► x'(q k v) ─► x'(o) ─► r' = h' + attention ─► x'(gate up) ─► x'(down) ─► next h'
                                               kept in scratch until the compressed block has passed the same place

Where a branch is added to the residual stream as it is, the stream is normalised before anything reads it. So what an error of the branch
does at a token is measured against the length of the stream there, and tokens are weighted by the inverse of its mean square
(`token_scale`). Otherwise the few tokens with massive activations (arXiv 2402.17762), whose stream is hundreds of times longer,
would dominate the mean.

It takes one more forward pass, one more copy of the hidden states and, on disk, the inputs of four linears. Models with experts have no
reference model: its router would send other tokens to them, so inputs could not be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from marlinctl.models.architectures import Block, Branch
from marlinctl.models.meta_model import set_parameter
from marlinctl.system.offload import Scratch, Slot
from marlinctl.system.processes import ALONE, Processes

_SAME_SUM = 0.02  # relative difference up to which a block's output is the sum of its input and its branches' outputs: bfloat16 rounds


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
        assert isinstance(block.mlp, Branch)
        branches = (block.attention, block.mlp)
        for name in block.linears:
            set_parameter(layer, f"{name[len(block.prefix) + 1 :]}.weight", self.read(f"{name}.weight").to(self.device, self.dtype))
        seen: dict[str, Tensor] = {}
        handles = []
        for branch in branches:
            for place in (branch.first[0], branch.last):
                module = layer.get_submodule(place)
                handles.append(module.register_forward_pre_hook(lambda _, args, place=place: seen.__setitem__(place, args[0])))
            module = layer.get_submodule(branch.module)
            handles.append(module.register_forward_hook(_store(seen, branch)))
        adds = torch.ones((), dtype=torch.bool, device=self.device)  # asked for at the end, so that no chunk waits
        try:
            for part in parts:
                before = self.hidden[part].to(self.device)
                after = call(before, block.index)
                for branch in branches:
                    for place in (branch.first[0], branch.last):
                        self._slot(place, seen[place].shape[-1])[part] = seen[place]
                middle = before + seen[block.attention.module]
                self._slot(f"{block.attention.module} residual", before.shape[-1])[part] = before
                self._slot(f"{block.mlp.module} residual", before.shape[-1])[part] = middle
                for branch, stream in zip(branches, (middle, after), strict=True):
                    self.energy.setdefault(branch.module, torch.empty(self.hidden.shape[:2], device=before.device))[part] = (
                        stream.float().square().mean(-1)
                    )
                total = middle + seen[block.mlp.module]
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


def _store(seen: dict[str, Tensor], branch: Branch) -> Callable[[nn.Module, Any, Any], None]:
    def hook(_: nn.Module, __: Any, output: Any) -> None:
        seen[branch.module] = output[0] if branch.returns_tuple else output

    return hook
