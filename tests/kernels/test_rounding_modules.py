"""Packed linears that round their activations: what operator and modules compute on a CPU, and what goes with them."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from marlinctl.kernels.configurations import DENSE, SPARSE
from marlinctl.kernels.linear import LinearPart, MarlinLinear, SharedLinear, packed_module
from marlinctl.kernels.ops import marlin_gemm, sparse_marlin_gemm
from marlinctl.pack.types import PackedLinear, PackedSparseLinear
from marlinctl.quantize.scheme import Rounding
from tests.kernels.software_kernel import random_packed

pytestmark = pytest.mark.filterwarnings("ignore:packed tensors on the CPU")
KINDS: tuple[Rounding, ...] = ("int8", "int8-128")
GATE = 5e-3  # relative error, Frobenius: of bfloat16
SHAPES = ((80, 96, 32), (64, 576, 64), (200, 256, -1), (72, 160, 32))  # N, K, group of the weights: K ends inside of 128 and of 64


def packed(n: int, k: int, group_size: int) -> tuple[PackedLinear, Tensor]:
    p, weight = random_packed(DENSE[0], n, k, group_size, seed=n)
    assert isinstance(p, PackedLinear)
    return p, weight


def tokens(m: int, k: int, dtype: torch.dtype) -> Tensor:
    """Of very different sizes, with a few large channels, so that scales of tokens and of groups differ."""
    generator = torch.Generator().manual_seed(m)
    x = torch.randn(m, k, generator=generator) * torch.logspace(-2, 1, m).unsqueeze(1)
    x[:, ::37] *= 20
    return x.to(dtype)


def in_float64(x: Tensor, kind: str) -> Tensor:
    """The rounded activations [M, K], group by group."""
    size = 128 if kind == "int8-128" else x.shape[1]
    parts = []
    for part in x.float().split(size, 1):
        scale = part.abs().amax(1, keepdim=True) / 127
        parts.append(torch.where(scale > 0, (part / scale).round(), 0).double() * scale.double())
    return torch.cat(parts, 1)


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
def test_products_are_those_of_the_rounded_operands(n: int, k: int, group_size: int, kind: Rounding) -> None:
    """If activations were left as they are, or rounded once more than servers do, `eval` would measure another model than is served."""
    p, weight = packed(n, k, group_size)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(1)) / 100
    for dtype, m in itertools.product((torch.bfloat16, torch.float16, torch.float32), (1, 9, 70)):
        x, given = tokens(m, k, dtype), bias.to(dtype)
        exact = in_float64(x, kind) @ weight.double().T + given.double()
        plain = x.double() @ weight.double().T + given.double()
        module = packed_module(p, given, kind)
        assert error(module(x), exact) < GATE and error(plain, exact) > 1.5 * GATE, "rounding shows, so that this test can fail"
        if dtype == torch.float32:
            continue
        found = marlin_gemm(x, p.qweight, p.scales, n, group_size, given, False, kind)
        assert found.dtype == dtype and error(found, exact) < (2e-3 if dtype == torch.bfloat16 else 3e-4)
        module.overlap = False  # by the operator, as on a GPU
        assert torch.equal(module(x), found)


def test_without_rounding_nothing_changes() -> None:
    """If "none" rounded, every folder of before would be served with other numbers."""
    p, _ = packed(80, 96, 32)
    x = tokens(9, 96, torch.float16)
    assert torch.equal(marlin_gemm(x, p.qweight, p.scales, 80, 32, None, False, "none"), marlin_gemm(x, p.qweight, p.scales, 80, 32))
    assert torch.equal(packed_module(p, None, "none")(x), packed_module(p)(x))


@pytest.mark.parametrize("kind", ["int4", "fp8"])
def test_an_unknown_way_to_round_is_refused(kind: Any) -> None:
    """If it were taken for none, a typing error would serve 16-bit activations without a word; fp8 is int8 on a GPU, which has no other."""
    p, _ = packed(80, 96, 32)
    refused = f"rounding must be one of none, int8, int8-128, got '{kind}'"
    x: Any
    for x in (tokens(2, 96, torch.float16), tokens(2, 96, torch.float16).to("meta")):
        tensors = (x, p.qweight.to(x.device), p.scales.to(x.device))
        with pytest.raises(ValueError, match=refused):
            marlin_gemm(*tensors, 80, 32, None, False, kind)
    with pytest.raises(ValueError, match=refused):
        packed_module(p, None, kind)(tokens(2, 96, torch.float16))


@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens_are_no_error(kind: Rounding) -> None:
    """If an empty batch failed, an expert or a server's step without tokens would end what 16-bit activations survive."""
    p, _ = packed(80, 96, 32)
    x = tokens(1, 96, torch.float16)[:0]
    for empty in (x, x.reshape(2, 0, 96)):
        assert marlin_gemm(empty, p.qweight, p.scales, 80, 32, None, False, kind).shape == (*empty.shape[:-1], 80)
        assert packed_module(p, None, kind)(empty).shape == (*empty.shape[:-1], 80)


