"""Every configuration of the INT4 kernels once on every odd shape, and nothing else: what compute-sanitizer is to look at.

    python benchmarks/sanitize_marlin.py --kernels a8 --build                    # compiles, many at a time, before the tool watches
    sanitize="compute-sanitizer --report-api-errors no --error-exitcode 1 --kernel-name kernel_substring=marlin"
    $sanitize --tool memcheck python benchmarks/sanitize_marlin.py --kernels a8
    $sanitize --tool racecheck python benchmarks/sanitize_marlin.py --kernels a8 --quick --every-lane

    --kernels dense, sparse     products of 16-bit activations
              a8                products of int8 activations: every configuration that fits the GPU, those of mma.sync on Hopper too, group
                                size and kind of token scales, and of factored weights, dense and 2:4, whose CTAs on Hopper are pairs
              rounding          activations to int8: with kernel_substring=round_activations
    --quick                     fewer shapes and rows, for racecheck, which is slow
    --part 1/4                  the first of every four kernels, where one run takes too long

Products are not compared (benchmarks/check_marlin.py does that): under a sanitizer every launch takes milliseconds. But an output that is
not written, or rounding that is not torch's, ends the run with exit code 1, as an error of the tool does. Tensors are allocated one by one,
so that one number too many is found.

Errors of the interface are not reported because cuda-bindings asks the driver for functions that it may not have. Racecheck follows
barriers, and does not see that lanes which have synchronized may let one of them arrive for all: with --every-lane each of them does
(csrc/pipeline_sm90.cuh), and all else stays as it is; such kernels are others, and --build takes the flag too.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from marlinctl.kernels import jit
from marlinctl.kernels.activations import round_activations_for_tiles
from marlinctl.kernels.configurations import GROUP_SIZES, LARGEST_CLUSTER, SHARINGS, Configuration, Grid, group_shift
from marlinctl.kernels.dispatch import FACTORED, KINDS, SPARSE_FACTORED, configurations
from marlinctl.kernels.factored import factored_scales
from marlinctl.kernels.functions import architecture_of
from marlinctl.kernels.int8_metadata import metadata_for_int8
from marlinctl.kernels.launch import launch, load, load_unpack, multiply, unpack, unpack_defines
from marlinctl.kernels.rounding import defines as rounding_defines
from marlinctl.kernels.rounding import round_on_gpu
from marlinctl.pack.types import PackedLinear, PackedSparseLinear, padded
from marlinctl.quantize.scheme import ACTIVATION_GROUP

DEVICE = torch.device("cuda", 0)
KERNELS = (*KINDS, "a8", "rounding")
DTYPES = (torch.float16, torch.bfloat16)
SHAPES = [(64, 48), (80, 64), (192, 64), (576, 576), (896, 896), (192, 160), (576, 18432)]  # N, K
QUICK_SHAPES = [(80, 64), (192, 160), (896, 896)]
TOKENS, QUICK_TOKENS = (1, 7, 17, 65, 129, 1000), (7, 65)
# Of int8 activations, by group size: a stage or less, and more than all stages of any configuration, so that each is filled again.
A8_SHAPES = {32: [(80, 96), (448, 1440)], 64: [(192, 192), (576, 1728)], 128: [(80, 256), (448, 1664)], -1: [(64, 72), (192, 1608)]}
A8_TOKENS, QUICK_A8_TOKENS = (1, 65, 300), (65,)
ROUNDED_K = (8, 96, 200, 4096, 16392, 32768)  # less than a piece of 16 codes, an odd end, and every number of pieces of a thread
ROUNDED_TOKENS = (1, 7, 65)
GROUPS = (None, ACTIVATION_GROUP)  # of activations that share a scale
PAIRS = torch.tensor([first + 4 * second for second in range(4) for first in range(second)], dtype=torch.int16)


@dataclass(frozen=True, slots=True)
class Case:
    """A kernel, and the linears and numbers of tokens that it multiplies."""

    configuration: Configuration
    dtype: torch.dtype
    shapes: tuple[tuple[int, int, int], ...]  # N, K, group size
    tokens: tuple[int, ...]
    token_groups: bool = False  # of int8 activations: a scale for each 128 of K

    @property
    def sources(self) -> set[tuple[str, tuple[str, ...]]]:
        """Source and defines, as jit.cubin takes them."""
        shifts = {group_shift(k if size == -1 else size, k) for _, k, size in self.shapes}
        c = self.configuration
        return {(f"{c.kernel}.cu", c.defines(self.dtype, shift, self.token_groups)) for shift in shifts}


@dataclass(frozen=True, slots=True)
class Rounding:
    """One kernel that rounds activations."""

    dtype: torch.dtype
    k: int
    group: int | None
    sparse: bool = False  # for 2:4 weights, which have none of groups

    @property
    def sources(self) -> set[tuple[str, tuple[str, ...]]]:
        return {("round_activations.cu", rounding_defines(self.dtype, self.k, self.group, self.sparse))}


def cases(kernels: str, architecture: str, *, quick: bool) -> list[Case]:
    """Of one of KERNELS but rounding. Of int8 activations group sizes take dtypes in turns, which differ in the output alone: each
    configuration and kind of token scales meets both."""
    if kernels == "a8":
        turns = list(itertools.product(enumerate(A8_SHAPES.items()), (False, True)))
        return [
            Case(
                configuration,
                DTYPES[(place + groups) % 2],
                tuple((n, k, size) for n, k in (shapes[1:] if quick else shapes)),
                QUICK_A8_TOKENS if quick else A8_TOKENS,
                groups,
            )
            for configuration in (*configurations(FACTORED), *configurations(SPARSE_FACTORED))
            if configuration.fits(architecture)
            for (place, (size, shapes)), groups in turns
            if not (configuration.factored and groups)
        ]
    shapes = tuple((n, k, group_size_of(k)) for n, k in (QUICK_SHAPES if quick else SHAPES))
    fitting = [c for c in configurations(kernels) if c.fits(architecture)]
    return [Case(c, dtype, shapes, QUICK_TOKENS if quick else TOKENS) for dtype, c in itertools.product(DTYPES, fitting)]


def roundings(*, quick: bool) -> list[Rounding]:
    kinds = itertools.product(DTYPES, ROUNDED_K[::2] if quick else ROUNDED_K, (*((group, False) for group in GROUPS), (None, True)))
    return [Rounding(dtype, k, group, sparse) for dtype, k, (group, sparse) in kinds]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", choices=KERNELS, action="append", help="repeatable (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and rows: racecheck is slow")
    parser.add_argument("--part", type=part, default=(1, 1), metavar="I/N", help="every Nth kernel, from the Ith on")
    parser.add_argument("--build", action="store_true", help="compile, launch nothing")
    parser.add_argument("--cache", type=Path, default=None, help="folder of compiled kernels (default: the user's)")
    parser.add_argument("--only", action="append", metavar="NAME", help="a configuration; repeatable")
    parser.add_argument("--every-lane", action="store_true", help="kernels in which every lane arrives at a barrier for itself")
    chosen = parser.parse_args()
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # torch asks before its first allocation
    if chosen.cache is not None:
        os.environ["MARLINCTL_CACHE"] = str(chosen.cache.absolute())
    if chosen.every_lane:
        defines = Configuration.defines
        Configuration.defines = lambda *given: (*defines(*given), "EVERY_LANE_ARRIVES=1")  # type: ignore[method-assign]
    architecture = architecture_of(DEVICE)
    (first, step), named = chosen.part, set(chosen.only or ())
    done = wrong = 0
    for kernels in dict.fromkeys(chosen.kernels or KERNELS):
        todo: Sequence[Case | Rounding]
        todo = roundings(quick=chosen.quick) if kernels == "rounding" else cases(kernels, architecture, quick=chosen.quick)
        todo = [one for one in todo if not named or (isinstance(one, Case) and one.configuration.name in named)][first - 1 :: step]
        build(todo, architecture)
        launches = 0
        for one in todo if not chosen.build else ():
            found = list(launched(one) if isinstance(one, Case) else rounded(one))
            launches, wrong = launches + len(found), wrong + sum(not right for right in found)
        if kernels in KINDS and not chosen.build:
            unpack_all(kernels, quick=chosen.quick)
        print(f"{kernels}: {len(todo)} kernels, {launches} launches, {wrong} wrong so far", flush=True)
        done += len(todo)
    if not done:
        parser.error("nothing to launch: no configuration of this name fits this GPU")
    return 1 if wrong else 0


def part(text: str) -> tuple[int, int]:
    first, _, step = text.partition("/")
    if not (first.isdecimal() and step.isdecimal() and 1 <= int(first) <= int(step)):
        raise argparse.ArgumentTypeError("must be I/N, such as 2/4")
    return int(first), int(step)


def build(todo: Sequence[Case | Rounding], architecture: str) -> None:
    """Into the cache, as many at a time as there are processors."""
    sources = set().union(*(one.sources for one in todo))
    products = [one for one in todo if isinstance(one, Case) and not one.configuration.int8]
    sources |= {("unpack.cu", unpack_defines(one.configuration.sparse, one.dtype)) for one in products}
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for _ in pool.map(lambda one: jit.cubin(one[0], one[1], architecture, jit.default_folder()), sorted(sources)):
            pass


def launched(case: Case) -> Iterator[bool]:
    """Of each launch, whether all of the output was written."""
    dtype, configuration = case.dtype, case.configuration
    for n, k, size in case.shapes:
        p = packed("sparse" if configuration.sparse else "dense", n, k, size)
        scales = factored_scales(p) if configuration.factored else p.scales
        assert scales is not None
        metadata = (metadata_for_int8(p.meta),) if configuration.int8 and isinstance(p, PackedSparseLinear) else ()
        shift = group_shift(p.group_size, k)
        kernel = load(configuration, dtype, DEVICE, jit.default_folder(), shift, case.token_groups)
        for m in case.tokens:
            x, bias = torch.randn(m, k).to(DEVICE, dtype), torch.randn(n).to(DEVICE, dtype)
            group = ACTIVATION_GROUP if case.token_groups else None
            codes = round_activations_for_tiles(x, group, configuration.sparse) if configuration.int8 else None
            for grid in grids(configuration, m, n, k, kernel.grid(m, n, k, kernel.resident)):
                out = torch.full((m, n), torch.nan, dtype=dtype, device=DEVICE)
                if codes is None:
                    launch(kernel, x, p, bias, out, grid)
                else:
                    multiply(kernel, codes.codes, (p.qweight, *metadata, codes.scales), scales, bias, out, shift, grid)
                torch.cuda.synchronize()
                yield not bool(out.isnan().any())


def rounded(one: Rounding) -> Iterator[bool]:
    """Of each launch, whether codes and scales are torch's."""
    for m in ROUNDED_TOKENS:
        x = torch.randn(m, one.k).to(DEVICE, one.dtype)
        found, expected = round_on_gpu(x, one.group, sparse=one.sparse), round_activations_for_tiles(x, one.group, one.sparse)
        yield torch.equal(found.codes, expected.codes) and torch.equal(found.scales, expected.scales)


