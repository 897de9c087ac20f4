"""What a launch must do beyond a right product, for every configuration on a GPU: `marlinctl bench --check --configurations` does the rest.

    python benchmarks/check_marlin.py
    python benchmarks/check_marlin.py --kernel sparse --only sparse-m8n128k256x5

    workspace   partial sums are poisoned before the launch and counters are back at zero after it, with grids that divide nothing evenly
    clusters    with as many CTAs as divide the steps of a tile, what they add up through distributed shared memory has the bits of what
                comes through L2
    streams     two at once give what one after the other gives
    graph       replayed with other inputs, it gives what a launch gives
    overlap     a chain in which each call reads what the one before it wrote gives the same bits overlapped and not

Odd shapes, identity, columns at the end of large weights and every time are bench's. Any failure is listed, and the exit code is 1. It
needs a CUDA build of torch (which brings cuda-bindings and NVRTC) and nothing else of marlinctl's dependencies.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from marlinctl.benchmarking.accuracy import GATES, between_nans, decoded, guarded, through_the_packer
from marlinctl.benchmarking.building import offered
from marlinctl.benchmarking.cases import Kind, Shape
from marlinctl.benchmarking.weights import Packed, random_packed
from marlinctl.kernels import jit
from marlinctl.kernels.configurations import LARGEST_CLUSTER, SHARINGS, Grid
from marlinctl.kernels.functions import architecture_of
from marlinctl.kernels.launch import LoadedKernel, launch, load

DEVICE = torch.device("cuda", 0)
DTYPES = (torch.float16, torch.bfloat16)
SHAPES = ((80, 64, -1), (192, 160, 32), (576, 576, 64), (896, 18432, 128))  # N, K, group size
TOKENS = (1, 17, 129)
GRID = 7  # CTAs: whatever the shape, stripes end inside of tiles


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", choices=["dense", "sparse"], default="both", help="which of the two (default: both)")
    parser.add_argument("--only", metavar="NAME", action="append", help="a configuration; repeatable")
    arguments = parser.parse_args()
    fitting = offered(architecture_of(DEVICE), arguments.kernel)
    configurations = [c for c in fitting if not arguments.only or c.name in arguments.only]
    if not configurations:
        parser.error(f"--only: the configurations for this GPU are {', '.join(c.name for c in fitting)}")
    print(f"{torch.cuda.get_device_name(DEVICE)}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    wrong: list[str] = []
    for configuration, dtype in itertools.product(configurations, DTYPES):
        kernel = load(configuration, dtype, DEVICE, jit.default_folder())
        found = [*check_workspace(kernel), *check_streams_and_graph(kernel), *check_overlap(kernel)]
        if configuration.wgmma:
            found += check_clusters(kernel)
        print(f"{kernel.name:32} {'ok' if not found else f'{len(found)} wrong'}", flush=True)
        wrong += found
    print("\n".join(wrong[:40]) if wrong else "all checks passed")
    return 1 if wrong else 0


def check_workspace(kernel: LoadedKernel) -> Iterator[str]:
    """With a workspace of ours: what a CTA reads before another wrote it, and counters that are left, show."""
    for (n, k, group_size), m in itertools.product(SHAPES, TOKENS):
        p = packed(kind_of(kernel), n, k, group_size)
        activations = between_nans(torch.randn(m, k, device=DEVICE).to(kernel.dtype))
        exact = activations.double() @ weight_of(kind_of(kernel), n, k, group_size).T
        for grid in dict.fromkeys(kernel.configuration.grid(m, n, k, GRID, sharing) for sharing in SHARINGS):
            partials = torch.full((kernel.configuration.partial_floats(grid.ctas),), torch.nan, device=DEVICE)
            counters = torch.zeros(kernel.configuration.output_tiles(m, n), dtype=torch.int32, device=DEVICE)
            out = empty(m, n, kernel)
            launch(kernel, activations, p, None, out, grid, (partials, counters))
            relative = float((out.double() - exact).norm() / exact.norm())
            where = f"{kernel.name}: M={m} N={n} K={k} group_size={group_size} {grid}"
            if not relative <= GATES[kernel.dtype]:  # NaN fails too
                yield f"{where}: relative error {relative:.2e}"
            if bool(counters.any()):
                yield f"{where}: counters are not back at 0"


def check_clusters(kernel: LoadedKernel) -> Iterator[str]:
    """Clusters of every size, three times each: a CTA that reads a part too early, or leaves too early, shows as other bits."""
    configuration = kernel.configuration
    for (n, k, group_size), m in itertools.product(SHAPES, TOKENS):
        p = packed(kind_of(kernel), n, k, group_size)
        activations = between_nans(torch.randn(m, k, device=DEVICE).to(kernel.dtype))
        tiles, units = configuration.output_tiles(m, n), configuration.units(m, n, k)
        for cluster in range(2, LARGEST_CLUSTER + 1):
            if units // tiles % cluster:
                continue
            through_l2 = empty(m, n, kernel)
            launch(kernel, activations, p, None, through_l2, Grid(tiles * cluster))
            for _ in range(3):
                out = empty(m, n, kernel)
                launch(kernel, activations, p, None, out, Grid(tiles * cluster, cluster=cluster))
                if not torch.equal(out.view(torch.int16), through_l2.view(torch.int16)):
                    where = f"{kernel.name}: M={m} N={n} K={k} group_size={group_size}"
                    yield f"{where}: other bits in clusters of {cluster} CTAs than through L2"
                    break


def check_streams_and_graph(kernel: LoadedKernel) -> Iterator[str]:
    """Two streams, and a graph that is replayed with other inputs, give what one launch gives; with the workspaces of the launcher."""
    m, n, k = 33, 576, 4096
    p = packed(kind_of(kernel), n, k, 128)
    grid = kernel.grid(m, n, k, 1)
    activations = [torch.randn(m, k, device="cuda").to(kernel.dtype) for _ in range(2)]
    alone, together = ([empty(m, n, kernel) for _ in range(2)] for _ in range(2))
    for x, out in zip(activations, alone, strict=True):
        launch(kernel, x, p, None, out, grid)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    for _ in range(20):
        for x, out, stream in zip(activations, together, streams, strict=True):
            with torch.cuda.stream(stream):
                launch(kernel, x, p, None, out, grid)
    torch.cuda.synchronize()
    if not all(torch.equal(a, b) for a, b in zip(alone, together, strict=True)):
        yield f"{kernel.name}: two streams at once differ from one after the other"
    x, out = activations[0].clone(), empty(m, n, kernel)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(kernel, x, p, None, out, grid)
    for inputs, expected in zip(activations, alone, strict=True):
        x.copy_(inputs)
        graph.replay()
        torch.cuda.synchronize()
        if not torch.equal(out, expected):
            yield f"{kernel.name}: a graph gives something else than a launch"


def check_overlap(kernel: LoadedKernel) -> Iterator[str]:
    """A chain in which each call reads what the one before it wrote, overlapped and not: the same bits."""
    m, size = kernel.configuration.tokens, 4096
    p = random_packed(kind_of(kernel), Shape(size, size, 128), torch.Generator(DEVICE).manual_seed(0))
    p.scales.mul_(0.1)
    wanted = itertools.product(range(1, kernel.resident + 1), SHARINGS)
    for grid in dict.fromkeys(kernel.grid(m, size, size, residents, sharing) for residents, sharing in wanted):
        first = torch.randn(m, size, device="cuda").to(kernel.dtype)
        chains = {overlap: [first, *(torch.empty_like(first) for _ in range(30))] for overlap in (False, True)}
        for overlap, chain in chains.items():
            for before, after in itertools.pairwise(chain):
                launch(kernel, before, p, None, after, grid, overlap=overlap)
            torch.cuda.synchronize()
        for i, (apart, together) in enumerate(zip(chains[False], chains[True], strict=True)):
            if not torch.equal(apart.view(torch.int16), together.view(torch.int16)):
                yield f"{kernel.name}: call {i} of a chain gives something else when it overlaps with the one before, {grid}"
                break


def kind_of(kernel: LoadedKernel) -> Kind:
    return "sparse" if kernel.configuration.sparse else "dense"


@lru_cache
def packed(kind: Kind, n: int, k: int, group_size: int) -> Packed:
    return through_the_packer(kind, n, k, group_size, seed=n + k, device=DEVICE)


@lru_cache
def weight_of(kind: Kind, n: int, k: int, group_size: int) -> Tensor:
    """In float64."""
    return decoded(packed(kind, n, k, group_size)).double()


def empty(m: int, n: int, kernel: LoadedKernel) -> Tensor:
    """An output full of NaN."""
    return guarded(m, n, torch.empty(0, dtype=kernel.dtype, device=DEVICE))[0]


if __name__ == "__main__":
    sys.exit(main())
