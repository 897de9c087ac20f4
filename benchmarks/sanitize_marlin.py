"""Every configuration of the INT4 kernels once on every odd shape, and nothing else: what compute-sanitizer is to look at.

    sanitize="compute-sanitizer --report-api-errors no --kernel-name kernel_substring=marlin --error-exitcode 1"
    $sanitize --tool memcheck python benchmarks/sanitize_marlin.py
    $sanitize --tool racecheck python benchmarks/sanitize_marlin.py --quick --every-lane

Results are not compared (benchmarks/check_marlin.py does that): under a sanitizer every launch takes milliseconds. Inputs and outputs end
where their allocation ends, so that one number too many is found. --quick leaves out most of the shapes and rows.

Errors of the interface are not reported because cuda-bindings asks the driver for functions that it may not have. Racecheck follows
barriers, and does not see that lanes which have synchronized may let one of them arrive for all: with --every-lane each of them does
(csrc/pipeline_sm90.cuh), and all else stays as it is.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import torch

from marlinctl.kernels import jit
from marlinctl.kernels.configurations import GROUP_SIZES, LARGEST_CLUSTER, SHARINGS, Configuration, Grid, group_shift
from marlinctl.kernels.dispatch import KINDS, configurations
from marlinctl.kernels.functions import architecture_of
from marlinctl.kernels.launch import launch, load, load_unpack, unpack
from marlinctl.pack.types import PackedLinear, PackedSparseLinear, padded

SHAPES = [(64, 48), (80, 64), (192, 64), (576, 576), (896, 896), (192, 160), (576, 18432)]  # N, K
QUICK_SHAPES = [(80, 64), (192, 160), (896, 896)]
TOKENS = (1, 7, 17, 65, 129, 1000)
PAIRS = torch.tensor([first + 4 * second for second in range(4) for first in range(second)], dtype=torch.int16)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer shapes and rows: racecheck is slow")
    parser.add_argument("--cache", type=Path, default=None, help="folder of compiled kernels (default: the user's)")
    parser.add_argument("--only", action="append", metavar="NAME", help="a configuration; repeatable")
    parser.add_argument("--every-lane", action="store_true", help="kernels in which every lane arrives at a barrier for itself")
    chosen = parser.parse_args()
    if chosen.every_lane:
        defines = Configuration.defines
        Configuration.defines = lambda *given: (*defines(*given), "EVERY_LANE_ARRIVES=1")  # type: ignore[method-assign]
    device = torch.device("cuda", 0)
    folder = chosen.cache or jit.default_folder()
    shapes = QUICK_SHAPES if chosen.quick else SHAPES
    tokens = (7, 65) if chosen.quick else TOKENS
    launches = 0
    for kind, dtype in itertools.product(KINDS, (torch.float16, torch.bfloat16)):
        fitting = [c for c in configurations(kind) if c.fits(architecture_of(device)) and (not chosen.only or c.name in chosen.only)]
        kernels = [load(c, dtype, device, folder) for c in fitting]
        for (n, k), m in itertools.product(shapes, tokens):
            p = packed(kind, n, k, group_size_of(k))
            activations, bias = torch.randn(m, k).to(dtype).cuda(), torch.randn(n).to(dtype).cuda()
            for kernel in kernels:
                for grid in {
                    kernel.grid(m, n, k, kernel.resident),
                    *(kernel.configuration.grid(m, n, k, 7, sharing) for sharing in SHARINGS),
                    *largest_cluster(kernel.configuration, m, n, k),
                }:
                    launch(kernel, activations, p, bias, torch.empty(m, n, dtype=dtype, device=device), grid)
                    launches += 1
            weights = (p.qweight, p.meta) if isinstance(p, PackedSparseLinear) else (p.qweight,)
            function = load_unpack(len(weights) == 2, dtype, device, folder)
            unpack(function, weights, p.scales, dtype, n, k, group_shift(p.group_size, k))
            torch.cuda.synchronize()
        print(f"{kind}, {str(dtype)[6:]}: {len(kernels)} configurations, {launches} launches so far", flush=True)
    return 0


def largest_cluster(configuration: Configuration, m: int, n: int, k: int) -> list[Grid]:
    """The most CTAs of a cluster that share the tiles evenly, however many CTAs that makes; none where nothing divides them."""
    tiles = configuration.output_tiles(m, n)
    steps = configuration.units(m, n, k) // tiles
    sizes = [size for size in range(2, LARGEST_CLUSTER + 1) if steps % size == 0] if configuration.wgmma else []
    return [Grid(tiles * size, cluster=size) for size in sizes[-1:]]


def group_size_of(k: int) -> int:
    """The smallest that there is for this K; all of K where none divides it."""
    return next((size for size in GROUP_SIZES if k % size == 0), k)


def packed(kind: str, n: int, k: int, group_size: int) -> PackedLinear | PackedSparseLinear:
    """Random tiles."""
    rows, columns = padded(k), 2 * padded(n)
    groups = 1 if group_size == k else -(-rows // group_size)
    scales = torch.randn(groups, padded(n)).half().cuda()
    if kind == "dense":
        return PackedLinear(torch.randint(-(2**31), 2**31, (rows // 16, columns), dtype=torch.int32).cuda(), scales, n, k, group_size)
    words = torch.randint(-(2**31), 2**31, (rows // 32, columns), dtype=torch.int32).cuda()
    meta = torch.zeros(rows // 32, columns, dtype=torch.int16)
    for shift in (0, 4, 8, 12):
        meta |= PAIRS[torch.randint(len(PAIRS), meta.shape)] << shift
    return PackedSparseLinear(words, meta.cuda(), scales, n, k, group_size)


if __name__ == "__main__":
    sys.exit(main())
