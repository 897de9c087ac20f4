"""Products with int8 activations on a real GPU: every configuration that fits, those of mma.sync on Hopper too, and the operator as a model
calls it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from marlinctl.kernels import dispatch, jit, ops
from marlinctl.kernels.activations import round_activations_for_tiles
from marlinctl.kernels.configurations import (
    A8_FACTORED_SM80,
    A8_FACTORED_SM90,
    A8_SM80,
    A8_SM90,
    SPARSE_A8_FACTORED_SM90,
    Configuration,
    group_shift,
)
from marlinctl.kernels.factored import factored_scales
from marlinctl.kernels.functions import architecture_of
from marlinctl.kernels.int8_metadata import metadata_for_int8
from marlinctl.kernels.launch import load, multiply
from marlinctl.kernels.linear import MarlinLinear, SparseMarlinLinear
from marlinctl.kernels.ops import marlin_gemm, sparse_marlin_gemm
from marlinctl.kernels.prepare import Multiplied, prepare
from marlinctl.kernels.reference import gemm_rounded
from marlinctl.kernels.rounding import round_on_gpu
from marlinctl.pack.types import PackedLinear, PackedSparseLinear
from marlinctl.quantize.activations import group_of
from marlinctl.quantize.scheme import Rounding
from tests.kernels.built import GPU_CACHE
from tests.kernels.software_kernel import random_packed
from tests.kernels.test_gpu import Linear, error_of

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

ROUNDINGS: tuple[Rounding, ...] = ("int8", "int8-128")
WAYS: tuple[tuple[Rounding, bool], ...] = (("int8", False), ("int8-128", False), ("int8", True))  # with factored weights or without
ways = pytest.mark.parametrize(("rounding", "factored"), WAYS, ids=["tokens", "groups", "factored"])
GATES = {torch.float16: 1e-3, torch.bfloat16: 5e-3}


@pytest.fixture(autouse=True)
def gpu(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An error of an earlier kernel shows in the test that made it."""
    monkeypatch.setenv("MARLINCTL_CACHE", str(GPU_CACHE))
    if not torch.cuda.is_available():
        pytest.fail("no CUDA device: tests with the marker gpu need one")
    if torch.cuda.get_device_capability() not in ((8, 0), (8, 6), (8, 9), (9, 0)):
        pytest.skip("products have int8 activations on Ampere, Ada and Hopper")
    torch.manual_seed(0)
    yield
    torch.cuda.synchronize()


def architecture() -> str:
    return architecture_of(torch.device("cuda", torch.cuda.current_device()))


def packed(linear: Linear) -> PackedLinear:
    assert isinstance(linear.p, PackedLinear)
    return linear.p


def linear_of(n: int, k: int, group_size: int, factored: bool) -> Linear:
    """Dense, and where asked for with scales that are integers times one scale for each output."""
    linear = Linear(False, n, k, group_size)
    if factored:
        p, weight = random_packed(A8_FACTORED_SM90[0], n, k, group_size, seed=n + k)
        assert isinstance(p, PackedLinear)
        linear.p = replace(p, qweight=p.qweight.cuda(), scales=p.scales.cuda())
        linear.weight, linear.tensors = weight.cuda(), (linear.p.qweight, linear.p.scales)
    return linear


def has_eight_bits(linear: Linear, m: int, rounding: Rounding, factored: bool) -> bool:
    """Whether the table multiplies so many tokens with 8-bit activations."""
    choice = dispatch.choose(architecture(), False, m, linear.n, linear.k, rounding, factored)
    return choice is not None and choice.configuration.int8


def call(linear: Linear, x: Tensor, rounding: Rounding, factored: bool, bias: Tensor | None = None, overlap: bool = True) -> Tensor:
    more = factored_scales(packed(linear)) if factored else None
    assert not factored or more is not None
    out: Tensor = marlin_gemm(x, *linear.tensors, linear.n, linear.group_size, bias, overlap, rounding, more)
    return out


