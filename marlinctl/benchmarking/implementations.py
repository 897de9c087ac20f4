"""What is checked and timed of ours: the operators as a model calls them, and every configuration with every number of CTAs.

    int4, int4 2:4               torch.ops.marlinctl: it chooses kernel, configuration and CTAs itself
    int4, int8-128               the same where activations may be rounded, as a folder's config.json says: for as many tokens as are then
                                 multiplied in 8 bits (kernels/dispatch.json)
    int4, overlap                the first, allowed to begin before the call before it has ended (since Hopper)
    dequantize, dequantize 2:4   a plain weight of the tiles, then torch.matmul: what the operators choose for many tokens
    m16n128k256x3/2              a configuration, with two CTAs on each multiprocessor; since Hopper with ", overlap"
    m16n128k256x3/2 even         the same, with another way of sharing output tiles (kernels/configurations.py)

The operators are timed without overlap, as peers have none, and with it, as marlinctl's modules call them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import linear

from marlinctl.benchmarking.building import offered
from marlinctl.benchmarking.cases import Kind, operator_name
from marlinctl.benchmarking.cubins import kernel_folder, telling
from marlinctl.benchmarking.documents import Kernel
from marlinctl.benchmarking.weights import Packed
from marlinctl.kernels.configurations import Grid, Sharing, group_shift
from marlinctl.kernels.dispatch import DEQUANTIZE, Choice, choose
from marlinctl.kernels.launch import LoadedKernel, launch, load, load_unpack, unpack
from marlinctl.pack.types import PackedSparseLinear
from marlinctl.quantize.scheme import Rounding
from marlinctl.system.console import Console
from marlinctl.verify.kernels import in_float64, multiply

OVERLAP = ", overlap"
LARGEST_TILE = 128  # tokens


@dataclass(frozen=True, slots=True)
class Operator:
    """torch.ops.marlinctl, as a model calls it: the kernel is its choice, and the output its own tensor."""

    kind: Kind
    dtype: torch.dtype
    overlap: bool = False

    @property
    def name(self) -> str:
        return operator_name(self.kind) + (OVERLAP if self.overlap else "")

    def run(self, activations: Tensor, p: Packed, bias: Tensor | None, out: Tensor) -> Tensor:
        return multiply(activations, p, bias, overlap=self.overlap)

    def rounded(self, activations: Tensor, n: int) -> Tensor | None:
        return None

    def is_worth_timing(self, m: int, n: int, k: int) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class RoundedOperator:
    """The same where activations may be rounded: timed where they are multiplied in 8 bits, which M decides."""

    dtype: torch.dtype
    rounding: Rounding
    shapes: frozenset[tuple[int, int]]  # N, K of the linears for which it is allowed
    architecture: str
    overlap: bool = False
    kind: Kind = "dense"

    @property
    def name(self) -> str:
        return operator_name(self.kind, self.rounding) + (OVERLAP if self.overlap else "")

    @property
    def otherwise(self) -> str:
        """What takes as long where activations stay at 16 bits."""
        return Operator(self.kind, self.dtype, self.overlap).name

    def run(self, activations: Tensor, p: Packed, bias: Tensor | None, out: Tensor) -> Tensor:
        return multiply(activations, p, bias, overlap=self.overlap, rounding=self.rounding)

    def rounded(self, activations: Tensor, n: int) -> Tensor | None:
        """A CPU always rounds."""
        if activations.is_cuda and not self._has_8_bits(activations.shape[0], n, activations.shape[1]):
            return None
        return in_float64(activations, self.rounding)

    def is_worth_timing(self, m: int, n: int, k: int) -> bool:
        return (n, k) in self.shapes and self._has_8_bits(m, n, k)

    def _has_8_bits(self, m: int, n: int, k: int) -> bool:
        choice = choose(self.architecture, False, m, n, k, self.rounding)
        return choice is not None and choice.configuration.int8


@dataclass(frozen=True, slots=True)
class Dequantized:
    """What the operators do for many tokens, whatever M: a plain weight of the tiles, and torch.matmul with it."""

    kind: Kind
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return dequantized_name(self.kind)

    def run(self, activations: Tensor, p: Packed, bias: Tensor | None, out: Tensor) -> Tensor:
        n, k = p.out_features, p.in_features
        weights = (p.qweight, p.meta) if isinstance(p, PackedSparseLinear) else (p.qweight,)
        function = load_unpack(len(weights) == 2, self.dtype, p.scales.device, kernel_folder(None))
        weight = unpack(function, weights, p.scales, self.dtype, n, -(-k // 8) * 8, group_shift(p.group_size, k))
        return linear(activations, weight[:, :k], bias)

    def rounded(self, activations: Tensor, n: int) -> Tensor | None:
        return None

    def is_worth_timing(self, m: int, n: int, k: int) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class Configured:
    """One configuration, at most so many of its CTAs on each multiprocessor, and one way in which they share output tiles."""

    kernel: LoadedKernel
    per_multiprocessor: int
    sharing: Sharing = "striped"
    overlap: bool = False

    @property
    def name(self) -> str:
        return Choice(self.kernel.configuration, self.per_multiprocessor, self.sharing).name + (OVERLAP if self.overlap else "")

    @property
    def kind(self) -> Kind:
        return "sparse" if self.kernel.configuration.sparse else "dense"

    @property
    def dtype(self) -> torch.dtype:
        return self.kernel.dtype

    def run(self, activations: Tensor, p: Packed, bias: Tensor | None, out: Tensor) -> Tensor:
        m, k = activations.shape
        launch(self.kernel, activations, p, bias, out, self.grid(m, p.out_features, k), overlap=self.overlap)
        return out

    def rounded(self, activations: Tensor, n: int) -> Tensor | None:
        return None

    def grid(self, m: int, n: int, k: int) -> Grid:
        return self.kernel.grid(m, n, k, self.per_multiprocessor, self.sharing)

    def is_worth_timing(self, m: int, n: int, k: int) -> bool:
        """Not where its tile is far too small or large, nor where its way of sharing is the striped one, which has a name of its own."""
        fits = self.kernel.configuration.tokens <= max(2 * m, 16) and 4 * self.kernel.configuration.tokens >= min(m, LARGEST_TILE)
        return fits and (self.sharing == "striped" or self.grid(m, n, k) != replace(self, sharing="striped").grid(m, n, k))


def configured(
    device: torch.device, architecture: str, kinds: Sequence[Kind], dtype: torch.dtype, console: Console
) -> tuple[list[Configured], list[Kernel]]:
    """Every configuration that fits the device, with 1 to as many CTAs as a multiprocessor holds, and every way of sharing; and what
    loading them took.

    Where calls can overlap they do, as modules launch them: it is for those that the best is looked for.
    """
    folder = kernel_folder(None)
    wanted = [c for kind in kinds for c in offered(architecture, kind)]
    found: list[Configured] = []
    facts: list[Kernel] = []
    with console.progress("compile and load", len(wanted)) as progress:
        for c in wanted:
            started = time.perf_counter()
            with telling(folder, f"{c.kernel}.cu for {architecture}"):
                kernel = load(c, dtype, device, folder)
            facts.append(_facts(kernel, time.perf_counter() - started))
            found += [
                Configured(kernel, ctas, sharing, overlaps(architecture))
                for ctas in range(1, kernel.resident + 1)
                for sharing in c.sharings
            ]
            progress.advance()
    return found, facts


def dequantized_name(kind: Kind) -> str:
    return f"{DEQUANTIZE} 2:4" if kind == "sparse" else DEQUANTIZE


def overlaps(architecture: str) -> bool:
    """Whether a launch may begin before the one before it has ended: programmatic dependent launch, since Hopper."""
    return architecture not in ("sm_80", "sm_86", "sm_89")


def fewest(implementations: Sequence[Configured]) -> Iterator[Configured]:
    """One CTA on each multiprocessor and the most that fit: what accuracy looks at, as the numbers between them split work alike."""
    for one in implementations:
        if one.per_multiprocessor in (1, one.kernel.resident):
            yield one


def _facts(kernel: LoadedKernel, seconds: float) -> Kernel:
    return Kernel(
        name=kernel.configuration.name,
        kind="sparse" if kernel.configuration.sparse else "dense",
        dtype=str(kernel.dtype).removeprefix("torch."),
        seconds=seconds,
        registers=kernel.registers,
        local_bytes=kernel.local_bytes,
        shared_bytes=kernel.configuration.shared_bytes,
        resident=kernel.resident,
    )
