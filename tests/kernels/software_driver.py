"""A CUDA driver that launches on the software GPU: what marlinctl/kernels/launch.py asks of the real one, on the CPU.

`install` puts it in the place of cuda-bindings and of the few functions of torch.cuda that a launch calls; CPU tensors then take the
way of CUDA tensors, from the arguments in their buffer to the kernel's own text, built by a C++ compiler.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from marlinctl.kernels import driver as cuda_driver
from marlinctl.kernels import functions, repack, rounding
from marlinctl.kernels import launch as launcher
from marlinctl.kernels.configurations import Configuration
from marlinctl.kernels.functions import Function
from marlinctl.kernels.launch import UNPACK_THREADS, LoadedKernel, unpack_defines, unpack_shared_bytes
from tests.kernels.software_kernel import Arguments, compiled, library_of

DEVICE = torch.device("cpu")
KINDS: dict[str, Any] = {field[0]: field[1] for field in Arguments._fields_}
SPARSE = [name for name in KINDS if name != "token_scales"]  # the arguments of each kernel, in order
DENSE = [name for name in SPARSE if name != "meta"]
SPARSE_INT8 = [*SPARSE[:3], "token_scales", *SPARSE[3:]]
REPACK = ["activations", "qweight", "n", "m", "k", "whole"]  # words, tiles, N, K/8, strides of rows and of columns
ROUND = ["activations", "out", "partials", "m", "k"]  # x, codes, scales
UNPACK = ["qweight", "meta", "scales", "out", "n", "k", "group_shift"]


class Status(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_LAUNCH_FAILED = 719


@dataclass
class SoftwareDriver:
    """The driver's calls, each with the values of cuda-bindings; `launches` are told in order."""

    stream: int = 7
    capture: int | None = None  # what is captured on the stream
    status: Status = Status.CUDA_SUCCESS  # of the next launch
    overlap: bool = False  # whether the launch under way may begin early
    cluster: int = 1  # CTAs of a cluster of it
    maps: int = 0  # tensor maps of activations that were made
    weight_maps: int = 0
    launches: list[SimpleNamespace] = field(default_factory=list)
    memory: list[Any] = field(default_factory=list)
    modes: list[object] = field(default_factory=list)  # of capture, as the thread changed them
    bound: list[object] = field(default_factory=list)  # contexts that were made current

    class CUstreamCaptureMode(IntEnum):
        CU_STREAM_CAPTURE_MODE_GLOBAL = 0
        CU_STREAM_CAPTURE_MODE_RELAXED = 2

    class CUstream_flags(IntEnum):
        CU_STREAM_NON_BLOCKING = 1

    def cuCtxSetCurrent(self, context: object) -> tuple[Status]:
        self.bound.append(context)
        return (Status.CUDA_SUCCESS,)

    def cuThreadExchangeStreamCaptureMode(self, mode: object) -> tuple[Status, object]:
        self.modes.append(mode)
        return Status.CUDA_SUCCESS, self.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL

    def cuMemAlloc(self, size: int) -> tuple[Status, int]:
        self.memory.append(ctypes.create_string_buffer(b"\xff" * size, size))
        return Status.CUDA_SUCCESS, ctypes.addressof(self.memory[-1])

    def cuMemsetD32Async(self, address: int, value: int, count: int, stream: object) -> tuple[Status]:
        assert value == 0
        ctypes.memset(address, 0, 4 * count)
        return (Status.CUDA_SUCCESS,)

    def cuStreamCreate(self, flags: int) -> tuple[Status, str]:
        assert flags == self.CUstream_flags.CU_STREAM_NON_BLOCKING, "a blocking stream waits for a capture on the default one"
        return Status.CUDA_SUCCESS, "stream"

    def cuStreamSynchronize(self, stream: str) -> tuple[Status]:
        return (Status.CUDA_SUCCESS,)

    cuStreamDestroy = cuStreamSynchronize

    def cuStreamGetCaptureInfo(self, stream: int) -> tuple[Any, ...]:
        assert self.capture is not None
        return Status.CUDA_SUCCESS, 1, self.capture, None, [], [], 0

    def cuLaunchKernel(
        self, function: Any, x: int, y: int, z: int, threads: int, ty: int, tz: int, shared: int, stream: int, params: int, extra: int
    ) -> tuple[Status]:
        assert (y, z, ty, tz, extra) == (1, 1, 1, 1, 0)
        addresses = (ctypes.c_void_p * len(function.names)).from_address(params)
        given = {name: KINDS[name].from_address(address).value for name, address in zip(function.names, addresses, strict=True)}
        if function.tokens:  # what is there instead of the addresses of activations and weights are maps, which begin with them
            assert addresses[0] is not None and addresses[1] is not None
            sizes = (ctypes.c_uint64 * 4).from_address(addresses[0])
            assert list(sizes)[1:] == [given["k"], given["m"], function.tokens], "the map is of another matrix, or another box"
            sizes_of_weights = [-(-given["n"] // 64), -(-given["k"] // 64) * 64 // function.tile_k, *function.box]
            assert list((ctypes.c_uint64 * 5).from_address(addresses[1]))[1:] == sizes_of_weights, "the map is of other weights"
        how = {"threads": threads, "shared": shared, "stream": stream, "overlap": self.overlap, "cluster": self.cluster}
        self.launches.append(SimpleNamespace(**given, ctas=x, **how))
        if self.status is not Status.CUDA_SUCCESS:
            return (self.status,)
        if function.library is not None:
            order = (ctypes.c_int * x)(*range(x))
            function.library.launch(Arguments(**given), order, x, self.cluster, ctypes.c_bool(False), ctypes.c_bool(False))
        return (Status.CUDA_SUCCESS,)

    cuuint32_t = cuuint64_t = int
    CUtensorMapDataType = SimpleNamespace(
        CU_TENSOR_MAP_DATA_TYPE_UINT16="uint16", CU_TENSOR_MAP_DATA_TYPE_UINT8="uint8", CU_TENSOR_MAP_DATA_TYPE_INT32="int32"
    )
    CUtensorMapInterleave = SimpleNamespace(CU_TENSOR_MAP_INTERLEAVE_NONE="none")
    CUtensorMapSwizzle = SimpleNamespace(CU_TENSOR_MAP_SWIZZLE_128B="128 bytes", CU_TENSOR_MAP_SWIZZLE_NONE="none")
    CUtensorMapL2promotion = SimpleNamespace(CU_TENSOR_MAP_L2_PROMOTION_L2_128B="128 bytes")
    CUtensorMapFloatOOBfill = SimpleNamespace(CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE="zeros")

    def cuTensorMapEncodeTiled(
        self, kind: str, rank: int, address: int, sizes: list[int], strides: list[int], box: list[int], steps: list[int], *how: str
    ) -> tuple[Status, SimpleNamespace]:
        """Not the driver's 128 bytes, but what launches are looked at for: address, sizes and box; of activations K, M and tokens, of
        weights blocks, rows, and the box's blocks and rows.
        """
        assert self.bound, "the driver may want a context"
        assert steps == [1] * rank and how[0] == "none" and how[2:] == ("128 bytes", "zeros") and address % 16 == 0
        if kind == "int32":
            words, *rest = sizes
            assert (rank, words, box[0], how[1]) == (3, 128, 128, "none") and strides == [512, 512 * sizes[1]] and max(box) <= 256
            numbers = (address, *rest, *box[1:])
            self.weight_maps += 1
        else:
            size = {"uint16": 2, "uint8": 1}[kind]
            k, m = sizes
            assert (rank, how[1]) == (2, "128 bytes") and strides == [size * k]
            assert box[0] == 128 // size and box[1] <= 256 and strides[0] % 16 == 0
            numbers = (address, k, m, box[1])
            self.maps += 1
        made = (ctypes.c_uint64 * len(numbers))(*numbers)
        return Status.CUDA_SUCCESS, SimpleNamespace(getPtr=lambda: ctypes.addressof(made), made=made)

    def CUlaunchAttribute(self) -> SimpleNamespace:
        return SimpleNamespace(id=None, value=SimpleNamespace(programmaticStreamSerializationAllowed=0, clusterDim=SimpleNamespace()))

    CUlaunchConfig = SimpleNamespace
    CUlaunchAttributeID = SimpleNamespace(
        CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION="programmatic stream serialization",
        CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION="cluster dimension",
    )

    def cuLaunchKernelEx(self, config: SimpleNamespace, function: Any, params: int, extra: int) -> tuple[Status]:
        attributes = {attribute.id: attribute.value for attribute in config.attrs}
        assert config.numAttrs == len(config.attrs) == len(attributes) > 0
        if (early := attributes.pop("programmatic stream serialization", None)) is not None:
            self.overlap = bool(early.programmaticStreamSerializationAllowed)
        if (cluster := attributes.pop("cluster dimension", None)) is not None:
            self.cluster = cluster.clusterDim.x
            assert (cluster.clusterDim.y, cluster.clusterDim.z) == (1, 1) and config.gridDimX % self.cluster == 0
        assert not attributes
        threads = (config.blockDimX, config.blockDimY, config.blockDimZ)
        try:
            return self.cuLaunchKernel(
                function, config.gridDimX, config.gridDimY, config.gridDimZ, *threads, config.sharedMemBytes, config.hStream, params, extra
            )
        finally:
            self.overlap, self.cluster = False, 1


def install(monkeypatch: pytest.MonkeyPatch) -> SoftwareDriver:
    driver = SoftwareDriver()
    monkeypatch.setattr(cuda_driver, "_module", driver)
    monkeypatch.setattr(launcher, "_counters", {})
    monkeypatch.setattr(launcher, "_mine", launcher._Mine())
    monkeypatch.setattr(functions, "_mine", functions._Mine())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: DEVICE.index)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=driver.stream))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: driver.capture is not None)
    return driver


