"""One process or many, of which each holds the whole model or a part of it. What differs between them is here, so that the loop reads the
same for both.

    one process              every tensor is whole
    several, replicated      DistributedDataParallel: each holds the whole model, gradients are averaged
    several, sharded         FSDP2 (`accelerate launch --use_fsdp --fsdp_version 2`): each holds a part of every parameter and of its
                             optimizer state; a block's parameters are gathered when it runs

What the sequential pipeline needs too is in system/processes.py. Sharding is torch's fully_shard, block by block, for student and teacher.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from marlinctl.system import processes
from marlinctl.system.launcher import settings_aside, sharding_asked


class Processes(processes.Processes):
    """All processes of this run, seen from one of them."""

    def __init__(self, device: str, joined: processes.Processes | None = None) -> None:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

        super().__init__(device, joined)
        self.sharded = self.alike(sharding_asked) and self.count > 1
        handlers = [InitProcessGroupKwargs(timeout=processes.PATIENCE), DistributedDataParallelKwargs(broadcast_buffers=False)]
        with settings_aside():
            self.accelerator = Accelerator(cpu=self.device.type == "cpu", mixed_precision="no", kwargs_handlers=handlers)

    # Models

    def shard(self, model: nn.Module, blocks: Sequence[nn.Module], dtype: torch.dtype | None = None) -> nn.Module:
        """Give each process its part of every parameter, where that was asked for.

        dtype: what parameters are gathered in, and what the model computes with; their own if None. Parts keep their dtype, and gradients
        are summed in float32.
        """
        if self.sharded:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

            mesh = init_device_mesh(self.device.type, (self.count,))
            policy = MixedPrecisionPolicy() if dtype is None else MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
            for block in blocks:
                fully_shard(block, mesh=mesh, mp_policy=policy)
            fully_shard(model, mesh=mesh, mp_policy=policy)
        return model

    def replicate(self, model: nn.Module) -> nn.Module:
        """The model to call in training, whose gradients come out averaged over the processes."""
        if self.sharded or self.count == 1:
            return model
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 renames broadcast_buffers, torch 2.11 knows no other name
            prepared: nn.Module = self.accelerator.prepare_model(model, device_placement=False)
        return prepared

    def unsynchronised(self, model: nn.Module) -> AbstractContextManager[object]:
        """Gradients only add up in here: for all parts of a step but the last. Shards are reduced each time; whole ones would not fit."""
        return nullcontext() if self.sharded else self.accelerator.no_sync(model)

    # Parameters

    def spread(self, tensor: Tensor | None, parameter: Tensor) -> Tensor:
        """What the main process has for a parameter (weight, optimizer state), as this process holds it."""
        held = tensor.to(self.device) if tensor is not None and self.main else torch.empty(parameter.shape, device=self.device)
        if self.count == 1:
            return held
        torch.distributed.broadcast(held, src=0)
        return shard_like(held, parameter)


def shard_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """The part of a tensor that belongs to this process's part of the parameter; every process has the whole tensor."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter, DTensor):
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a parameter; all processes must ask together."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def local(tensor: Tensor) -> Tensor:
    """This process's part of a parameter."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part
