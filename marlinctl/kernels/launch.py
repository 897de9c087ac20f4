"""From a configuration to work on a stream: machine code loaded once, workspaces that no two launches share, and the launch itself.

    configuration, dtype, device ─► jit.py ─► load: function of the driver, CTAs that fit ─┐
    activations, packed weight, bias, out ─────────────────────────────────────────────────┴─► launch ─► torch's current stream
    packed weight ─► unpack: csrc/unpack.cu ───────────────────────────────────────────────────────────► the same

A launch needs a workspace in which CTAs that share an output tile meet:

    partial sums   float32, undefined before and after      torch.empty for each launch, so the allocator orders their reuse by stream, and
                                                            gives a captured launch memory of its graph
    counters       int32, zero before and after: the last   kept, as zeroing them would cost each launch as much as another kernel;
                   CTA of a tile sets its counter back      never shared by launches that may run at the same time

CTAs of a thread block cluster, pairs excepted, meet in shared memory and need none of it.

Counters are handed out once and never again: to a stream, whose launches follow each other, or to one capture on a stream, whose graph
may be replayed anywhere, beside anything. They come from memory of our own, 1 MiB at a time. Tensors would not do: what a tensor
allocates under capture belongs to the graph's pool, and inductor's graphs refuse a pool in which a tensor survives that is no output.
A capture takes 4 KiB for each stream it uses, mostly; they stay taken when the graph is gone. Graphs that are captured from one another's
memory pool must not be replayed at once, as torch says; those that are not may.

Streams are told apart by their handle, as torch's allocator does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from marlinctl.kernels import jit
from marlinctl.kernels.configurations import LARGEST_CLUSTER, NUMBERS, Configuration, Grid, Sharing, group_shift
from marlinctl.kernels.driver import done, done_all, driver
from marlinctl.kernels.functions import Arguments, Function, architecture_of, checked_architecture, enqueue, load_function, make_current
from marlinctl.kernels.tensor_maps import TensorMaps
from marlinctl.pack.types import PackedLinear, PackedSparseLinear

CHUNK_COUNTERS = 2**18  # that are allocated at a time
FEWEST_COUNTERS = 2**10  # that a stream or capture is given, so that it rarely needs more later
ALIGNMENT = 16  # bytes: every pointer that a kernel is given
UNPACK_TILES, UNPACK_THREADS = 8, 256  # of a CTA of csrc/unpack.cu: rows of words, 64 columns wide


@dataclass(frozen=True, slots=True)
class LoadedKernel:
    """A configuration on one device, ready to launch."""

    configuration: Configuration
    dtype: torch.dtype  # of activations and output
    function: Function
    multiprocessors: int
    folder: Path  # of the cache that it came from
    shift: int | None  # the group size that is compiled in, as group_shift() says it; None: all
    token_groups: bool = False  # of int8 activations: a token has a scale for each 128 of K

    def for_groups(self, shift: int) -> LoadedKernel:
        """The same for another group size."""
        if self.shift in (None, shift):
            return self
        return load(self.configuration, self.dtype, self.device, self.folder, shift, self.token_groups)

    @property
    def device(self) -> torch.device:
        return self.function.device

    @property
    def resident(self) -> int:
        """CTAs that a multiprocessor holds at once."""
        return self.function.resident

    @property
    def registers(self) -> int:
        """Of a thread."""
        return self.function.registers

    @property
    def local_bytes(self) -> int:
        """Of a thread: 0, or registers were spilled."""
        return self.function.local_bytes

    @property
    def name(self) -> str:
        return f"{self.configuration.name} {str(self.dtype)[6:]}"

    def grid(self, m: int, n: int, k: int, per_multiprocessor: int, sharing: Sharing = "striped") -> Grid:
        """With at most so many CTAs on each multiprocessor."""
        return self.configuration.grid(m, n, k, self.multiprocessors * per_multiprocessor, sharing)


def load(
    configuration: Configuration, dtype: torch.dtype, device: torch.device, folder: Path, shift: int = 3, token_groups: bool = False
) -> LoadedKernel:
    """The kernel, compiled or taken from the cache in `folder`, and loaded once for each configuration, dtype and device.

    shift: of configurations.group_shift; kernels with wgmma and for int8 activations are compiled for one group size each.
    token_groups: of kernels for int8 activations, whether a token has a scale for each 128 of K, and not one for all.

    Raises:
        ValueError: the device is no GPU that the kernels run on, or the configuration needs more shared memory than it has.
        RuntimeError: a CUDA graph is being captured, or the driver refuses; what jit.cubin raises.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    key = (configuration, dtype, index, shift if configuration.for_one_group_size else None, token_groups)
    known = _loaded.get(key)
    if known is None:
        with _lock:
            known = _loaded.get(key) or _load(configuration, dtype, torch.device("cuda", index), folder, shift, token_groups)
            _loaded[key] = known
    return known


_loaded: dict[tuple[Configuration, torch.dtype, int, int | None, bool], LoadedKernel] = {}
_lock = threading.Lock()


