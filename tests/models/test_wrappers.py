"""Language models with parts for images: the language model is compressed, everything else is copied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from marlinctl.checkpoint.folder import open_folder
from marlinctl.checkpoint.formats.targets import Entries
from marlinctl.errors import BadInput, UsageError
from marlinctl.models.config import positions, sizes_of
from marlinctl.models.lookup import architecture_of
from marlinctl.system.console import Console
from marlinctl.verify.inspect import inspect
from marlinctl.verify.run import verify
from tests import runs, zoo
from tests.models.sweep import disagreement, outcome

QUIET = Console.quiet()
QUICK = ("gemma3",)
EXPERTS = ("llama4", "qwen3_vl_moe")  # which checkpoints store in one tensor; transformers does not put single ones together
EVERY = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in zoo.WRAPPERS if name not in EXPERTS]
OLD, NEW = "language_model.model.layers.0.mlp.up_proj", "model.language_model.layers.0.mlp.up_proj"


def respell(folder: Path, old: str, new: str) -> None:
    path = folder / "model.safetensors"
    save_file({name.replace(old, new, 1): tensor for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("model_type", EVERY)
def test_the_language_model_is_compressed_and_the_rest_is_copied(tmp_path: Path, model_type: str) -> None:
    """If names or modules were mixed up, hidden states would not be those of transformers, or logits not those of the weights; if `ignore`
    left out a linear, transformers would look for packed weights of the vision tower, and fill it with random numbers.
    """
    folder = zoo.build(model_type, tmp_path / "model")
    (folder / "video_preprocessor_config.json").write_text("{}")
    assert disagreement(folder, tmp_path) == ""
    assert verify(tmp_path / "out", source=folder, load=True, console=QUIET).logit_error == 0
    with open_folder(folder, structure="needed") as before, open_folder(tmp_path / "out", structure="needed") as after:
        known = after.architecture
        assert known is not None and set(after.info.layers) == set(known.linears) and known == before.architecture
        others = [name for name in before.checkpoint.tensors if name.removesuffix(".weight") not in after.info.layers]
        assert any("vis" in name for name in others)
        assert all(before.checkpoint.raw(name) == after.checkpoint.raw(name) for name in others)
        ignored = Entries(after.checkpoint.config["quantization_config"]["ignore"])
        linears = {name for name, module in _whole(folder).named_modules() if isinstance(module, nn.Linear)}
        packed = {known.module(name) for name in after.info.layers}
        assert {name for name in linears if name not in ignored} == packed
    assert (tmp_path / "out" / "video_preprocessor_config.json").exists()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "AutoModelForImageTextToText.from_pretrained" in card and "pipeline_tag: image-text-to-text" in card
    assert inspect(tmp_path / "out")["hidden_size"] == 64


@pytest.mark.slow
@pytest.mark.parametrize(
    "model_type", ["cosmos3_edge", "cosmos3_omni", "fuyu", "hyperclovax_vision_v2", "kimi_k25", "kosmos-2.5", "mistral_large4"]
)
def test_names_and_positions_of_odd_wrappers(model_type: str) -> None:
    """A linear called an embedding, a projector called otherwise, blocks or all tensors in them called otherwise, positions that are found
    by token ids: clients took what was left at 16 bits for packed, blocks were not found, or hidden states were of other positions.
    """
    found = outcome(model_type)
    assert (found.how, found.reason) == ("wrapper", ""), found.line


# Tensors of checkpoints -> of transformers' models, behind the decoder.
RENAMED = {
    "cosmos3_edge": {"layers.0.self_attn.to_q": "layers.0.self_attn.q_proj", "layers.0.mlp.up_proj": "layers.0.mlp.fc1"},
    "mistral_large4": {"layers.0.attention.wq": "layers.0.self_attn.q_proj", "tok_embeddings": "embed_tokens"},
}


@pytest.mark.parametrize("model_type", RENAMED)
def test_linears_of_a_wrapper_have_the_checkpoints_names(tmp_path: Path, model_type: str) -> None:
    """If names inside of blocks were taken to be transformers', their tensors would be called missing."""
    with open_folder(zoo.build(model_type, tmp_path / "model"), structure="needed") as examined:
        known = examined.architecture
    assert known is not None
    for stored, module in RENAMED[model_type].items():
        assert f"{stored}.weight" in known.expected
        assert known.module(known.renamed_modules.get(stored, stored)) == f"model.language_model.{module}"


def test_experts_of_a_wrapper_have_the_checkpoints_names(tmp_path: Path) -> None:
    """If gate and up changed places, or expert 10 came before expert 2, nothing but the results would show it."""
    from marlinctl.models.places import block_places

    folder = zoo.build("mistral_large4", tmp_path / "model", text_config={"n_routed_experts": 12})
    with open_folder(folder, structure="needed") as examined:
        known = examined.architecture
    assert known is not None
    (experts,) = known.blocks[1].experts
    assert (experts.count, experts.first, experts.last) == (12, ("experts.{e}.w1", "experts.{e}.w3"), "experts.{e}.w2")
    places = block_places(known.blocks[1])
    assert places["layers.1.experts.10.w3.weight"].index == (10, slice(32, 64))