def unpack_all(kind: str, *, quick: bool) -> None:
    for dtype, (n, k) in itertools.product(DTYPES, QUICK_SHAPES if quick else SHAPES):
        p = packed(kind, n, k, group_size_of(k))
        weights = (p.qweight, p.meta) if isinstance(p, PackedSparseLinear) else (p.qweight,)
        function = load_unpack(len(weights) == 2, dtype, DEVICE, jit.default_folder())
        unpack(function, weights, p.scales, dtype, n, k, group_shift(p.group_size, k))
    torch.cuda.synchronize()


def grids(configuration: Configuration, m: int, n: int, k: int, full: Grid) -> list[Grid]:
    """All of the GPU, seven CTAs in every way of sharing, so that stripes end inside of tiles, and the largest cluster. full: the first."""
    few = (configuration.grid(m, n, k, 7, sharing) for sharing in SHARINGS)
    return list(dict.fromkeys([full, *few, *largest_cluster(configuration, m, n, k)]))


def largest_cluster(configuration: Configuration, m: int, n: int, k: int) -> list[Grid]:
    """The most CTAs of a cluster that share the tiles evenly, however many CTAs that makes; none where nothing divides them."""
    tiles = configuration.output_tiles(m, n)
    steps = configuration.units(m, n, k) // tiles
    sizes = [size for size in range(2, LARGEST_CLUSTER + 1) if steps % size == 0] if "cluster" in configuration.sharings else []
    return [Grid(tiles * size, cluster=size) for size in sizes[-1:]]