def _load(
    configuration: Configuration, dtype: torch.dtype, device: torch.device, folder: Path, shift: int, token_groups: bool
) -> LoadedKernel:
    architecture = architecture_of(device)
    if not configuration.fits(architecture):
        raise ValueError(f"{configuration.name} does not fit {architecture}: it takes {configuration.shared_bytes} bytes of shared memory")
    sizes = (configuration.threads, configuration.shared_bytes)
    function = load_function(
        jit.SOURCES, configuration.kernel, configuration.defines(dtype, shift, token_groups), checked_architecture, *sizes, device, folder
    )
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    compiled_in = shift if configuration.for_one_group_size else None
    return LoadedKernel(configuration, dtype, function, multiprocessors, folder, compiled_in, token_groups)


def launch(
    kernel: LoadedKernel,
    activations: Tensor,  # [M, K], contiguous, M > 0
    p: PackedLinear | PackedSparseLinear,
    bias: Tensor | None,  # [N]
    out: Tensor,  # [M, N], contiguous; all of it is written
    grid: Grid,
    workspace: tuple[Tensor, Tensor] | None = None,
    overlap: bool = False,
) -> None:
    """out = activations . weightᵀ + bias, on torch's current stream of the tensors' device.

    overlap: on Hopper the kernel may begin, and read weights, while the one before it on the stream still runs: 2 to 3 us less a call. Not
    for weights that the kernel before changes.

    grid.cluster: above 1, the CTAs of an output tile are a thread block cluster, and each has the same part of it; for wgmma alone.

    A caller that looks into the workspace brings its own: partial_floats(grid.ctas) float32, and output_tiles(M, N) int32, all zero.
    N and K must be multiples of 8. ValueError for tensors that the kernel would read wrongly.
    """
    configuration, (m, k) = kernel.configuration, activations.shape
    weights = (p.qweight, p.meta) if isinstance(p, PackedSparseLinear) else (p.qweight,)
    if configuration.sparse != isinstance(p, PackedSparseLinear):
        raise ValueError(f"{configuration.name} does not multiply with {type(p).__name__}")
    if k != p.in_features or tuple(out.shape) != (m, p.out_features) or k % 8 or p.out_features % 8 or m < 1:
        shapes = f"activations {list(activations.shape)} and out {list(out.shape)}"
        raise ValueError(f"{shapes} do not belong to N={p.out_features}, K={p.in_features}, multiples of 8")
    tiles, units = configuration.output_tiles(m, p.out_features), configuration.units(m, p.out_features, k)
    if not 1 <= grid.ctas <= units or not 0 <= grid.whole <= tiles // grid.ctas:
        raise ValueError(f"{grid.ctas} CTAs with {grid.whole} whole tiles each, for {tiles} tiles of {units} units of work")
    if grid.cluster != 1 and not (
        configuration.wgmma
        and 1 < grid.cluster <= LARGEST_CLUSTER
        and grid == Grid(tiles * grid.cluster, cluster=grid.cluster)
        and units // tiles % grid.cluster == 0
    ):
        raise ValueError(f"{configuration.name} does not share {tiles} tiles of {units // tiles} steps in clusters as {grid} says")
    for tensor in (activations, *weights, p.scales, out, *(() if bias is None else (bias,))):
        if tensor.device != kernel.device or not tensor.is_contiguous() or tensor.data_ptr() % ALIGNMENT:
            raise ValueError(f"a tensor {list(tensor.shape)} on {tensor.device} is not contiguous, aligned and on {kernel.device}")
    if not activations.dtype == out.dtype == kernel.dtype or (bias is not None and bias.dtype != kernel.dtype):
        raise ValueError(f"activations, bias and out must be {kernel.dtype}")
    shift = group_shift(p.group_size, k)
    multiply(kernel.for_groups(shift), activations, weights, p.scales, bias, out, shift, grid, workspace, overlap)


