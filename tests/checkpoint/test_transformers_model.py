from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, CompressedTensorsConfig

from marlinctl.checkpoint.transformers_model import load_dense, quietly
from marlinctl.errors import BadInput
from marlinctl.system.console import Console
from marlinctl.verify.run import verify
from tests.packed import edit_json, edit_tensors, make_packed
from tests.tiny import make_tiny

TOKENS = torch.arange(1, 25).reshape(1, -1)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(TOKENS).logits.double()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
def test_dense_folders_load_as_transformers_loads_them(tmp_path: Path, tied: bool, shards: int) -> None:
    """The original is what everything is compared with: it must be the same model here and there."""
    folder = make_tiny(tmp_path / "m", shards=shards, tie_word_embeddings=tied)
    ours, theirs = load_dense(folder, dtype=torch.float32), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(logits(ours), logits(theirs)) and not ours.training
    assert (ours.lm_head.weight.data_ptr() == ours.model.embed_tokens.weight.data_ptr()) is tied


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_are_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    """Dequantized in fp32, then rounded to the dtype asked for: two roundings would measure another model."""
    codes = make_packed(make_tiny(tmp_path / "m"), tmp_path / "ct")
    model = load_dense(tmp_path / "ct", dtype=dtype)
    for layer, q in codes.items():
        assert torch.equal(model.get_parameter(f"{layer}.weight"), q.dequantize().to(dtype))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_loading_draws_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """transformers draws bars on stderr, which would stand in the middle of our own messages."""
    folder = make_tiny(tmp_path / "m")
    load_dense(folder, dtype=torch.float32)
    assert capfd.readouterr().err == ""
    with quietly() as story:
        AutoModelForCausalLM.from_pretrained(folder)
    assert "Loading weights" in story.getvalue()


@pytest.mark.parametrize("fmt", ["ct", "marlin"])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.input_layernorm.weight", "lm_head.weight"])
def test_a_missing_tensor_is_an_error(tmp_path: Path, fmt: str, name: str) -> None:
    """transformers fills it with random numbers or ones, and goes on."""
    make_packed(make_tiny(tmp_path / "m"), tmp_path / "out", fmt)
    edit_tensors(tmp_path / "out", lambda tensors: tensors.__delitem__(name))
    with pytest.raises(BadInput) as caught:
        load_dense(tmp_path / "out", dtype=torch.float32)
    assert caught.value.error_id == "E302" and name in caught.value.problems[0].what


def test_an_unexpected_tensor_is_an_error(tmp_path: Path) -> None:
    """A tensor without a place means that config.json is another model's: dropped layers would go unnoticed."""
    folder = make_tiny(tmp_path / "m")
    edit_json(folder / "config.json", lambda config: config.update(num_hidden_layers=1))
    with pytest.raises(BadInput) as caught:
        load_dense(folder, dtype=torch.float32)
    assert len(caught.value.problems) == 9 and "model.layers.1." in caught.value.problems[0].what


def test_a_wrong_shape_is_an_error(tmp_path: Path) -> None:
    """Config and weights of two sizes of one family are easily mixed up."""
    folder = make_tiny(tmp_path / "m")
    edit_json(folder / "config.json", lambda config: config.update(intermediate_size=512))
    with pytest.raises((BadInput, RuntimeError), match=r"gate_proj|shape|size"):
        load_dense(folder, dtype=torch.float32)


def test_a_model_that_is_no_language_model_is_refused(tmp_path: Path) -> None:
    """The class is looked up by config; a traceback with a KeyError would help nobody."""
    folder = make_tiny(tmp_path / "m")
    config = AutoConfig.for_model("vit").to_dict()
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match="no language model") as caught:
        load_dense(folder, dtype=torch.float32)
    assert caught.value.error_id == "E392"


FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "phi3": {},
    "qwen2": {},
    "gemma3_text": {},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_load_in_every_way(tmp_path: Path, family: str) -> None:
    """Experts are fused into 3-D parameters, q/k/v lie in one matrix, biases and extra norms travel: each on its own way into the model."""
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {"vocab_size": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(family, **sizes, **tokens, head_dim=32, **FAMILIES[family])
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(tmp_path / "source")
    make_packed(tmp_path / "source", tmp_path / "ct", "ct")
    make_packed(tmp_path / "source", tmp_path / "marlin", "marlin")
    checked = verify(tmp_path / "ct", source=tmp_path / "source", load=True, console=Console.quiet())
    assert checked.logit_error is not None and checked.logit_error <= 1e-3 and checked.skipped == ()
    ours = logits(load_dense(tmp_path / "ct", dtype=torch.float32))
    assert torch.equal(logits(load_dense(tmp_path / "marlin", dtype=torch.float32)), ours)
    dequantized = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ct", dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    # This mode multiplies in the scales' dtype: fp16 rounds each weight by up to 2^-11, and errors of single weights average out.
    assert float((logits(dequantized) - ours).norm() / ours.norm()) <= 2**-9


def test_experts_of_one_size_and_attention_of_another_load(tmp_path: Path) -> None:
    """transformers takes one scheme for all experts: it must be the experts' own, not that of the attention."""
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model("mixtral", **sizes, vocab_size=256, num_local_experts=4, num_experts_per_tok=2, head_dim=32)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(tmp_path / "source")
    attention = {f"model.layers.{i}.self_attn.{p}_proj": 64 for i in range(2) for p in "qkvo"}
    make_packed(tmp_path / "source", tmp_path / "ct", overrides=attention)
    checked = verify(tmp_path / "ct", source=None, load=True, console=Console.quiet())
    assert checked.logit_error is not None and checked.logit_error <= 1e-3
