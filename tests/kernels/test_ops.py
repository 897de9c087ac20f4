"""The operators on the CPU, in torch.compile, and, with the software GPU in the place of a real one, on the way to a kernel."""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from marlinctl.kernels import dispatch, ops, rounding
from marlinctl.kernels.configurations import A8_FACTORED_SM90, A8_SM90, DENSE, SPARSE, SPARSE_A8_FACTORED_SM90
from marlinctl.kernels.dispatch import Choice
from marlinctl.kernels.factored import factored_scales
from marlinctl.kernels.int8_metadata import metadata_for_int8
from marlinctl.kernels.launch import LoadedKernel
from marlinctl.kernels.ops import marlin_gemm, sparse_marlin_gemm
from marlinctl.kernels.reference import gemm_rounded
from marlinctl.pack.types import PackedLinear, PackedSparseLinear
from marlinctl.quantize.activations import group_of
from marlinctl.quantize.scheme import Rounding
from tests import forked
from tests.kernels.software_driver import SoftwareDriver, install, software_kernel, software_round, software_unpack
from tests.kernels.software_kernel import aligned, random_packed

pytestmark = pytest.mark.filterwarnings("ignore:packed tensors on the CPU")

PAIR, SPARSE_PAIR = (next(c for c in configurations if c.paired) for configurations in (A8_FACTORED_SM90, SPARSE_A8_FACTORED_SM90))
GATES = {torch.float16: 1e-3, torch.bfloat16: 5e-3}  # a single wrong number among thousands is beyond them


