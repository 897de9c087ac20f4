"""From a configuration to work on a stream: machine code loaded once, workspaces that no two launches share, and the launch itself.

    configuration, dtype, device ─► jit.py ─► load: function of the driver, CTAs that fit ─┐
    activations, packed weight, bias, out ─────────────────────────────────────────────────┴─► launch ─► torch's current stream

A launch needs a workspace in which CTAs that share an output tile meet:

    partial sums   float32, undefined before and after      torch.empty for each launch, so the allocator orders their reuse by stream, and
                                                            gives a captured launch memory of its graph
    counters       int32, zero before and after: the last   kept, as zeroing them would cost each launch as much as another kernel;
                   CTA of a tile sets its counter back      never shared by launches that may run at the same time

Counters are handed out once and never again: to a stream, whose launches follow each other, or to one capture on a stream, whose graph
may be replayed anywhere, beside anything. They come from memory of our own, 1 MiB at a time. Tensors would not do: what a tensor
allocates under capture belongs to the graph's pool, and inductor's graphs refuse a pool in which a tensor survives that is no output.
A capture takes 4 KiB for each stream it uses, mostly; they stay taken when the graph is gone. Graphs that are captured from one another's
memory pool must not be replayed at once, as torch says; those that are not may.

Streams are told apart by their handle, as torch's allocator does.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from marlinctl.kernels import jit
from marlinctl.kernels.configurations import Configuration, group_shift
from marlinctl.pack.types import PackedLinear, PackedSparseLinear

CHUNK_COUNTERS = 2**18  # that are allocated at a time
FEWEST_COUNTERS = 2**10  # that a stream or capture is given, so that it rarely needs more later
ALIGNMENT = 16  # bytes: every pointer that a kernel is given


@dataclass(frozen=True, slots=True)
class LoadedKernel:
    """A configuration on one device, ready to launch."""

    configuration: Configuration
    dtype: torch.dtype  # of activations and output
    device: torch.device  # with its index
    function: Any  # CUfunction of the driver
    context: Any  # CUcontext, the device's primary one
    resident: int  # CTAs that a multiprocessor holds at once
    multiprocessors: int
    registers: int  # of a thread
    local_bytes: int  # of a thread: 0, or registers were spilled

    @property
    def name(self) -> str:
        return f"{self.configuration.name} {str(self.dtype)[6:]}"

    def ctas(self, m: int, n: int, k: int, per_multiprocessor: int) -> int:
        """The grid that puts so many CTAs on each multiprocessor, as far as there is work for them."""
        return min(self.multiprocessors * per_multiprocessor, self.configuration.units(m, n, k))


def architecture_of(device: torch.device) -> str:
    """The architecture, one of jit.ARCHITECTURES, whose machine code this GPU runs. ValueError where there is none."""
    major, minor = torch.cuda.get_device_capability(device)
    if major == 8:
        return "sm_89" if minor >= 9 else "sm_86" if minor >= 6 else "sm_80"  # machine code runs on later minor versions too
    if (major, minor) == (9, 0):
        return "sm_90a"
    name = torch.cuda.get_device_name(device)
    raise ValueError(f"the kernels need a GPU of compute capability 8.0 to 9.0, and {name} ({device}) has {major}.{minor}")


def load(configuration: Configuration, dtype: torch.dtype, device: torch.device, folder: Path) -> LoadedKernel:
    """The kernel, compiled or taken from the cache in `folder`, and loaded once for each configuration, dtype and device.

    Raises:
        ValueError: the device is no GPU that the kernels run on, or the configuration needs more shared memory than it has.
        RuntimeError: a CUDA graph is being captured, or the driver refuses; what jit.cubin raises.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    key = (configuration, dtype, index)
    known = _loaded.get(key)
    if known is None:
        with _lock:
            known = _loaded.get(key) or _load(configuration, dtype, torch.device("cuda", index), folder)
            _loaded[key] = known
    return known


_loaded: dict[tuple[Configuration, torch.dtype, int], LoadedKernel] = {}
_lock = threading.Lock()


