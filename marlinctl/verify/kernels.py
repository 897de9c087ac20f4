"""Do the tiles of a native folder, read as a kernel reads them, give the product of the linear's weights?

    tiles ─► with a GPU: the CUDA kernel, through the operator that models call, all outputs             ┐ differ by rounding
          └► without: the lane-exact emulator (kernels/emulate.py), sampled blocks of 64 outputs         │ alone, or the check
    codes, scales and mask as every other part of marlinctl reads them ─► float64 product, in chunks    ┘ fails

Where the folder allows int8 activations, its linears are multiplied with those too: by the CUDA kernel with as many rows as the table
multiplies in 8 bits, or by the emulator of that kernel (kernels/emulate_int8.py), and compared with the product of the rounded activations.

Packing and unpacking that are wrong in the same way cancel out; kernel and emulator know neither. Activations are random, so a weight in a
wrong place shows in the sums.

What rounding may do. The emulator's sums are float32:  |error| <= (K'/16 + G') 2^-24 sum |a w|,  twice for good measure. The kernel rounds
its output to float16 as well, and where it dequantizes first, each weight: independent roundings, whose sum stays within a few times the
root of the sum of squares:  |error| <= 2^-10 |product| + 2^-9 sqrt(sum (a w)^2) + 2^-24.  Both hold for each output by itself, so that one
wrong block among many does not drown in the rest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from marlinctl.checkpoint.formats import registry
from marlinctl.checkpoint.formats.base import FormatInfo
from marlinctl.errors import CheckFailed, Problem, number_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from marlinctl.checkpoint.reader import Checkpoint
    from marlinctl.pack.types import PackedLinear, PackedSparseLinear
    from marlinctl.quantize.scheme import Rounding
    from marlinctl.system.console import Console

BLOCKS = 2  # of each linear that the emulator reads: 0.1 s for K = 4096 on one core
ROWS = 16  # of activations: one tile of the tensor core
CHUNK = 1024  # outputs whose weights are in float64 at once
ALLOWED = 2.0**-9  # of the kernel's error over its scale, as `compared` measures it
EMULATOR = "emulator"


@dataclass(frozen=True, slots=True)
class KernelCheck:
    """How the tiles were read. `error` is the largest of all outputs that were read, relative to the scale of its own sum."""

    by: str  # emulator, or the CUDA kernel and its device
    linears: int
    unread: tuple[str, ...]  # groups that end within a step of the kernels: these linears can be stored, but no kernel multiplies them
    blocks: int
    of_blocks: int
    error: float
    rounded: int = 0  # linears that were multiplied with int8 activations too
    rounded_by: str = ""


@dataclass(frozen=True, slots=True)
class Reading:
    """One linear: what the tiles gave, and what rounding allows."""

    blocks: int
    error: float
    allowed: float


@dataclass(frozen=True, slots=True)
class CudaKernel:
    """The operator on one GPU. `name` is for people."""

    name: str
    device: torch.device
    multiply: Callable[[Tensor, PackedLinear | PackedSparseLinear], Tensor]
    multiply_rounded: Callable[[Tensor, PackedLinear | PackedSparseLinear, Rounding], Tensor] | None = None
    # The fewest rows that it multiplies in 8 bits by a weight [N, K], by how they are rounded and whether the weight is factored.
    rows_rounded: Callable[[int, int, Rounding, bool], int | None] = lambda n, k, rounding, factored: None


def takes(packed: PackedLinear | PackedSparseLinear) -> bool:
    """Whether a kernel multiplies these groups. The emulator of 16-bit products knows more sizes."""
    from marlinctl.kernels.configurations import GROUP_SIZES

    return packed.channel_wise or packed.group_size in GROUP_SIZES


def check_kernels(checkpoint: Checkpoint, info: FormatInfo, console: Console) -> KernelCheck:
    """Every native linear. CheckFailed E113 lists the linears whose product is another."""
    from marlinctl.kernels.emulate import BLOCK, SPARSE_STEP, STEP

    step = SPARSE_STEP if info.format.needs_mask else STEP
    kernel = cuda_kernel(console, rounds=bool(info.rounding))
    problems: list[Problem] = []
    unread: list[str] = []
    emulated = blocks = of_blocks = rounded = rounded_emulated = 0
    largest = 0.0
    with console.progress("read the tiles as a kernel does", len(info.layers)) as progress:
        for layer, group_size in info.layers.items():
            progress.advance()
            if group_size != -1 and group_size % step:
                unread.append(layer)
                continue
            packed = registry.tiles_of(checkpoint, info, layer)
            there = packed.qweight.shape[1] // (2 * BLOCK)  # two words for each output of a block
            weight, chosen = registry.read_parts(checkpoint, info, layer).weight(), sample(layer, there)
            reading = by_kernel(kernel, packed, weight) if kernel is not None else None
            if reading is None:
                emulated += 1
                reading = Reading(len(chosen), *worst(packed, weight, chosen))
            _judge(problems, layer, reading, "")
            blocks, of_blocks, largest = blocks + reading.blocks, of_blocks + there, max(largest, reading.error)
            kind = info.rounding.get(layer, "none")
            if kind == "none" or not takes(packed):
                continue
            reading = by_kernel(kernel, packed, weight, kind) if kernel is not None else None
            if reading is None:
                rounded_emulated += 1
                reading = Reading(len(chosen), *worst(packed, weight, chosen, kind))
            _judge(problems, layer, reading, f" with {kind} activations")
            rounded, largest = rounded + 1, max(largest, reading.error)
    if problems:
        raise CheckFailed.from_problems("E113", problems)
    read = len(info.layers) - len(unread)
    by, rounded_by = _readers(kernel, read, emulated), _readers(kernel, rounded, rounded_emulated) if rounded else ""
    return KernelCheck(by, read, tuple(unread), blocks, of_blocks, largest, rounded, rounded_by)


def _judge(problems: list[Problem], layer: str, reading: Reading, how: str) -> None:
    if not reading.error <= reading.allowed:  # NaN too
        what = f"{layer}: its tiles, read as a kernel reads them, give another product{how}"
        what += f" (error {reading.error:.1e}, at most {reading.allowed:.1e} is rounding)"
        problems.append(Problem(what, layer, "pack the model again, and report it if that does not help"))


def _readers(kernel: CudaKernel | None, read: int, emulated: int) -> str:
    if kernel is None or emulated == read:
        return EMULATOR
    return kernel.name + (f" ({number_of(emulated, 'linear')} by the {EMULATOR})" if emulated else "")


def cuda_kernel(console: Console, *, rounds: bool = False) -> CudaKernel | None:
    """The operator on the current GPU, tried on a small linear; None where there is no GPU, or, with a warning, where it cannot run.

    A kernel that does not compile says nothing about the tiles: after hours of work the emulator still can. rounds: whether int8
    activations are tried too.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    from marlinctl.kernels.dispatch import fewest_rounded
    from marlinctl.kernels.functions import architecture_of, checked_architecture
    from marlinctl.pack.marlin import pack_marlin
    from marlinctl.quantize.types import QuantizedLinear

    device = torch.device("cuda", torch.cuda.current_device())
    kernel = CudaKernel(
        f"CUDA kernel on {torch.cuda.get_device_name(device)}", device, multiply,
        multiply_rounded=lambda activations, packed, rounding: multiply(
            activations, packed, rounding=rounding, factored=_factored(packed, rounding)
        ),
        rows_rounded=lambda n, k, rounding, factored: fewest_rounded(architecture_of(device), n, k, rounding, factored),
    )  # fmt: skip
    small = pack_marlin(QuantizedLinear(torch.ones(64, 64, dtype=torch.int8), torch.ones(64, 1).half(), 64))
    without, what = None, "the CUDA kernel"
    try:
        checked_architecture(device)
        compared(kernel, small, torch.ones(64, 64))
        without, what = replace(kernel, multiply_rounded=None), "the CUDA kernel for int8 activations"
        if rounds and kernel.rows_rounded(64, 64, "int8", False) is not None:
            compared(kernel, small, torch.ones(64, 64), "int8")
    except (RuntimeError, ValueError, OSError) as error:  # no compiler, an old or new GPU, a cache that cannot be written, no memory
        cause = (str(error).splitlines() or [""])[0]
        console.warn(f"{what} does not run on {torch.cuda.get_device_name(device)}, so the emulator reads the tiles: {cause}")
        return without
    return kernel