REFUSED = {
    "blip-2": "transformers runs it with pixel_values alone",
    "minimax_m3_vl": r"shared_experts\.gate_proj\.weight, which no single tensor",
    "shieldgemma2": "which its language model of this type does not have",
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_wrapper_is_refused_with_the_true_reason(tmp_path: Path, model_type: str) -> None:
    """It was said that a tensor is missing, and whoever downloaded the folder again got the same."""
    with (
        pytest.raises(BadInput, match=REFUSED[model_type]) as caught,
        open_folder(zoo.build(model_type, tmp_path / "model"), structure="needed"),
    ):
        pass
    assert caught.value.error_id == "E390"


def test_who_splits_weights_of_a_tower_is_known(tmp_path: Path) -> None:
    """transformers cannot load packed weights beside weights that it splits: `plan` said that it loads them."""
    folder = zoo.build("qianfan_ocr", tmp_path / "model")
    found = runs.plan(folder, runs.recipe(runs.write_text(tmp_path / "text.txt")))
    assert "16-bit weights of qianfan_ocr" in str(found["outputs"][0]["refused_by"]), found["outputs"][0]


def test_a_language_model_without_a_row_in_the_table_is_derived() -> None:
    """The decoder of a wrapper is not a whole model of transformers: what derivation asks of one must be there too."""
    from marlinctl.models.meta_model import build
    from tests.models.test_derivation import config_of

    config = config_of("aya_vision", **zoo.WRAPPERS["aya_vision"])
    known = architecture_of(config, build(config, torch.float32).state_dict().keys())
    assert len(known.linears) == 14 and all(name.startswith("model.language_model.layers.") for name in known.linears)


def test_a_plan_says_what_stays(tmp_path: Path) -> None:
    """The linears of a vision tower are no routers, and their bytes are part of the result."""
    folder = zoo.build("gemma3", tmp_path / "model", dtype=torch.bfloat16)
    found = runs.plan(folder, runs.recipe(runs.write_text(tmp_path / "text.txt")))
    reasons = {item["name"]: item["reason"] for item in found["linears"]["kept"]}
    assert (
        reasons["vision_tower.encoder.layers.0.mlp.fc1"] == "not of the language model" and "router of the experts" not in reasons.values()
    )
    assert found["model"]["bytes"] == sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    assert found["outputs"][0]["bytes"]["weights"] < found["model"]["bytes"]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", EXPERTS)
def test_the_experts_of_a_wrapper_are_compressed(tmp_path: Path, model_type: str) -> None:
    """A wrapper has a prefix before the names by which experts get names of their own, and are put together again."""
    folder = zoo.build(model_type, tmp_path / "model")
    assert disagreement(folder, tmp_path) == ""
    assert verify(tmp_path / "out", source=folder, load=None, console=QUIET).linears > 14


def _whole(folder: Path) -> nn.Module:
    from transformers import AutoModelForImageTextToText

    model: nn.Module = AutoModelForImageTextToText.from_pretrained(folder)
    return model


def test_every_spelling_of_a_wrapper_is_known(tmp_path: Path) -> None:
    """The hub has Gemma 3 in two spellings, and transformers loads both. Names are the checkpoint's, modules are transformers'."""
    folder = zoo.build("gemma3", tmp_path / "model")
    found = []
    for name in (OLD, NEW):
        with open_folder(folder, structure="needed") as examined:
            known = examined.architecture
            assert known is not None and name in known.linears and not known.unexpected(examined.checkpoint.tensors)
            assert known.module(name) == NEW and known.blocks[0].path == "model.language_model.layers.0"
            found.append(len(known.expected))
        respell(folder, "language_model.model.", "model.language_model.")
    assert found[0] == found[1]


def test_what_a_wrapper_lacks_is_named(tmp_path: Path) -> None:
    """A vision tower without one of its tensors would be carried along, and filled with random numbers where it is loaded."""
    folder = zoo.build("gemma3", tmp_path / "model")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["vision_tower.encoder.layers.0.mlp.fc1.bias"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"fc1\.bias is missing") as caught, open_folder(folder, structure="needed"):
        pass
    assert caught.value.error_id == "E302"


def test_a_module_map_is_not_taken_for_a_wrapper(tmp_path: Path) -> None:
    """No map can say which part is the language model, and none needs to."""
    with pytest.raises(UsageError, match="gemma3") as caught:
        architecture_of({"model_type": "gemma3", "text_config": {}}, [], tmp_path / "map.json")
    assert caught.value.error_id == "E251" and "leave --module-map out" in caught.value.problems[0].fix


@pytest.mark.slow
def test_every_format_holds_a_wrapper(tmp_path: Path) -> None:
    """`pack` has only names and config.json to know it by; skipped linears must be found by GPTQ's rules and by compressed-tensors."""
    from marlinctl.convert.repack import repack

    folder = zoo.build("gemma3", tmp_path / "model", dtype=torch.bfloat16)
    text = runs.write_text(tmp_path / "text.txt")
    rules: dict[str, Any] = {"quantize__skip": ["layers.1.*"], "quantize__overrides": {"down_proj": {"group_size": -1}}}
    runs.quantize(folder, tmp_path / "out", runs.recipe(text, **rules))
    repack(tmp_path / "out", tmp_path / "gptq", format="gptq", also=["marlin", "ct"])
    for fmt in ("gptq", "gptq-marlin", "gptq-ct"):
        assert verify(tmp_path / fmt, source=folder, load=fmt == "gptq-ct", console=QUIET, kernels=False).linears == 7
    with open_folder(tmp_path / "gptq") as examined:
        assert {name: size for name, size in examined.info.layers.items() if size == -1} == {OLD.replace("up_proj", "down_proj"): -1}


def test_sizes_are_those_of_the_language_model() -> None:
    """PaliGemma has a hidden_size of 2048 beside its text_config whatever the language model is: `inspect` showed that."""
    config = {"model_type": "paligemma", "hidden_size": 2048, "max_position_embeddings": 9, "text_config": {"hidden_size": 64}}
    assert sizes_of(config)["hidden_size"] == 64 and positions(config) == 9
    assert positions({**config, "text_config": {"max_position_embeddings": 512}}) == 512
