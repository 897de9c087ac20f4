"""The operators on a real GPU: what the software GPU cannot show. `python -m pytest -m gpu tests/kernels`"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from marlinctl.kernels import dispatch, jit, ops
from marlinctl.kernels import launch as launcher
from marlinctl.kernels.configurations import DENSE, SPARSE, group_shift
from marlinctl.kernels.dispatch import Choice
from marlinctl.kernels.linear import packed_module
from marlinctl.kernels.ops import marlin_gemm, sparse_marlin_gemm
from marlinctl.pack.types import PackedLinear, PackedSparseLinear
from tests.kernels.software_kernel import random_packed
from tests.kernels.test_ops import GATES

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

DTYPES = [torch.float16, torch.bfloat16]
KINDS = [(sparse, dtype) for sparse in (False, True) for dtype in DTYPES]
IDS = [f"{'sparse' if sparse else 'dense'}-{str(dtype)[6:]}" for sparse, dtype in KINDS]
SHAPES = [(64, 48, -1), (80, 64, 32), (192, 576, 64), (576, 896, 128), (896, 18432, 128), (70, 100, -1), (576, 18432, -1)]
TOKENS = [1, 7, 17, 65, 129, 1000]


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    """An error of an earlier kernel shows in the test that made it."""
    if not torch.cuda.is_available():
        pytest.fail("no CUDA device: tests with the marker gpu need one")
    torch.manual_seed(0)
    yield
    torch.cuda.synchronize()


class Linear:
    """A random packed linear, its operator, and what it must compute."""

    def __init__(self, sparse: bool, n: int, k: int, group_size: int, device: str = "cuda") -> None:
        p, weight = random_packed(SPARSE[0] if sparse else DENSE[0], n, k, group_size, seed=n + k)
        names = ("qweight", "meta", "scales") if sparse else ("qweight", "scales")
        self.p: PackedLinear | PackedSparseLinear = replace(p, **{name: getattr(p, name).to(device) for name in names})
        self.weight = weight.to(device)
        self.tensors = tuple(getattr(self.p, name) for name in names)
        self.n, self.k, self.group_size, self.sparse = n, k, group_size, sparse
        self.operator = sparse_marlin_gemm if sparse else marlin_gemm

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.operator(x, *self.tensors, self.n, self.group_size, bias)

    def exact(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return x.double() @ self.weight.double().T + (0 if bias is None else bias.double())

    def inputs(self, m: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(m, self.k, device=self.weight.device).to(dtype)


def error_of(out: Tensor, exact: Tensor) -> float:
    return float((out.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(("sparse", "dtype"), KINDS, ids=IDS)
def test_products(sparse: bool, dtype: torch.dtype) -> None:
    """If this failed, the operator would multiply wrongly on this GPU: a race, an address, a choice of the table, or dequantizing."""
    for n, k, group_size in SHAPES:
        linear = Linear(sparse, n, k, group_size)
        for m in TOKENS:
            x, bias = linear.inputs(m, dtype), torch.randn(n, device="cuda").to(dtype)
            for with_bias in (bias, None):
                torch.full((m * n,), torch.nan, device="cuda", dtype=dtype)  # freed: what the output is likely to lie in
                out = linear(x, with_bias)
                where = f"M={m} N={n} K={k} group_size={group_size}"
                assert out.shape == (m, n) and out.dtype == dtype
                assert error_of(out, linear.exact(x, with_bias)) <= GATES[dtype], where
                assert torch.equal(out, linear(x, with_bias)), f"{where}: two calls differ"


@pytest.mark.parametrize(("sparse", "dtype"), KINDS, ids=IDS)
def test_identity_gives_the_weight(sparse: bool, dtype: torch.dtype) -> None:
    """If this failed, some weight would not be decoded exactly, by a kernel for few rows or by the one that dequantizes."""
    for group_size in (32, 64, 128, -1):
        linear = Linear(sparse, 448, 640, group_size)
        eye, expected = torch.eye(640, device="cuda", dtype=dtype), linear.weight.T.to(dtype)
        assert torch.equal(torch.cat([linear(rows) for rows in eye.split(16)]), expected)
        shift = group_shift(linear.p.group_size, 640)
        function = launcher.load_unpack(sparse, dtype, eye.device, jit.default_folder())
        weight = launcher.unpack(function, linear.tensors[:-1], linear.p.scales, dtype, 448, 640, shift)
        assert torch.equal(weight, expected.T)


def test_activations_may_lie_as_they_like() -> None:
    """If this failed, slices and transposed or misaligned activations would be read as if they were contiguous."""
    linear = Linear(False, 64, 128, 32)
    wide = torch.randn(6, 256, device="cuda").half()
    for x in (wide[:, 128:], wide[::2, :128], wide.view(128, 12).T, wide.flatten()[3:131].view(1, 128), wide[:, :128].expand(2, 6, 128)):
        assert error_of(linear(x), linear.exact(x)) < 1e-3
    assert linear(wide[:0, :128]).shape == (0, 64)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_opcheck(sparse: bool) -> None:
    """If this failed, torch would trace another operator than the one that runs on a GPU."""
    linear = Linear(sparse, 80, 128, 32)
    for m in (3, 400):
        torch.library.opcheck(linear.operator, (linear.inputs(m, torch.float16), *linear.tensors, 80, 32))


def test_calls_that_overlap() -> None:
    """If this failed, a kernel would start with activations or counters that the one before it has not finished with."""
    linear, back = Linear(False, 576, 1024, 128), Linear(True, 1024, 576, 64)

    def chain(x: Tensor, overlap: bool) -> Tensor:
        for _ in range(20):
            x = linear.operator(x, *linear.tensors, 576, 128, None, overlap)
            x = back.operator(x, *back.tensors, 1024, 64, None, overlap)
            x = x / x.abs().amax()
        return x

    for m in (1, 16, 33, 65):
        x = linear.inputs(m, torch.float16)
        expected = chain(x, False)
        assert not expected.isnan().any()
        assert all(torch.equal(chain(x, True), expected) for _ in range(10))


def test_tensors_on_the_cpu_are_refused() -> None:
    """If this failed, the kernel would read the address of another memory: an illegal access, after which nothing works."""
    linear = Linear(False, 64, 128, 32)
    with pytest.raises(ValueError, match=r"qweight must be .* on cuda:0, got .* on cpu"):
        marlin_gemm(linear.inputs(1, torch.float16), linear.tensors[0].cpu(), linear.tensors[1], 64, 32)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_streams(sparse: bool) -> None:
    """If this failed, launches on two streams would meet in one workspace."""
    linear = Linear(sparse, 576, 4096, 128)
    inputs = [linear.inputs(33, torch.float16) for _ in range(4)]
    alone = [linear(x) for x in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    together: list[list[Tensor]] = [[] for _ in inputs]
    for _ in range(50):
        for x, stream, outs in zip(inputs, streams, together, strict=True):
            with torch.cuda.stream(stream):
                outs.append(linear(x))
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected) for outs, expected in zip(together, alone, strict=True) for out in outs)


def captured(work: Callable[[], Tensor], **options: Any) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    work()  # kernels are not loaded under capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, **options):
        out = work()
    return graph, out


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("m", [1, 33, 400], ids=["one row", "many", "dequantized"])
def test_a_graph_with_other_inputs(sparse: bool, m: int) -> None:
    """If this failed, a captured model would compute with what the capture saw, or with memory that others have by now."""
    linear, square = Linear(sparse, 576, 1024, 128), Linear(sparse, 1024, 576, 64)
    x = linear.inputs(m, torch.float16)
    graph, out = captured(lambda: square(torch.nn.functional.silu(linear(x))))
    for _ in range(5):
        new = linear.inputs(m, torch.float16)
        expected = square(torch.nn.functional.silu(linear(new)))
        x.copy_(new)
        noise = [torch.full((2**20,), torch.nan, device="cuda") for _ in range(8)]  # over whatever the capture gave back
        graph.replay()
        torch.cuda.synchronize()
        del noise
        if m < 400:
            assert torch.equal(out, expected)
        else:
            assert error_of(out, expected.double()) < 1e-3  # torch.matmul may choose another kernel under capture


def test_graphs_replayed_at_once() -> None:
    """If this failed, two graphs, or a graph and a call, would meet in one workspace."""
    linear = Linear(False, 576, 4096, 128)
    inputs = [linear.inputs(33, torch.float16) for _ in range(3)]
    expected = [linear(x) for x in inputs]
    graphs = [captured(partial(linear, x)) for x in inputs[:2]]
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(50):
        for (graph, _), stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        eager = linear(inputs[2])
    torch.cuda.synchronize()
    assert torch.equal(eager, expected[2])
    assert all(torch.equal(out, wanted) for (_, out), wanted in zip(graphs, expected, strict=False))


def test_graphs_that_share_a_pool() -> None:
    """If this failed, capturing a graph for each batch size, as servers do, would damage the earlier ones."""
    linear = Linear(False, 576, 4096, 128)
    pool = torch.cuda.graph_pool_handle()
    inputs = {m: linear.inputs(m, torch.float16) for m in (64, 33, 8, 1)}

    def cloned(x: Tensor) -> Tensor:
        return linear(x).clone()

    graphs = {m: captured(partial(cloned, x), pool=pool) for m, x in inputs.items()}
    for m in (1, 64, 8, 33, 1):
        graphs[m][0].replay()
        torch.cuda.synchronize()
        assert torch.equal(graphs[m][1], linear(inputs[m]))


def test_a_kernel_is_not_loaded_under_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, a first call under capture would break it with an error of the driver's, or compile for seconds."""
    linear = Linear(False, 64, 128, 32)
    x = linear.inputs(2, torch.float16)
    unused = replace(DENSE[0], stages=2)
    monkeypatch.setattr(dispatch, "choose", lambda *_: Choice(unused, 1))
    ops._route.cache_clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x + 1  # a graph of nothing warns
        with pytest.raises(RuntimeError, match="call it once with as many rows before the capture"):
            linear(x)
    ops._route.cache_clear()


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_torch_compile(mode: str) -> None:
    """If this failed, a compiled model would break at a linear, or refuse its memory under CUDA graphs."""
    if find_spec("triton") is None:
        pytest.skip("inductor needs triton")
    linear, back = packed_module(Linear(False, 576, 1024, 128).p), packed_module(Linear(True, 1024, 576, 64).p)

    @torch.no_grad()
    def block(x: Tensor) -> Tensor:
        return x + back(torch.nn.functional.silu(linear(x)))

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, mode=mode)
    for m in (1, 1, 1, 16, 16, 16, 1):
        x = torch.randn(m, 1024, device="cuda").half()
        assert error_of(compiled(x).clone(), block(x).double()) < 1e-3


def test_a_thread_of_its_own() -> None:
    """If this failed, a server's worker thread, in which torch did nothing yet, would find no context."""
    linear = Linear(False, 64, 128, 32)
    x = linear.inputs(1, torch.float16)
    expected, found = linear(x), []
    thread = threading.Thread(target=lambda: found.append(linear(x)))
    thread.start()
    thread.join()
    assert len(found) == 1 and torch.equal(found[0], expected)


def test_several_devices() -> None:
    """If this failed, a model spread over GPUs would launch on the wrong one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    first, second = (Linear(False, 576, 1024, 128, device) for device in ("cuda:0", "cuda:1"))
    for m in (1, 400):
        x = first.inputs(m, torch.float16)
        assert torch.cuda.current_device() == 0
        out = second(x.to("cuda:1"))
        assert out.device == torch.device("cuda", 1) and torch.cuda.current_device() == 0
        assert torch.equal(out.to("cuda:0"), first(x))
    with pytest.raises(ValueError, match="on cuda:1"):
        second(x)
