"""Do the tiles of a native folder, read as a kernel reads them, give the product of the linear's weights?

    tiles ─► lane-exact emulator (kernels/emulate.py), sampled blocks of 64 outputs ─► sums   ┐
    codes, scales and mask as every other part of marlinctl reads them ─► float64 product     ┘ differ by rounding alone, or the check fails

Packing and unpacking that are wrong in the same way cancel out; the emulator knows neither. Activations are random, so a weight in a wrong
place shows in the sums, and float32 bounds what rounding may do:  |error| <= (K'/16 + G') 2^-24 sum |a w|,  twice for good measure.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from marlinctl.checkpoint import formats
from marlinctl.errors import CheckFailed, Problem

if TYPE_CHECKING:
    from torch import Tensor

    from marlinctl.checkpoint.reader import Checkpoint
    from marlinctl.console import Console
    from marlinctl.pack.types import PackedLinear, PackedSparseLinear

BLOCKS = 2  # of each linear: 0.1 s for K = 4096 on one core
ROWS = 16  # of activations: one tile of the tensor core


@dataclass(frozen=True, slots=True)
class KernelCheck:
    """How the tiles were read. `error` is the largest |error| / sum |a w| over all sampled outputs."""

    by: str
    linears: int
    unread: tuple[str, ...]  # groups that end within a step of the kernels: these linears can be stored, but no kernel multiplies them
    blocks: int
    of_blocks: int
    error: float


def check_kernels(checkpoint: Checkpoint, info: formats.FormatInfo, console: Console) -> KernelCheck:
    """Every native linear, a sample of its outputs. CheckFailed E113 lists the linears whose product is another."""
    from marlinctl.kernels.emulate import BLOCK, SPARSE_STEP, STEP

    step = SPARSE_STEP if info.name == "marlin_24" else STEP
    problems: list[Problem] = []
    unread: list[str] = []
    blocks = of_blocks = 0
    largest = 0.0
    with console.progress("read the tiles as a kernel does", len(info.layers)) as progress:
        for layer, group_size in info.layers.items():
            progress.advance()
            if group_size != -1 and group_size % step:
                unread.append(layer)
                continue
            packed = tiles(checkpoint, info, layer)
            there = packed.qweight.shape[1] // (2 * BLOCK)  # two words for each output of a block
            chosen = sample(layer, there)
            error, allowed = worst(packed, formats.read_parts(checkpoint, info, layer).weight(), chosen)
            if not error <= allowed:  # NaN too
                what = f"{layer}: its tiles, read as a kernel reads them, give another product"
                what += f" (error {error:.1e}, at most {allowed:.1e} is rounding)"
                problems.append(Problem(what, layer, "pack the model again, and report it if that does not help"))
            blocks, of_blocks, largest = blocks + len(chosen), of_blocks + there, max(largest, error)
    if problems:
        raise CheckFailed.from_problems("E113", problems)
    return KernelCheck("emulator", len(info.layers) - len(unread), tuple(unread), blocks, of_blocks, largest)


def sample(layer: str, there: int) -> list[int]:
    """The last block, where padding is, and others by the layer's name: the same on every machine, not the same in every layer."""
    start = int.from_bytes(hashlib.sha256(layer.encode()).digest()[:4], "big")
    return sorted({there - 1, *((start + i) % there for i in range(BLOCKS - 1))})


def worst(packed: PackedLinear | PackedSparseLinear, weight: Tensor, blocks: list[int]) -> tuple[float, float]:
    """Largest |error| / sum |a w| of the emulator over the outputs of `blocks`, and what rounding allows. weight: [N, K] float32."""
    import torch

    from marlinctl.kernels.emulate import BLOCK, gemm_blocks
    from marlinctl.pack.types import padded

    n, k = weight.shape
    activations = torch.randn(ROWS, k, generator=torch.Generator().manual_seed(0)).to(torch.float16)
    outputs = torch.cat([torch.arange(BLOCK * block, BLOCK * (block + 1)) for block in blocks])
    rows = torch.zeros(len(outputs), k, dtype=torch.float64)  # outputs beyond N are zero
    rows[outputs < n] = weight[outputs[outputs < n]].double()
    wide = activations.double()
    error = (gemm_blocks(activations, packed, blocks).double() - wide @ rows.T).abs()
    scale = wide.abs() @ rows.abs().T
    share = torch.where(scale > 0, error / scale, torch.where(error > 0, torch.inf, 0.0))
    additions = padded(k) // 16 + packed.padded_groups
    return float(share.max()), 2 * additions * 2.0**-24


def tiles(checkpoint: Checkpoint, info: formats.FormatInfo, layer: str) -> PackedLinear | PackedSparseLinear:
    """The tensors of a native linear as they lie in the file."""
    from marlinctl.pack.types import PackedLinear, PackedSparseLinear

    n, k = formats.layer_shape(checkpoint, info, layer)
    size = k if info.layers[layer] == -1 else info.layers[layer]
    scales = checkpoint.read(f"{layer}.s")
    if info.name == "marlin":
        return PackedLinear(checkpoint.read(f"{layer}.B"), scales, n, k, size)
    return PackedSparseLinear(checkpoint.read(f"{layer}.B_24"), checkpoint.read(f"{layer}.B_meta"), scales, n, k, size)
