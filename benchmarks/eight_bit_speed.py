"""8-bit activations: every configuration of the kernels for int8, checked and timed, beside 16-bit products and torch's fp8.

    PYTHONPATH=. python benchmarks/eight_bit_speed.py --shapes 73728x18432 --tokens 64,128,256 [--kernels sm80] [--sparse]
        [--kind factored] [--table] [--json FILE]

On Ampere, Ada or Hopper: those configurations that fit the GPU, or of them --kernels, sm80 (mma.sync) or sm90 (wgmma). Each product is
checked against float64 of the same 8-bit activations and 4-bit weights, and then timed as `marlinctl bench` does: CUDA graphs, cold
weights, candidates in turns, medians (marlinctl/benchmarking/timing.py). "tokens": one scale for each token; "groups": one for each 128
of K; "factored": one for each token, and scales of weights that are integers times one scale for each output. With --sparse the weights
are 2:4, which have the last alone, on Hopper, and "w4a16" is their product with 16-bit activations. Times are of the product alone, or
where "rounded" follows of rounding and product, as a model calls it. --table prints the rows of kernels/dispatch.json, kind by kind: of
each shape and M the fastest with rounding, or 16-bit activations where they are faster; nothing else is timed then.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from marlinctl.benchmarking.cases import Shape
from marlinctl.benchmarking.gpu import Gpu
from marlinctl.benchmarking.timing import Candidate, Sample, copies_for, take_turns
from marlinctl.benchmarking.weights import packed_bytes, random_packed
from marlinctl.kernels import jit
from marlinctl.kernels.activations import RoundedActivations, round_activations_for_tiles
from marlinctl.kernels.configurations import Configuration, Sharing, group_shift
from marlinctl.kernels.dispatch import FACTORED, ROUNDED, SIXTEEN_BIT, SPARSE_FACTORED, Choice, configurations
from marlinctl.kernels.factored import factored_scales
from marlinctl.kernels.functions import architecture_of
from marlinctl.kernels.int8_metadata import metadata_for_int8
from marlinctl.kernels.launch import LoadedKernel, load, multiply
from marlinctl.kernels.ops import marlin_gemm, sparse_marlin_gemm
from marlinctl.kernels.reference import gemm_rounded
from marlinctl.kernels.rounding import round_on_gpu
from marlinctl.pack.types import PackedLinear, PackedSparseLinear
from marlinctl.quantize.scheme import ACTIVATION_GROUP

GROUP_SIZE = 128
MOST_ERROR = 5e-3
CHECKED_TOKENS = (1, 37, 131, 300)
KERNELS = ("sm80", "sm90")
GROUPS = {"tokens": None, "groups": ACTIVATION_GROUP, "factored": None}  # of activations that share a scale
TABLES = {"tokens": ROUNDED["int8"], "groups": ROUNDED["int8-128"], "factored": FACTORED}  # kinds of dispatch.json
SPARSE_TABLES = {"factored": SPARSE_FACTORED}


@dataclass(frozen=True)
class Weight:
    p: PackedLinear | PackedSparseLinear
    factored: Tensor  # its scales once more
    metadata: tuple[Tensor, ...] = ()  # of 2:4: in the order of 8-bit products


@dataclass(frozen=True)
class Product:
    kernel: LoadedKernel
    kind: str  # of GROUPS
    sharing: Sharing

    @property
    def name(self) -> str:
        return f"a8 {self.choice} {self.kind}"

    @property
    def choice(self) -> str:
        return Choice(self.kernel.configuration, 1, self.sharing).name

    def of(self, weight: Weight, rounded: RoundedActivations, out: Tensor) -> Tensor:
        p = weight.p
        grid = self.kernel.grid(out.shape[0], p.out_features, p.in_features, 1, self.sharing)
        shift, scales = group_shift(p.group_size, p.in_features), weight.factored if self.kernel.configuration.factored else p.scales
        weights = (p.qweight, *weight.metadata, rounded.scales)
        multiply(self.kernel, rounded.codes, weights, scales, None, out, shift, grid, None, overlap=True)
        return out

    def rounding_too(self, x: Tensor, weight: Weight, out: Tensor) -> Tensor:
        return self.of(weight, round_on_gpu(x, GROUPS[self.kind], overlap=True, sparse=bool(weight.metadata)), out)


def loaded(device: torch.device, families: Sequence[str], tables: Mapping[str, str], only: Sequence[str]) -> list[Product]:
    folder, started = jit.default_folder(), time.perf_counter()
    fitting = {kind: [c for c in configurations(table) if c.fits(architecture_of(device))] for kind, table in tables.items()}
    wanted = [(c, kind) for kind in tables for c in fitting[kind] if KERNELS[c.wgmma] in families and (not only or c.name in only)]

    def one(wanted: tuple[Configuration, str]) -> LoadedKernel:
        return load(wanted[0], torch.float16, device, folder, 3, GROUPS[wanted[1]] is not None)

    with ThreadPoolExecutor(12) as pool:
        kernels = list(pool.map(one, wanted))
    print(f"{len(kernels)} kernels in {time.perf_counter() - started:.1f} s", flush=True)
    return [Product(kernel, kind, sharing) for kernel, (c, kind) in zip(kernels, wanted, strict=True) for sharing in c.sharings]


def random_weight(sparse: bool, shape: Shape, generator: torch.Generator) -> Weight:
    """With factors of 7 to 16, half of them negative, and channel scales of seven significant bits."""
    p = random_packed("sparse" if sparse else "dense", shape, generator)
    factors = torch.randint(7, 16, p.scales.shape, device=generator.device, generator=generator)
    factors *= 1 - 2 * torch.randint(0, 2, p.scales.shape, device=generator.device, generator=generator)
    channel = torch.randint(64, 128, (1, shape.n), device=generator.device, generator=generator) * 2.0**-17
    p = replace(p, scales=(factors * channel).half())
    factored = factored_scales(p)
    assert factored is not None
    return Weight(p, factored, (metadata_for_int8(p.meta),) if isinstance(p, PackedSparseLinear) else ())


def check(products: list[Product], gpu: Gpu, shape: Shape, sparse: bool) -> None:
    """Relative error of every product, for odd numbers of tokens. SystemExit where one is above MOST_ERROR."""
    weight, worst = random_weight(sparse, shape, gpu.generator(1)), 0.0
    for m in CHECKED_TOKENS:
        x = torch.randn(m, shape.k, device=gpu.device, dtype=torch.float16, generator=gpu.generator(m)) + 0.1
        for kind, group in GROUPS.items():
            rounded = round_activations_for_tiles(x, group, sparse)
            assert all(torch.equal(a, b) for a, b in zip(vars_of(rounded), vars_of(round_on_gpu(x, group, sparse=sparse)), strict=True))
            expected = gemm_rounded(x, weight.p, group).double()
            for product in products:
                if product.kind == kind:
                    out = product.of(weight, rounded, torch.full((m, shape.n), torch.nan, dtype=torch.float16, device=gpu.device))
                    error = float((out.double() - expected).norm() / expected.norm())
                    worst = max(worst, error)
                    if not error <= MOST_ERROR:
                        raise SystemExit(f"{product.name}, M={m}: relative error {error:.2e}")
    print(f"{len(products)} products are right, relative error at most {worst:.1e} (float16 output)\n", flush=True)


def vars_of(rounded: RoundedActivations) -> tuple[Tensor, Tensor]:
    return rounded.codes, rounded.scales


def times(gpu: Gpu, products: list[Product], shape: Shape, m: int, replays: int, only_rounded: bool, sparse: bool) -> dict[str, Sample]:
    generator, n = gpu.generator(0), shape.n
    copies = copies_for(packed_bytes("sparse" if sparse else "dense", shape), gpu.l2_bytes)
    weights = [random_weight(sparse, shape, generator) for _ in range(copies)]
    x = torch.randn(m, shape.k, device=gpu.device, dtype=torch.float16, generator=generator)
    out = torch.empty(m, n, device=gpu.device, dtype=torch.float16)
    rounded = {kind: round_activations_for_tiles(x, group, sparse) for kind, group in GROUPS.items()}
    candidates: dict[str, Candidate] = {}
    known = set()
    for product in products:
        c, grid = product.kernel.configuration, product.kernel.grid(m, n, shape.k, 1, product.sharing)
        if c.tokens > max(2 * m, 32) or 4 * c.tokens < min(m, 256) or (m >= 512 and c.tokens < (128 if c.wgmma else 64)):
            continue
        if (product.kernel, product.kind, grid) in known:
            continue
        known.add((product.kernel, product.kind, grid))

        def alone(product: Product, i: int) -> object:
            return product.of(weights[i % copies], rounded[product.kind], out)

        def both(product: Product, i: int) -> object:
            return product.rounding_too(x, weights[i % copies], out)

        if not only_rounded:
            candidates[product.name] = Candidate(partial(alone, product), copies, product.kind)
        candidates[f"{product.name} rounded"] = Candidate(partial(both, product), copies, f"{product.kind} rounded")

    def sixteen_bit(i: int) -> object:
        p = weights[i % copies].p
        if isinstance(p, PackedSparseLinear):
            return sparse_marlin_gemm(x, p.qweight, p.meta, p.scales, n, GROUP_SIZE, None, True)
        return marlin_gemm(x, p.qweight, p.scales, n, GROUP_SIZE, None, True)

    def rounding(group: int | None, i: int) -> object:
        return round_on_gpu(x, group, overlap=True, sparse=sparse)

    candidates["w4a16"] = Candidate(sixteen_bit, copies)
    candidates |= {f"rounding alone, {kind}": Candidate(partial(rounding, group), 1) for kind, group in GROUPS.items()}
    dense = torch.randn(n, shape.k, device=gpu.device, dtype=torch.float16, generator=generator)
    candidates["torch float16"] = Candidate(lambda i: torch.matmul(x, dense.T, out=out), 1)
    if torch.cuda.get_device_capability(gpu.device) >= (8, 9):
        x8, w8 = x.to(torch.float8_e4m3fn), dense.to(torch.float8_e4m3fn)
        ones = torch.ones(m, 1, device=gpu.device), torch.ones(1, n, device=gpu.device)
        candidates["torch fp8"] = Candidate(lambda i: torch._scaled_mm(x8, w8.T, *ones, out_dtype=torch.bfloat16), 1)
    return take_turns(gpu, candidates, replays=replays)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="73728x18432", help="N x K, with commas")
    parser.add_argument("--tokens", default="64,128,256", help="M, with commas")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--kind", nargs="+", choices=tuple(GROUPS), default=tuple(GROUPS), help="of scales")
    parser.add_argument("--replays", type=int, default=10)
    parser.add_argument("--top", type=int, default=2, help="of each kind, how many are printed")
    parser.add_argument("--sparse", action="store_true", help="2:4 weights")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="a configuration; repeatable")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    gpu = Gpu(0)
    document: dict[str, dict[str, float]] = {}
    with gpu.current():
        tables = {kind: table for kind, table in (SPARSE_TABLES if given.sparse else TABLES).items() if kind in given.kind}
        products = loaded(gpu.device, given.kernels, tables, given.only)
        if not products:
            parser.error(f"no kernel of {', '.join(given.kernels)} fits {gpu.name}, or none is called so")
        check(products, gpu, Shape(768, 1408, GROUP_SIZE), given.sparse)
        print(f"{gpu.name}, driver {gpu.driver}; microseconds, median of {given.replays}\n")
        for n, k in (map(int, text.split("x")) for text in given.shapes.split(",")):
            for m in map(int, given.tokens.split(",")):
                found = times(gpu, products, Shape(n, k, GROUP_SIZE), m, given.replays, given.table, given.sparse)
                print(f"N={n} K={k} M={m}")
                for name, sample in _first(found, given.top):
                    print(f"  {sample.median:9.1f}  {2 * n * k * m / sample.median / 1e6:7.0f} TFLOP/s  {name}", flush=True)
                document[f"{n}x{k}x{m}"] = {name: sample.median for name, sample in found.items()}
                for kind, table in tables.items() if given.table else ():
                    print(f"     {table}: {json.dumps([m, n, k, _best(found, kind)])},", flush=True)
                gpu.free()
    if given.json:
        given.json.write_text(json.dumps(document, indent=1))


def _best(found: dict[str, Sample], kind: str) -> str:
    """The choice of a row: with rounding."""
    end = f" {kind} rounded"
    times = {name: sample.median for name, sample in found.items() if name.endswith(end)}
    name = min(times, key=times.__getitem__)
    return name.removeprefix("a8 ").removesuffix(end) if times[name] < found["w4a16"].median else SIXTEEN_BIT


def _first(found: dict[str, Sample], top: int) -> Iterator[tuple[str, Sample]]:
    """The baselines, and the fastest `top` of either kind of scales, with and without rounding."""
    rows = sorted(found.items(), key=lambda item: item[1].median)
    yield from (row for row in rows if not row[0].startswith("a8"))
    for end in (*GROUPS, *(f"{kind} rounded" for kind in GROUPS)):
        yield from [row for row in rows if row[0].startswith("a8") and row[0].endswith(end)][:top]


if __name__ == "__main__":
    main()