def _load(configuration: Configuration, dtype: torch.dtype, device: torch.device, folder: Path) -> LoadedKernel:
    architecture = architecture_of(device)
    if not configuration.fits(architecture):
        raise ValueError(f"{configuration.name} does not fit {architecture}: it takes {configuration.shared_bytes} bytes of shared memory")
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            what = "compiled or loaded while a CUDA graph is captured: call it once with as many rows before the capture"
            raise RuntimeError(f"{configuration.name} cannot be {what}")
        code = jit.cubin(f"{configuration.kernel}.cu", configuration.defines(dtype), architecture, folder)
        torch.zeros(1, device=device)  # torch makes the device's primary context, and makes it current
        driver = _driver()
        context = done(driver.cuDevicePrimaryCtxRetain(done(driver.cuDeviceGet(device.index))))
        library = done(driver.cuLibraryLoadData(code, [], [], 0, [], [], 0))
        function = done(driver.cuKernelGetFunction(done(driver.cuLibraryGetKernel(library, configuration.kernel.encode()))))
        attribute = driver.CUfunction_attribute
        size = configuration.shared_bytes
        done(driver.cuFuncSetAttribute(function, attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, size))
        resident = done(driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(function, configuration.threads, size))
        registers = done(driver.cuFuncGetAttribute(attribute.CU_FUNC_ATTRIBUTE_NUM_REGS, function))
        local_bytes = done(driver.cuFuncGetAttribute(attribute.CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES, function))
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return LoadedKernel(configuration, dtype, device, function, context, resident, multiprocessors, registers, local_bytes)


def launch(
    kernel: LoadedKernel,
    activations: Tensor,  # [M, K], contiguous, M > 0
    p: PackedLinear | PackedSparseLinear,
    bias: Tensor | None,  # [N]
    out: Tensor,  # [M, N], contiguous; all of it is written
    ctas: int,  # 1 .. units of the product
    workspace: tuple[Tensor, Tensor] | None = None,
) -> None:
    """out = activations . weightᵀ + bias, on torch's current stream of the tensors' device.

    A caller that looks into the workspace brings its own: partial_floats(ctas) float32, and output_tiles(M, N) int32, all zero.
    N and K must be multiples of 8. ValueError for tensors that the kernel would read wrongly.
    """
    configuration, (m, k) = kernel.configuration, activations.shape
    weights = (p.qweight, p.meta) if isinstance(p, PackedSparseLinear) else (p.qweight,)
    if configuration.sparse != isinstance(p, PackedSparseLinear):
        raise ValueError(f"{configuration.name} does not multiply with {type(p).__name__}")
    if k != p.in_features or tuple(out.shape) != (m, p.out_features) or k % 8 or p.out_features % 8 or m < 1:
        shapes = f"activations {list(activations.shape)} and out {list(out.shape)}"
        raise ValueError(f"{shapes} do not belong to N={p.out_features}, K={p.in_features}, multiples of 8")
    if not 1 <= ctas <= configuration.units(m, p.out_features, k):
        raise ValueError(f"{ctas} CTAs for {configuration.units(m, p.out_features, k)} units of work")
    for tensor in (activations, *weights, p.scales, out, *(() if bias is None else (bias,))):
        if tensor.device != kernel.device or not tensor.is_contiguous() or tensor.data_ptr() % ALIGNMENT:
            raise ValueError(f"a tensor {list(tensor.shape)} on {tensor.device} is not contiguous, aligned and on {kernel.device}")
    if not activations.dtype == out.dtype == kernel.dtype or (bias is not None and bias.dtype != kernel.dtype):
        raise ValueError(f"activations, bias and out must be {kernel.dtype}")
    multiply(kernel, activations, weights, p.scales, bias, out, group_shift(p.group_size, k), ctas, workspace)


def multiply(
    kernel: LoadedKernel,
    activations: Tensor,
    weights: tuple[Tensor, ...],
    scales: Tensor,
    bias: Tensor | None,
    out: Tensor,
    shift: int,  # of configurations.group_shift
    ctas: int,
    workspace: tuple[Tensor, Tensor] | None = None,
) -> None:
    """launch without its checks: for the operators, which have made theirs."""
    device = kernel.device
    if torch.cuda.current_device() != device.index:
        with torch.cuda.device(device):
            multiply(kernel, activations, weights, scales, bias, out, shift, ctas, workspace)
        return
    mine = _mine
    if device.index not in mine.bound:  # a thread that torch has given no work yet has no context
        done(_driver().cuCtxSetCurrent(kernel.context))
        mine.bound.add(device.index)
    (m, k), n, configuration = activations.shape, out.shape[1], kernel.configuration
    stream = torch.cuda.current_stream(device).cuda_stream
    if workspace is None:
        partials = torch.empty(configuration.partial_floats(ctas), dtype=torch.float32, device=device)
        counters = _counters_of(device.index).of(stream, configuration.output_tiles(m, n))
    else:
        partials, counters = workspace[0], workspace[1].data_ptr()
    pointers = [
        activations.data_ptr(),
        *(tensor.data_ptr() for tensor in weights),
        scales.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        partials.data_ptr(),
        counters,
    ]
    arguments = mine.sparse if configuration.sparse else mine.dense
    arguments.pack(*pointers, m, n, k, shift)
    done(
        _driver().cuLaunchKernel(
            kernel.function, ctas, 1, 1, configuration.threads, 1, 1, configuration.shared_bytes, stream, arguments.address, 0
        )
    )


