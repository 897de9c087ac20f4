"""What it costs to choose the survivors of one 2:4 linear anew while a model runs (marlinctl.pack.sparse_marlin.remask).

    python benchmarks/remask.py
    python benchmarks/remask.py --device cuda --shape 14336x4096

Prints a Markdown table of median times for one call on a whole linear, with and without an importance for each input. On a GPU the
replay of a CUDA graph that holds the call is timed as well: the call is some eighty small kernels, and a graph launches them at once.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import time
from collections.abc import Callable, Iterator

import torch

from benchmarks.pack_speed import device_name, wait
from marlinctl.pack.sparse_marlin import pack_sparse_marlin, remask
from marlinctl.pack.types import PackedSparseLinear
from marlinctl.quantize.types import QuantizedLinear
from marlinctl.sparsify.types import QUAD, SURVIVORS, SparseQuantizedLinear


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", metavar="NxK", help="out_features x in_features, repeatable")
    parser.add_argument("--group-size", type=int, default=128, help="it does not change the cost (default: 128)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    device = torch.device(arguments.device)
    print(
        f"{device_name(device)}, torch {torch.__version__}, {datetime.datetime.now(datetime.UTC).date()}, median of {arguments.repeats}\n"
    )
    print("| N x K | step | ms | million weights/s |")
    print("|---|---|---:|---:|")
    for shape in arguments.shape or ["4096x4096", "14336x4096"]:
        n, k = (int(size) for size in shape.lower().split("x"))
        for step, call in steps(n, k, arguments.group_size, device):
            seconds = measure(call, arguments.repeats, device)
            print(f"| {n} x {k} | {step} | {seconds * 1e3:.2f} | {n * k / seconds / 1e6:,.0f} |", flush=True)


def steps(n: int, k: int, group_size: int, device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (n, k), dtype=torch.int8, generator=generator).to(device)
    scales = torch.rand(n, k // group_size, generator=generator).to(device, torch.float16)
    importance = torch.rand(k, generator=generator).to(device)
    q, packed = QuantizedLinear(codes, scales, group_size), some_tiles(codes, scales, group_size)
    for name, weights in (("codes alone", None), ("with importance", importance)):
        yield name, lambda weights=weights: remask(packed, q, weights)  # type: ignore[misc]
        if device.type == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                remask(packed, q, weights)
            yield f"{name}, CUDA graph", graph.replay


def some_tiles(codes: torch.Tensor, scales: torch.Tensor, group_size: int) -> PackedSparseLinear:
    """Tiles to write into: the linear with the first two of each quad."""
    keep = (torch.arange(codes.shape[1], device=codes.device) % QUAD < SURVIVORS).repeat(len(codes), 1)
    return pack_sparse_marlin(SparseQuantizedLinear(codes * keep, scales, group_size, keep))


def measure(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Seconds of the median call; the first two, which fill caches, do not count."""
    seconds = []
    for _ in range(repeats + 2):
        wait(device)
        start = time.perf_counter()
        call()
        wait(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


if __name__ == "__main__":
    main()