@pytest.mark.parametrize("configuration", [*A8_SM80, *A8_FACTORED_SM80, *A8_SM90, *A8_FACTORED_SM90], ids=lambda c: c.name)
def test_every_configuration_in_every_way_of_sharing(configuration: Configuration) -> None:
    """If this failed, a product would be wrong for some group size, number of tokens or way in which CTAs share tiles."""
    device = torch.device("cuda", torch.cuda.current_device())
    if not configuration.fits(architecture()):
        pytest.skip(f"{configuration.name} does not fit {architecture()}")
    for n, k, group_size in ((192, 576, 64), (576, 1152, 128), (448, 640, 32), (1024, 2048, -1)):
        linear = linear_of(n, k, group_size, configuration.factored)
        shift, scales = group_shift(packed(linear).group_size, k), linear.tensors[1]
        if configuration.factored:
            found = factored_scales(packed(linear))
            assert found is not None
            scales = found
        for rounding in ROUNDINGS[:1] if configuration.factored else ROUNDINGS:
            group = group_of(rounding)
            kernel = load(configuration, torch.float16, device, jit.default_folder(), shift, group is not None)
            for m in (1, 61, 300):
                x = linear.inputs(m, torch.float16)
                rounded, exact = round_activations_for_tiles(x, group), gemm_rounded(x, packed(linear), group).double()
                for sharing in configuration.sharings:
                    out = torch.full((m, n), torch.nan, dtype=torch.float16, device="cuda")
                    grid = kernel.grid(m, n, k, 1, sharing)
                    multiply(kernel, rounded.codes, (linear.tensors[0], rounded.scales), scales, None, out, shift, grid)
                    assert error_of(out, exact) <= GATES[torch.float16], f"M={m} N={n} K={k} {group_size} {rounding} {sharing}"


@pytest.mark.parametrize("configuration", [A8_SM80[2], A8_FACTORED_SM80[2]], ids=lambda c: c.name)
def test_rounding_and_a_product_with_mma_sync_that_overlap(configuration: Configuration) -> None:
    """If this failed, the product would read activations or scales of tokens before the kernel before it has written them."""
    device = torch.device("cuda", torch.cuda.current_device())
    linear = linear_of(4096, 4096, 128, configuration.factored)
    scales = factored_scales(packed(linear)) if configuration.factored else linear.tensors[1]
    assert scales is not None
    for rounding in ROUNDINGS[:1] if configuration.factored else ROUNDINGS:
        group = group_of(rounding)
        kernel = load(configuration, torch.bfloat16, device, jit.default_folder(), 3, group is not None)
        for m in (64, 200):
            x, bias = linear.inputs(m, torch.bfloat16), torch.randn(4096, device="cuda").bfloat16()
            expected, grid = None, kernel.grid(m, 4096, 4096, 1)
            for i in range(20):
                out = torch.full((m, 4096), torch.nan, dtype=torch.bfloat16, device="cuda")
                rounded = round_on_gpu(x * 1, group, overlap=i > 0)
                multiply(kernel, rounded.codes, (linear.tensors[0], rounded.scales), scales, bias, out, 3, grid, overlap=i > 0)
                expected = out if expected is None else expected
                assert torch.equal(out, expected), f"{rounding} M={m}, call {i}"
            assert expected is not None
            assert error_of(expected, gemm_rounded(x, packed(linear), group, bias).double()) <= GATES[torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@ways
def test_the_operator(rounding: Rounding, factored: bool, dtype: torch.dtype) -> None:
    """If this failed, a model with 8-bit activations would compute something else than `eval` on a CPU says."""
    for n, k, group_size in ((80, 64, 32), (70, 100, -1), (896, 18432, 128), (28672, 4096, 128)):
        linear = linear_of(n, k, group_size, factored)
        for m in (1, 7, 64, 129, 1000):
            x, bias = linear.inputs(m, dtype), torch.randn(n, device="cuda").to(dtype)
            out, exact = call(linear, x, rounding, factored, bias), gemm_rounded(x, packed(linear), group_of(rounding), bias).double()
            with_16_bits = linear.exact(x, bias)
            expected = exact if has_eight_bits(linear, m, rounding, factored) else with_16_bits
            assert error_of(out, expected) <= GATES[dtype], f"M={m} N={n} K={k} group_size={group_size}"
            assert torch.equal(out, call(linear, x, rounding, factored, bias)), f"M={m} N={n} K={k}: two calls differ"
    assert has_eight_bits(linear, m, rounding, factored), "the last of these products"
    assert error_of(out, with_16_bits) > error_of(out, exact)


@ways
def test_activations_of_a_mean_and_with_outliers(rounding: Rounding, factored: bool) -> None:
    """If this failed, sums would not be exact where activations are shifted, or where one of them is a hundred times the others."""
    linear = linear_of(28672, 4096, 128, factored)
    assert has_eight_bits(linear, 1024, rounding, factored)
    shifted = linear.inputs(1024, torch.float16) + 1
    outliers = linear.inputs(1024, torch.float16)
    outliers[:, 7] *= 100
    for x in (shifted, outliers):
        assert error_of(call(linear, x, rounding, factored), gemm_rounded(x, packed(linear), group_of(rounding)).double()) <= 1e-3


@ways
def test_graphs_streams_and_overlap(rounding: Rounding, factored: bool) -> None:
    """If this failed, a product would read activations before they are rounded, or share its counters with another stream."""
    linear = linear_of(4096, 4096, 128, factored)
    x, more = linear.inputs(1024, torch.float16), factored_scales(packed(linear)) if factored else None
    assert has_eight_bits(linear, 1024, rounding, factored)

    def product(x: Tensor) -> Tensor:
        out: Tensor = marlin_gemm(x, *linear.tensors, linear.n, linear.group_size, None, True, rounding, more)
        return out

    chain = [x]
    for _ in range(4):
        chain.append(product(chain[-1] / 64))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x
        for _ in range(4):
            y = product(y / 64)
    for _ in range(20):
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, chain[-1])
    streams = [torch.cuda.Stream() for _ in range(3)]
    expected, outs = product(x), []
    torch.cuda.synchronize()
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                outs.append(product(x))
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected) for out in outs)


