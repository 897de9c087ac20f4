"""Functions of the driver: the machine code that a GPU runs, loaded, and enqueued on a stream with its arguments."""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from marlinctl.kernels import jit
from marlinctl.kernels.driver import done, driver

NEWER = {10: "sm_100", 11: "sm_110", 12: "sm_120"}  # by major version; machine code runs on later minor versions, 10.3 and 12.1


@dataclass(frozen=True, slots=True, eq=False)
class Function:
    """A function of the driver on one device."""

    handle: Any  # CUfunction
    context: Any  # CUcontext, the device's primary one
    device: torch.device  # with its index
    threads: int
    shared_bytes: int
    resident: int  # CTAs that a multiprocessor holds at once
    registers: int  # of a thread
    local_bytes: int  # of a thread: 0, or registers were spilled
    overlaps: bool  # whether it may begin before the kernel before it on the stream has ended


def architecture_of(device: torch.device) -> str:
    """The architecture, one of jit.ARCHITECTURES, whose machine code this GPU runs. ValueError where there is none."""
    major, minor = torch.cuda.get_device_capability(device)
    architecture = architecture_for(major, minor)
    if architecture is None:
        name = torch.cuda.get_device_name(device)
        raise ValueError(f"the kernels need a GPU of compute capability 8.0 to 12.x, and {name} ({device}) has {major}.{minor}")
    return architecture


def architecture_for(major: int, minor: int) -> str | None:
    """The same of a compute capability, which can be asked for without CUDA; None where no kernel is made for it."""
    if major == 8:
        return "sm_89" if minor >= 9 else "sm_86" if minor >= 6 else "sm_80"  # machine code runs on later minor versions too
    return "sm_90a" if (major, minor) == (9, 0) else NEWER.get(major)


def checked_architecture(device: torch.device) -> str:
    """`architecture_of`, where compiler and driver are there and belong together. Nothing is compiled, or put on the GPU.

    Raises:
        ValueError: no kernel is made for this GPU.
        jit.CompilerMissing, jit.DriverTooOld: no kernel can be compiled here, or what is compiled cannot be loaded.
    """
    architecture = architecture_of(device)
    require_driver()
    return architecture


def require_driver() -> None:
    """Refuses a driver that may not load what NVRTC compiles. Raises jit.CompilerMissing, jit.DriverTooOld."""
    known = done(driver().cuDriverGetVersion())
    jit.refuse_old_driver((known // 1000, known % 1000 // 10))


def load_function(
    sources: Path, name: str, defines: tuple[str, ...], architecture: Callable[[torch.device], str],
    threads: int, shared_bytes: int, device: torch.device, folder: Path,
) -> Function:  # fmt: skip
    """The function `name` of name.cu in the folder `sources`, compiled or taken from the cache in `folder`.

    architecture: says which of a device, or why there is none.
    """
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            what = "compiled or loaded while a CUDA graph is captured: call it once with as many rows before the capture"
            raise RuntimeError(f"{name} ({', '.join(defines)}) cannot be {what}")
        code = jit.cubin(f"{name}.cu", defines, architecture(device), folder, sources)
        torch.zeros(1, device=device)  # torch makes the device's primary context, and makes it current
        cuda = driver()
        context = done(cuda.cuDevicePrimaryCtxRetain(done(cuda.cuDeviceGet(device.index))))
        library = done(cuda.cuLibraryLoadData(code, [], [], 0, [], [], 0))
        handle = done(cuda.cuKernelGetFunction(done(cuda.cuLibraryGetKernel(library, name.encode()))))
        attribute = cuda.CUfunction_attribute
        done(cuda.cuFuncSetAttribute(handle, attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes))
        resident = done(cuda.cuOccupancyMaxActiveBlocksPerMultiprocessor(handle, threads, shared_bytes))
        registers = done(cuda.cuFuncGetAttribute(attribute.CU_FUNC_ATTRIBUTE_NUM_REGS, handle))
        local_bytes = done(cuda.cuFuncGetAttribute(attribute.CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES, handle))
    overlaps = torch.cuda.get_device_capability(device) >= (9, 0)
    return Function(handle, context, device, threads, shared_bytes, resident, registers, local_bytes, overlaps)


def enqueue(function: Function, ctas: int, stream: int, arguments: Arguments, *, overlap: bool, cluster: int = 1) -> None:
    """The device of the function is torch's current one."""
    mine = _mine
    make_current(function)
    if not overlap and cluster == 1:
        sizes = (ctas, 1, 1, function.threads, 1, 1, function.shared_bytes)
        done(driver().cuLaunchKernel(function.handle, *sizes, stream, arguments.address, 0))
        return
    config = mine.configs.get((function, overlap, cluster))
    if config is None:
        config = mine.configs[function, overlap, cluster] = _config(function, overlap, cluster)
    config.gridDimX, config.hStream = ctas, stream
    done(driver().cuLaunchKernelEx(config, function.handle, arguments.address, 0))


def make_current(function: Function) -> None:
    """The context of its device: a thread that torch has given no work yet has none."""
    if function.device.index not in _mine.bound:
        done(driver().cuCtxSetCurrent(function.context))
        _mine.bound.add(function.device.index)


def _config(function: Function, overlap: bool, cluster: int) -> Any:
    """A launch that may begin before the kernel before it has ended, or in clusters; grid and stream are filled in later."""
    cuda = driver()
    attributes = []
    if overlap:
        attributes.append(cuda.CUlaunchAttribute())
        attributes[-1].id = cuda.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attributes[-1].value.programmaticStreamSerializationAllowed = 1
    if cluster > 1:
        attributes.append(cuda.CUlaunchAttribute())
        attributes[-1].id = cuda.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        size = attributes[-1].value.clusterDim
        size.x, size.y, size.z = cluster, 1, 1
    config = cuda.CUlaunchConfig()
    config.gridDimY = config.gridDimZ = config.blockDimY = config.blockDimZ = 1
    config.blockDimX, config.sharedMemBytes = function.threads, function.shared_bytes
    config.attrs, config.numAttrs = attributes, len(attributes)
    return config


class Arguments:
    """The arguments of a launch in one buffer, and the array of their addresses that the driver wants: made once, filled each time."""

    def __init__(self, pointers: int, sizes: int) -> None:
        layout = struct.Struct(f"{pointers}Q{sizes}Ii")  # .., m, n, k, whole, group_shift
        buffer = ctypes.create_string_buffer(layout.size)
        start = ctypes.addressof(buffer)
        places = [start + 8 * i for i in range(pointers)]
        places += [start + 8 * pointers + 4 * i for i in range(sizes + 1)]
        self._addresses = (ctypes.c_void_p * len(places))(*places)
        self.address = ctypes.addressof(self._addresses)  # the driver copies the arguments before the launch returns
        self.pack = partial(layout.pack_into, buffer, 0)

    def begin_with(self, activations: int, weights: int) -> None:
        """The first two arguments are at these addresses instead: tensor maps, where kernels for Hopper have them."""
        self._addresses[0], self._addresses[1] = activations, weights


class _Mine(threading.local):
    """What each thread has for itself."""

    def __init__(self) -> None:
        self.configs: dict[tuple[Function, bool, int], Any] = {}  # of launches that overlap, or in clusters of so many CTAs
        self.bound: set[int | None] = set()  # devices whose context has been current here


_mine = _Mine()
