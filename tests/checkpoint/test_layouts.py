"""Model folders that are whole, and not the usual ones: other names, tied heads, tensors that others added, odd configs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from marlinctl.checkpoint.folder import open_folder
from marlinctl.checkpoint.reader import open_checkpoint
from marlinctl.convert.repack import repack
from marlinctl.errors import BadInput, UsageError
from marlinctl.models.families import architecture
from marlinctl.verify import run as verify
from marlinctl.verify.inspect import inspect
from tests import runs
from tests.checkpoint.verbs import (
    FROM_DENSE,
    QUIET,
    TEXT,
    assert_says,
    edit_config,
    measure,
    refusal,
)
from tests.packed import edit_tensors
from tests.tiny import VOCAB_SIZE, make_tiny, tiny_config


def _renamed(folder: Path, rename: Callable[[str], str], **extra: torch.Tensor) -> Path:
    make_tiny(folder, tie_word_embeddings=True)
    tensors = {rename(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file({**tensors, **extra}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_another_prefix_is_named(tmp_path: Path) -> None:
    """The text model of a wrapper, or of a trainer, has the right tensors under longer names."""
    error = refusal(FROM_DENSE["plan"], _renamed(tmp_path / "model", lambda name: f"language_model.{name}"))
    assert error.error_id == "E302" and "'language_model.'" in error.problems[0].what


def test_a_missing_head_is_not_taken_for_a_layout(tmp_path: Path) -> None:
    """Saved again, transformers would fill the head with random numbers."""
    folder = _renamed(tmp_path / "model", lambda name: name.removeprefix("model."))
    edit_config(tie_word_embeddings=False)(folder)
    assert_says(refusal(FROM_DENSE["plan"], folder), "E302", "lm_head.weight is missing")


def _unprefixed(folder: Path) -> Path:
    return _renamed(folder, lambda name: name.removeprefix("model."))


def test_names_without_their_beginning_are_taken_as_they_are(tmp_path: Path) -> None:
    """Embedding models are saved without their head, so their names lack "model."; transformers loads them. The result, and whatever is
    made of it, has the checkpoint's own names, and the config's patterns match them and transformers' modules.
    """
    folder = _unprefixed(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    measure(folder)
    runs.quantize(folder, tmp_path / "out", runs.recipe(tmp_path / "text.txt", quantize__skip=["up_proj"]))
    with open_folder(tmp_path / "out", structure="needed") as examined:
        assert "layers.1.mlp.down_proj" in examined.info.layers and "layers.1.mlp.up_proj.weight" in examined.checkpoint.tensors
        assert examined.checkpoint.config["quantization_config"]["ignore"] == [
            r"re:^(.*\.)?layers\.0\.mlp\.up_proj$", r"re:^(.*\.)?layers\.1\.mlp\.up_proj$", r"re:^(.*\.)?lm_head$",
        ]  # fmt: skip
    assert verify.verify(tmp_path / "out", source=folder, load=True, console=QUIET).logit_error == 0
    repack(tmp_path / "out", tmp_path / "marlin", format="marlin", also=["gptq"])
    assert verify.verify(tmp_path / "marlin", source=folder, load=True, console=QUIET, kernels=False).linears == 12


def test_a_tied_head_that_is_stored_alone_is_the_embedding(tmp_path: Path) -> None:
    """transformers loads such a folder; the result has the matrix where every client looks for it."""
    folder = _renamed(tmp_path / "model", lambda name: name.replace("model.embed_tokens", "lm_head"))
    (tmp_path / "text.txt").write_text(TEXT)
    runs.quantize(folder, tmp_path / "out", runs.recipe(tmp_path / "text.txt"))
    with open_folder(tmp_path / "out") as examined:
        assert "lm_head.weight" not in examined.checkpoint.tensors
        assert torch.equal(examined.checkpoint.read("model.embed_tokens.weight"), load_file(folder / "model.safetensors")["lm_head.weight"])
    assert verify.verify(tmp_path / "out", source=folder, load=True, console=QUIET).logit_error == 0


GUESTS = {
    "model.layers.0.self_attn.k_scale": (torch.ones(1), "scales of a quantized KV cache"),
    "mtp.fc.weight": (torch.full((128, 256), 0.5), "(MTP)"),
    "model.layers.2.eh_proj.weight": (torch.full((128, 256), 0.5), "(MTP)"),  # where config.json says num_nextn_predict_layers 1
    "v_head.summary.weight": (torch.full((1, 128), 0.5), "value head"),
    "score.weight": (torch.full((2, 128), 0.5), "a part that the model of config.json lacks"),
}


def test_tensors_that_others_added_are_carried(tmp_path: Path) -> None:
    """transformers loads such a model without a word of harm, so "download both again" does not help. They come out as they went in."""
    folder = make_tiny(tmp_path / "model", num_nextn_predict_layers=1)
    edit_tensors(folder, lambda tensors: tensors.update({name: tensor for name, (tensor, _) in GUESTS.items()}))
    with open_folder(folder, structure="needed") as examined:
        (said,) = examined.notes
        assert said.startswith("5 tensors are no part of the model") and all(kind in said for _, kind in GUESTS.values())
    (tmp_path / "text.txt").write_text(TEXT)
    measure(folder)
    runs.quantize(folder, tmp_path / "out", runs.recipe(tmp_path / "text.txt"))
    with open_folder(tmp_path / "out") as examined:
        assert all(torch.equal(examined.checkpoint.read(name), tensor) for name, (tensor, _) in GUESTS.items())
        ignored = examined.checkpoint.config["quantization_config"]["ignore"]
        assert {"mtp.fc", "model.layers.2.eh_proj", "lm_head"} <= set(ignored)
    assert verify.verify(tmp_path / "out", source=folder, load=True, console=QUIET).logit_error == 0


def test_tensors_that_others_added_are_left_out_on_demand(tmp_path: Path) -> None:
    """If they stayed in the folder, or in `ignore`, the flag would promise what it does not do; `plan` counts what the run writes."""
    folder = make_tiny(tmp_path / "model", num_nextn_predict_layers=1)
    edit_tensors(folder, lambda tensors: tensors.update({name: tensor for name, (tensor, _) in GUESTS.items()}))
    (tmp_path / "text.txt").write_text(TEXT)
    recipe = runs.recipe(tmp_path / "text.txt")
    carried, left_out = (runs.plan(folder, recipe, drop_unexpected=drop)["outputs"][0]["bytes"]["weights"] for drop in (False, True))
    assert carried - left_out == sum(tensor.nbytes for tensor, _ in GUESTS.values())
    runs.quantize(folder, tmp_path / "out", recipe, drop_unexpected=True)
    with open_folder(tmp_path / "out") as examined:
        assert not GUESTS.keys() & examined.checkpoint.tensors.keys() and not examined.notes
        assert examined.checkpoint.config["quantization_config"]["ignore"] == ["lm_head"]
    assert verify.verify(tmp_path / "out", source=folder, load=True, console=QUIET).logit_error == 0


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.bias", "model.layers.2.mlp.up_proj.weight", "lm_head.bias"])
def test_tensors_of_another_model_are_refused(tmp_path: Path, name: str) -> None:
    """transformers drops them too, and computes another model than the one that was trained."""
    folder = make_tiny(tmp_path / "model")
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.ones(256)}))
    error = refusal(FROM_DENSE["plan"], folder)
    assert_says(error, "E302", name)
    assert "download" not in error.problems[0].fix


@pytest.mark.parametrize(
    ("changes", "planned"),
    [
        ({"model_type": "gemma3n_text", "intermediate_size": [8192] * 2, "num_kv_shared_layers": 0}, "E390"),
        ({"model_type": "granitemoehybrid", "num_local_experts": 0, "num_experts_per_tok": 0}, "E302"),  # known, and these are a Llama's
        ({"model_type": "openelm", "num_key_value_heads": [1, 2], "head_dim": 64}, "E390"),
    ],
)
def test_a_sound_config_of_an_unknown_kind_is_not_called_damaged(tmp_path: Path, changes: dict[str, Any], planned: str) -> None:
    """ "Download it again" sends people round in circles; inspect needs no architecture."""
    folder = make_tiny(tmp_path / "model")
    (folder / "config.json").write_text(json.dumps(tiny_config(**changes)))
    assert inspect(folder)["model_type"] == changes["model_type"]
    assert refusal(FROM_DENSE["plan"], folder).error_id == planned
    (tmp_path / "text.txt").write_text(TEXT)
    error = refusal(measure, folder)  # these weights are a Llama's, so nothing else could load them
    assert error.exit_code == 3 and error.error_id in ("E302", "E392")


@pytest.mark.parametrize("changes", [{"pretraining_tp": "x"}, {"initializer_range": True}, {"is_causal": "x"}, {"layer_types": 1}])
def test_a_value_that_transformers_refuses_is_no_defect_of_ours(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Its classes raise errors of their own kinds, some only in the forward pass."""
    (tmp_path / "text.txt").write_text(TEXT)
    error = refusal(measure, make_tiny(tmp_path / "model", **changes))
    assert error.error_id in ("E301", "E392") and error.exit_code == 3


