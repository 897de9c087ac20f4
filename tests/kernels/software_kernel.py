"""Kernels of csrc as functions on the CPU: the sources that NVRTC compiles, built by a C++ compiler against a software GPU.

software_gpu/ptx.cuh and ptx_sm90.cuh take the place of the instructions (gpu.cpp); everything else, addresses, pipeline, stripes and
reduction, is the kernels' own.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from marlinctl.kernels import jit
from marlinctl.kernels.activations import round_activations_for_tiles
from marlinctl.kernels.configurations import DENSE_SM90, SPARSE_SM90, Configuration, group_shift
from marlinctl.kernels.factored import factored_scales
from marlinctl.kernels.int8_metadata import metadata_for_int8
from marlinctl.kernels.reference import dequantize, dequantize_sparse
from marlinctl.pack.marlin import pack_marlin
from marlinctl.pack.sparse_marlin import pack_sparse_marlin
from marlinctl.pack.types import PackedLinear, PackedSparseLinear
from marlinctl.quantize.types import QuantizedLinear
from marlinctl.sparsify.types import SparseQuantizedLinear
from tests.kernels.built import SOFTWARE_GPU, kernel_library
from tests.pack.naive import random_linear, random_sparse

GUARD = 64  # elements before and after the output that must stay as they are

Launch = Callable[..., Tensor]
Linear = TypeVar("Linear", QuantizedLinear, SparseQuantizedLinear)


class Arguments(ctypes.Structure):
    """struct Arguments of software_gpu/gpu.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("activations", "qweight", "meta", "scales", "bias", "out", "partials", "counters")),
        *((name, ctypes.c_int) for name in ("m", "n", "k", "whole", "group_shift")),
        ("token_scales", ctypes.c_void_p),
    ]


def library_of(
    configuration: Configuration, dtype: torch.dtype, folder: Path, edit: Callable[[str], str] = lambda source: source, shift: int = 3,
    token_groups: bool = False,
) -> ctypes.CDLL:  # fmt: skip
    """The kernel, built for the CPU; `edit` may break its sources first."""
    kernel = (f"SPARSE={int(configuration.sparse)}", f"WGMMA={int(configuration.wgmma)}")
    return compiled(configuration.kernel, (*configuration.defines(dtype, shift, token_groups), *kernel), folder, edit)


def compiled(kernel: str, defines: Sequence[str], folder: Path, edit: Callable[[str], str] = lambda source: source) -> ctypes.CDLL:
    """kernel.cu and the software GPU in one library, with `edit` applied to the kernel and to what it includes."""
    files = {
        name: edit(text) if name == f"{kernel}.cu" or name.endswith(".cuh") else text for name, text in jit.texts_of(jit.SOURCES).items()
    }
    files |= {name: (SOFTWARE_GPU / name).read_text("utf-8") for name in ("ptx.cuh", "ptx_sm90.cuh")}
    return ctypes.CDLL(str(kernel_library(files, defines, folder)))


