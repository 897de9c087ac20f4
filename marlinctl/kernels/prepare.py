"""Everything that a product may ask for, compiled and loaded before it is asked: for servers, where the first request must not wait,
and for CUDA graphs, under whose capture nothing can be compiled.

    products [N, K] ─► dispatch.choices: a kernel for each range of M ─┐
    torch.matmul for large M ─► unpack.cu                              ┴─► compiled side by side into the cache ─► loaded
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from marlinctl.kernels import dispatch, jit
from marlinctl.kernels.configurations import Configuration, group_shift
from marlinctl.kernels.functions import checked_architecture
from marlinctl.kernels.launch import load, load_unpack, unpack_defines
from marlinctl.kernels.ops import ROW
from marlinctl.kernels.rounding import defines as rounding_defines
from marlinctl.kernels.rounding import prepare_rounding
from marlinctl.quantize.activations import group_of
from marlinctl.quantize.scheme import Rounding


@dataclass(frozen=True, slots=True)
class Multiplied:
    """What decides the kernels of a linear: not its weights."""

    sparse: bool
    out_features: int  # N
    in_features: int  # K
    group_size: int  # -1: whole rows
    dtype: torch.dtype  # of activations
    rounding: Rounding = "none"  # of them, where it is allowed
    factored: bool = False  # scales are of the form of factored.py


@dataclass(frozen=True, slots=True)
class Needed:
    """Kernels of one dtype."""

    # With the group size, as configurations.group_shift says it, and of int8 whether tokens have a scale for each 128 of K.
    kernels: frozenset[tuple[Configuration, torch.dtype, int, bool]]
    unpacks: frozenset[tuple[bool, torch.dtype]]  # 2:4 or dense
    # Of activations, with K, the group of a scale, and whether for 2:4.
    roundings: frozenset[tuple[torch.dtype, int, int | None, bool]] = frozenset()

    @property
    def sources(self) -> set[tuple[str, tuple[str, ...]]]:
        """Source and defines, as jit.cubin takes them. Kernels of mma.sync for 16 bits serve all group sizes, and come up once."""
        kernels = {(f"{c.kernel}.cu", c.defines(dtype, shift, groups)) for c, dtype, shift, groups in self.kernels}
        kernels |= {("round_activations.cu", rounding_defines(*one)) for one in self.roundings}
        return kernels | {("unpack.cu", unpack_defines(sparse, dtype)) for sparse, dtype in self.unpacks}


def needed(architecture: str, products: Iterable[Multiplied]) -> Needed:
    """What these products may launch on that architecture."""
    kernels, unpacks, roundings = set(), set(), set()
    for one in products:
        n, k = (-(-size // ROW) * ROW for size in (one.out_features, one.in_features))  # as the operators ask
        shift = group_shift(one.in_features if one.group_size == -1 else one.group_size, one.in_features)
        for choice in dispatch.choices(architecture, one.sparse, n, k, one.rounding, one.factored):
            if choice is None:
                unpacks.add((one.sparse, one.dtype))
            elif choice.configuration.int8:
                group = group_of(one.rounding)
                kernels.add((choice.configuration, one.dtype, shift, group is not None))
                roundings.add((one.dtype, k, group, one.sparse))
            else:
                kernels.add((choice.configuration, one.dtype, shift, False))
    return Needed(frozenset(kernels), frozenset(unpacks), frozenset(roundings))


def prepare(products: Iterable[Multiplied], device: torch.device) -> int:
    """Compiles what is not in the cache, as many at a time as there are processors, and loads it. How many kernels there are.

    Raises what launch.load raises. NVRTC leaves the interpreter alone while it compiles, so threads are enough.
    """
    architecture = checked_architecture(device)
    folder = jit.default_folder()
    wanted = needed(architecture, products)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for _ in pool.map(lambda one: jit.cubin(one[0], one[1], architecture, folder), wanted.sources):
            pass
    for configuration, dtype, shift, groups in wanted.kernels:
        load(configuration, dtype, device, folder, shift, groups)
    for dtype, k, group, sparse in wanted.roundings:
        prepare_rounding(device, dtype, k, group, sparse)
    index = torch.cuda.current_device() if device.index is None else device.index
    for sparse, dtype in wanted.unpacks:
        load_unpack(sparse, dtype, torch.device("cuda", index), folder)
    return len(wanted.sources)