@pytest.mark.parametrize("kind", KINDS)
def test_the_module_remembers_how_to_round(kind: Rounding) -> None:
    """If a copy forgot it, a model on several devices would round in one half of its blocks; it must not become a tensor."""
    p, _ = packed(80, 96, 32)
    module, x = packed_module(p, None, kind), tokens(4, 96, torch.bfloat16)
    wanted = module(x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other.rounding == kind and torch.equal(other(x), wanted)
    assert set(module.state_dict()) == set(packed_module(p).state_dict()) and repr(module).endswith(f", rounding={kind})")


@pytest.mark.parametrize("kind", KINDS)
def test_sparse_weights_too(kind: Rounding) -> None:
    """If 2:4 linears left activations as they are, `eval` on a CPU would not see what int8 activations cost a 2:4 model."""
    p, weight = random_packed(SPARSE[0], 80, 256, 64, seed=0)
    assert isinstance(p, PackedSparseLinear)
    x = tokens(9, 256, torch.bfloat16)
    exact, plain = in_float64(x, kind) @ weight.double().T, x.double() @ weight.double().T
    module = packed_module(p, None, kind)
    assert error(module(x), exact) < GATE and error(plain, exact) > 1.5 * GATE, "rounding shows, so that this test can fail"
    found = sparse_marlin_gemm(x, p.qweight, p.meta, p.scales, 80, 64, None, False, kind)
    assert error(found, exact) < 2e-3
    module.overlap = False
    assert torch.equal(module(x), found)
    copied = copy.deepcopy(module)
    assert copied.rounding == kind and set(module.state_dict()) == set(packed_module(p).state_dict())
    module.split_scales()
    assert module.factored is None and module.int8_meta is None, "no GPU has a use for them here"


@pytest.mark.parametrize("kind", KINDS)
def test_joined_linears_round_alike(kind: Rounding) -> None:
    """If the joined product rounded otherwise, fusing q, k and v would change what a model answers."""
    from marlinctl.pack.types import side_by_side

    parts = [packed(64, 256, 64)[0], packed(72, 256, 64)[0]]
    x = tokens(5, 256, torch.bfloat16)
    joined = packed_module(side_by_side(parts), None, kind)
    assert isinstance(joined, MarlinLinear)
    shared = SharedLinear(joined, 2)
    for part, (first, p) in enumerate(zip((0, 64), parts, strict=True)):
        assert torch.equal(LinearPart(shared, part, first, p.out_features)(x), packed_module(p, None, kind)(x))


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_model_rounds(kind: Rounding) -> None:
    """If tracing lost the argument or broke the graph, vLLM and torch.compile would serve other numbers, or fail."""
    p, weight = packed(80, 96, 32)
    model = nn.Sequential(packed_module(p, None, kind), nn.SiLU())
    x = tokens(9, 96, torch.bfloat16)
    wanted = model(x)  # prepares the module
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), wanted)
    plain = torch.nn.functional.silu(x.double() @ weight.double().T)
    assert error(wanted, plain) > 1.5 * GATE