def group_size_of(k: int) -> int:
    """The smallest that there is for this K; all of K where none divides it."""
    return next((size for size in GROUP_SIZES if k % size == 0), k)


def packed(kind: str, n: int, k: int, group_size: int) -> PackedLinear | PackedSparseLinear:
    """Random tiles. group_size: -1 is all of K."""
    size = k if group_size == -1 else group_size
    rows, columns = padded(k), 2 * padded(n)
    groups = 1 if size == k else -(-rows // size)
    # Integers times one number for each output, as factored weights have them.
    scales = (torch.randint(1, 17, (groups, padded(n))) * torch.randint(64, 128, (padded(n),)) * 2.0**-15).to(DEVICE, torch.float16)
    if kind == "dense":
        return PackedLinear(torch.randint(-(2**31), 2**31, (rows // 16, columns), dtype=torch.int32).to(DEVICE), scales, n, k, size)
    words = torch.randint(-(2**31), 2**31, (rows // 32, columns), dtype=torch.int32).to(DEVICE)
    meta = torch.zeros(rows // 32, columns, dtype=torch.int16)
    for shift in (0, 4, 8, 12):
        meta |= PAIRS[torch.randint(len(PAIRS), meta.shape)] << shift
    return PackedSparseLinear(words, meta.to(DEVICE), scales, n, k, size)


if __name__ == "__main__":
    sys.exit(main())
