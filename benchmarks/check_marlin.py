"""The INT4 kernels, dense and 2:4, on a GPU: are they right, and how fast are they.

    python benchmarks/check_marlin.py
    python benchmarks/check_marlin.py --check                                     # no timing
    python benchmarks/check_marlin.py --kernel sparse                             # one of the two
    python benchmarks/check_marlin.py --shape 4096x14336 --tokens 1,16 --json out.json

First every configuration of marlinctl/kernels/configurations.py, in float16 and bfloat16, against the float64 product of the weights
that kernels/reference.py decodes: random inputs on odd shapes, identity activations (which must give the weights bit for bit), inputs
that lie between NaNs, poisoned outputs and workspaces, odd numbers of CTAs, two streams at once, a CUDA graph; each launch three
times, with equal bits. Each configuration is checked in a process of its own, several at once: one that hangs is stopped and is a failure
like any other. Any failure is listed and the script exits with 1 before it times anything.

Then the time of a call inside a CUDA graph of many calls, over so many copies of the weights that they come from memory and not
from L2, beside torch.matmul in the same type on weights [N, K]; replays of all candidates take turns, the median is printed. Words and
scales are random: zeros draw less power, and the GPU clocks higher. Kernels for Hopper are timed with programmatic dependent launch too
(+p, "overlapped"), where a call fetches its first weights while the call before it ends; the speed-up is that without.

It needs a CUDA build of torch (which brings cuda-bindings and NVRTC) and nothing else of marlinctl's dependencies.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import datetime
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from marlinctl.kernels import jit
from marlinctl.kernels.configurations import DENSE, DENSE_SM90, GROUP_SIZES, SPARSE, SPARSE_SM90, Configuration, group_shift
from marlinctl.kernels.reference import dequantize, dequantize_sparse
from marlinctl.pack.marlin import pack_marlin
from marlinctl.pack.sparse_marlin import pack_sparse_marlin
from marlinctl.pack.types import PackedLinear, PackedSparseLinear, padded
from marlinctl.quantize.types import QuantizedLinear
from marlinctl.sparsify.keep import best_of_quads
from marlinctl.sparsify.types import SparseQuantizedLinear

Packed = PackedLinear | PackedSparseLinear

DTYPES = (torch.float16, torch.bfloat16)
GATES = {torch.float16: 1e-3, torch.bfloat16: 5e-3}  # relative error, Frobenius
IDEAL = ["73728x18432", "18432x73728"]  # N x K
LLAMA3_8B = ["6144x4096", "4096x4096", "28672x4096", "4096x14336"]
L2_TIMES = 5  # copies of the weights hold this many times the L2 cache
REPLAYS = 15
CHECK_SECONDS = 180  # for one configuration; some of it is for compiling


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only whether it is right")
    parser.add_argument("--time", action="store_true", help="only how fast it is")
    parser.add_argument("--shape", action="append", metavar="NxK", help="to time; repeatable (default: two large ones and Llama-3-8B's)")
    parser.add_argument("--tokens", default="1,8,16,32,64,128", help="values of M to time (default: %(default)s)")
    parser.add_argument("--group-size", type=int, default=128, help="of what is timed; -1 is channel-wise (default: 128)")
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="float16", help="of what is timed")
    parser.add_argument("--kernel", choices=["dense", "sparse"], help="which of the two (default: both)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="configurations checked at once (default: one for each processor)")
    parser.add_argument("--only", metavar="NAME", action="append", help="a configuration; repeatable")
    parser.add_argument("--cache", type=Path, help="folder of compiled kernels (default: a new one, so that compiling is timed)")
    parser.add_argument("--json", type=Path, help="where every figure goes")
    arguments = parser.parse_args()

    torch.cuda.init()
    gpu = torch.cuda.get_device_properties(0)
    today = datetime.datetime.now(datetime.UTC).date()
    print(f"{gpu.name}, {gpu.multi_processor_count} multiprocessors, torch {torch.__version__}, CUDA {torch.version.cuda}, {today}")
    of_kernel = {"dense": (*DENSE, *DENSE_SM90), "sparse": (*SPARSE, *SPARSE_SM90)}
    wanted = [arguments.kernel] if arguments.kernel else list(of_kernel)
    fitting = [c for kernel in wanted for c in of_kernel[kernel] if c.fits(architecture(c))]
    configurations = [c for c in fitting if not arguments.only or c.name in arguments.only]
    if not configurations:
        parser.error(f"--only: the configurations for this GPU are {', '.join(c.name for c in fitting)}")
    cache = arguments.cache or Path(tempfile.mkdtemp(prefix="marlin-"))
    figures: dict[str, Any] = {"gpu": gpu.name, "torch": torch.__version__, "date": str(today)}
    wrong = []
    if not arguments.time:
        if len(configurations) == 1:
            wrong = check([Kernel.load(configurations[0], dtype, cache) for dtype in DTYPES])
        else:
            wrong = check_apart(configurations, cache, arguments.jobs)
        figures["wrong"] = wrong
        print("\n".join(wrong[:40]) if wrong else "all checks passed", flush=True)
    if not arguments.check and not wrong:
        dtype = getattr(torch, arguments.dtype)
        shapes = [tuple(int(size) for size in shape.lower().split("x")) for shape in arguments.shape or [*LLAMA3_8B, *IDEAL]]
        tokens = [int(m) for m in arguments.tokens.split(",")]
        shift = -1 if arguments.group_size == -1 else group_shift(arguments.group_size, 2 * arguments.group_size)
        with ThreadPoolExecutor(arguments.jobs) as pool:
            kernels = list(pool.map(lambda c: Kernel.load(c, dtype, cache, (shift,)), configurations))
        both = [[k for k in kernels if k.configuration.sparse == sparse] for sparse in (False, True)]
        figures["timing"] = [row for some in both if some for row in time_all(some, shapes, tokens, arguments.group_size)]
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 1 if wrong else 0


# Loading and launching


def architecture(configuration: Configuration) -> str:
    """What this GPU runs it as: wgmma takes the instructions that no architecture but Hopper has."""
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}{'a' if configuration.wgmma and major == 9 else ''}"


@dataclass(frozen=True)
class Kernel:
    """One configuration, loaded."""

    configuration: Configuration
    dtype: torch.dtype
    functions: dict[int, Any]  # CUfunction, by group_shift(); where it is not compiled in, one for all
    resident: int  # CTAs that fit on the GPU at once, by multiprocessor

    @classmethod
    def load(cls, configuration: Configuration, dtype: torch.dtype, cache: Path, shifts: tuple[int, ...] = (-1, 1, 2, 3)) -> Kernel:
        from cuda.bindings import driver

        torch.zeros(1, device="cuda")  # makes torch's context current
        functions, registers, local, resident, start = {}, 0, 0, 99, time.perf_counter()
        for shift in shifts if configuration.wgmma else (3,):
            defines = configuration.defines(dtype, shift)
            code = jit.cubin(f"{configuration.kernel}.cu", defines, architecture(configuration), cache)
            library = done(driver.cuLibraryLoadData(code, [], [], 0, [], [], 0))
            function = done(driver.cuKernelGetFunction(done(driver.cuLibraryGetKernel(library, configuration.kernel.encode()))))
            size = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            done(driver.cuFuncSetAttribute(function, size, configuration.shared_bytes))
            shape = configuration.threads, configuration.shared_bytes
            resident = min(resident, done(driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(function, *shape)))
            attribute = driver.CUfunction_attribute
            registers = max(registers, done(driver.cuFuncGetAttribute(attribute.CU_FUNC_ATTRIBUTE_NUM_REGS, function)))
            local = max(local, done(driver.cuFuncGetAttribute(attribute.CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES, function)))
            functions[shift] = function
        print(
            f"{configuration.name:24} {str(dtype)[6:]:9} compiled and loaded in {time.perf_counter() - start:.2f} s, "
            f"{registers} registers, {local} bytes of local memory, {configuration.shared_bytes} of shared, {resident} CTAs each",
            flush=True,
        )
        return cls(configuration, dtype, functions, resident)

    @property
    def name(self) -> str:
        return f"{self.configuration.name} {str(self.dtype)[6:]}"

    def workspace(self, m: int, n: int, ctas: int) -> tuple[Tensor, Tensor]:
        """Partial sums, poisoned, and counters, zero."""
        partials = torch.full((self.configuration.partial_floats(ctas),), torch.nan, device="cuda")
        return partials, torch.zeros(self.configuration.output_tiles(m, n), dtype=torch.int32, device="cuda")

    def ctas(self, m: int, n: int, k: int, per_multiprocessor: int) -> int:
        everywhere = torch.cuda.get_device_properties(0).multi_processor_count * per_multiprocessor
        return min(everywhere, self.configuration.units(m, n, k))

    def launch(
        self,
        activations: Tensor,
        p: Packed,
        bias: Tensor | None,
        out: Tensor,
        workspace: tuple[Tensor, Tensor],
        ctas: int,
        programmatic: bool = False,
    ) -> None:
        """On torch's current stream. `programmatic` (for Hopper's): the kernel may start before the one before it has ended."""
        from cuda.bindings import driver

        m, k = activations.shape
        partials, counters = workspace
        weights = (p.qweight, p.meta) if isinstance(p, PackedSparseLinear) else (p.qweight,)
        tensors = (activations, *weights, p.scales, bias, out, partials, counters)
        pointers = [ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors]
        numbers = [ctypes.c_int(value) for value in (m, p.out_features, k, group_shift(p.group_size, k))]
        values = [*pointers, *numbers]
        places = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))  # read before the call returns
        stream = torch.cuda.current_stream().cuda_stream
        shared = self.configuration.shared_bytes
        function = self.functions[group_shift(p.group_size, k) if self.configuration.wgmma else 3]
        threads = self.configuration.threads
        if not programmatic:
            done(driver.cuLaunchKernel(function, ctas, 1, 1, threads, 1, 1, shared, stream, ctypes.addressof(places), 0))
            return
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = ctas, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes, config.hStream = shared, stream
        config.attrs, config.numAttrs = [attribute], 1
        done(driver.cuLaunchKernelEx(config, function, ctypes.addressof(places), 0))


def done(result: tuple[Any, ...]) -> Any:
    """What a driver call gives, or its error as an exception."""
    status, *values = result
    if int(status) != 0:
        raise RuntimeError(f"the driver reports {status.name}")
    return values[0] if values else None


# Is it right


def check_apart(configurations: list[Configuration], cache: Path, jobs: int) -> list[str]:
    """Every failure of every configuration, of which each is checked by this script in another process."""

    def run(configuration: Configuration) -> list[str]:
        command = [sys.executable, __file__, "--check", "--only", configuration.name, "--cache", str(cache)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=CHECK_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            return [f"{configuration.name}: stopped after {CHECK_SECONDS} s"]
        lines = done.stdout.splitlines()[1:]  # without the GPU
        if done.returncode == 0:
            print("\n".join(lines[:-1]), flush=True)
            return []
        return [line for line in lines if " compiled and loaded " not in line] + done.stderr.splitlines()[-3:]

    with ThreadPoolExecutor(jobs) as pool:
        return [line for lines in pool.map(run, configurations) for line in lines]


def check(kernels: list[Kernel]) -> list[str]:
    """Every failure, told in a line. The kernels are all dense or all 2:4."""
    sparse = kernels[0].configuration.sparse
    tokens = (1, 7, 17, 65, 129, 1000)
    shapes = [
        (64, 48, -1),
        (80, 64, -1),
        (192, 64, 32),
        (576, 576, 64),
        (896, 896, 128),
        (192, 160, 32),
        (576, 18432, 128),
        (896, 18432, -1),
    ]
    wrong: list[str] = []
    worst = {(kernel.name, what): 0.0 for kernel in kernels for what in ("relative", "mean ratio")}
    for (n, k, group_size), m in itertools.product(shapes, tokens):
        p = random_packed(sparse, n, k, group_size, seed=n + k + m)
        weight = decoded(p).double()  # [N, K]
        for kernel in kernels:
            for residents, with_bias in ((kernel.resident, True), (1, False), (0, True)):
                ctas = kernel.ctas(m, n, k, residents) if residents else min(7, kernel.configuration.units(m, n, k))
                activations = between_nans(torch.randn(m, k, device="cuda").to(kernel.dtype))
                bias = torch.randn(n, device="cuda").to(kernel.dtype) if with_bias else None
                exact = activations.double() @ weight.T + (0 if bias is None else bias.double())
                where = f"{kernel.name}: M={m} N={n} K={k} group_size={group_size} CTAs={ctas}"
                workspace = kernel.workspace(m, n, ctas)
                outs = [guarded(m, n, kernel.dtype) for _ in range(3)]
                for out, _ in outs:
                    kernel.launch(activations, p, bias, out, workspace, ctas)
                torch.cuda.synchronize()
                error = outs[0][0].double() - exact
                relative = float(error.norm() / exact.norm())
                ratio = float(error.abs().mean() / exact.abs().mean())
                worst[kernel.name, "relative"] = max(worst[kernel.name, "relative"], relative)
                worst[kernel.name, "mean ratio"] = max(worst[kernel.name, "mean ratio"], ratio)
                if not relative <= GATES[kernel.dtype]:  # NaN fails too
                    place = (error.abs().nan_to_num(torch.inf) == error.abs().nan_to_num(torch.inf).max()).nonzero()[0].tolist()
                    wrong.append(f"{where}: relative error {relative:.2e}, worst at {place}")
                if not all(torch.equal(outs[0][0], out) for out, _ in outs):
                    wrong.append(f"{where}: three launches differ")
                if not all(bool(guard.isnan().all()) for _, guards in outs for guard in guards):
                    wrong.append(f"{where}: written outside of the output")
                if bool(workspace[1].any()):
                    wrong.append(f"{where}: counters are not back at 0")
    for kernel in kernels:
        wrong += [*check_identity(kernel), *check_large(kernel), *check_streams_and_graph(kernel)]
        figures = ", ".join(f"{what} {worst[kernel.name, what]:.2e}" for what in ("relative", "mean ratio"))
        print(f"{kernel.name:40} worst error against float64: {figures}", flush=True)
    return wrong


def check_identity(kernel: Kernel) -> Iterator[str]:
    """Identity activations give the decoded weight, rounded once."""
    for group_size in (*GROUP_SIZES, -1):
        n, k = 448, 640
        p = random_packed(kernel.configuration.sparse, n, k, group_size, seed=group_size)
        ctas = kernel.ctas(k, n, k, kernel.resident)
        out, _ = guarded(k, n, kernel.dtype)
        kernel.launch(torch.eye(k, device="cuda", dtype=kernel.dtype), p, None, out, kernel.workspace(k, n, ctas), ctas)
        expected = decoded(p).T.to(kernel.dtype)
        if not torch.equal(out, expected):
            k_wrong, n_wrong = (out != expected).nonzero()[0].tolist()
            values = f"{float(out[k_wrong, n_wrong])} instead of {float(expected[k_wrong, n_wrong])}"
            yield f"{kernel.name}: identity, group_size={group_size}: weight n={n_wrong} k={k_wrong} is {values}"


def check_large(kernel: Kernel) -> Iterator[str]:
    """First and last columns of more weights than 2**30: indices that overflow show at the end."""
    m, n, k, group_size = kernel.configuration.tokens + 1, 73728, 18432, 128
    p = random_words(kernel.configuration.sparse, n, k, group_size)
    activations = torch.randn(m, k, device="cuda").to(kernel.dtype)
    ctas = kernel.ctas(m, n, k, kernel.resident)
    out, _ = guarded(m, n, kernel.dtype)
    kernel.launch(activations, p, None, out, kernel.workspace(m, n, ctas), ctas)
    for first in (0, n - 256):
        exact = activations.double() @ decoded(columns(p, first, first + 256)).double().T
        relative = float((out[:, first : first + 256].double() - exact).norm() / exact.norm())
        if not relative <= GATES[kernel.dtype]:
            yield f"{kernel.name}: N={n} K={k}, columns from {first}: relative error {relative:.2e}"


def check_streams_and_graph(kernel: Kernel) -> Iterator[str]:
    """Two streams with a workspace each, and a graph that is replayed with other inputs, give what one launch gives."""
    m, n, k = 33, 576, 4096
    p = random_packed(kernel.configuration.sparse, n, k, 128, seed=5)
    ctas = kernel.ctas(m, n, k, 1)
    activations = [torch.randn(m, k, device="cuda").to(kernel.dtype) for _ in range(2)]
    workspaces = [kernel.workspace(m, n, ctas) for _ in range(2)]
    alone, together = ([guarded(m, n, kernel.dtype)[0] for _ in range(2)] for _ in range(2))
    for x, out, workspace in zip(activations, alone, workspaces, strict=True):
        kernel.launch(x, p, None, out, workspace, ctas)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]  # each keeps its workspace: launches on one stream follow each other
    for _ in range(20):
        for x, out, workspace, stream in zip(activations, together, workspaces, streams, strict=True):
            with torch.cuda.stream(stream):
                kernel.launch(x, p, None, out, workspace, ctas)
    torch.cuda.synchronize()
    if not all(torch.equal(a, b) for a, b in zip(alone, together, strict=True)):
        yield f"{kernel.name}: two streams at once differ from one after the other"
    if kernel.configuration.wgmma:  # one workspace for launches that overlap
        for _ in range(20):
            for x, out in zip(activations, together, strict=True):
                kernel.launch(x, p, None, out.fill_(torch.nan), workspaces[0], ctas, programmatic=True)
                kernel.launch(x, p, None, out, workspaces[0], ctas, programmatic=True)
        torch.cuda.synchronize()
        if not all(torch.equal(a, b) for a, b in zip(alone, together, strict=True)):
            yield f"{kernel.name}: programmatic dependent launches differ from one after the other"
    x, out = activations[0].clone(), guarded(m, n, kernel.dtype)[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel.launch(x, p, None, out, workspaces[0], ctas)
    for inputs, expected in zip(activations, alone, strict=True):
        x.copy_(inputs)
        graph.replay()
        torch.cuda.synchronize()
        if not torch.equal(out, expected):
            yield f"{kernel.name}: a graph gives something else than a launch"


def random_packed(sparse: bool, n: int, k: int, group_size: int, seed: int) -> Packed:
    """Every code, scales of both signs, all six choices of survivors, through the packer."""
    generator = torch.Generator().manual_seed(abs(seed))
    size = k if group_size == -1 else group_size
    codes = torch.randint(-8, 8, (n, k), dtype=torch.int8, generator=generator)
    scales = (torch.randn(n, k // size, generator=generator) * 0.02).to(torch.float16)
    if not sparse:
        return on_gpu(pack_marlin(QuantizedLinear(codes, scales, size)))
    keep = best_of_quads(torch.rand(k, n, generator=generator)).T.contiguous()
    return on_gpu(pack_sparse_marlin(SparseQuantizedLinear(codes * keep, scales, size, keep)))


def random_words(sparse: bool, n: int, k: int, group_size: int) -> Packed:
    """Random words, metadata and scales without the packer, for sizes at which the packer takes seconds; N and K multiples of 64."""
    size = k if group_size == -1 else group_size
    words = torch.randint(-(2**31), 2**31, (k // (32 if sparse else 16), 2 * n), dtype=torch.int32, device="cuda")
    scales = (torch.randn(k // size, n, device="cuda") * 0.02).to(torch.float16)
    if not sparse:
        return PackedLinear(words, scales, n, k, size)
    pairs = [first + 4 * second for second in range(4) for first in range(second)]
    nibbles = torch.tensor(pairs, dtype=torch.int16, device="cuda")
    meta = torch.zeros(k // 32, 2 * n, dtype=torch.int16, device="cuda")
    for shift in (0, 4, 8, 12):
        meta |= nibbles[torch.randint(len(pairs), meta.shape, dtype=torch.int32, device="cuda")] << shift
    return PackedSparseLinear(words, meta, scales, n, k, size)


def decoded(p: Packed) -> Tensor:
    return dequantize_sparse(p) if isinstance(p, PackedSparseLinear) else dequantize(p)


def on_gpu(p: Packed) -> Packed:
    return dataclasses.replace(p, **{name: tensor.cuda() for name, tensor in tensors_of(p).items()})


def columns(p: Packed, first: int, last: int) -> Packed:
    """Columns first..last of the output, multiples of 64: tiles are independent."""
    parts = {name: t[:, first:last] if name == "scales" else t[:, 2 * first : 2 * last] for name, t in tensors_of(p).items()}
    return dataclasses.replace(p, **{name: t.contiguous() for name, t in parts.items()}, out_features=last - first)


def tensors_of(p: Packed) -> dict[str, Tensor]:
    names = ("qweight", "meta", "scales") if isinstance(p, PackedSparseLinear) else ("qweight", "scales")
    return {name: getattr(p, name) for name in names}


def between_nans(inner: Tensor) -> Tensor:
    """The same numbers with NaNs before and after: what is read beyond them shows."""
    room = torch.full((inner.numel() + 2048,), torch.nan, dtype=inner.dtype, device=inner.device)
    return room[1024:-1024].view(inner.shape).copy_(inner)


def guarded(m: int, n: int, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """An output full of NaN, and the NaNs before and behind it."""
    room = torch.full((m * n + 2048,), torch.nan, dtype=dtype, device="cuda")
    return room[1024:-1024].view(m, n), (room[:1024], room[-1024:])


# How fast is it


def time_all(kernels: list[Kernel], shapes: list[tuple[int, ...]], tokens: list[int], group_size: int) -> list[dict[str, Any]]:
    """A line for each shape and M; returns all figures in microseconds."""
    rate = read_rate()
    what = f"{str(kernels[0].dtype)[6:]}, group size {group_size}; microseconds per call, speed-up over torch.matmul"
    print(f"\nreads {rate / 1e12:.2f} TB/s; {what}; name/CTAs per multiprocessor")
    rows = []
    for n, k in shapes:
        if n != padded(n) or k != padded(k):
            raise SystemExit(f"{n}x{k}: what is timed must have multiples of 64")
        rows += time_shape(kernels, n, k, tokens, group_size, rate)
        torch.cuda.empty_cache()
    return rows


def time_shape(kernels: list[Kernel], n: int, k: int, tokens: list[int], group_size: int, rate: float) -> list[dict[str, Any]]:
    dtype, l2 = kernels[0].dtype, torch.cuda.get_device_properties(0).L2_cache_size
    sparse = kernels[0].configuration.sparse
    word_bytes = n * k * (3 if sparse else 4) // 8  # with metadata
    packed = [random_words(sparse, n, k, group_size) for _ in range(1 + -(-L2_TIMES * l2 // word_bytes))]
    dense = [torch.randn(n, k, device="cuda", dtype=dtype) for _ in range(1 + -(-L2_TIMES * l2 // (2 * n * k)))]
    weight_bytes = word_bytes + packed[0].scales.numel() * 2
    copies = f"{len(packed)} copies {'of 2:4 ' if sparse else ''}in 4 bits, {len(dense)} in 16"
    print(f"\nN={n} K={k}, {copies}; the weights alone take {weight_bytes / rate * 1e6:.1f} us", flush=True)
    calls = max(len(packed), min(40, 40_000_000_000 // (n * k)))
    rows = []
    for m in tokens:
        activations = torch.randn(m, k, device="cuda", dtype=dtype)
        out = torch.empty(m, n, device="cuda", dtype=dtype)
        candidates: dict[str, Callable[[int], object]] = {"torch.matmul": partial(dense_call, activations, dense, out)}
        for kernel in kernels:
            if m > 4 * kernel.configuration.tokens:
                continue  # a tile this small is not for so many tokens
            for residents in range(1, kernel.resident + 1):
                ctas = kernel.ctas(m, n, k, residents)
                call = partial(packed_call, kernel, activations, packed, out, kernel.workspace(m, n, ctas), ctas)
                candidates[f"{kernel.configuration.name}/{residents}"] = partial(call, False)
                if kernel.configuration.wgmma:
                    candidates[f"{kernel.configuration.name}/{residents}+p"] = partial(call, True)
        medians = {name: time / calls for name, time in replay({name: graph_of(call, calls) for name, call in candidates.items()}).items()}
        baseline = medians.pop("torch.matmul")
        best = min((name for name in medians if not name.endswith("+p")), key=medians.__getitem__)
        overlapped = min((value for name, value in medians.items() if name.endswith("+p")), default=medians[best])
        moved = weight_bytes + 2 * m * (n + k)
        print(
            f"M={m:<5} torch {baseline:8.1f}  best {medians[best]:8.1f}  {baseline / medians[best]:5.2f}x  "
            f"{moved / medians[best] / 1e6:5.2f} TB/s  {2 * m * n * k / medians[best] / 1e6:6.1f} TFLOP/s  {best:28} "
            f"overlapped {overlapped:8.1f} | " + " ".join(f"{name} {value:.1f}" for name, value in medians.items()),
            flush=True,
        )
        rows.append({"sparse": sparse, "n": n, "k": k, "m": m, "group_size": group_size, "torch.matmul": baseline, **medians})
    return rows


def dense_call(activations: Tensor, weights: list[Tensor], out: Tensor, i: int) -> None:
    torch.matmul(activations, weights[i % len(weights)].T, out=out)


def packed_call(
    kernel: Kernel,
    activations: Tensor,
    packed: list[Packed],
    out: Tensor,
    workspace: tuple[Tensor, Tensor],
    ctas: int,
    programmatic: bool,
    i: int,
) -> None:
    kernel.launch(activations, packed[i % len(packed)], None, out, workspace, ctas, programmatic)


def graph_of(call: Callable[[int], object], calls: int) -> torch.cuda.CUDAGraph:
    """A graph of call(0), call(1), ..; call(0) has run before, outside of it: what is initialised once is not captured."""
    call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i)
    return graph


def replay(graphs: dict[str, torch.cuda.CUDAGraph]) -> dict[str, float]:
    """Microseconds of a replay, the median; the graphs take turns, and the first turn warms up."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(1 + REPLAYS):
        for name, graph in graphs.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn:
                times[name].append(begin.elapsed_time(end) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def read_rate() -> float:
    """Bytes per second that a sum over 4 GB reads."""
    numbers = torch.randn(2**30, device="cuda")
    graph = graph_of(lambda i: numbers.sum(), 5)
    seconds = replay({"sum": graph})["sum"] / 5 / 1e6
    return numbers.numel() * 4 / seconds


if __name__ == "__main__":
    sys.exit(main())