def build(configuration: Configuration, dtype: torch.dtype, folder: Path, edit: Callable[[str], str] = lambda source: source) -> Launch:
    """The kernel as a function; one with wgmma or for int8 is built for each group size that it is called with.

    One for int8 activations rounds them itself, by round_activations_for_tiles.
    """

    @functools.cache
    def library(shift: int, token_groups: bool) -> ctypes.CDLL:
        return library_of(configuration, dtype, folder.with_name(f"{folder.name}{shift}{token_groups}"), edit, shift, token_groups)

    def launch(
        activations: Tensor,
        p: PackedLinear | PackedSparseLinear,
        bias: Tensor | None,
        order: list[int],
        *,
        whole: int = 0,
        cluster: int = 1,
        eager: bool = False,
        backwards: bool = False,
        activation_group: int | None = None,
    ) -> Tensor:
        """One launch of len(order) CTAs with `whole` tiles each, run in that order; those of a pair are a cluster. Outputs and partial sums
        are poisoned; counters must come back as zeros, and clusters that are no pairs must use neither.
        """
        (m, k), n, ctas = activations.shape, p.out_features, len(order)
        cluster = configuration.pair if configuration.paired else cluster
        out = torch.full((m * n + 2 * GUARD,), torch.nan, dtype=dtype)
        size, tiles = configuration.partial_floats(ctas), configuration.output_tiles(m, n)
        partials = aligned(torch.full((size + GUARD,), torch.nan))
        counters = torch.zeros(tiles + GUARD, dtype=torch.int32)
        meta = p.meta if isinstance(p, PackedSparseLinear) else torch.empty(0, dtype=torch.int16)
        scales, token_scales = p.scales, None
        if configuration.int8:
            rounded = round_activations_for_tiles(activations, activation_group, configuration.sparse)
            activations, meta = rounded.codes, metadata_for_int8(meta) if configuration.sparse else rounded.scales
            token_scales = aligned(rounded.scales)
        if configuration.factored:
            factored = factored_scales(p)
            assert factored is not None
            scales = factored
        inputs = [aligned(tensor) for tensor in (activations, p.qweight, meta, scales)]
        pointers = [*(tensor.data_ptr() for tensor in inputs), None if bias is None else bias.data_ptr()]
        pointers += [out[GUARD:].data_ptr(), partials.data_ptr(), counters.data_ptr()]
        shift = group_shift(p.group_size, k)
        arguments = Arguments(*pointers, m, n, k, whole, shift, None if token_scales is None else token_scales.data_ptr())
        library(shift if configuration.for_one_group_size else 0, activation_group is not None).launch(
            arguments, (ctypes.c_int * ctas)(*order), ctas, cluster, ctypes.c_bool(eager), ctypes.c_bool(backwards)
        )
        assert not counters.any(), "the next launch would find a used workspace"
        assert partials[0 if cluster > 1 and not configuration.paired else size :].isnan().all(), "written behind the workspace"
        assert out[:GUARD].isnan().all() and out[-GUARD:].isnan().all(), "written outside of the output"
        return out[GUARD:-GUARD].view(m, n)

    return launch


def aligned(tensor: Tensor) -> Tensor:
    """A copy at a multiple of 16 bytes, as CUDA's allocator has it."""
    room = torch.empty(tensor.numel() + 16, dtype=tensor.dtype)
    start = (-room.data_ptr() % 16) // tensor.element_size()
    return room[start : start + tensor.numel()].view(tensor.shape).copy_(tensor)


def random_packed(
    configuration: Configuration, n: int, k: int, group_size: int, seed: int
) -> tuple[PackedLinear | PackedSparseLinear, Tensor]:
    """What this kernel multiplies with, and the weight [N, K] that it stands for."""
    if configuration.sparse:
        pruned = random_sparse(n, k, group_size, seed)
        sparse = pack_sparse_marlin(with_factors(pruned, seed) if configuration.factored else pruned)
        return sparse, dequantize_sparse(sparse)
    linear = random_linear(n, k, group_size, seed)
    dense = pack_marlin(with_factors(linear, seed) if configuration.factored else linear)
    return dense, dequantize(dense)


def with_factors(linear: Linear, seed: int) -> Linear:
    """The same codes with scales that are integers times one scale for each output, the least and the greatest factor among them.
    Channel-wise ones are as they were."""
    generator = torch.Generator().manual_seed(seed)
    if linear.scales.shape[1] == 1:
        return linear
    factors = torch.randint(-15, 16, linear.scales.shape, generator=generator)
    factors[factors >= 0] += 1
    factors[0, 0], factors[-1, -1] = 16, -15
    channel = torch.randint(65, 128, (len(factors), 1), generator=generator) * 2.0**-15
    scales = (factors * channel).half()
    assert torch.equal(scales.double(), factors * channel.double()), "exact"
    return replace(linear, scales=scales)


NAMED = {c.name.removeprefix("sparse-").removeprefix("wgmma-") + ("s" if c.sparse else ""): c for c in (*DENSE_SM90, *SPARSE_SM90)}


def mistake(right: str, wrong: str) -> tuple[Callable[[str], str], list[int]]:
    """An edit of sources, and how often each had what it replaces."""
    hits: list[int] = []

    def edit(source: str) -> str:
        hits.append(source.count(right))
        return source.replace(right, wrong)

    return edit, hits