@pytest.mark.parametrize("factored", [False, True])
def test_a_compiled_module(factored: bool) -> None:
    """If this failed, torch.compile would break the graph at a linear with 8-bit activations, or lose its rounding."""
    linear = linear_of(6144, 4096, 128, factored)
    module = MarlinLinear(packed(linear), None, "int8")
    x = linear.inputs(1024, torch.float16)
    assert has_eight_bits(linear, 1024, "int8", factored)
    plain = module(x)
    assert (module.factored is not None) == factored
    assert torch.equal(torch.compile(module, fullgraph=True)(x), plain)
    assert error_of(plain, gemm_rounded(x, packed(linear), None).double()) <= 1e-3
    torch.library.opcheck(marlin_gemm, (x, *linear.tensors, linear.n, linear.group_size, None, False, "int8", module.factored))


@ways
def test_a_token_that_is_no_number(rounding: Rounding, factored: bool) -> None:
    """If this failed, an overflow before a linear would disappear in its rounding."""
    linear = linear_of(4096, 4096, 128, factored)
    x = linear.inputs(1024, torch.float16)
    assert has_eight_bits(linear, 1024, rounding, factored)
    x[3, 100], x[5] = torch.inf, 0
    out = call(linear, x, rounding, factored)
    assert out[3].isnan().all() and not out[5].any() and out[[0, 1, 2, 4, 1023]].isfinite().all()


@ways
def test_prepared_kernels_are_all_that_a_capture_needs(rounding: Rounding, factored: bool) -> None:
    """If this failed, a server would compile, or stop, under the capture of its first graph."""
    prepare([Multiplied(False, 4096, 4096, 128, torch.float16, rounding, factored)], torch.device("cuda"))
    linear = linear_of(4096, 4096, 128, factored)
    more = factored_scales(packed(linear)) if factored else None
    for m in (1, 48, 100, 256, 2000):
        x, graph = linear.inputs(m, torch.float16), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            marlin_gemm(x, *linear.tensors, linear.n, linear.group_size, None, True, rounding, more)


def test_rounding_waits_for_what_wrote_its_input() -> None:
    """If this failed, activations would be rounded before the kernel before has written them."""
    source = torch.randn(2048, 8192, device="cuda").half()
    for _ in range(20):
        written = source * 2
        rounded = round_on_gpu(written, None, overlap=True)
        assert torch.equal(rounded.codes, round_on_gpu(source, None).codes)


# 2:4 weights