class _Arguments:
    """The arguments of a launch in one buffer, and the array of their addresses that the driver wants: made once, filled each time."""

    def __init__(self, pointers: int) -> None:
        layout = struct.Struct(f"{pointers}Q3Ii")  # .., m, n, k, group_shift
        buffer = ctypes.create_string_buffer(layout.size)
        start = ctypes.addressof(buffer)
        places = [start + 8 * i for i in range(pointers)]
        places += [start + 8 * pointers + 4 * i for i in range(4)]
        self._addresses = (ctypes.c_void_p * len(places))(*places)
        self.address = ctypes.addressof(self._addresses)  # the driver copies the arguments before the launch returns
        self.pack = partial(layout.pack_into, buffer, 0)


class _Mine(threading.local):
    """What each thread has for itself: the driver reads arguments while other threads run."""

    def __init__(self) -> None:
        self.dense, self.sparse = _Arguments(7), _Arguments(8)
        self.bound: set[int] = set()  # devices whose context has been current here


_mine = _Mine()


class Counters:
    """The counters of one device, all zero: a piece for each stream, and one for each capture on a stream."""

    def __init__(self, zeroed: Callable[[int], int], capture_of: Callable[[int], int | None]) -> None:
        self._zeroed = zeroed  # so many bytes of memory, as their address
        self._capture_of = capture_of  # what is captured on a stream, by a number that no other capture has
        self._of_stream: dict[int, tuple[int, int]] = {}  # stream -> address, counters
        self._of_capture: dict[int, tuple[int, int, int]] = {}  # stream -> the last capture on it, address, counters
        self._next, self._left = 0, 0
        self._lock = threading.Lock()

    def of(self, stream: int, count: int) -> int:
        """The address of at least `count` counters for a launch on this stream, now."""
        capture = self._capture_of(stream)
        if capture is None:
            address, there = self._of_stream.get(stream, (0, 0))
            if there < count:
                address, there = self._of_stream[stream] = self._take(count)
            return address
        last, address, there = self._of_capture.get(stream, (None, 0, 0))
        if last != capture or there < count:
            address, there = self._take(count)
            self._of_capture[stream] = (capture, address, there)
        return address

    def _take(self, count: int) -> tuple[int, int]:
        """A piece that nobody had before: a power of two of counters, so that what is outgrown sums up to less than what is used."""
        size = max(FEWEST_COUNTERS, 1 << (count - 1).bit_length())
        with self._lock:
            if size > self._left:
                chunk = max(CHUNK_COUNTERS, size)
                self._next, self._left = self._zeroed(4 * chunk), chunk
            address = self._next
            self._next, self._left = address + 4 * size, self._left - size
            return address, size


_counters: dict[int, Counters] = {}


def _counters_of(index: int) -> Counters:
    found = _counters.get(index)
    if found is None:
        with _lock:
            found = _counters.setdefault(index, Counters(_zeroed, _capture_of))
    return found


def _capture_of(stream: int) -> int | None:
    """The capture that records what is launched on torch's current stream, which is `stream`."""
    if not torch.cuda.is_current_stream_capturing():
        return None
    _, capture, *_ = done_all(_driver().cuStreamGetCaptureInfo(stream))
    return int(capture)


def _zeroed(size: int) -> int:
    """Memory of the current device, as torch's allocator takes it under capture: from the driver, with the capture looking away."""
    driver = _driver()
    mode = done(driver.cuThreadExchangeStreamCaptureMode(driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED))
    try:
        address = done(driver.cuMemAlloc(size))
        stream = done(driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING.value))
        done(driver.cuMemsetD32Async(address, 0, size // 4, stream))
        done(driver.cuStreamSynchronize(stream))
        done(driver.cuStreamDestroy(stream))
    finally:
        done(driver.cuThreadExchangeStreamCaptureMode(mode))
    return int(address)


def _driver() -> ModuleType:
    global _driver_module
    if _driver_module is None:
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise jit.CompilerMissing(f"the package cuda-bindings cannot be imported: {error}") from error
        _driver_module = driver
    return _driver_module


_driver_module: ModuleType | None = None


def done_all(result: tuple[Any, ...]) -> list[Any]:
    """What a driver call gives, or its error as an exception."""
    status, *values = result
    if int(status) != 0:
        raise RuntimeError(f"the CUDA driver reports {status.name}")
    return values


def done(result: tuple[Any, ...]) -> Any:
    """The first of what a driver call gives; None for a call that gives nothing."""
    values = done_all(result)
    return values[0] if values else None