def test_hostile_sizes_in_lists_are_refused(tmp_path: Path) -> None:
    """A list is as good a place for 10^12 as a number."""
    for value in ([10**12], ["8"], [], [1] * 20_000, [[8]]):
        make_tiny(tmp_path / "model", intermediate_size=256)
        edit_config(intermediate_size=value)(tmp_path / "model")
        with pytest.raises(BadInput, match="intermediate_size"):
            open_checkpoint(tmp_path / "model")


def test_a_module_map_is_held_against_every_block(tmp_path: Path) -> None:
    """A map that fits block 0 alone ended in a KeyError."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    }
    config = {"model_type": "glm4_moe", **sizes, **experts, "head_dim": 16, "vocab_size": VOCAB_SIZE, "n_group": 1, "topk_group": 1}
    attention = {"module": "self_attn", "first": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], "last": "self_attn.o_proj"}
    mlp = {"module": "mlp", "first": ["mlp.gate_proj", "mlp.up_proj"], "last": "mlp.down_proj"}
    names = {"decoder": "model", "blocks": "model.layers", "embedding": "model.embed_tokens", "norm": "model.norm"}

    def refused(**changes: Any) -> str:
        (tmp_path / "map.json").write_text(json.dumps({**names, "attention": attention, "mlp": mlp, **changes}))
        with pytest.raises(UsageError) as caught:
            architecture(config, tmp_path / "map.json")
        assert caught.value.error_id == "E251"
        return caught.value.problems[0].what

    assert "block 1 lacks mlp.gate_proj, mlp.up_proj, mlp.down_proj" in refused()
    assert "model.0." in refused(blocks="model")  # whose children have no numbers
    assert "input_layernorm" in refused(mlp={**mlp, "last": "input_layernorm"})  # a norm
    assert "model.norm.weight" in refused(embedding="model.norm")