def sparse_linear_of(n: int, k: int, group_size: int) -> tuple[PackedSparseLinear, Tensor, Tensor]:
    """With scales that are integers times one scale for each output: those once more, and metadata in the order of int8 products."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("8-bit products with 2:4 weights need Hopper")
    p, _ = random_packed(SPARSE_A8_FACTORED_SM90[0], n, k, group_size, seed=n + k)
    assert isinstance(p, PackedSparseLinear)
    p = replace(p, qweight=p.qweight.cuda(), meta=p.meta.cuda(), scales=p.scales.cuda())
    factored = factored_scales(p)
    assert factored is not None
    return p, factored, metadata_for_int8(p.meta)


@pytest.mark.parametrize("configuration", SPARSE_A8_FACTORED_SM90, ids=lambda c: c.name)
def test_sparse_weights_in_every_way_of_sharing(configuration: Configuration) -> None:
    """If this failed, the metadata or the operands of wgmma.sp would lie elsewhere than in the software GPU, or an edge be wrong."""
    device = torch.device("cuda", torch.cuda.current_device())
    for n, k, group_size in ((192, 576, 64), (576, 1152, 128), (448, 640, 32), (1024, 2048, -1)):
        p, factored, meta = sparse_linear_of(n, k, group_size)
        shift = group_shift(p.group_size, k)
        kernel = load(configuration, torch.float16, device, jit.default_folder(), shift)
        for m in (1, 61, 300):
            x = torch.randn(m, k, device="cuda").half()
            rounded, exact = round_activations_for_tiles(x, None, sparse=True), gemm_rounded(x, p, None).double()
            for sharing in configuration.sharings:
                out = torch.full((m, n), torch.nan, dtype=torch.float16, device="cuda")
                grid = kernel.grid(m, n, k, 1, sharing)
                multiply(kernel, rounded.codes, (p.qweight, meta, rounded.scales), factored, None, out, shift, grid)
                assert error_of(out, exact) <= GATES[torch.float16], f"M={m} N={n} K={k} {group_size} {sharing}"


@pytest.fixture
def all_in_8_bits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Configuration]:
    """A table that multiplies 2:4 weights with 8-bit activations from 64 tokens on, whatever was measured."""
    configuration = next(c for c in SPARSE_A8_FACTORED_SM90 if c.tokens == 128 and c.paired)
    rows = (dispatch.Row(63, 4096, 4096, None), dispatch.Row(1024, 4096, 4096, dispatch.Choice(configuration, 1)))
    tables = dispatch.tables() | {("sm_90a", dispatch.SPARSE_FACTORED): dispatch.Table(None, rows)}
    monkeypatch.setattr(dispatch, "tables", lambda: tables)
    for known in (dispatch.choose, ops._route):
        known.cache_clear()
    yield configuration
    for known in (dispatch.choose, ops._route):
        known.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_operator_with_sparse_weights(all_in_8_bits: Configuration, dtype: torch.dtype) -> None:
    """If this failed, a 2:4 model with 8-bit activations would compute something else than `eval` on a CPU says."""
    for n, k, group_size in ((80, 64, 32), (70, 100, -1), (896, 18432, 128), (28672, 4096, 128)):
        p, factored, meta = sparse_linear_of(n, k, group_size)
        operands = (p.qweight, p.meta, p.scales, n, group_size)
        for m in (7, 64, 129, 1000):
            x, bias = torch.randn(m, k, device="cuda").to(dtype), torch.randn(n, device="cuda").to(dtype)
            out = sparse_marlin_gemm(x, *operands, bias, True, "int8", factored, meta)
            exact, plain = gemm_rounded(x, p, None, bias).double(), sparse_marlin_gemm(x, *operands, bias)
            assert error_of(out, exact if m >= 64 else plain.double()) <= GATES[dtype], f"M={m} N={n} K={k} group_size={group_size}"
            assert torch.equal(out, sparse_marlin_gemm(x, *operands, bias, True, "int8", factored, meta)), "two calls differ"
            assert torch.equal(sparse_marlin_gemm(x, *operands, bias, True, "int8", factored), plain), "without metadata: 16 bits"


def test_a_sparse_module_in_a_graph_and_compiled(all_in_8_bits: Configuration) -> None:
    """If this failed, a served 2:4 model would lose its rounding, or read activations before they are rounded."""
    p, _, _ = sparse_linear_of(4096, 4096, 128)
    module = SparseMarlinLinear(p, None, "int8")
    x = torch.randn(1024, 4096, device="cuda").half()
    plain = module(x)
    assert module.factored is not None and module.int8_meta is not None
    assert error_of(plain, gemm_rounded(x, p, None).double()) <= 1e-3
    assert torch.equal(torch.compile(module, fullgraph=True)(x), plain)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = module(x)
    for _ in range(20):
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, plain)
    torch.library.opcheck(
        sparse_marlin_gemm, (x, p.qweight, p.meta, p.scales, 4096, 128, None, False, "int8", module.factored, module.int8_meta)
    )
