"""Loading and launching: what the driver is told, and which launches may meet in a workspace."""

from __future__ import annotations

import ctypes
import itertools
import random
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from marlinctl.kernels import jit, tensor_maps
from marlinctl.kernels import launch as launcher
from marlinctl.kernels.configurations import DENSE, DENSE_SM90, SPARSE, Configuration, Grid
from marlinctl.kernels.functions import architecture_of
from marlinctl.kernels.launch import CHUNK_COUNTERS, FEWEST_COUNTERS, Counters, launch, load
from tests.kernels.software_driver import SoftwareDriver, Status, install, software_kernel
from tests.kernels.software_kernel import aligned, random_packed


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> SoftwareDriver:
    return install(monkeypatch)


@pytest.mark.parametrize("configuration", [DENSE[0], SPARSE[0]], ids=lambda c: c.name)
def test_a_launch_multiplies(configuration: Configuration, driver: SoftwareDriver, tmp_path: Path) -> None:
    """If this failed, an argument would reach the kernel in a wrong place or width, or a launch would leave its counters used."""
    m, n, k, group_size, ctas = 9, 192, 320, 64, 4
    kernel = software_kernel(configuration, torch.float16, tmp_path)
    p, weight = random_packed(configuration, n, k, group_size, seed=1)
    activations, bias = (aligned(torch.randn(*shape).to(torch.float16)) for shape in ((m, k), (n,)))
    for with_bias in (bias, None):
        out = aligned(torch.full((m, n), torch.nan, dtype=torch.float16))
        launch(kernel, activations, p, with_bias, out, Grid(ctas))
        exact = activations.double() @ weight.double().T + (0 if with_bias is None else bias.double())
        assert torch.allclose(out.double(), exact, rtol=1e-3, atol=1e-3)
    first, second = driver.launches
    assert (first.m, first.n, first.k, first.group_shift, first.ctas) == (m, n, k, 2, ctas)
    assert (first.threads, first.shared) == (configuration.threads, configuration.shared_bytes)
    assert first.counters == second.counters, "launches on one stream follow each other"
    assert not any(ctypes.string_at(first.counters, 4 * configuration.output_tiles(m, n)))
    assert driver.bound == ["context"], "bound once for each thread"


@pytest.mark.parametrize("overlaps", [True, False])
def test_kernels_overlap_where_that_is_asked_for_and_there_is_hopper(overlaps: bool, driver: SoftwareDriver) -> None:
    """If this failed, every call would pay 2 us, or a kernel would read weights that the one before it still changes."""
    kernel = software_kernel(DENSE[0], torch.float16, None, overlaps=overlaps)
    p, _ = random_packed(DENSE[0], 64, 128, 32, seed=0)
    x, out = aligned(torch.zeros(3, 128, dtype=torch.float16)), aligned(torch.zeros(3, 64, dtype=torch.float16))
    launch(kernel, x, p, None, out, Grid(1))
    launch(kernel, x, p, None, out, Grid(1), overlap=True)
    driver.stream = 9
    launch(kernel, x, p, None, out, Grid(1), overlap=True)
    assert [entry.overlap for entry in driver.launches] == [False, overlaps, overlaps]
    assert [entry.stream for entry in driver.launches] == [7, 7, 9]
    assert {(entry.ctas, entry.threads, entry.shared) for entry in driver.launches} == {(1, DENSE[0].threads, DENSE[0].shared_bytes)}


CLUSTERED = next(c for c in DENSE_SM90 if c.name == "wgmma-m64n128k256x3w")


