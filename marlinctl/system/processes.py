"""One process or many, as a launcher (`accelerate launch`, torchrun) started them. With one, nothing here costs anything.

    default group   NCCL between GPUs, gloo on a CPU: sums and rows that lie on the device
    host group      gloo: decisions, texts and tensors in host memory; its waits may last hours, since the main process alone downloads,
                    writes and measures
    watch           a connection of each process to the main one, which closes when a process dies (watch.py)

Process 0, the main one, reads the texts, writes every file and prints progress messages; the others print errors only.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, TypeVar

from click.exceptions import Exit

from marlinctl.errors import EnvironmentProblem, MarlinctlError
from marlinctl.system.devices import choose_device
from marlinctl.system.launcher import cpu_asked, sharding_asked

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from marlinctl.system.console import Console
    from marlinctl.system.watch import Watch

Value = TypeVar("Value")
PATIENCE = timedelta(hours=6)  # the others wait while the main process downloads, reads a text or measures the result
_LAUNCHED = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT"),
)
_MOST_AT_ONCE = 1 << 28  # bytes of one message between two hosts


class Processes:
    """All processes of this run, seen from one of them. Use as a context manager around the run: it ends for all of them together."""

    def __init__(self, device: str | None = None, joined: Processes | None = None) -> None:
        """device: `--device`; without one, this process alone. joined: what this process is a part of already, to be used again.

        EnvironmentProblem E420 where this process has no GPU of its own; UsageError E288 for settings of the launcher that are not offered.
        """
        self.count, self.index, self.local_index = 1, 0, 0
        self._asked = device or "cpu"
        self._joined = joined is not None
        self._device: torch.device | None = None
        self._host: torch.distributed.ProcessGroup | None = None
        self._watch: Watch | None = None
        self._ended, self._grouped = False, False
        if joined is not None:
            self.count, self.index, self.local_index = joined.count, joined.index, joined.local_index
            self._device, self._host, self._watch = joined._device, joined._host, joined._watch
        elif device is not None and {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys() and int(os.environ["WORLD_SIZE"]) > 1:
            self.count, self.index, self.local_index = (int(os.environ[name]) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"))
            self._join()

    def _join(self) -> None:
        import torch

        from marlinctl.system.watch import Watch

        self.alike(sharding_asked)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        torch.distributed.init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=PATIENCE)
        self._host = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
        self._grouped = True
        self._watch = Watch(self.index, self.count, self.share)

    @property
    def main(self) -> bool:
        return self.index == 0

    @property
    def launcher(self) -> str:
        """What stands before `marlinctl` on the command line."""
        return "accelerate launch ... -m " if self.count > 1 else ""

    @property
    def device(self) -> torch.device:
        """Of several processes, each has its own GPU."""
        if self._device is None:
            import torch

            chosen = self.alike(lambda: choose_device(self._asked))
            if chosen == "cpu" or (self._asked == "auto" and cpu_asked()):  # `accelerate launch --cpu` is heard where nothing else was said
                self._device = torch.device("cpu")
            elif self.count == 1:
                self._device = torch.device(chosen)
            elif self.local_index < torch.cuda.device_count():
                self._device = torch.device("cuda", self.local_index)
            else:
                raise EnvironmentProblem(
                    "E420", f"there is no GPU for process {self.index}: this machine has {torch.cuda.device_count()}",
                    where=f"process {self.index}", fix="start as many processes as there are GPUs (--num_processes), or give --device cpu",
                )  # fmt: skip
        return self._device

    # What all must agree on

    def alike(self, work: Callable[[], Value]) -> Value:
        """All do it, and an error is the same for all: the main process reports it, the others leave with the same exit code."""
        try:
            return work()
        except MarlinctlError as error:
            self.stop(error)

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

    def stop(self, error: MarlinctlError) -> NoReturn:
        """All have found the same: the main process reports it, the others leave with the same exit code."""
        raise error if self.main else Exit(error.exit_code)

    def share(self, value: Value) -> Value:
        """The main process's value, for all."""
        if self.count == 1:
            return value
        import torch

        box = [value]
        torch.distributed.broadcast_object_list(box, src=0, group=self._host)
        return box[0]

    def gather(self, value: Value) -> list[Value]:
        """Every process's value, for all, in the order of the processes."""
        if self.count == 1:
            return [value]
        import torch

        box: list[Value] = [value] * self.count
        torch.distributed.all_gather_object(box, value, group=self._host)
        return box

    def largest(self, value: int) -> int:
        return max(self.gather(value))

    def wait(self) -> None:
        if self.count > 1:
            import torch

            torch.distributed.barrier(group=self._host)

    # Tensors in host memory

    def share_tensor(self, tensor: Tensor | None) -> Tensor:
        """The main process's tensor, for all, on the CPU."""
        if self.count == 1:
            assert tensor is not None
            return tensor
        import torch

        described = self.share((tensor.shape, tensor.dtype) if tensor is not None else None)
        assert described is not None
        held = tensor.cpu().contiguous() if tensor is not None and self.main else torch.empty(described[0], dtype=described[1])
        torch.distributed.broadcast(held.view(torch.uint8), src=0, group=self._host)
        return held

    def part_of(self, total: int, index: int | None = None) -> slice:
        """A contiguous range of `total` things for each process, in their order; sizes differ by one at most."""
        index = self.index if index is None else index
        return slice(index * total // self.count, (index + 1) * total // self.count)

    def collect(self, part: Tensor, total: int) -> Tensor | None:
        """[total, ...] on the CPU of the main process, of which each process has its `part_of`; None in the others."""
        if self.count == 1:
            return part
        import torch

        if not self.main:
            for message in _messages(part.cpu()):
                torch.distributed.send(message, dst=0, group=self._host)
            return None
        whole = torch.empty((total, *part.shape[1:]), dtype=part.dtype)
        whole[self.part_of(total)] = part.cpu()
        for index in range(1, self.count):
            for message in _messages(whole[self.part_of(total, index)]):
                torch.distributed.recv(message, src=index, group=self._host)
        return whole

    def hand_out(self, whole: Tensor | None, like: Tensor, total: int) -> Tensor:
        """What `collect` has undone: of the main process's [total, ...], each process's `part_of`, on the CPU. like: the part's shape."""
        if self.count == 1:
            assert whole is not None
            return whole
        import torch

        if self.main:
            assert whole is not None
            for index in range(1, self.count):
                for message in _messages(whole[self.part_of(total, index)]):
                    torch.distributed.send(message, dst=index, group=self._host)
            return whole[self.part_of(total)]
        part = torch.empty(like.shape, dtype=like.dtype)
        for message in _messages(part):
            torch.distributed.recv(message, src=0, group=self._host)
        return part

    # Tensors on the device

    def sum(self, tensor: Tensor) -> Tensor:
        """In place."""
        if self.count > 1:
            import torch

            torch.distributed.all_reduce(tensor)
        return tensor

    def concatenate(self, part: Tensor) -> Tensor:
        """[count * n, ...]: the parts [n, ...] of all processes, in their order, for all. Equal shapes."""
        if self.count == 1:
            return part
        import torch

        held = part.contiguous()
        whole = torch.empty((self.count * held.shape[0], *held.shape[1:]), dtype=held.dtype, device=held.device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 has another name for it, torch 2.11 knows no other
            torch.distributed.all_gather_into_tensor(whole.view(torch.uint8), held.view(torch.uint8))
        return whole

    # The end

    def disband(self) -> None:
        """All together: nothing is spread any more, and the main process does the rest alone. Libraries that find a group of processes wait
        for the others in it (compressed-tensors when it loads a model, lm_eval), so there is none for them from now on."""
        if self._watch is None or self._joined or not self._grouped:
            return
        import torch

        self.wait()
        self._watch.free()
        torch.distributed.destroy_process_group()
        self._grouped = False
        if "accelerate" in sys.modules:
            from accelerate.state import AcceleratorState

            AcceleratorState._reset_state(reset_partial_state=True)
        for name in [name for name in os.environ if name in _LAUNCHED or name.startswith("TORCHELASTIC_")]:
            del os.environ[name]

    def part(self, value: Value) -> Value:
        """The run is over; the others wait here until it is. The main process's value, for all; of JSON's kinds."""
        if self._watch is None or self._joined:
            return self.share(value)
        self.disband()
        self._ended = True
        if self.main:
            self._watch.close(value)
            return value
        ended: Value = self._watch.wait()
        return ended

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """An error of one process ends all of them, and is reported once, by the main process if that lives."""
        if self._watch is None or self._joined:
            return
        if error is None:
            if not self._ended:
                self.part(None)
            return
        instead = self._watch.leave(error)
        if instead is not None:
            raise instead from error


ALONE = Processes()  # one process, and no launcher is asked


def silence_if_second(console: Console) -> None:
    """Under a launcher all processes run the same command; one of them talks."""
    if int(os.environ.get("RANK", "0")) > 0:
        console.mute()


def _messages(tensor: Tensor) -> Iterator[Tensor]:
    """The bytes of a contiguous tensor on the CPU, a message at a time."""
    import torch

    yield from tensor.view(-1).view(torch.uint8).split(_MOST_AT_ONCE) if tensor.numel() else ()
