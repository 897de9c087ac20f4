"""The modules that hold packed tensors: what they compute, and what conversions leave alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from marlinctl.kernels import linear
from marlinctl.kernels.configurations import DENSE, SPARSE
from marlinctl.kernels.linear import MarlinLinear, SparseMarlinLinear, packed_module
from marlinctl.pack.types import PackedLinear, PackedSparseLinear
from tests.kernels.software_kernel import random_packed

pytestmark = pytest.mark.filterwarnings("ignore:packed tensors on the CPU")

NAMES = {False: {"B", "s", "weight_shape", "bias"}, True: {"B_24", "B_meta", "s", "weight_shape", "bias"}}


def module_of(sparse: bool, bias: torch.Tensor | None = None) -> tuple[MarlinLinear | SparseMarlinLinear, torch.Tensor]:
    p, weight = random_packed(SPARSE[0] if sparse else DENSE[0], 80, 96, 32, seed=4)
    return packed_module(p, bias), weight


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_the_module_multiplies(sparse: bool) -> None:
    """If this failed, a model with packed linears would compute something else than its weights say."""
    bias = torch.randn(80).half()
    module, weight = module_of(sparse, bias)
    x = torch.randn(2, 3, 96).half()
    exact = x.double() @ weight.double().T + bias.double()
    assert float((module(x).double() - exact).norm() / exact.norm()) < 5e-3, "in bfloat16 on a CPU"
    module.overlap = False
    assert float((module(x).double() - exact).norm() / exact.norm()) < 1e-3
    assert isinstance(module, SparseMarlinLinear if sparse else MarlinLinear)
    assert repr(module) == f"{type(module).__name__}(in_features=96, out_features=80, group_size=32, bias=True)"


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_the_state_dict_is_what_lies_on_disk(sparse: bool) -> None:
    """If this failed, native folders would not load, or would be saved under names that nobody reads."""
    module, _ = module_of(sparse, torch.zeros(80).half())
    state = module.state_dict()
    assert set(state) == NAMES[sparse]
    assert state["weight_shape"].tolist() == [80, 96] and state["weight_shape"].dtype == torch.int64
    other, _ = module_of(sparse, torch.ones(80).half())
    other.load_state_dict(state)
    x = torch.randn(1, 96).half()
    assert torch.equal(module(x), other(x))


@pytest.mark.parametrize("convert", [lambda m: m.to(torch.bfloat16), lambda m: m.bfloat16()], ids=["to", "bfloat16"])
def test_conversions_leave_scales_alone(convert: Callable[[torch.nn.Module], Any]) -> None:
    """If this failed, `model.to(torch.bfloat16)` would round the scales, or make the operator refuse them."""
    module, weight = module_of(False, torch.randn(80).half())
    before = module.s.clone()
    module = convert(torch.nn.Sequential(module))[0]
    assert torch.equal(module.s, before) and module.s.dtype == torch.float16
    assert module.bias.dtype == torch.bfloat16 and module.B.dtype == torch.int32
    out = module(torch.eye(96).bfloat16()) - module.bias
    assert torch.allclose(out.float(), weight.T, rtol=2**-7, atol=0.1)


def test_copies_and_moves() -> None:
    """If this failed, the module could not be copied, or a move to another device would leave tensors behind."""
    module, _ = module_of(True, torch.zeros(80).half())
    assert torch.equal(copy.deepcopy(module)(torch.ones(1, 96).half()), module(torch.ones(1, 96).half()))
    assert {tensor.device.type for tensor in module.to("meta").state_dict().values()} == {"meta"}


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_whoever_changes_weights_can_say_so(sparse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, a kernel could read tiles that the one before it still writes."""
    module, _ = module_of(sparse)
    module, given = module.to("meta"), []
    monkeypatch.setattr(linear, "sparse_marlin_gemm" if sparse else "marlin_gemm", lambda *arguments: given.append(arguments[-1]))
    x = torch.zeros(1, 96, dtype=torch.float16, device="meta")
    module(x)
    module.overlap = False
    module(x)
    assert given == [True, False]


def test_a_wrong_bias_is_refused() -> None:
    """If this failed, it would be found out at the first forward pass."""
    with pytest.raises(ValueError, match=r"bias must be \[80\], got \[81\]"):
        module_of(False, torch.zeros(81))


@pytest.mark.parametrize("kind", [PackedLinear, PackedSparseLinear])
def test_modules_without_memory(kind: type) -> None:
    """If this failed, a model could not be built before its weights are read."""
    with torch.device("meta"):
        words, scales = torch.empty(8, 256, dtype=torch.int32), torch.empty(4, 128, dtype=torch.float16)
        meta = torch.empty(4, 256, dtype=torch.int16)
        p = PackedLinear(words, scales, 80, 128, 32) if kind is PackedLinear else PackedSparseLinear(words[:4], meta, scales, 80, 128, 32)
        module = packed_module(p)
    assert {tensor.device.type for tensor in module.state_dict().values()} == {"meta"}
    assert module(torch.empty(5, 128, dtype=torch.float16, device="meta")).shape == (5, 80)