def test_a_map_is_made_once_for_activations_at_an_address(driver: SoftwareDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, every call would cost the host microseconds, read the activations of another, or maps pile up."""
    kernel = software_kernel(CLUSTERED, torch.float16, None)
    p, _ = random_packed(CLUSTERED, 192, 512, 128, seed=0)
    first, second = (aligned(torch.zeros(3, 512, dtype=torch.float16)) for _ in range(2))
    out = aligned(torch.zeros(3, 192, dtype=torch.float16))
    for x in (first, second, first, first[:2], first):
        launch(kernel, x, p, None, out[: len(x)], Grid(1))
    assert [entry.activations for entry in driver.launches] == [x.data_ptr() for x in (first, second, first, first, first)]
    assert driver.maps == 3, "two addresses, one of them with two sizes"
    monkeypatch.setattr(tensor_maps, "MOST_MAPS", 3)
    for x in (second[:1], first):
        launch(kernel, x, p, None, out[: len(x)], Grid(1))
    assert driver.maps == 5, "the others were let go"
    assert driver.weight_maps == 1, "one weight, in boxes of one size"
    other, _ = random_packed(CLUSTERED, 192, 512, 128, seed=1)
    for weight in (other, p, other):
        launch(kernel, first, weight, None, out, Grid(1))
    assert driver.weight_maps == 2
    assert [entry.qweight for entry in driver.launches][-3:] == [weight.qweight.data_ptr() for weight in (other, p, other)]


def test_clusters_are_asked_for(driver: SoftwareDriver) -> None:
    """If this failed, CTAs would wait for others that are in no cluster with them, or a cluster would not begin early."""
    c = CLUSTERED
    kernel = software_kernel(c, torch.float16, None, overlaps=True)
    p, _ = random_packed(c, 192, 4 * c.k_step, 128, seed=0)
    x, out = (aligned(torch.zeros(3, size, dtype=torch.float16)) for size in (4 * c.k_step, 192))
    for overlap in (False, True):
        for grid in (Grid(8, cluster=4), Grid(4, cluster=2), Grid(8)):
            launch(kernel, x, p, None, out, grid, overlap=overlap)
    assert [(entry.ctas, entry.cluster, entry.overlap) for entry in driver.launches] == [
        *((8, 4, False), (4, 2, False), (8, 1, False)),
        *((8, 4, True), (4, 2, True), (8, 1, True)),
    ]
    assert [bool(entry.partials or entry.counters) for entry in driver.launches] == [False, False, True] * 2, "a cluster needs no workspace"


def test_a_cluster_multiplies(driver: SoftwareDriver, tmp_path: Path) -> None:
    """If this failed, the way from a grid to a cluster would be broken somewhere between the launcher and the kernel."""
    c = CLUSTERED
    kernel = software_kernel(c, torch.float16, tmp_path)
    p, weight = random_packed(c, 192, 768, 128, seed=1)
    activations, out = aligned(torch.randn(9, 768).to(torch.float16)), aligned(torch.full((9, 192), torch.nan, dtype=torch.float16))
    launch(kernel, activations, p, None, out, Grid(6, cluster=3))
    assert torch.allclose(out.double(), activations.double() @ weight.double().T, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("grid", [Grid(6, cluster=2), Grid(10, cluster=5), Grid(4, 1, cluster=2), Grid(2, cluster=0), Grid(32, cluster=16)])
def test_clusters_that_share_no_tile_evenly_are_refused(grid: Grid, driver: SoftwareDriver) -> None:
    """If this failed, a cluster would add up parts of different tiles, or the GPU would refuse it without saying why."""
    c = CLUSTERED
    p, _ = random_packed(c, 192, 16 * c.k_step, 128, seed=0)
    x, out = (aligned(torch.zeros(3, size, dtype=torch.float16)) for size in (16 * c.k_step, 192))
    with pytest.raises(ValueError, match=r"CTAs with . whole|does not share 2 tiles of 16 steps in clusters"):
        launch(software_kernel(c, torch.float16, None), x, p, None, out, grid)
    with pytest.raises(ValueError, match="does not share"):
        launch(software_kernel(DENSE[0], torch.float16, None), x, p, None, out, Grid(4, cluster=2))
    assert not driver.launches


def test_group_sizes_that_are_compiled_in(driver: SoftwareDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, a kernel that is compiled for groups of 128 would multiply weights in groups of 32, with the wrong scales."""
    loaded = []
    for_32 = software_kernel(DENSE[0], torch.float16, None, shift=1)
    monkeypatch.setattr(launcher, "load", lambda *key: loaded.append(key[-2]) or for_32)
    x, out = aligned(torch.zeros(3, 128, dtype=torch.float16)), aligned(torch.zeros(3, 64, dtype=torch.float16))
    p, _ = random_packed(DENSE[0], 64, 128, 32, seed=0)
    launch(for_32, x, p, None, out, Grid(1))
    assert not loaded
    launch(software_kernel(DENSE[0], torch.float16, None, shift=3), x, p, None, out, Grid(1))
    assert loaded == [1]


def test_what_a_kernel_would_read_wrongly_is_refused(driver: SoftwareDriver) -> None:
    """If this failed, a mistake of the caller would read foreign memory."""
    kernel = software_kernel(DENSE[0], torch.float16, None)
    p, _ = random_packed(DENSE[0], 64, 128, 32, seed=0)
    x, out = torch.zeros(3, 128, dtype=torch.float16), torch.zeros(3, 64, dtype=torch.float16)
    odd, _ = random_packed(DENSE[0], 68, 128, 32, seed=0)
    sparse, _ = random_packed(SPARSE[0], 64, 128, 32, seed=0)
    shifted = torch.zeros(3 * 128 + 1, dtype=torch.float16)[1:].view(3, 128)
    for arguments, what in [
        ((x[:, :64], p, None, out, Grid(1)), "do not belong to N=64, K=128"),
        ((x, p, None, out[:2], Grid(1)), "do not belong"),
        ((x[:0], p, None, out[:0], Grid(1)), "do not belong"),
        ((x, odd, None, torch.zeros(3, 68, dtype=torch.float16), Grid(1)), "multiples of 8"),
        ((x, sparse, None, out, Grid(1)), "does not multiply with PackedSparseLinear"),
        ((x, p, None, out, Grid(0)), "0 CTAs with 0 whole tiles"),
        ((x, p, None, out, Grid(2)), "2 CTAs with 0 whole tiles each, for 1 tiles of 1 units"),
        ((x, p, None, out, Grid(1, 2)), "1 CTAs with 2 whole tiles"),
        ((shifted, p, None, out, Grid(1)), "not contiguous, aligned"),
        ((torch.zeros(128, 3, dtype=torch.float16).T, p, None, out, Grid(1)), "not contiguous, aligned"),
        ((x, p, torch.zeros(64), out, Grid(1)), "must be torch.float16"),
        ((x.to(torch.bfloat16), p, None, out, Grid(1)), "must be torch.float16"),
        ((x.to("meta"), p, None, out, Grid(1)), "on meta is not"),
    ]:
        with pytest.raises(ValueError, match=what):
            launch(kernel, *arguments)
    assert not driver.launches


def test_an_error_of_the_driver_is_an_error(driver: SoftwareDriver) -> None:
    """If this failed, a launch that did not happen would leave whatever lay in the output."""
    driver.status = Status.CUDA_ERROR_LAUNCH_FAILED
    p, _ = random_packed(DENSE[0], 64, 64, 32, seed=0)
    x = torch.zeros(1, 64, dtype=torch.float16)
    with pytest.raises(RuntimeError, match="CUDA_ERROR_LAUNCH_FAILED"):
        launch(software_kernel(DENSE[0], torch.float16, None), x, p, None, x.clone(), Grid(1))


def test_threads_do_not_share_arguments(driver: SoftwareDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, a thread could overwrite what the driver is about to read of another's launch."""
    seen = []
    original = driver.cuLaunchKernel
    both = threading.Barrier(2)

    def slow(*arguments: Any) -> tuple[Status]:
        both.wait(timeout=20)  # both have packed their arguments
        seen.append(original(*arguments))
        return (Status.CUDA_SUCCESS,)

    monkeypatch.setattr(driver, "cuLaunchKernel", slow)
    kernel = software_kernel(DENSE[0], torch.float16, None)
    p, _ = random_packed(DENSE[0], 64, 64, 32, seed=0)

    def work(m: int) -> None:
        x = torch.zeros(m, 64, dtype=torch.float16)
        launch(kernel, x, p, None, x.clone(), Grid(1))

    threads = [threading.Thread(target=work, args=(m,)) for m in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(launched.m for launched in driver.launches) == [1, 2]
    assert driver.bound == ["context", "context"]


# Workspaces


class Memory:
    """Where counters come from: addresses that tell which chunk they lie in."""

    def __init__(self) -> None:
        self.chunks: list[int] = []

    def __call__(self, size: int) -> int:
        self.chunks.append(size)
        return len(self.chunks) << 32


def test_streams_and_captures_never_share_counters() -> None:
    """If this failed, two launches at once would count each other's CTAs: sums with parts missing, or a hang."""
    numbers = random.Random(0)
    capture: dict[int, int | None] = {1: None, 2: None, 3: None}
    captures = itertools.count()
    counters = Counters(Memory(), lambda stream: capture[stream])
    pieces: list[tuple[int, int, tuple[int, int | None]]] = []  # address, bytes, who may use it
    for _ in range(4000):
        stream = numbers.choice([1, 2, 3])
        if numbers.random() < 0.2:
            capture[stream] = next(captures) if capture[stream] is None else None
        count = numbers.choice([1, 30, 1024, 1025, 70000])
        owner = (stream, capture[stream])
        pieces.append((counters.of(stream, count), 4 * count, owner))
    pieces = sorted(set(pieces), key=lambda piece: piece[0])
    assert len({owner for _, _, owner in pieces}) > 100
    end = 0
    last: tuple[int, int | None] | None = None
    for address, size, owner in pieces:
        assert address >= end or owner == last, f"{owner} and {last} share counters"
        if address + size > end:
            end, last = address + size, owner


def test_counters_are_kept() -> None:
    """If this failed, every launch would take new memory, for ever."""
    memory = Memory()
    capture: list[int | None] = [None]
    counters = Counters(memory, lambda stream: capture[0])
    assert len({counters.of(1, 10) for _ in range(5)}) == 1
    outgrown = counters.of(1, FEWEST_COUNTERS + 1)
    assert counters.of(1, 1) == outgrown != counters.of(2, 1)
    for capture[0] in range(100):  # a graph each
        assert len({counters.of(1, 10) for _ in range(5)}) == 1
    assert len(memory.chunks) == 1, "1 MiB for a hundred graphs"
    assert counters.of(1, CHUNK_COUNTERS * 3) >> 32 == 2
    assert memory.chunks[1] == 4 * 4 * CHUNK_COUNTERS


def test_memory_for_counters_is_taken_beside_a_capture(driver: SoftwareDriver) -> None:
    """If this failed, the first launch under capture would break the capture: cuMemAlloc is forbidden in its mode."""
    driver.capture = 5
    kernel = software_kernel(DENSE[0], torch.float16, None)
    p, _ = random_packed(DENSE[0], 64, 64, 32, seed=0)
    x = torch.zeros(1, 64, dtype=torch.float16)
    for driver.capture in (5, 5, 6, None, None):
        launch(kernel, x, p, None, x.clone(), Grid(1))
    mode = SoftwareDriver.CUstreamCaptureMode
    assert driver.modes == [mode.CU_STREAM_CAPTURE_MODE_RELAXED, mode.CU_STREAM_CAPTURE_MODE_GLOBAL], "looked away, and back"
    first, again, other, eager, later = [launched.counters for launched in driver.launches]
    assert first == again and eager == later
    assert len({first, other, eager}) == 3


# Loading


def gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> torch.device:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(launcher, "_loaded", {})
    return torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("capability", "architecture"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_86"),
        ((8, 7), "sm_86"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90a"),
        ((10, 0), "sm_100"),
        ((10, 3), "sm_100"),
        ((11, 0), "sm_110"),
        ((12, 0), "sm_120"),
        ((12, 1), "sm_120"),
    ],
)
def test_every_gpu_gets_code_that_it_runs(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], architecture: str) -> None:
    """If this failed, a GPU would be given machine code of another."""
    assert architecture_of(gpu(monkeypatch, capability)) == architecture
    assert architecture in jit.ARCHITECTURES


@pytest.mark.parametrize("capability", [(7, 5), (9, 1), (13, 0)])
def test_other_gpus_are_refused(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], tmp_path: Path) -> None:
    """If this failed, an older or newer GPU would fail in the driver, with a number for a reason."""
    device = gpu(monkeypatch, capability)
    with pytest.raises(ValueError, match=rf"capability 8.0 to 12.x, and a GPU \(cuda:0\) has {capability[0]}.{capability[1]}"):
        load(DENSE[0], torch.float16, device, tmp_path)


def test_a_configuration_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """If this failed, the launch would fail for want of shared memory."""
    with pytest.raises(ValueError, match=f"{DENSE[5].name} does not fit sm_86"):
        load(DENSE[5], torch.float16, gpu(monkeypatch, (8, 6)), tmp_path)


def test_nothing_is_loaded_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """If this failed, a first call under capture would compile for seconds and then break the capture."""
    device = gpu(monkeypatch, (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda device: threading.Lock())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="call it once with as many rows before the capture"):
        load(DENSE[0], torch.float16, device, tmp_path)


def test_a_kernel_is_loaded_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """If this failed, every call would load machine code; dtypes and devices have their own."""
    gpu(monkeypatch, (9, 0))
    loads = []
    monkeypatch.setattr(launcher, "_load", lambda *key: loads.append(key[:3]) or SimpleNamespace(key=key))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    first = load(DENSE[0], torch.float16, torch.device("cuda", 0), tmp_path)
    assert load(DENSE[0], torch.float16, torch.device("cuda", 0), tmp_path) is first
    current = load(DENSE[0], torch.float16, torch.device("cuda"), tmp_path)
    assert load(DENSE[0], torch.float16, torch.device("cuda", 1), tmp_path) is current
    load(DENSE[0], torch.bfloat16, torch.device("cuda", 0), tmp_path)
    assert load(DENSE[0], torch.float16, torch.device("cuda", 0), tmp_path, -1) is first, "one for all group sizes"
    hopper = load(DENSE_SM90[0], torch.float16, torch.device("cuda", 0), tmp_path, 3)
    assert load(DENSE_SM90[0], torch.float16, torch.device("cuda", 0), tmp_path, -1) is not hopper, "one for each"
    del loads[-2:]
    assert loads == [
        (DENSE[0], torch.float16, torch.device("cuda", 0)),
        (DENSE[0], torch.float16, torch.device("cuda", 1)),
        (DENSE[0], torch.bfloat16, torch.device("cuda", 0)),
    ]