def multiply(
    kernel: LoadedKernel,
    activations: Tensor,
    weights: tuple[Tensor, ...],
    scales: Tensor,
    bias: Tensor | None,
    out: Tensor,
    shift: int,  # of configurations.group_shift
    grid: Grid,
    workspace: tuple[Tensor, Tensor] | None = None,
    overlap: bool = False,
) -> None:
    """launch without its checks, with a kernel for these groups: for the operators, which have made theirs.

    Of int8 activations: their codes [M, K'] in the order of the tile, and as weights qweight, of 2:4 what int8_metadata.metadata_for_int8
    makes of meta, and the scales of the tokens. Of factored weights: as scales what factored.factored_scales makes of them.
    """
    function, configuration = kernel.function, kernel.configuration
    device = function.device
    if torch.cuda.current_device() != device.index:
        with torch.cuda.device(device):
            multiply(kernel, activations, weights, scales, bias, out, shift, grid, workspace, overlap)
        return
    (m, k), n = activations.shape, out.shape[1]
    stream = torch.cuda.current_stream(device).cuda_stream
    partials, counters = None, 0
    if workspace is not None:
        partials, counters = workspace[0], workspace[1].data_ptr()
    elif grid.cluster == 1 or configuration.paired:
        partials = torch.empty(configuration.partial_floats(grid.ctas), dtype=torch.float32, device=device)
        counters = _counters_of(device).of(stream, configuration.output_tiles(m, n))
    given = activations.data_ptr()
    pointers = [
        given,
        *(tensor.data_ptr() for tensor in weights),
        scales.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        0 if partials is None else partials.data_ptr(),
        counters,
    ]
    arguments = _mine.of[len(weights), configuration.wgmma]
    arguments.pack(*pointers, m, n, k, grid.whole, shift)
    if configuration.wgmma:
        make_current(function)
        maps, qweight = _mine.maps, weights[0]
        rows, columns = qweight.shape
        arguments.begin_with(
            maps.of_activations(given, m, k, configuration.tokens // configuration.pair, activations.itemsize),
            maps.of_weights(qweight.data_ptr(), rows, columns, configuration.blocks, configuration.k_step // configuration.tile_k),
        )
    enqueue(function, grid.ctas, stream, arguments, overlap=overlap and function.overlaps, cluster=grid.cluster)


# A dense weight out of tiles


def unpack(
    function: Function,  # of load_unpack, for this kind of weights and dtype
    weights: tuple[Tensor, ...],  # qweight, and of 2:4 meta; contiguous, aligned
    scales: Tensor,
    dtype: torch.dtype,
    n: int,
    k: int,  # a multiple of 8, up to K'; what lies beyond the true K is zero
    shift: int,  # of configurations.group_shift
) -> Tensor:  # [N, K]
    """The weight in `dtype`, each code times its scale rounded once, on torch's current stream of the tensors' device."""
    device = scales.device
    if torch.cuda.current_device() != device.index:
        with torch.cuda.device(device):
            return unpack(function, weights, scales, dtype, n, k, shift)
    sparse = len(weights) == 2
    weight = torch.empty(n, k, dtype=dtype, device=device)
    meta = weights[1].data_ptr() if sparse else 0
    arguments = _mine.unpack
    arguments.pack(weights[0].data_ptr(), meta, scales.data_ptr(), weight.data_ptr(), n, k, shift)
    ctas = -(-n // 64) * -(-k // (UNPACK_TILES * unpack_tile(sparse)))
    enqueue(function, ctas, torch.cuda.current_stream(device).cuda_stream, arguments, overlap=False)
    return weight


def unpack_tile(sparse: bool) -> int:
    """K of a row of words."""
    return 32 if sparse else 16


def unpack_defines(sparse: bool, dtype: torch.dtype) -> tuple[str, ...]:
    return (f"NUMBER={NUMBERS[dtype]}", f"SPARSE={int(sparse)}", f"SHARED_BYTES={unpack_shared_bytes(sparse)}")


def unpack_shared_bytes(sparse: bool) -> int:
    """64 rows of the tiles' k, each a little longer, as unpack.cu says."""
    return 64 * (UNPACK_TILES * unpack_tile(sparse) * 2 + (32 if sparse else 16))


def load_unpack(sparse: bool, dtype: torch.dtype, device: torch.device, folder: Path) -> Function:
    """The function, loaded once; raises what load raises."""
    key = (sparse, dtype, device.index)
    known = _unpacks.get(key)
    if known is None:
        with _lock:
            defines, shared_bytes = unpack_defines(sparse, dtype), unpack_shared_bytes(sparse)
            known = _unpacks.get(key) or load_function(
                jit.SOURCES, "unpack", defines, checked_architecture, UNPACK_THREADS, shared_bytes, device, folder
            )
            _unpacks[key] = known
    return known


_unpacks: dict[tuple[bool, torch.dtype, int | None], Function] = {}


class _Mine(threading.local):
    """What each thread has for itself: the driver reads arguments while other threads run."""

    def __init__(self) -> None:
        self.of = {(weights, wgmma): Arguments(6 + weights, 4) for weights in (1, 2, 3) for wgmma in (False, True)}
        self.unpack, self.maps = Arguments(4, 2), TensorMaps()


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


_counters: dict[int | None, Counters] = {}


def _counters_of(device: torch.device) -> Counters:
    found = _counters.get(device.index)
    if found is None:
        with _lock:
            found = _counters.setdefault(device.index, Counters(_zeroed, _capture_of))
    return found


def _capture_of(stream: int) -> int | None:
    """The capture that records what is launched on torch's current stream, which is `stream`."""
    if not torch.cuda.is_current_stream_capturing():
        return None
    _, capture, *_ = done_all(driver().cuStreamGetCaptureInfo(stream))
    return int(capture)


def _zeroed(size: int) -> int:
    """Memory of the current device, as torch's allocator takes it under capture: from the driver, with the capture looking away."""
    cuda = driver()
    mode = done(cuda.cuThreadExchangeStreamCaptureMode(cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED))
    try:
        address = done(cuda.cuMemAlloc(size))
        stream = done(cuda.cuStreamCreate(cuda.CUstream_flags.CU_STREAM_NON_BLOCKING.value))
        done(cuda.cuMemsetD32Async(address, 0, size // 4, stream))
        done(cuda.cuStreamSynchronize(stream))
        done(cuda.cuStreamDestroy(stream))
    finally:
        done(cuda.cuThreadExchangeStreamCaptureMode(mode))
    return int(address)
