"""Other people's kernels: found where they are, and refused where their interface is another."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch

from marlinctl.benchmarking import peers
from marlinctl.benchmarking.cases import Shape

CPU = torch.device("cpu")


def gemm(a: object, b_q_weight: object, c: object = None, *, size_m: int) -> tuple[object, ...]:
    return a, b_q_weight, c, size_m


def test_keywords_are_given_where_the_installed_version_has_them() -> None:
    """If this failed, a release that adds an optional tensor would break the comparison."""
    bound = peers.bind(gemm, {"a": ..., "b_q_weight": 2, "size_m": 3}, empty=("c", "b_bias"))
    assert bound("rows") == ("rows", 2, None, 3)


def test_a_function_that_takes_any_keyword_is_given_ours() -> None:
    """If this failed, a wrapper of theirs would count as another interface."""
    assert peers.bind(lambda a, **others: (a, others), {"a": ..., "size_m": 3})(1) == (1, {"size_m": 3})


@pytest.mark.parametrize(
    ("given", "what"),
    [({"a": ..., "b_q": 2, "size_m": 3}, "no parameter b_q"), ({"a": ..., "b_q_weight": 2}, "wants size_m too")],
)
def test_another_interface_is_told(given: dict[str, object], what: str) -> None:
    """If this failed, a renamed parameter would end the run, or worse, be passed as another one."""
    with pytest.raises(peers.ApiDiffers, match=what):
        peers.bind(gemm, given)


def test_what_is_not_installed_is_noted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, nobody would know that the comparison lacks somebody."""
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    there, notes = peers.find_peers("sm_90a")
    assert there == []
    assert [(note.name, note.status) for note in notes] == [(peer.name, "absent") for peer in peers.PEERS]


def test_a_peer_for_another_architecture_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, Machete would fail on every linear of an A100."""
    monkeypatch.setattr(peers, "find_spec", lambda name: object())
    assert "vllm machete" not in {peer.name for peer in peers.find_peers("sm_80")[0]}
    assert "vllm machete" in {peer.name for peer in peers.find_peers("sm_90a")[0]}


def test_a_package_that_cannot_be_imported_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, an extension that was built for another torch would end our run."""
    with pytest.raises(peers.ApiDiffers, match="cannot be imported"):
        peers.attribute("a_module_that_is_not_there", "gemm")
    with pytest.raises(peers.ApiDiffers, match="torch has no marlin or machete"):
        peers.attribute("torch", "marlin", "machete")
    assert peers.attribute("torch", "marlin", "matmul") is torch.matmul


def module(monkeypatch: pytest.MonkeyPatch, name: str, **members: object) -> None:
    """A package that is not here, with what we call of it."""
    made = types.ModuleType(name)
    made.__dict__.update(members)
    monkeypatch.setitem(sys.modules, name, made)