def software_kernel(
    configuration: Configuration,
    dtype: torch.dtype,
    folder: Path | None,
    *,
    resident: int = 1,
    multiprocessors: int = 3,
    overlaps: bool = False,
    shift: int | None = None,
    token_groups: bool = False,
) -> LoadedKernel:
    """A loaded kernel. Without a folder to build it in, its launches are told and nothing is computed."""
    where = None if folder is None else folder / f"{configuration.name}-{str(dtype)[6:]}-{shift}-{token_groups}"
    library = (
        None if where is None else library_of(configuration, dtype, where, shift=3 if shift is None else shift, token_groups=token_groups)
    )
    tokens = configuration.tokens // configuration.pair if configuration.wgmma else 0  # of a box of activations
    c, box = configuration, (configuration.blocks, configuration.k_step // configuration.tile_k)  # of a box of weights
    names = SPARSE_INT8 if c.sparse and c.int8 else SPARSE if c.sparse or c.int8 else DENSE
    handle = SimpleNamespace(library=library, names=names, tokens=tokens, tile_k=c.tile_k, box=box)
    sizes = (configuration.threads, configuration.shared_bytes, resident)
    function = Function(handle, "context", DEVICE, *sizes, registers=0, local_bytes=0, overlaps=overlaps)
    return LoadedKernel(configuration, dtype, function, multiprocessors, Path("cache"), shift, token_groups)


def software_repack(folder: Path, edit: Callable[[str], str] = lambda source: source) -> Function:
    """csrc/repack.cu, as kernels/repack.py loads it; `edit` may break its source."""
    library = compiled("repack", (*repack.DEFINES, "REPACK=1"), folder / "repack", edit)
    handle = SimpleNamespace(library=library, names=REPACK, tokens=0)
    return Function(handle, "context", DEVICE, repack.THREADS, repack.SHARED_BYTES, resident=1, registers=0, local_bytes=0, overlaps=True)


def software_round(
    dtype: torch.dtype, k: int, group: int | None, folder: Path, edit: Callable[[str], str] = lambda source: source, sparse: bool = False
) -> Function:
    """csrc/round_activations.cu, as kernels/rounding.py loads it; `edit` may break its source."""
    defines = (*rounding.defines(dtype, k, group, sparse), "ROUND=1")
    library = compiled("round_activations", defines, folder / "-".join(("round", *defines)), edit)
    handle = SimpleNamespace(library=library, names=ROUND, tokens=0)
    threads, _ = rounding.shape_of(k, group)
    return Function(handle, "context", DEVICE, threads, rounding.SHARED_BYTES, resident=1, registers=0, local_bytes=0, overlaps=True)


def software_unpack(sparse: bool, dtype: torch.dtype, folder: Path) -> Function:
    """csrc/unpack.cu, as launch.load_unpack hands it out."""
    defines = (*unpack_defines(sparse, dtype), "UNPACK=1")
    library = compiled("unpack", defines, folder / f"unpack-{sparse}-{str(dtype)[6:]}")
    handle = SimpleNamespace(library=library, names=UNPACK, tokens=0)
    return Function(
        handle, "context", DEVICE, UNPACK_THREADS, unpack_shared_bytes(sparse), resident=1, registers=0, local_bytes=0, overlaps=True
    )
