"""One CUDA device as a clock: graphs, events, what it is, how fast it reads and multiplies, how it is clocked.

The only module here that knows CUDA. Everything else takes a device of this interface, so the whole of bench runs on a CPU in tests.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from importlib import metadata

import torch

from marlinctl.benchmarking.cubins import kernel_folder, telling
from marlinctl.benchmarking.documents import Ceilings, Clocks
from marlinctl.benchmarking.timing import Candidate, take_turns
from marlinctl.errors import EnvironmentProblem
from marlinctl.kernels.functions import architecture_of, checked_architecture
from marlinctl.system.devices import no_cuda

READ_BYTES = 2**32  # that the read rate is measured over: no cache holds any of it
MATMUL_SIZE = 8192
OLDEST = (8, 0)


def open_gpu(name: str) -> Gpu:
    """Asked before anything is put on the GPU.

    EnvironmentProblem E420 where there is no CUDA device or no kernel is made for it, E403 where none can be compiled or
    loaded.
    """
    if not torch.cuda.is_available():
        reason, cure = no_cuda()
        without = "compile them here with --build; check a packed folder without a GPU with `marlinctl verify --kernels FOLDER`"
        what = f"bench times kernels on an NVIDIA GPU: {reason}"
        raise EnvironmentProblem("E420", what, where="this machine (see `marlinctl doctor`)", fix=cure or without)
    try:
        device = torch.device(name)
        index = torch.cuda.current_device() if device.index is None else device.index
        known = device.type == "cuda" and index < torch.cuda.device_count()
    except RuntimeError:
        known = False
    if not known:
        there = ", ".join(f"cuda:{i}" for i in range(torch.cuda.device_count()))
        raise EnvironmentProblem("E420", f"there is no GPU {name!r}", where=f"--device {name}", fix=f"give one of {there}")
    try:
        with telling(kernel_folder(None), f"cuda:{index}"):
            checked_architecture(torch.device("cuda", index))
    except ValueError as error:
        fix = "bench on an A100, A10, RTX 30, 40 or 50, L4, L40, H100, H200 or B200, or with --device cpu"
        raise EnvironmentProblem("E420", str(error), where=f"cuda:{index}", fix=fix) from error
    return Gpu(index)


class Gpu:
    """A device with its index, and torch's current device while `current` is open."""

    def __init__(self, index: int) -> None:
        self.device = torch.device("cuda", index)
        self._facts = torch.cuda.get_device_properties(index)
        self.name: str = self._facts.name
        self.architecture = architecture_of(self.device)
        self.multiprocessors: int = self._facts.multi_processor_count
        self.l2_bytes: int = self._facts.L2_cache_size
        self.memory_bytes: int = self._facts.total_memory

    @contextmanager
    def current(self) -> Iterator[None]:
        with torch.cuda.device(self.device), torch.inference_mode():
            yield

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    def settle(self) -> None:
        torch.cuda.synchronize(self.device)

    def free(self) -> None:
        """Hand unused memory back between shapes of very different sizes."""
        torch.cuda.empty_cache()

    # The clock of timing.py

    def record(self, call: Callable[[int], object], calls: int) -> Callable[[], None]:
        """A CUDA graph of call(0) .. call(calls - 1); they have run before, so nothing is compiled or loaded while it is captured."""
        self.settle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(calls):
                call(i)
        return graph.replay

    def microseconds(self, run: Callable[[], object]) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3

    # What it is, and what it can

    def ceilings(self, dtype: torch.dtype) -> Ceilings:
        """Bytes per second that a sum over 4 GiB reads, operations per second of a square torch.matmul; on random numbers."""
        generator = self.generator(0)
        numbers = torch.randn(min(READ_BYTES, self.memory_bytes // 8) // 4, device=self.device, generator=generator)
        reading = take_turns(self, {"sum": Candidate(lambda i: numbers.sum(), 1)})["sum"].median
        read = numbers.numel() * 4 / reading * 1e6
        a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, device=self.device, generator=generator).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        multiplying = take_turns(self, {"matmul": Candidate(lambda i: torch.matmul(a, b.T, out=out), 1)})["matmul"].median
        self.free()
        return Ceilings(read=read, matmul=2 * MATMUL_SIZE**3 / multiplying * 1e6)

    @cached_property
    def driver(self) -> str | None:
        found = self._smi("driver_version")
        return found[0] if found else None

    @property
    def cublas(self) -> str | None:
        for name in ("nvidia-cublas", "nvidia-cublas-cu12"):
            try:
                return metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
        return None

    def clocks(self) -> Clocks:
        found = self._smi("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
        if not found:
            return Clocks()
        sm, memory, power, temperature = (_number(text) for text in found)
        return Clocks(sm_mhz=sm, memory_mhz=memory, power_watts=power, temperature=temperature)

    def _smi(self, *fields: str) -> list[str] | None:
        """What nvidia-smi answers about this device, None where it is not installed. It numbers devices its own way: by UUID."""
        command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", f"--id=GPU-{self._facts.uuid}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        return [part.strip() for part in done.stdout.strip().split(",")]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # [N/A], where a device does not report it
        return None