def by_kernel(kernel: CudaKernel, packed: PackedLinear | PackedSparseLinear, weight: Tensor, rounding: Rounding = "none") -> Reading | None:
    """`compared`, or None where it is for the emulator: groups that only it reads, a GPU that never multiplies this linear in 8 bits, or
    whose memory others have taken."""
    import torch

    if not takes(packed) or (rounding != "none" and _rows(kernel, packed, rounding) is None):
        return None
    try:
        return compared(kernel, packed, weight, rounding)
    except torch.cuda.OutOfMemoryError:
        return None


def _rows(kernel: CudaKernel, packed: PackedLinear | PackedSparseLinear, rounding: Rounding) -> int | None:
    """Of the activations of a check; None where the kernel does not round so many or so few of them."""
    if rounding == "none":
        return ROWS
    if kernel.multiply_rounded is None:
        return None
    n, k = (-(-size // 8) * 8 for size in (packed.out_features, packed.in_features))  # as the operator asks
    return kernel.rows_rounded(n, k, rounding, _factored(packed, rounding) is not None)


def compared(kernel: CudaKernel, packed: PackedLinear | PackedSparseLinear, weight: Tensor, rounding: Rounding = "none") -> Reading:
    """All outputs of the kernel on random activations against float64. weight: [N, K] float32, on the CPU. rounding: of the activations.

    The error of an output is |error| over (|product| / 2 + sqrt(sum (a w)^2)), after 2^-24 for numbers that float16 barely holds.
    """
    import torch

    from marlinctl.kernels.emulate import BLOCK

    (n, k), rows = weight.shape, _rows(kernel, packed, rounding)
    assert rows is not None
    activations = torch.randn(rows, k, generator=torch.Generator().manual_seed(0))
    activations = (activations * _comfortable(weight)).to(kernel.device, torch.float16)
    there = on_device(packed, kernel.device)
    if rounding == "none" or kernel.multiply_rounded is None:
        found = kernel.multiply(activations, there)
    else:
        found = kernel.multiply_rounded(activations, there, rounding)
    wide = in_float64(activations, rounding)
    largest = 0.0
    for first in range(0, n, CHUNK):
        part = weight[first : first + CHUNK].to(kernel.device).double()
        exact = wide @ part.T
        error = (found[:, first : first + CHUNK].double() - exact).abs()
        scale = exact.abs() / 2 + (wide.square() @ part.square().T).sqrt()
        share = torch.where(error <= 2.0**-24, 0.0, error / scale)  # a scale of 0 gives infinity
        largest = max(largest, float(share.max().nan_to_num(nan=torch.inf, posinf=torch.inf)))
    return Reading(packed.qweight.shape[1] // (2 * BLOCK), largest, ALLOWED)


def in_float64(activations: Tensor, rounding: Rounding) -> Tensor:
    """[M, K]: what a product with rounded activations is made of, code times scale, exact."""
    from marlinctl.quantize.activations import group_of, rounded

    if rounding == "none":
        return activations.double()
    group, k = group_of(rounding), activations.shape[-1]
    codes, scales = rounded(activations, "int8", group)
    return codes.double() * scales.double().repeat_interleave(group or k, -1)[..., :k]


def multiply(
    activations: Tensor, packed: PackedLinear | PackedSparseLinear, bias: Tensor | None = None, *, overlap: bool = False,
    rounding: Rounding = "none", factored: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """[M, N], by the operator that a model calls: whichever kernel it chooses on this device.

    rounding and factored: of dense weights alone.
    """
    from marlinctl.kernels import ops
    from marlinctl.pack.types import PackedSparseLinear

    n, size = packed.out_features, packed.group_size
    if isinstance(packed, PackedSparseLinear):
        return ops.sparse_marlin_gemm(activations, packed.qweight, packed.meta, packed.scales, n, size, bias, overlap)
    return ops.marlin_gemm(activations, packed.qweight, packed.scales, n, size, bias, overlap, rounding, factored)


def _factored(packed: PackedLinear | PackedSparseLinear, rounding: Rounding) -> Tensor | None:
    """What a model would give the operator as well."""
    from marlinctl.kernels.factored import factored_scales
    from marlinctl.pack.types import PackedLinear

    return factored_scales(packed) if rounding == "int8" and isinstance(packed, PackedLinear) else None


def on_device(packed: PackedLinear | PackedSparseLinear, device: torch.device) -> PackedLinear | PackedSparseLinear:
    from marlinctl.pack.types import PackedSparseLinear

    if isinstance(packed, PackedSparseLinear):
        return replace(packed, qweight=packed.qweight.to(device), meta=packed.meta.to(device), scales=packed.scales.to(device))
    return replace(packed, qweight=packed.qweight.to(device), scales=packed.scales.to(device))


def _comfortable(weight: Tensor) -> float:
    """A power of two that brings the largest sum near 1, where float16 neither overflows nor thins out."""
    import math

    norm = float(weight.norm(dim=1).max())
    return 2.0 ** min(max(-round(math.log2(norm)), -10), 10) if norm > 0 else 1.0


def sample(layer: str, there: int) -> list[int]:
    """The last block, where padding is, and others by the layer's name: the same on every machine, not the same in every layer."""
    start = int.from_bytes(hashlib.sha256(layer.encode()).digest()[:4], "big")
    return sorted({there - 1, *((start + i) % there for i in range(BLOCKS - 1))})


def worst(packed: PackedLinear | PackedSparseLinear, weight: Tensor, blocks: list[int], rounding: Rounding = "none") -> tuple[float, float]:
    """Largest |error| / sum |a w| of the emulator over the outputs of `blocks`, and what rounding allows. weight: [N, K] float32."""
    import torch

    from marlinctl.kernels.emulate import BLOCK, gemm_blocks
    from marlinctl.pack.types import padded

    n, k = weight.shape
    activations = torch.randn(ROWS, k, generator=torch.Generator().manual_seed(0)).to(torch.float16)
    outputs = torch.cat([torch.arange(BLOCK * block, BLOCK * (block + 1)) for block in blocks])
    rows = torch.zeros(len(outputs), k, dtype=torch.float64)  # outputs beyond N are zero
    rows[outputs < n] = weight[outputs[outputs < n]].double()
    wide = in_float64(activations, rounding)
    if rounding == "none":
        found = gemm_blocks(activations, packed, blocks)
    else:
        rows = rows[: int((outputs < n).sum())]
        found = _rounded_blocks(activations, packed, blocks, len(rows), rounding)
    error = (found.double() - wide @ rows.T).abs()
    scale = wide.abs() @ rows.abs().T
    share = torch.where(scale > 0, error / scale, torch.where(error > 0, torch.inf, 0.0))
    additions = padded(k) // 16 + packed.padded_groups
    return float(share.max()), 2 * additions * 2.0**-24


def _rounded_blocks(
    activations: Tensor, packed: PackedLinear | PackedSparseLinear, blocks: list[int], outputs: int, rounding: Rounding
) -> Tensor:
    """[M, outputs] of these blocks, in their order, by the emulator of the kernel for int8 activations. Tiles and scales of a block do not
    know their neighbours."""
    import torch

    from marlinctl.kernels.activations import round_activations_for_tiles
    from marlinctl.kernels.emulate import BLOCK
    from marlinctl.kernels.emulate_int8 import gemm_factored, gemm_int8
    from marlinctl.pack.types import PackedLinear
    from marlinctl.quantize.activations import group_of

    words = torch.cat([packed.qweight[:, 2 * BLOCK * block : 2 * BLOCK * (block + 1)] for block in blocks], 1)
    scales = torch.cat([packed.scales[:, BLOCK * block : BLOCK * (block + 1)] for block in blocks], 1)
    part = PackedLinear(words, scales, outputs, packed.in_features, packed.group_size)
    group = group_of(rounding)
    rounded, factored = round_activations_for_tiles(activations, group), _factored(part, rounding)
    if factored is not None:
        return gemm_factored(rounded.codes, rounded.scales, part, factored)
    return gemm_int8(rounded.codes, rounded.scales, part, group)
