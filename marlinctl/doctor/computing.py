"""Does this machine multiply right? torch on the CPU and on each GPU, NVRTC, the kernels, and the packed formats through the emulator.

Runs as the child process of child.py, one JSON line as each check starts and one for each result, so that a crash can be located.
The matrices hold small integers: every partial sum is a whole number below 256, which bfloat16 holds exactly, and Python's own integers
say what must come out, to the last bit.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from marlinctl.doctor.driver import gpu as missing_gpu
from marlinctl.doctor.places import shared_memory
from marlinctl.doctor.result import Check
from marlinctl.errors import number_of
from marlinctl.system.console import gibibytes
from marlinctl.system.driver import OLDEST_DRIVER, Driver, find_driver, no_gpu

if TYPE_CHECKING:
    import torch

    from marlinctl.pack.types import PackedLinear, PackedSparseLinear

SIZE = 16  # of the matrices: 16 products of at most 3 * 4 each, so no sum exceeds 192
OLDEST_CAPABILITY = (8, 0)  # of the CUDA kernels: mma.m16n8k16, cp.async, mma.sp


def main() -> None:
    """Every check to stdout, a line each."""
    _started("torch")
    try:
        import torch
    except Exception as error:  # noqa: BLE001  whatever a broken installation raises is the finding
        cause = (str(error).splitlines() or [""])[0]
        _emit(Check("torch", "fail", f"import torch: {type(error).__name__}: {cause}", "pip install --force-reinstall torch"))
        return
    for check in cpu(torch.__version__):
        _emit(check)
    _started("gpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        _emit(missing_gpu(no_gpu(find_driver(), torch.version.cuda or None, os.environ.get("CUDA_VISIBLE_DEVICES"))))
    for index in range(count):
        _emit(gpu(index))
    for check in shared_memory(count):
        _emit(check)
    _started("nvrtc")
    capability = torch.cuda.get_device_capability(0) if count else None
    compiler = nvrtc(capability, find_driver())
    _emit(compiler)
    if count and compiler.status == "ok":
        _started("kernels")
        _emit(kernels(torch.device("cuda", 0)))
    _started("marlin")
    _emit(packed(sparse=False))
    _started("sparse-marlin")
    _emit(packed(sparse=True))


def cpu(version: str) -> Iterator[Check]:
    import torch

    from marlinctl.system.devices import cpu_has_bf16

    wrong = [str(dtype).removeprefix("torch.") for dtype in _dtypes() if not _right("cpu", dtype)]
    if wrong:
        cure = "pip install --force-reinstall torch; if that does not help, suspect memory or processor"
        yield Check("torch", "fail", f"{version}: a product on the CPU is wrong in {', '.join(wrong)}", cure)
        return
    unit = "the processor multiplies bfloat16 itself" if cpu_has_bf16() else "bfloat16 is emulated, so runs on the CPU take float32"
    yield Check("torch", "ok", f"{version}: products on the CPU are right, {number_of(torch.get_num_threads(), 'thread')}; {unit}")


def gpu(index: int) -> Check:
    """One device that torch sees: it must multiply, because `--device auto` would take it."""
    import torch

    name = f"cuda:{index}"
    try:
        facts = torch.cuda.get_device_properties(index)
        described = f"{name} {facts.name}, compute capability {facts.major}.{facts.minor}, {gibibytes(facts.total_memory, 0)}"
        wrong = [str(dtype).removeprefix("torch.") for dtype in (*_dtypes(), torch.float16) if not _right(name, dtype)]
    except RuntimeError as error:  # no kernel image for this device, a device that fell off the bus, memory taken by others
        cause = (str(error).splitlines() or [""])[0]
        return Check("gpu", "fail", f"{name}: {cause}", "see nvidia-smi; until it works, give --device cpu")
    if wrong:
        return Check("gpu", "fail", f"{described}: a product is wrong in {', '.join(wrong)}", "give --device cpu; suspect the device")
    if (facts.major, facts.minor) < OLDEST_CAPABILITY:
        return Check("gpu", "warn", f"{described}: too old for the CUDA kernels", "compress on it; to run the kernels take 8.0 or newer")
    return Check("gpu", "ok", f"{described}: products are right")


def nvrtc(capability: tuple[int, int] | None, found: Driver) -> Check:
    """The dense kernel is compiled for this device as it will be when it is wanted, past the cache; its driver must know this CUDA."""
    import torch

    from marlinctl.kernels import jit
    from marlinctl.kernels.configurations import DENSE

    if capability is None:
        return Check("nvrtc", "ok", "not needed without a GPU")
    name = f"sm_{capability[0]}{capability[1]}"
    if name not in jit.ARCHITECTURES:
        known = ", ".join(jit.ARCHITECTURES)
        return Check(
            "nvrtc", "warn", f"the CUDA kernels are not made for {name}, but for {known}", "only the CUDA kernels need another GPU"
        )
    configuration = next(one for one in DENSE if one.fits(name))
    cure = "pip install cuda-bindings nvidia-cuda-nvrtc; until then only the CUDA kernels are missing"
    try:
        with tempfile.TemporaryDirectory() as folder:
            code = jit.cubin("marlin_sm80.cu", configuration.defines(torch.float16), name, Path(folder))
        if found.cuda is not None:
            jit.refuse_old_driver(found.cuda)
    except (jit.CompilerMissing, jit.CompilationFailed) as error:
        return Check("nvrtc", "warn", " ".join(str(error).split()), cure)
    except jit.DriverTooOld as error:
        return Check("nvrtc", "warn", str(error), f"install driver {OLDEST_DRIVER.get(error.needed, 'of a newer branch')} or newer")
    found_out = f"the dense kernel compiles for {name}, {len(code):,} bytes of machine code"
    if name in jit.BLACKWELL:
        cure = "run `marlinctl bench --check --configurations` and report its output together with that of `marlinctl doctor --json`"
        return Check("nvrtc", "warn", f"{found_out}; compiled for Blackwell, never run by us", cure)
    return Check("nvrtc", "ok", found_out)


def kernels(device: torch.device) -> Check:
    """Both kinds of tiles through the operators, as a model calls them: compiled if they are not in the cache, run, against float64."""
    from marlinctl.verify.kernels import CudaKernel, compared, multiply

    kernel = CudaKernel("the operators", device, multiply)
    readings = {}
    try:
        for sparse in (False, True):
            readings["2:4" if sparse else "dense"] = compared(kernel, *_tiles(sparse=sparse))
    except (RuntimeError, ValueError, OSError) as error:
        cause = (str(error).splitlines() or [""])[0]
        cure = "clear the folder of compiled kernels, update the driver; until it works, compress on the CPU"
        return Check("kernels", "fail", f"{device}: {cause}", cure)
    wrong = [f"{kind}, off by {reading.error:.1e}" for kind, reading in readings.items() if not reading.error <= reading.allowed]
    if wrong:
        cure = "marlinctl bench --check gives details; report it, and do not serve from this GPU"
        return Check("kernels", "fail", f"{device}: a product of the INT4 kernels is wrong: {', '.join(wrong)}", cure)
    largest = max(reading.error for reading in readings.values())
    return Check("kernels", "ok", f"{device}: the INT4 kernels, dense and 2:4, multiply right: error {largest:.1e}")


def packed(*, sparse: bool) -> Check:
    """128 x 128 weights packed, read lane by lane as a kernel reads them, and multiplied; against codes times scales in float64."""
    from marlinctl.verify.kernels import worst

    name = "sparse-marlin" if sparse else "marlin"
    error, allowed = worst(*_tiles(sparse=sparse), [0, 1])
    if not error <= allowed:  # NaN too
        found = f"packed and read as a kernel reads it, the product is off by {error:.1e}; rounding explains {allowed:.1e}"
        return Check(
            name, "fail", found, "pip install --force-reinstall torch marlinctl; if it stays, report it: nothing packed here is sound"
        )
    return Check(name, "ok", f"128 x 128 weights packed, read as a kernel reads them, multiplied: relative error {error:.1e}")


def _tiles(*, sparse: bool) -> tuple[PackedLinear | PackedSparseLinear, torch.Tensor]:
    """128 x 128 weights as the packer writes them, and as they are in float32."""
    import torch

    from marlinctl.pack.marlin import pack_marlin
    from marlinctl.pack.sparse_marlin import pack_sparse_marlin
    from marlinctl.quantize.types import QuantizedLinear
    from marlinctl.sparsify.types import SparseQuantizedLinear

    group_size = 64 if sparse else 32
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (128, 128), dtype=torch.int8, generator=generator)
    scales = torch.rand(128, 128 // group_size, generator=generator).to(torch.float16)
    keep = torch.zeros(128, 32, 4, dtype=torch.bool)
    keep.scatter_(-1, torch.rand(128, 32, 4, generator=generator).argsort(-1)[..., :2], True)
    tiles: PackedLinear | PackedSparseLinear
    if sparse:
        codes = codes * keep.reshape(128, 128)
        tiles = pack_sparse_marlin(SparseQuantizedLinear(codes, scales, group_size, keep.reshape(128, 128)))
    else:
        tiles = pack_marlin(QuantizedLinear(codes, scales, group_size))
    return tiles, codes.float() * scales.float().repeat_interleave(group_size, 1)


def _dtypes() -> tuple[torch.dtype, ...]:
    import torch

    return torch.float32, torch.float64, torch.bfloat16


def _right(device: str, dtype: torch.dtype) -> bool:
    """Whether the product of two matrices of small integers is the one of Python's integers."""
    import torch

    left = [[(3 * i + 5 * j) % 7 - 3 for j in range(SIZE)] for i in range(SIZE)]
    right = [[(5 * i + 2 * j) % 9 - 4 for j in range(SIZE)] for i in range(SIZE)]
    expected = [[sum(left[i][k] * right[k][j] for k in range(SIZE)) for j in range(SIZE)] for i in range(SIZE)]
    product = torch.tensor(left, dtype=dtype, device=device) @ torch.tensor(right, dtype=dtype, device=device)
    return bool(product.double().cpu().tolist() == expected)


def _started(name: str) -> None:
    print(json.dumps({"started": name}), flush=True)  # noqa: T201  the protocol of child.py


def _emit(check: Check) -> None:
    line = {"name": check.name, "status": check.status, "found": check.found, "cure": check.cure}
    print(json.dumps(line), flush=True)  # noqa: T201  the protocol of child.py
