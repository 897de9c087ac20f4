"""The kernel for checkpoints that vLLM loads itself: what it takes, and that words of others multiply as their codes do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import Module, Parameter

from marlinctl.pack.interchange import pack_ct, pack_gptq
from marlinctl.quantize.types import QuantizedLinear
from tests.serve.vllm.fake_vllm import MPLinearLayerConfig, Vllm, installed

GOOD = MPLinearLayerConfig((4096, 4096), (4096, 2048), "uint4b8", torch.float16, 128, False, False)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Vllm]:
    with installed() as state:
        monkeypatch.setattr(state.module_of("linear_kernel"), "require_driver", lambda: None)
        yield state


def answer(vllm: Vllm, c: MPLinearLayerConfig = GOOD) -> tuple[bool, str | None]:
    found: tuple[bool, str | None] = vllm.module_of("linear_kernel").MarlinctlLinearKernel.can_implement(c)
    return found


@pytest.mark.parametrize(
    "changes",
    [{}, {"act_type": torch.bfloat16}, {"group_size": 64}, {"group_size": 32}, {"group_size": -1}, {"out_type": torch.float16}],
)
def test_what_it_takes(vllm: Vllm, changes: dict[str, Any]) -> None:
    assert answer(vllm, replace(GOOD, **changes)) == (True, None)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"has_g_idx": True}, "activation order"),
        ({"zero_points": True}, "zero points"),
        ({"weight_type": "uint8b128"}, "weights are uint8b128"),
        ({"weight_type": "uint4"}, "weights are uint4"),
        ({"group_size": 256}, "groups of 256"),
        ({"act_type": torch.float32}, "activations are torch.float32"),
        ({"act_type": torch.float8_e4m3fn}, "activations are torch.float8"),
        ({"out_type": torch.float32}, "activations are torch.float16"),
        ({"partition_weight_shape": (4096, 2080)}, r"\[2080, 4096\] on this device"),
        ({"partition_weight_shape": (4000, 2048)}, r"\[2048, 4000\] on this device"),
        ({"partition_weight_shape": (4160, 2048)}, "4160 inputs on this device cut a group of 128"),
    ],
)
def test_what_it_leaves_to_others(vllm: Vllm, changes: dict[str, Any], why: str) -> None:
    """A yes to one of these would be a wrong product, or an error where vLLM has a kernel."""
    taken, said = answer(vllm, replace(GOOD, **changes))
    assert not taken and said is not None and why.replace("\\", "") in said


@pytest.mark.parametrize(
    ("capability", "why"),
    [
        ((7, 5), "7.5"),
        ((10, 0), "not measured on sm_100"),
        ((8, 0), "not measured on sm_80"),
        ((8, 9), "not measured on sm_89"),
        (None, "needs CUDA"),
    ],
)
def test_where_it_is_not_known_to_be_faster(vllm: Vllm, capability: tuple[int, int] | None, why: str) -> None:
    vllm.capability = capability
    taken, said = answer(vllm)
    assert not taken and said is not None and why in said


@pytest.mark.parametrize(("name", "value"), [("VLLM_BATCH_INVARIANT", True), ("VLLM_MARLIN_INPUT_DTYPE", "int8")])
def test_an_engine_that_asks_for_other_kernels_gets_them(vllm: Vllm, name: str, value: object) -> None:
    setattr(vllm.envs, name, value)
    taken, said = answer(vllm)
    assert not taken and said is not None and name in said


def test_without_a_compiler_vllm_serves_on(vllm: Vllm, monkeypatch: pytest.MonkeyPatch) -> None:
    from marlinctl.kernels.jit import CompilerMissing

    def missing() -> None:
        raise CompilerMissing("cuda-bindings cannot be imported")

    monkeypatch.setattr(vllm.module_of("linear_kernel"), "require_driver", missing)
    assert answer(vllm) == (False, "its kernels cannot be compiled here: cuda-bindings cannot be imported")


@pytest.mark.filterwarnings("ignore:packed linears on the CPU")
@pytest.mark.parametrize("layout", ["gptq", "ct"])
@pytest.mark.parametrize(("n", "k", "group_size"), [(192, 256, 64), (64, 128, 128), (128, 192, -1), (64, 320, 32)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_words_multiply_as_their_codes_do(vllm: Vllm, layout: str, n: int, k: int, group_size: int, dtype: torch.dtype) -> None:
    """vLLM has parameters of GPTQ inputs first, of compressed-tensors outputs first, scales in the dtype of the model."""
    generator = torch.Generator().manual_seed(0)
    size = k if group_size == -1 else group_size
    scales = torch.rand(n, k // size, generator=generator).add_(0.5).to(torch.bfloat16).to(torch.float16)  # exact in both
    q = QuantizedLinear(torch.randint(-8, 8, (n, k), dtype=torch.int8, generator=generator), scales, size)
    layer = Module()
    words, steps = (pack_gptq(q)["qweight"], scales.T) if layout == "gptq" else (pack_ct(q.codes), scales)
    for name, tensor in (("w", words), ("s", steps.to(dtype))):
        parameter = Parameter(tensor.contiguous(), requires_grad=False)
        parameter.output_dim = int(layout == "gptq")  # type: ignore[attr-defined]
        layer.register_parameter(name, parameter)
    config = MPLinearLayerConfig((k, n), (k, n), "uint4b8", dtype, group_size, False, False)
    kernel = vllm.module_of("linear_kernel").MarlinctlLinearKernel(config, "w", "s")
    kernel.process_weights_after_loading(layer)
    x, bias = torch.randn(2, 3, k, generator=generator).to(dtype), torch.randn(n, generator=generator).to(dtype)
    got = kernel.apply_weights(layer, x, bias)
    weight = q.codes.float() * scales.float().repeat_interleave(size, 1)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), x.float() @ weight.T + bias.float(), rtol=2e-2, atol=0.2 if dtype == torch.float16 else 1.0)
    assert set(vllm.envs.environment_variables) == {"VLLM_MARLINCTL_LINEARS"}


def test_scales_beyond_float16_are_refused(vllm: Vllm) -> None:
    layer = Module()
    for name, tensor in (("w", torch.zeros(16, 64, dtype=torch.int32)), ("s", torch.full((1, 64), 1e6, dtype=torch.bfloat16))):
        parameter = Parameter(tensor, requires_grad=False)
        parameter.output_dim = 1  # type: ignore[attr-defined]
        layer.register_parameter(name, parameter)
    config = MPLinearLayerConfig((128, 64), (128, 64), "uint4b8", torch.bfloat16, -1, False, False)
    kernel = vllm.module_of("linear_kernel").MarlinctlLinearKernel(config, "w", "s")
    with pytest.raises(RuntimeError, match="VLLM_DISABLED_KERNELS=MarlinctlLinearKernel"):
        kernel.process_weights_after_loading(layer)
