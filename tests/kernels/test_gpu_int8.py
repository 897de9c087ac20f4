"""Products with int8 activations on a real GPU (Hopper): every configuration, and the operator as a model calls it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from marlinctl.kernels import dispatch, jit
from marlinctl.kernels.activations import round_activations_for_tiles
from marlinctl.kernels.configurations import A8_SM90, Configuration, group_shift
from marlinctl.kernels.launch import load, multiply
from marlinctl.kernels.linear import MarlinLinear
from marlinctl.kernels.ops import marlin_gemm
from marlinctl.kernels.prepare import Multiplied, prepare
from marlinctl.kernels.reference import gemm_rounded
from marlinctl.kernels.rounding import round_on_gpu
from marlinctl.pack.types import PackedLinear
from marlinctl.quantize.activations import group_of
from marlinctl.quantize.scheme import Rounding
from tests.kernels.test_gpu import Linear, error_of

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

ROUNDINGS: tuple[Rounding, ...] = ("int8", "int8-128")
GATES = {torch.float16: 1e-3, torch.bfloat16: 5e-3}


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    """An error of an earlier kernel shows in the test that made it."""
    if not torch.cuda.is_available():
        pytest.fail("no CUDA device: tests with the marker gpu need one")
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("kernels for int8 activations need Hopper")
    torch.manual_seed(0)
    yield
    torch.cuda.synchronize()


def packed(linear: Linear) -> PackedLinear:
    assert isinstance(linear.p, PackedLinear)
    return linear.p


def has_eight_bits(linear: Linear, m: int) -> bool:
    """Whether the table multiplies so many tokens with 8-bit activations."""
    choice = dispatch.choose("sm_90a", False, m, linear.n, linear.k, rounding=True)
    return choice is not None and choice.configuration.int8


def call(linear: Linear, x: Tensor, rounding: Rounding, bias: Tensor | None = None, overlap: bool = True) -> Tensor:
    out: Tensor = marlin_gemm(x, *linear.tensors, linear.n, linear.group_size, bias, overlap, rounding)
    return out


@pytest.mark.parametrize("configuration", A8_SM90, ids=lambda c: c.name)
def test_every_configuration_in_every_way_of_sharing(configuration: Configuration) -> None:
    """If this failed, a product would be wrong for some group size, number of tokens or way in which CTAs share tiles."""
    device = torch.device("cuda", torch.cuda.current_device())
    for n, k, group_size in ((192, 576, 64), (576, 1152, 128), (448, 640, 32), (1024, 2048, -1)):
        linear = Linear(False, n, k, group_size)
        shift = group_shift(packed(linear).group_size, k)
        for rounding in ROUNDINGS:
            group = group_of(rounding)
            kernel = load(configuration, torch.float16, device, jit.default_folder(), shift, group is not None)
            for m in (1, 61, 300):
                x = linear.inputs(m, torch.float16)
                rounded, exact = round_activations_for_tiles(x, group), gemm_rounded(x, packed(linear), group).double()
                for sharing in configuration.sharings:
                    out = torch.full((m, n), torch.nan, dtype=torch.float16, device="cuda")
                    grid = kernel.grid(m, n, k, 1, sharing)
                    multiply(kernel, rounded.codes, (linear.tensors[0], rounded.scales), linear.tensors[1], None, out, shift, grid)
                    assert error_of(out, exact) <= GATES[torch.float16], f"M={m} N={n} K={k} {group_size} {rounding} {sharing}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_the_operator(rounding: Rounding, dtype: torch.dtype) -> None:
    """If this failed, a model with 8-bit activations would compute something else than `eval` on a CPU says."""
    for n, k, group_size in ((80, 64, 32), (70, 100, -1), (896, 18432, 128), (6144, 4096, 128)):
        linear = Linear(False, n, k, group_size)
        for m in (1, 7, 64, 129, 1000):
            x, bias = linear.inputs(m, dtype), torch.randn(n, device="cuda").to(dtype)
            out, exact = call(linear, x, rounding, bias), gemm_rounded(x, packed(linear), group_of(rounding), bias).double()
            with_16_bits = linear.exact(x, bias)
            expected = exact if has_eight_bits(linear, m) else with_16_bits
            assert error_of(out, expected) <= GATES[dtype], f"M={m} N={n} K={k} group_size={group_size}"
            assert torch.equal(out, call(linear, x, rounding, bias)), f"M={m} N={n} K={k}: two calls differ"
    assert has_eight_bits(linear, m) and error_of(out, with_16_bits) > error_of(out, exact), "the last of these products"


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_activations_of_a_mean_and_with_outliers(rounding: Rounding) -> None:
    """If this failed, sums would not be exact where activations are shifted, or where one of them is a hundred times the others."""
    linear = Linear(False, 512, 4096, 128)
    assert has_eight_bits(linear, 1024)
    shifted = linear.inputs(1024, torch.float16) + 1
    outliers = linear.inputs(1024, torch.float16)
    outliers[:, 7] *= 100
    for x in (shifted, outliers):
        assert error_of(call(linear, x, rounding), gemm_rounded(x, packed(linear), group_of(rounding)).double()) <= 1e-3


def test_graphs_streams_and_overlap() -> None:
    """If this failed, a product would read activations before they are rounded, or share its counters with another stream."""
    linear, square = Linear(False, 4096, 4096, 128), Linear(False, 4096, 4096, 128)
    x = linear.inputs(1024, torch.float16)
    assert has_eight_bits(linear, 1024)
    chain = [x]
    for _ in range(4):
        chain.append(call(square, chain[-1] / 64, "int8"))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x
        for _ in range(4):
            y = call(square, y / 64, "int8")
    for _ in range(20):
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, chain[-1])
    streams = [torch.cuda.Stream() for _ in range(3)]
    expected, outs = call(linear, x, "int8-128"), []
    torch.cuda.synchronize()
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                outs.append(call(linear, x, "int8-128"))
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected) for out in outs)


def test_a_compiled_module() -> None:
    """If this failed, torch.compile would break the graph at a linear with 8-bit activations, or lose its rounding."""
    linear = Linear(False, 1024, 2048, 128)
    module = MarlinLinear(packed(linear), None, "int8")
    x = linear.inputs(1024, torch.float16)
    assert has_eight_bits(linear, 1024)
    plain = module(x)
    assert torch.equal(torch.compile(module, fullgraph=True)(x), plain)
    assert error_of(plain, gemm_rounded(x, packed(linear), None).double()) <= 1e-3
    torch.library.opcheck(marlin_gemm, (x, *linear.tensors, linear.n, linear.group_size, None, False, "int8-128"))


def test_a_token_that_is_no_number() -> None:
    """If this failed, an overflow before a linear would disappear in its rounding."""
    linear = Linear(False, 4096, 4096, 128)
    x = linear.inputs(1024, torch.float16)
    assert has_eight_bits(linear, 1024)
    x[3, 100], x[5] = torch.inf, 0
    for rounding in ROUNDINGS:
        out = call(linear, x, rounding)
        assert out[3].isnan().all() and not out[5].any() and out[[0, 1, 2, 4, 1023]].isfinite().all()


def test_prepared_kernels_are_all_that_a_capture_needs() -> None:
    """If this failed, a server would compile, or stop, under the capture of its first graph."""
    prepare([Multiplied(False, 4096, 4096, 128, torch.float16, "int8")], torch.device("cuda"))
    linear = Linear(False, 4096, 4096, 128)
    for m in (1, 48, 100, 256, 2000):
        x, graph = linear.inputs(m, torch.float16), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call(linear, x, "int8")


def test_rounding_waits_for_what_wrote_its_input() -> None:
    """If this failed, activations would be rounded before the kernel before has written them."""
    source = torch.randn(2048, 8192, device="cuda").half()
    for _ in range(20):
        written = source * 2
        rounded = round_on_gpu(written, None, overlap=True)
        assert torch.equal(rounded.codes, round_on_gpu(source, None).codes)
