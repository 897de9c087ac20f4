"""How many weights per second the packers move, on one core or on a GPU.

    python benchmarks/pack_speed.py
    python benchmarks/pack_speed.py --shape 14336x4096 --group-size -1
    python benchmarks/pack_speed.py --device cuda

Prints a Markdown table. Each figure is the fastest of the repeats of one call on a whole linear, checks included: no step
depends on the data, so whatever is slower was disturbed by something else on the machine.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from marlinctl.pack.interchange import pack_ct, pack_gptq, unpack_ct, unpack_gptq
from marlinctl.pack.marlin import pack_marlin, unpack_marlin
from marlinctl.pack.sparse_marlin import pack_sparse_marlin, unpack_sparse_marlin
from marlinctl.quantize.types import QuantizedLinear
from marlinctl.sparsify.types import QUAD, SparseQuantizedLinear


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", metavar="NxK", help="out_features x in_features, repeatable")
    parser.add_argument("--group-size", type=int, default=128, help="-1 is a whole row (default: 128)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    device = torch.device(arguments.device)
    today = datetime.datetime.now(datetime.UTC).date()
    print(f"{device_name(device)}, torch {torch.__version__}, {today}, group size {arguments.group_size}\n")
    print("| N x K | step | ms | million weights/s |")
    print("|---|---|---:|---:|")
    for shape in arguments.shape or ["576x1536", "4096x4096", "14336x4096"]:
        n, k = (int(size) for size in shape.lower().split("x"))
        for step, call in steps(n, k, arguments.group_size, device):
            seconds = measure(call, arguments.repeats, device)
            print(f"| {n} x {k} | {step} | {seconds * 1e3:.2f} | {n * k / seconds / 1e6:,.0f} |", flush=True)


def steps(n: int, k: int, group_size: int, device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every packer and its inverse on one random linear."""
    group_size = k if group_size == -1 else group_size
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (n, k), dtype=torch.int8, generator=generator).to(device)
    scales = torch.rand(n, k // group_size, generator=generator).to(device, torch.float16)
    q = QuantizedLinear(codes, scales, group_size)
    yield "pack_marlin", lambda: pack_marlin(q)
    packed = pack_marlin(q)
    yield "unpack_marlin", lambda: unpack_marlin(packed)
    order = torch.rand(n, k // QUAD, QUAD, generator=generator).argsort(-1).to(device)
    keep = (order < 2).reshape(n, k)
    sparse = SparseQuantizedLinear(codes * keep, scales, group_size, keep)
    yield "pack_sparse_marlin", lambda: pack_sparse_marlin(sparse)
    tiles = pack_sparse_marlin(sparse)
    yield "unpack_sparse_marlin", lambda: unpack_sparse_marlin(tiles)
    yield "pack_ct", lambda: pack_ct(codes)
    words = pack_ct(codes)
    yield "unpack_ct", lambda: unpack_ct(words, n, k)
    yield "pack_gptq", lambda: pack_gptq(q)
    gptq = pack_gptq(q)
    yield "unpack_gptq", lambda: unpack_gptq(gptq["qweight"], gptq["qzeros"], gptq["scales"], gptq["g_idx"], v2=False)


def measure(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Seconds of the fastest call."""
    seconds = []
    for _ in range(repeats):
        wait(device)
        start = time.perf_counter()
        call()
        wait(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu_info = Path("/proc/cpuinfo")  # only Linux has it
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, one core"


if __name__ == "__main__":
    main()
