"""One process or many. What differs between them is here, so that the loop reads the same for both.

    one process              every tensor is whole
    several, replicated      DistributedDataParallel: each holds the whole model, gradients are averaged
    several, sharded         FSDP2 (`accelerate launch --use_fsdp --fsdp_version 2`): each holds a part of every parameter and of its
                             optimizer state; a block's parameters are gathered when it runs

accelerate starts the processes and numbers them. Process 0, the main one, reads the data, writes every file and prints progress
messages; the others print errors only. Sharding is torch's fully_shard, block by block, for student and teacher.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
from click.exceptions import Exit
from torch import Tensor, nn

from marlinctl.errors import MarlinctlError
from marlinctl.system.console import Console
from marlinctl.system.devices import choose_device
from marlinctl.system.launcher import cpu_asked, settings_aside, sharding_asked

Value = TypeVar("Value")
PATIENCE = timedelta(hours=6)  # the others wait while the main process downloads, or writes the training text


class Processes:
    """All processes of this run, seen from one of them."""

    def __init__(self, device: str) -> None:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

        self.sharded = sharding_asked()
        # `accelerate launch --cpu` is heard where the person did not say otherwise.
        on_cpu = choose_device(device) == "cpu" or (device == "auto" and cpu_asked())
        handlers = [InitProcessGroupKwargs(timeout=PATIENCE), DistributedDataParallelKwargs(broadcast_buffers=False)]
        with settings_aside():
            self.accelerator = Accelerator(cpu=on_cpu, mixed_precision="no", kwargs_handlers=handlers)
        self.count, self.index = self.accelerator.num_processes, self.accelerator.process_index
        self.sharded = self.sharded and self.count > 1
        alone = torch.device("cpu" if on_cpu else choose_device(device))
        self.device: torch.device = self.accelerator.device if self.count > 1 else alone
        # Answers of one byte on the host: asking the accelerator's own group would wait for the device.
        self._host_group = torch.distributed.new_group(backend="gloo", timeout=PATIENCE) if self.count > 1 else None

    @property
    def main(self) -> bool:
        return self.index == 0

    # What all must agree on

    def main_first(self, work: Callable[[], Value]) -> Value:
        """The main process does it first. If it fails there, it reports the error, and the others exit with the same code."""
        if self.count == 1:
            return work()
        value: Value | None = None
        failed: MarlinctlError | None = None
        if self.main:
            try:
                value = work()
            except MarlinctlError as error:
                failed = error
        exit_code = self.share(failed.exit_code if failed else 0)
        if failed is not None:
            raise failed
        if exit_code:
            raise Exit(exit_code)
        return value if self.main else work()  # type: ignore[return-value]

    def share(self, value: Value) -> Value:
        """The main process's value, for all."""
        if self.count == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0, group=self._host_group)
        return box[0]

    def gather(self, value: Value) -> list[Value]:
        """Every process's value, for all, in the order of the processes."""
        if self.count == 1:
            return [value]
        box: list[Value] = [value] * self.count
        torch.distributed.all_gather_object(box, value, group=self._host_group)
        return box

    def stop(self, error: MarlinctlError) -> NoReturn:
        """All have found the same: the main process reports it, the others leave with the same exit code."""
        raise error if self.main else Exit(error.exit_code)

    def share_tensor(self, tensor: Tensor | None) -> Tensor:
        """The main process's tensor, for all, on the CPU."""
        described = self.share((tensor.shape, tensor.dtype) if tensor is not None else None)
        assert described is not None
        held = tensor.contiguous() if tensor is not None and self.main else torch.empty(described[0], dtype=described[1])
        if self.count > 1:
            torch.distributed.broadcast(held.view(torch.uint8), src=0, group=self._host_group)
        return held

    def largest(self, value: int) -> int:
        if self.count == 1:
            return value
        box = torch.tensor([value])
        torch.distributed.all_reduce(box, torch.distributed.ReduceOp.MAX, group=self._host_group)
        return int(box)

    def sum(self, tensor: Tensor) -> Tensor:
        if self.count > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def wait(self) -> None:
        if self.count > 1:
            torch.distributed.barrier(group=self._host_group)

    def part(self) -> None:
        """The run is over: wait for the slowest, and let the others go."""
        self.wait()
        if self.count > 1:
            torch.distributed.destroy_process_group()

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


def silence_if_second(console: Console) -> None:
    """Under a launcher all processes run the same command; one of them talks."""
    if int(os.environ.get("RANK", "0")) > 0:
        console.mute()
