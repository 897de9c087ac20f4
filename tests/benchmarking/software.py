"""A device for bench that is this CPU: everything but CUDA runs as it does on a GPU, with times that mean nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from marlinctl.benchmarking.cases import Kind
from marlinctl.benchmarking.documents import Ceilings, Clocks
from marlinctl.benchmarking.weights import Packed
from marlinctl.kernels.reference import gemm


@dataclass
class SoftwareGpu:
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    name: str = "a CPU that plays a GPU"
    architecture: str = "sm_90a"
    multiprocessors: int = 4
    l2_bytes: int = 64 * 1024
    memory_bytes: int = 2**30
    driver: str | None = None
    cublas: str | None = None
    recorded: list[int] = field(default_factory=list)

    @contextmanager
    def current(self) -> Iterator[None]:
        with torch.inference_mode():
            yield

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    def settle(self) -> None:
        pass

    def free(self) -> None:
        pass

    def record(self, call: Callable[[int], object], calls: int) -> Callable[[], None]:
        self.recorded.append(calls)

        def run() -> None:
            for i in range(min(calls, 2)):  # a test has no time for fifty
                call(i)

        return run

    def microseconds(self, run: Callable[[], object]) -> float:
        started = time.perf_counter()
        run()
        return (time.perf_counter() - started) * 1e6

    def ceilings(self, dtype: torch.dtype) -> Ceilings:
        return Ceilings(read=1e10, matmul=1e11)

    def clocks(self) -> Clocks:
        return Clocks()


@dataclass(frozen=True)
class Pretended:
    """An implementation that multiplies by the reference, after `wrong` has been at the product."""

    kind: Kind = "dense"
    dtype: torch.dtype = torch.float16
    name: str = "pretended"
    wrong: Callable[[Tensor], Tensor] = lambda product: product

    def run(self, activations: Tensor, p: Packed, bias: Tensor | None, out: Tensor) -> Tensor:
        out.copy_(self.wrong(gemm(activations, p, bias)).to(self.dtype))
        return out

    def rounded(self, activations: Tensor, n: int) -> Tensor | None:
        return None

    def is_worth_timing(self, m: int, n: int, k: int) -> bool:
        return True