def vllm(monkeypatch: pytest.MonkeyPatch, told: dict[str, object]) -> None:
    """The parameters of vLLM 0.24's functions, in their order; they tell what they were given."""

    def marlin_gemm(  # type: ignore[no-untyped-def]
        a, c, b_q_weight, b_bias, b_scales, a_scales, global_scale, b_zeros, g_idx, perm, workspace, b_q_type, size_m, size_n, size_k,
        is_k_full=True, use_atomic_add=False, use_fp32_reduce=False, is_zp_float=False,
    ) -> None:  # fmt: skip
        told.update(locals())

    def machete_prepack_B(b_q_weight, a_type, b_type, group_scales_type):  # type: ignore[no-untyped-def]
        told["prepacked"] = b_q_weight
        return b_q_weight

    def machete_mm(  # type: ignore[no-untyped-def]
        a, b_q, b_type, out_type=None, b_group_scales=None, b_group_zeros=None, b_group_size=None, b_channel_scales=None,
        a_token_scales=None, schedule=None,
    ) -> None:  # fmt: skip
        told.update(locals())

    functions = {f.__name__: f for f in (marlin_gemm, machete_prepack_B, machete_mm)}
    module(monkeypatch, "vllm")
    module(monkeypatch, "vllm._custom_ops", **functions)
    module(monkeypatch, "vllm.scalar_type", scalar_types=types.SimpleNamespace(uint4b8="uint4b8"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(multi_processor_count=7))


def test_vllms_marlin_gets_its_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, the comparison with vLLM would end with `differs`, or time another product."""
    told: dict[str, object] = {}
    vllm(monkeypatch, told)
    call = peers._vllm_marlin(Shape(256, 512, 128), torch.bfloat16, CPU)
    assert told == {}, "only looked at, not called"
    call(torch.zeros(3, 512, dtype=torch.bfloat16))
    assert (told["size_m"], told["size_n"], told["size_k"], told["use_fp32_reduce"]) == (3, 256, 512, True)
    shapes = {name: tuple(tensor.shape) for name, tensor in told.items() if isinstance(tensor, torch.Tensor)}
    assert shapes == {"a": (3, 512), "b_q_weight": (32, 512), "b_scales": (4, 256), "workspace": (7,)}
    assert told["b_zeros"] is told["g_idx"] is told["perm"] is None
    scales = told["b_scales"]
    assert isinstance(scales, torch.Tensor) and scales.dtype == torch.bfloat16 and bool((scales < 0).any()) and bool((scales > 0).any())


def test_machete_gets_columns_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, Machete would be given a matrix it does not read, or one scale for the whole of K as a group of -1."""
    told: dict[str, object] = {}
    vllm(monkeypatch, told)
    peers._machete(Shape(256, 512, -1), torch.float16, CPU)(torch.zeros(3, 512, dtype=torch.float16))
    packed = told["prepacked"]
    assert isinstance(packed, torch.Tensor) and (packed.shape, packed.stride()) == ((64, 256), (1, 64))
    assert told["b_group_size"] == 512 and told["b_type"] == "uint4b8"


class HummingLayer(torch.nn.Module):
    """What humming 0.1.19's layer has of use here: its parameters' shapes, and a configuration once it is transformed."""

    def __init__(
        self, shape_n: int, shape_k: int, weight_config: dict[str, object], input_config: object = None, pad_n_to_multiple: int = 1,
        pad_k_to_multiple: int = 1, num_experts: int | None = None, has_bias: bool = False, torch_dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.weight_config = weight_config
        self.humming_config: str | None = None
        size = weight_config["group_size"]
        assert isinstance(size, int)
        self.weight = torch.nn.Parameter(torch.zeros(shape_n, shape_k // 8, dtype=torch.int32), requires_grad=False)
        scales = torch.zeros(shape_n, shape_k // (size or shape_k), dtype=torch_dtype)
        self.weight_scale = torch.nn.Parameter(scales, requires_grad=False)
        self.called_with: dict[str, object] = {}

    def transform(self) -> None:
        self.words = self.weight.clone()
        self.humming_config = "configuration"

    def forward(
        self, inputs: torch.Tensor, outputs: object = None, input_scale: object = None, input_scale_2: object = None,
        sorted_ids: object = None, expert_ids: object = None, num_tokens_padded: object = None, expert_layout: object = None,
        top_k: int = 1, valid_shape_m: int = 0, compute_config: object = None, tuning_config: object = None,
        hadamard_block_size: object = None, use_pdl: object = None,
    ) -> HummingLayer:  # fmt: skip
        self.called_with = {"rows": len(inputs), "compute_config": compute_config, "tuning_config": tuning_config}
        return self


def humming(monkeypatch: pytest.MonkeyPatch, layer: type[torch.nn.Module], asked: list[object]) -> None:
    """The parameters of humming 0.1.19's heuristics; `asked` gets what they were asked for."""

    def get_heuristics_config(
        layer_config: object, shape_m: int | None = None, use_f16_accum: bool = False, use_batch_invariant: bool = False,
        use_m_major_input_scale: bool = False, gemm_type: object = "dense", device: object = None,
    ) -> object:  # fmt: skip
        asked.append(shape_m)
        return {"of": layer_config, "for": shape_m, "as": gemm_type}

    module(monkeypatch, "humming")
    module(monkeypatch, "humming.layer", HummingLayer=layer)
    module(monkeypatch, "humming.tune", get_heuristics_config=get_heuristics_config)


@pytest.mark.parametrize(("group_size", "told"), [(128, 128), (-1, 0)])
def test_humming_is_made_filled_and_tuned(monkeypatch: pytest.MonkeyPatch, group_size: int, told: int) -> None:
    """If this failed, the comparison with humming would end with `differs`, time zeros, or time what was chosen for another M."""
    asked: list[object] = []
    humming(monkeypatch, HummingLayer, asked)
    call = peers._humming(Shape(256, 512, group_size), torch.float16, CPU)
    assert asked == [], "nothing is chosen before M is known"
    for rows in (3, 3, 16):
        layer: Any = call(torch.zeros(rows, 512))
        assert isinstance(layer, HummingLayer)
        assert layer.called_with == {
            "rows": rows, "compute_config": None, "tuning_config": {"of": "configuration", "for": rows, "as": "dense"},
        }  # fmt: skip
    assert asked == [3, 16], "once for each M, and not while it is timed"
    assert layer.weight_config == {"dtype": "uint4", "group_size": told}
    assert bool((layer.words < 0).any()) and bool(layer.weight_scale.any()), "filled before it is transformed, with all 32 bits"


def test_a_layer_that_is_transformed_otherwise_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, a later humming would end the run at its first call, in the middle of the measurements."""

    class Later(HummingLayer):
        def transform(self) -> None:
            pass

    humming(monkeypatch, Later, [])
    with pytest.raises(peers.ApiDiffers, match="humming_config"):
        peers._humming(Shape(256, 512, 128), torch.float16, CPU)
