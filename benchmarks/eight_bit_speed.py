"""8-bit activations: every configuration of the kernel for int8, checked and timed, beside 16-bit products and torch's fp8.

    PYTHONPATH=. python benchmarks/eight_bit_speed.py --shapes 73728x18432 --tokens 64,128,256 [--json FILE] [--all]

On Hopper. Each product is checked against float64 of the same 8-bit activations and 4-bit weights, and then timed
as `marlinctl bench` does: CUDA graphs, cold weights, candidates in turns, medians (marlinctl/benchmarking/timing.py). Times of `a8` are of the
product alone, with it of rounding and product where "rounded" is behind the name. --all also times configurations that no table uses.
--table prints the rows of kernels/dispatch.json: of each shape and M the fastest with rounding, or 16-bit activations where they are
faster, by one scale a token.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from marlinctl.benchmarking.cases import Shape
from marlinctl.benchmarking.gpu import Gpu
from marlinctl.benchmarking.timing import Candidate, Sample, copies_for, take_turns
from marlinctl.benchmarking.weights import packed_bytes, random_packed
from marlinctl.kernels import jit
from marlinctl.kernels.activations import RoundedActivations, in_column_order, round_activations_for_tiles
from marlinctl.kernels.configurations import A8_SM90, ACTIVATION_GROUP, Configuration, group_shift
from marlinctl.kernels.dispatch import SIXTEEN_BIT, Choice
from marlinctl.kernels.launch import LoadedKernel, load, multiply
from marlinctl.kernels.ops import marlin_gemm
from marlinctl.kernels.reference import dequantize
from marlinctl.kernels.rounding import round_on_gpu
from marlinctl.pack.types import PackedLinear

GROUP_SIZE = 128
CHECKED = 256  # outputs
MOST_ERROR = 5e-3


def experiments() -> tuple[Configuration, ...]:
    """The table's, and what they are compared with."""
    found = dict.fromkeys(A8_SM90)
    for c in A8_SM90:
        found[replace(c, ordered=0)] = None
        found[replace(c, batch=3 - c.batch)] = None
        if c.tokens <= 128:
            found[replace(c, k_step=256, stages=max(2, c.stages // 2))] = None
    return tuple(found)


def name_of(c: Configuration) -> str:
    return f"{c.name}b{c.batch}s{c.split}"


@dataclass(frozen=True)
class Wanted:
    configuration: Configuration
    token_groups: bool


def loaded(wanted: list[Wanted], device: torch.device, folder: Path, shift: int) -> dict[Wanted, LoadedKernel]:
    started = time.perf_counter()

    def one(w: Wanted) -> LoadedKernel | Exception:
        try:
            jit.cubin(
                f"{w.configuration.kernel}.cu", w.configuration.defines(torch.float16, shift, w.token_groups), "sm_90a", folder, jit.SOURCES
            )
        except jit.CompilationFailed as error:  # of one experiment
            return error
        return load(w.configuration, torch.float16, device, folder, shift, w.token_groups)

    with ThreadPoolExecutor(12) as pool:
        kernels = dict(zip(wanted, pool.map(one, wanted), strict=True))
    for w, kernel in kernels.items():
        if isinstance(kernel, Exception):
            print(f"- {name_of(w.configuration)}: {str(kernel)[:300]}")
    good = {w: kernel for w, kernel in kernels.items() if not isinstance(kernel, Exception)}
    print(f"{len(good)} kernels in {time.perf_counter() - started:.1f} s", flush=True)
    for w, kernel in good.items():
        if kernel.local_bytes:
            print(f"- {name_of(w.configuration)} groups {w.token_groups}: {kernel.local_bytes} bytes spilled")
    return good


def plain(p: PackedLinear, rounded: RoundedActivations) -> Tensor:
    """[M, N] float64, of the 8-bit activations and the 4-bit weights."""
    codes = in_column_order(rounded.codes, p.in_features).double()
    scales = rounded.scales.T[: len(codes)].double()
    if scales.shape[1] > 1:
        scales = scales.repeat_interleave(ACTIVATION_GROUP, 1)[:, : codes.shape[1]]
    return (codes * scales) @ dequantize(p).double().T


def product(kernel: LoadedKernel, p: PackedLinear, rounded: RoundedActivations, out: Tensor, sharing: str, overlap: bool = False) -> Tensor:
    grid = kernel.grid(out.shape[0], p.out_features, p.in_features, 1, sharing)  # type: ignore[arg-type]
    shift = group_shift(p.group_size, p.in_features)
    multiply(kernel, rounded.codes, (p.qweight, rounded.scales), p.scales, None, out, shift, grid, None, overlap)
    return out


def check(kernels: dict[Wanted, LoadedKernel], gpu: Gpu, shape: tuple[int, int]) -> set[Wanted]:
    """Those that are right for odd numbers of tokens, in every way of sharing."""
    n, k = shape
    p = random_packed("dense", Shape(n, k, GROUP_SIZE), gpu.generator(1))
    good: set[Wanted] = set(kernels)
    for m in (1, 37, 131, 300):
        x = torch.randn(m, k, device=gpu.device, dtype=torch.float16, generator=gpu.generator(m)) + 0.1
        for group in (None, ACTIVATION_GROUP):
            rounded = round_activations_for_tiles(x, group)
            expected = plain(p, rounded)
            for w, kernel in kernels.items():
                if w.token_groups != (group is not None) or w not in good:
                    continue
                for sharing in kernel.configuration.sharings:
                    out = torch.full((m, n), torch.nan, dtype=torch.float16, device=gpu.device)
                    product(kernel, p, rounded, out, sharing)
                    error = float((out.double() - expected).norm() / expected.norm())
                    if not error <= MOST_ERROR:
                        print(f"- WRONG {name_of(w.configuration)} groups {w.token_groups} {sharing} M={m}: {error:.2e}", flush=True)
                        good.discard(w)
                        break
    print(f"{len(good)} of {len(kernels)} kernels are right", flush=True)
    return good


def times(gpu: Gpu, kernels: dict[Wanted, LoadedKernel], shape: tuple[int, int], m: int, replays: int) -> dict[str, Sample]:
    n, k = shape
    generator = gpu.generator(0)
    copies = copies_for(packed_bytes("dense", Shape(n, k, GROUP_SIZE)), gpu.l2_bytes)
    weights = [random_packed("dense", Shape(n, k, GROUP_SIZE), generator) for _ in range(copies)]
    x = torch.randn(m, k, device=gpu.device, dtype=torch.float16, generator=generator)
    out = torch.empty(m, n, device=gpu.device, dtype=torch.float16)
    candidates: dict[str, Candidate] = {}
    for w, kernel in kernels.items():
        c = kernel.configuration
        if c.tokens > max(2 * m, 16) or c.tokens * 4 < min(m, 256) or (m >= 512 and c.tokens < 128):
            continue
        group = ACTIVATION_GROUP if w.token_groups else None
        rounded = round_activations_for_tiles(x, group)
        known = set()
        for sharing in c.sharings:
            grid = kernel.grid(m, n, k, 1, sharing)
            if grid in known:
                continue
            known.add(grid)

            def call(i: int, kernel: LoadedKernel = kernel, rounded: RoundedActivations = rounded, sharing: str = sharing) -> object:
                return product(kernel, weights[i % copies], rounded, out, sharing, overlap=True)

            def rounding_too(i: int, kernel: LoadedKernel = kernel, group: int | None = group, sharing: str = sharing) -> object:
                return product(kernel, weights[i % copies], round_on_gpu(x, group, True), out, sharing, overlap=True)

            kind = "groups" if group else "tokens"
            name = f"a8 {Choice(c, 1, sharing).name} {kind}"  # type: ignore[arg-type]
            candidates[name] = Candidate(call, copies, kind)
            candidates[f"{name} rounded"] = Candidate(rounding_too, copies, f"{kind} rounded")
    for group in (None, ACTIVATION_GROUP):
        candidates[f"rounding alone, {'groups' if group else 'tokens'}"] = Candidate(lambda i, group=group: round_on_gpu(x, group, True), 1)
    candidates["w4a16"] = Candidate(
        lambda i: marlin_gemm(x, weights[i % copies].qweight, weights[i % copies].scales, n, GROUP_SIZE, None, True), copies
    )
    dense = torch.randn(n, k, device=gpu.device, dtype=torch.float16, generator=generator)
    candidates["torch float16"] = Candidate(lambda i: torch.matmul(x, dense.T, out=out), 1)
    x8, w8 = x.to(torch.float8_e4m3fn), dense.to(torch.float8_e4m3fn)
    sx, sw = torch.ones(m, 1, device=gpu.device), torch.ones(1, n, device=gpu.device)
    candidates["torch fp8"] = Candidate(lambda i: torch._scaled_mm(x8, w8.T, sx, sw, out_dtype=torch.bfloat16), 1)
    return take_turns(gpu, candidates, replays=replays)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="73728x18432")
    parser.add_argument("--tokens", default="64,128,256")
    parser.add_argument("--check", default="768x1408")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--replays", type=int, default=10)
    parser.add_argument("--top", type=int, default=8)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    gpu, folder = Gpu(0), jit.default_folder()
    document: dict[str, dict[str, float]] = {}
    rows: list[list[int | str]] = []
    with gpu.current():
        wanted = [Wanted(c, groups) for c in (experiments() if given.all else A8_SM90) for groups in (False, True)]
        kernels = loaded(wanted, gpu.device, folder, 3)
        good = check(kernels, gpu, _shape(given.check))
        kernels = {w: kernel for w, kernel in kernels.items() if w in good}
        print(f"\n{gpu.name}, driver {gpu.driver}; microseconds, median of {given.replays}\n")
        for shape in map(_shape, given.shapes.split(",")):
            for m in map(int, given.tokens.split(",")):
                found = times(gpu, kernels, shape, m, given.replays)
                print(f"N={shape[0]} K={shape[1]} M={m}")
                for name, sample in _first(found, given.top):
                    tera = 2 * shape[0] * shape[1] * m / sample.median / 1e6
                    print(f"  {sample.median:9.1f}  {tera:7.0f} TFLOP/s  {name}", flush=True)
                document[f"{shape[0]}x{shape[1]}x{m}"] = {name: sample.median for name, sample in found.items()}
                rows.append([m, *shape, _best(found)])
                gpu.free()
    for row in sorted(rows, key=lambda row: (row[1], row[2], row[0])) if given.table else ():
        print(f"     {json.dumps(row)},")
    if given.json:
        given.json.write_text(json.dumps(document, indent=1))


def _best(found: dict[str, Sample]) -> str:
    """The choice of a row: with rounding, one scale a token."""
    end = " tokens rounded"
    times = {name: sample.median for name, sample in found.items() if name.endswith(end)}
    name = min(times, key=times.__getitem__)
    return name.removeprefix("a8 ").removesuffix(end) if times[name] < found["w4a16"].median else SIXTEEN_BIT


def _first(found: dict[str, Sample], top: int) -> Iterator[tuple[str, Sample]]:
    """The baselines, and the fastest `top` of either kind of scales, with and without rounding."""
    rows = sorted(found.items(), key=lambda item: item[1].median)
    yield from (row for row in rows if not row[0].startswith("a8"))
    for kind in (" tokens", " groups", " tokens rounded", " groups rounded"):
        yield from [row for row in rows if row[0].startswith("a8") and row[0].endswith(kind)][:top]


def _shape(text: str) -> tuple[int, int]:
    n, k = map(int, text.split("x"))
    return n, k


if __name__ == "__main__":
    main()