def operands(sparse: bool, n: int, k: int, group_size: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """What the operator takes beside activations, aligned as on a GPU, and the weight [N, K]."""
    p, weight = random_packed(SPARSE[0] if sparse else DENSE[0], n, k, group_size, seed=n + k)
    return tensors_of(p), weight


def tensors_of(p: PackedLinear | PackedSparseLinear) -> tuple[Tensor, ...]:
    weights = (p.qweight, p.meta) if isinstance(p, PackedSparseLinear) else (p.qweight,)
    return tuple(aligned(tensor) for tensor in (*weights, p.scales))


def called(compute: Callable[[ops.Product], Tensor], sparse: bool) -> Callable[..., Tensor]:
    """As torch calls it: with the operator's arguments."""
    return ops._implementation(compute, 2 if sparse else 1)


def close(out: Tensor, exact: Tensor) -> bool:
    return float((out.double() - exact).norm()) <= GATES[out.dtype] * float(exact.norm())


# N, K, group size: whole tiles, padded ones, N that no row of 16 bytes ends at, K likewise, every kind of group
SHAPES = [(64, 128, 32), (80, 48, -1), (200, 320, 64), (136, 896, 128), (70, 100, -1), (3, 36, 36)]
LEADING = [(5,), (), (2, 3), (0,), (2, 0, 4)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_the_product_on_the_cpu(sparse: bool, dtype: torch.dtype) -> None:
    """If this failed, a machine without a GPU would compute something else than one with it."""
    operator = sparse_marlin_gemm if sparse else marlin_gemm
    for (n, k, group_size), leading in [(shape, LEADING[i % len(LEADING)]) for i, shape in enumerate(SHAPES)] + [(SHAPES[0], (2, 0, 4))]:
        tensors, weight = operands(sparse, n, k, group_size)
        activations, bias = torch.randn(*leading, k).to(dtype), torch.randn(n).to(dtype)
        for with_bias in (None, bias):
            out = operator(activations, *tensors, n, group_size, with_bias)
            exact = activations.double() @ weight.double().T + (0 if with_bias is None else with_bias.double())
            assert out.shape == (*leading, n) and out.dtype == dtype and out.is_contiguous()
            assert out.numel() == 0 or close(out, exact), (n, k, group_size, leading)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_arguments_by_name(sparse: bool) -> None:
    """If this failed, a call that names its arguments would be refused, or multiply with other tensors than one that does not."""
    operator, names = (sparse_marlin_gemm, ("qweight", "meta", "scales")) if sparse else (marlin_gemm, ("qweight", "scales"))
    tensors, _ = operands(sparse, 80, 128, 32)
    activations, bias = torch.randn(3, 128).half(), torch.randn(80).half()
    named = {"overlap": True, "bias": bias, "group_size": 32, "out_features": 80, **dict(zip(names, tensors, strict=True))}
    for device in ("cpu", "meta"):
        on_device = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in named.items()}
        out = operator(activations=activations.to(device), **on_device)
        assert out.shape == (3, 80) and out.dtype == torch.float16
        assert device == "meta" or torch.equal(out, operator(activations, *tensors, 80, 32, bias))


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_opcheck(sparse: bool) -> None:
    """If this failed, torch would trace another operator than the one that runs: shapes, strides, aliases."""
    operator = sparse_marlin_gemm if sparse else marlin_gemm
    tensors, _ = operands(sparse, 80, 128, 32)
    for activations in (torch.randn(3, 128).half(), torch.randn(2, 3, 128).bfloat16(), torch.randn(128, 4).half().T):
        torch.library.opcheck(operator, (activations, *tensors, 80, 32, torch.zeros(80, dtype=activations.dtype)))
        torch.library.opcheck(operator, (activations, *tensors, 80, 32))


@pytest.mark.parametrize("dynamic", [None, True], ids=["as torch decides", "dynamic"])
def test_torch_compile_sees_one_graph(dynamic: bool | None) -> None:
    """If this failed, a compiled model would break at every linear, or compile again for every number of tokens."""
    dense, dense_weight = operands(False, 64, 96, 32)
    sparse, _ = operands(True, 96, 64, 32)
    graphs = []

    def block(x: Tensor) -> Tensor:
        middle = torch.nn.functional.silu(torch.ops.marlinctl.marlin_gemm(x, *dense, 64, 32))
        return x + torch.ops.marlinctl.sparse_marlin_gemm(middle, *sparse, 96, 32)

    from torch._dynamo.backends.debugging import aot_eager

    def counting(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend=counting, dynamic=dynamic)
    for m in (7, 5, 9):  # no size of a weight: torch takes equal sizes for one
        x = torch.randn(m, 96).half()
        assert torch.equal(compiled(x), block(x))
    assert len(graphs) == (1 if dynamic else 2), "one for the first shape, one for all later ones"
    assert dense_weight.shape == (64, 96)


def test_the_meta_device_gives_the_shape() -> None:
    """If this failed, models could not be built or traced without memory."""
    tensors = [tensor.to("meta") for tensor in operands(False, 80, 128, 32)[0]]
    out = marlin_gemm(torch.empty(2, 7, 128, dtype=torch.bfloat16, device="meta"), *tensors, 80, 32)
    assert (out.shape, out.dtype, out.device.type) == ((2, 7, 80), torch.bfloat16, "meta")


def test_slowness_is_said_once() -> None:
    """If this failed, users would wonder why it takes minutes, or drown in warnings."""
    program = """
        import torch, warnings
        from marlinctl.kernels.ops import marlin_gemm
        from tests.kernels.test_ops import operands
        tensors, _ = operands(False, 64, 64, 32)
        warnings.simplefilter("always")
        for _ in range(3):
            marlin_gemm(torch.zeros(1, 64).half(), *tensors, 64, 32)
    """
    done = forked.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("right, and slow") == 1


WRONG: list[tuple[bool, dict[str, Any], str]] = [
    (False, {"activations": torch.zeros(2, 128)}, "marlin_gemm: activations must be float16 or bfloat16, got torch.float32"),
    (False, {"activations": torch.tensor(1.0).half()}, "activations must be [.., K], got a single number"),
    (False, {"activations": torch.zeros(2, 64).half()}, "qweight must be torch.int32 [4, 128] on cpu, got torch.int32 [8, 128]"),
    (False, {"activations": torch.zeros(2, 0).half()}, "must be positive, got N=64, K=0"),
    (False, {"out_features": 128}, "qweight must be torch.int32 [8, 256]"),
    (False, {"out_features": -1}, "must be positive, got N=-1"),
    (False, {"group_size": 64}, "scales must be torch.float16 [2, 64] on cpu, got torch.float16 [4, 64]"),
    (False, {"group_size": 48}, "group_size 48 does not divide K=128"),
    (False, {"group_size": 0}, "group_size 0 does not divide"),
    (False, {"group_size": 16}, "32, 64, 128 and channel-wise, got 16"),
    (False, {"qweight": torch.zeros(8, 128)}, "qweight must be torch.int32"),
    (False, {"qweight": torch.zeros(128, 8, dtype=torch.int32).T}, "qweight must be contiguous"),
    (False, {"qweight": torch.zeros(8, 128, dtype=torch.int32, device="meta")}, "on cpu, got torch.int32 [8, 128] on meta"),
    (False, {"scales": torch.zeros(4, 64).bfloat16()}, "scales must be torch.float16"),
    (False, {"bias": torch.zeros(64)}, "bias must be torch.float16 [64] on cpu, got torch.float32"),
    (False, {"bias": torch.zeros(63).half()}, "bias must be torch.float16 [64] on cpu, got torch.float16 [63]"),
    (True, {"meta": torch.zeros(4, 128, dtype=torch.int32)}, "sparse_marlin_gemm: meta must be torch.int16 [4, 128]"),
    (True, {"meta": torch.zeros(8, 128, dtype=torch.int16)}, "meta must be torch.int16 [4, 128]"),
    (True, {"qweight": torch.zeros(8, 128, dtype=torch.int32)}, "qweight must be torch.int32 [4, 128]"),
    (True, {"activations": torch.zeros(2, 126).half(), "group_size": -1}, "K=126 is not a multiple of 4"),
]


@pytest.mark.parametrize("on_gpu", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize(("sparse", "changes", "what"), WRONG, ids=[f"{i}" for i in range(len(WRONG))])
def test_what_would_be_read_wrongly_is_refused(
    sparse: bool, changes: dict[str, Any], what: str, on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this failed, a wrong shape, dtype or device would read foreign memory or give wrong numbers."""
    driver = install(monkeypatch)
    tensors, _ = operands(sparse, 64, 128, 32)
    names = ("qweight", "meta", "scales") if sparse else ("qweight", "scales")
    given = {"activations": torch.zeros(2, 128).half(), **dict(zip(names, tensors, strict=True))}
    given |= {"out_features": 64, "group_size": 32, "bias": None} | changes
    cpu, gpu = called(ops._on_cpu, sparse), called(ops._on_gpu, sparse)
    with pytest.raises(ValueError, match=re.escape(what)):
        (gpu if on_gpu else cpu)(*given.values())
    assert not driver.launches


# The way to a kernel


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """Kernels are built once for all tests of this file."""
    folder = tmp_path_factory.mktemp("kernels")
    return {"folder": folder}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, built: dict[Any, Any]) -> Iterator[SoftwareDriver]:
    """CPU tensors go the way of CUDA tensors; from 40 tokens on they are dequantized."""
    driver = install(monkeypatch)

    def choose(architecture: str, sparse: bool, m: int, n: int, k: int, rounding: Rounding, factored: bool) -> Choice | None:
        if sparse and factored and rounding == "int8" and m >= 12:
            return Choice(SPARSE_PAIR, 2)
        if rounding != "none" and m >= 12 and not sparse:
            return Choice(PAIR if factored and rounding == "int8" else A8_SM90[0], 2 if factored else 1)
        configuration = (SPARSE if sparse else DENSE)[0 if m <= 8 else 2]
        return None if m >= 40 else Choice(configuration, 9)

    def load(configuration: Any, dtype: torch.dtype, device: torch.device, folder: Path, shift: int, token_groups: bool) -> LoadedKernel:
        assert folder.name == "kernels"
        key = (configuration, dtype, shift if configuration.int8 else None, token_groups)
        if key not in built:
            built[key] = software_kernel(configuration, dtype, built["folder"], resident=2, shift=key[2], token_groups=token_groups)
        return built[key]

    def load_rounding(index: int, dtype: torch.dtype, k: int, group: int | None, sparse: bool) -> Any:
        key = rounding.defines(dtype, k, group, sparse)
        if key not in built:
            built[key] = software_round(dtype, k, group, built["folder"], sparse=sparse)
        return built[key]

    def load_unpack(sparse: bool, dtype: torch.dtype, device: torch.device, folder: Path) -> Any:
        key = (sparse, dtype)
        if key not in built:
            built[key] = software_unpack(sparse, dtype, built["folder"])
        return built[key]

    monkeypatch.setattr(ops, "architecture_of", lambda device: "sm_80")
    monkeypatch.setattr(dispatch, "choose", choose)
    monkeypatch.setattr(ops, "load", load)
    monkeypatch.setattr(ops, "load_unpack", load_unpack)
    monkeypatch.setattr(rounding, "_loaded", load_rounding)
    monkeypatch.setattr(rounding, "_mine", rounding._Mine())
    ops._route.cache_clear()
    ops._unpack.cache_clear()
    yield driver
    ops._route.cache_clear()
    ops._unpack.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_the_product_on_a_gpu(gpu: SoftwareDriver, sparse: bool, dtype: torch.dtype) -> None:
    """If this failed, padding, leading dimensions, a bias or the choice of the kernel would change the product."""
    operator = called(ops._on_gpu, sparse)
    for i, (n, k, group_size) in enumerate(SHAPES):
        tensors, weight = operands(sparse, n, k, group_size)
        for leading in (LEADING[i % len(LEADING)], (9,), (3, 15)):
            activations, bias = aligned(torch.randn(*leading, k).to(dtype)), torch.randn(n).to(dtype)
            for with_bias in (None, bias):
                out = operator(activations, *tensors, n, group_size, with_bias)
                exact = activations.double() @ weight.double().T + (0 if with_bias is None else with_bias.double())
                assert out.shape == (*leading, n) and out.dtype == dtype and out.is_contiguous()
                assert out.numel() == 0 or close(out, exact), (n, k, group_size, leading, with_bias is None)
    assert {launched.ctas for launched in gpu.launches} > {1, 2}


@pytest.mark.parametrize("way", ["int8", "int8-128"])
def test_activations_are_rounded_where_the_table_says_so(gpu: SoftwareDriver, way: Rounding) -> None:
    """If this failed, few tokens would lose accuracy for nothing, or many would be multiplied with scales that are not theirs."""
    for n, k, group_size in ((80, 100, -1), (192, 576, 64)):
        tensors, weight = operands(False, n, k, group_size)
        p = PackedLinear(tensors[0], tensors[1], n, k, k if group_size == -1 else group_size)
        x, bias = aligned(torch.randn(3, 5, k).half()), torch.randn(n).half()
        launched = len(gpu.launches)
        out = called(ops._on_gpu, False)(x, *tensors, n, group_size, bias, False, way)
        rounded = gemm_rounded(x.view(15, k), p, group_of(way), bias).view(3, 5, n)
        plain = x.double() @ weight.double().T + bias.double()
        assert close(out, rounded.double()) and not close(out, plain), (n, k, group_size)
        assert len(gpu.launches) == launched + 2, "one kernel rounds, and one multiplies"
        few = called(ops._on_gpu, False)(x[0], *tensors, n, group_size, bias, False, way)
        assert close(few, plain[0])


@pytest.mark.parametrize("way", ["int8", "int8-128"])
def test_factored_scales_are_used_where_the_table_says_so(gpu: SoftwareDriver, way: Rounding) -> None:
    """If this failed, factored weights would be multiplied with the other form of their scales, or beside a rounding that needs groups."""
    for n, k, group_size in ((80, 100, -1), (192, 576, 64)):
        packed, _ = random_packed(PAIR, n, k, group_size, seed=n)
        assert isinstance(packed, PackedLinear)
        p = replace(packed, qweight=aligned(packed.qweight), scales=aligned(packed.scales))
        found = factored_scales(p)
        assert found is not None
        more, x = aligned(found), aligned(torch.randn(15, k).half())
        out = called(ops._on_gpu, False)(x, p.qweight, p.scales, n, group_size, None, False, way, more)
        assert close(out, gemm_rounded(x, p, group_of(way)).double()), (n, k, group_size)
        assert (gpu.launches[-1].cluster == 2) == (way == "int8")
        with pytest.raises(ValueError, match="factored must be"):
            called(ops._on_gpu, False)(x, p.qweight, p.scales, n, group_size, None, False, way, more[:, :64].contiguous())


@pytest.mark.parametrize("way", ["int8", "int8-128"])
def test_sparse_weights_with_rounded_activations(gpu: SoftwareDriver, way: Rounding) -> None:
    """If this failed, 2:4 weights would be multiplied with activations or metadata in the order of others, or in 8 bits without them."""
    for n, k, group_size in ((80, 100, -1), (192, 576, 64)):
        packed, weight = random_packed(SPARSE_PAIR, n, k, group_size, seed=n)
        assert isinstance(packed, PackedSparseLinear)
        qweight, stored, scales = tensors_of(packed)
        p = PackedSparseLinear(qweight, stored, scales, n, k, packed.group_size)
        found = factored_scales(p)
        assert found is not None
        factored, meta, x = aligned(found), aligned(metadata_for_int8(p.meta)), aligned(torch.randn(15, k).half())
        bias = torch.randn(n).half()
        plain = x.double() @ weight.double().T + bias.double()
        for more in ((factored, meta), (factored, None), (None, None)):
            launched = len(gpu.launches)
            out = called(ops._on_gpu, True)(x, *tensors_of(p), n, group_size, bias, False, way, *more)
            rounds = way == "int8" and more[1] is not None
            exact = gemm_rounded(x, p, None, bias).double() if rounds else plain
            assert close(out, exact) and (not rounds or not close(out, plain)), (n, k, group_size)
            assert len(gpu.launches) == launched + 1 + rounds and (gpu.launches[-1].cluster == 2) == rounds
        with pytest.raises(ValueError, match="int8_meta must be"):
            called(ops._on_gpu, True)(x, *tensors_of(p), n, group_size, bias, False, way, factored, meta[:1])
        cpu = sparse_marlin_gemm(x, *tensors_of(p), n, group_size, bias, False, way, factored, meta)
        assert close(cpu, gemm_rounded(x, p, group_of(way), bias).double()), "the CPU always rounds"
    torch.library.opcheck(sparse_marlin_gemm, (x, *tensors_of(p), n, group_size, bias, False, way, factored, meta))


def test_activations_may_lie_as_they_like(gpu: SoftwareDriver) -> None:
    """If this failed, a slice or a transposed matrix would be read as if it were contiguous."""
    tensors, weight = operands(False, 64, 128, 32)
    wide = aligned(torch.randn(6, 256).half())
    for x in (wide[:, 128:], wide[::2, :128], wide.view(128, 12).T, wide.flatten()[3:131].view(1, 128), wide[:, :128].expand(2, 6, 128)):
        assert close(called(ops._on_gpu, False)(x, *tensors, 64, 32), x.double() @ weight.double().T)


def test_nothing_is_launched_for_no_tokens(gpu: SoftwareDriver) -> None:
    """If this failed, an empty batch would start a grid of no CTAs, which the driver refuses."""
    tensors, _ = operands(False, 64, 128, 32)
    assert called(ops._on_gpu, False)(torch.zeros(0, 128).half(), *tensors, 64, 32).shape == (0, 64)
    assert not gpu.launches


def test_m_decides_in_the_call(gpu: SoftwareDriver) -> None:
    """If this failed, one kernel would serve all M, or the grid would be larger than the GPU holds at once."""
    tensors, _ = operands(False, 320, 512, 32)
    for m in (1, 9, 40):
        called(ops._on_gpu, False)(aligned(torch.zeros(m, 512).half()), *tensors, 320, 32)
    small, medium, large = gpu.launches
    assert (small.threads, small.shared) == (DENSE[0].threads, DENSE[0].shared_bytes)
    assert (medium.threads, medium.shared) == (DENSE[2].threads, DENSE[2].shared_bytes)
    assert (small.ctas, medium.ctas) == (6, 6), "2 of 9 CTAs fit on each of 3 multiprocessors"
    assert not hasattr(large, "m"), "unpack.cu"


def test_packed_tensors_that_are_not_aligned_are_refused(gpu: SoftwareDriver) -> None:
    """If this failed, a 16-byte load would stop the GPU with a misaligned address."""
    (qweight, scales), _ = operands(False, 64, 128, 32)
    shifted = torch.zeros(qweight.numel() + 1, dtype=torch.int32)
    shifted = shifted[1:] if shifted.data_ptr() % 16 == 0 else shifted[:-1]
    with pytest.raises(ValueError, match=r"a tensor \[8, 128\] is not aligned to 16 bytes"):
        called(ops._on_gpu, False)(torch.zeros(1, 128).half(), shifted.view(8, 128), scales, 64, 32)
