"""Names of experts in checkpoints, as transformers' own conversions have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from marlinctl.checkpoint.runtimes import READ_WEIGHTS, WHOLE_EXPERTS
from marlinctl.errors import BadInput
from marlinctl.models.architectures import Experts
from marlinctl.models.config import RENAMED_DECODERS
from marlinctl.models.derivation import derived_architecture
from marlinctl.models.families import FAMILIES, architecture
from marlinctl.models.meta_model import build
from marlinctl.models.stored_names import stored_names
from marlinctl.system.console import Console
from marlinctl.verify.run import verify
from tests import runs, zoo
from tests.models.sweep import outcome
from tests.models.test_derivation import config_of

RENAMED = ("hy_v3", "laguna", "nemotron_h", "lfm3")
MIXTURES = ("deepseek_v3", "gpt_oss", "granitemoeshared", "llama4_text", "phimoe", "qwen3_5_moe_text")


@pytest.mark.parametrize("model_type", sorted(name for name, family in FAMILIES.items() if family.experts))
def test_derivation_names_experts_as_the_table_does(model_type: str) -> None:
    """If conversions were run backwards wrongly, gate and up would change places, and nothing else would show it."""
    config = config_of(model_type)
    by_table, derived = architecture(config), derived_architecture(config)
    assert [block.parts for block in derived.blocks] == [block.parts for block in by_table.blocks]
    assert dict(derived.expected) == dict(by_table.expected)
    renamed = [{name: other for name, other in block.renamed.items() if name != other} for block in by_table.blocks]
    assert [dict(block.renamed) for block in derived.blocks] == renamed


@pytest.mark.parametrize("model_type", MIXTURES)
def test_who_does_not_load_experts_one_by_one_is_known(model_type: str) -> None:
    """If a family were missing in the list, `loads` would promise what transformers fills with random numbers."""
    known = derived_architecture(config_of(model_type))
    whole = {bool(experts.whole) for block in known.blocks for experts in block.experts}
    assert whole == {model_type in WHOLE_EXPERTS}


@pytest.mark.parametrize("model_type", [name if name == "laguna" else pytest.param(name, marks=pytest.mark.slow) for name in RENAMED])
def test_linears_that_checkpoints_call_otherwise_are_quantized(model_type: str) -> None:
    """If the checkpoint's name were taken for the module's, or the reverse, a linear would be read or written in another's place."""
    found = outcome(model_type)
    assert (found.how, found.reason) == ("derived", ""), found.line


@pytest.mark.parametrize("model_type", RENAMED)
def test_whose_decoder_is_called_otherwise_is_known(model_type: str) -> None:
    """If a family were missing in the list, transformers would not find the linears that stay at 16 bits, and fill them at random."""
    known = derived_architecture(config_of(model_type))
    assert (known.spelling is not None) == (model_type in RENAMED_DECODERS)
    assert known.spelling is not None or known.renamed_modules


PIECES = ("bailing_hybrid", "kimi_linear", "olmo_hybrid")


@pytest.mark.parametrize("model_type", [name if name == "kimi_linear" else pytest.param(name, marks=pytest.mark.slow) for name in PIECES])
def test_convolutions_that_are_stored_in_pieces_are_joined(model_type: str) -> None:
    """If q, k and v of a convolution changed places, hidden states would not be those of transformers; and transformers loads no packed
    folder of them, which `loads` must say."""
    found = outcome(model_type)
    assert found.how == "derived" and "splits or joins 16-bit weights" in found.reason, found.line


def test_pieces_have_the_rows_of_the_checkpoint(tmp_path: Path) -> None:
    """AllenAI's OLMo Hybrid has fewer rows for q and k than for v; transformers saves thirds. It loads both, and so it is here."""
    from safetensors.torch import load_file, save_file

    from marlinctl.checkpoint.folder import open_folder
    from marlinctl.models.places import block_places

    folder = zoo.build("olmo_hybrid", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    names = [f"model.layers.0.linear_attn.{part}_conv1d.weight" for part in "qkv"]
    whole = torch.cat([tensors[name] for name in names])
    assert whole.shape[0] == 192
    tensors |= dict(zip(names, (part.contiguous() for part in whole.split([48, 48, 96])), strict=True))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with open_folder(folder, structure="needed") as examined:
        known, read = examined.architecture, examined.checkpoint.read
        assert known is not None
        places = block_places(known.blocks[0])
        assert all(torch.equal(places[name].of(whole), read(name)) for name in names)
    tensors[names[2]] = tensors[names[2]][:95].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"conv1d\.weight has shape") as caught, open_folder(folder, structure="needed"):
        pass
    assert caught.value.error_id == "E302"


def test_a_checkpoint_may_have_the_names_of_modules() -> None:
    """The dense blocks of Kimi Linear say `mlp`; transformers saves them as `block_sparse_moe`, and loads both."""
    from marlinctl.models.lookup import architecture_of

    config = config_of("kimi_linear")
    saved = derived_architecture(config)
    assert "model.layers.0.block_sparse_moe.up_proj.weight" in saved.expected
    published = {name.replace("layers.0.block_sparse_moe.", "layers.0.mlp.") for name in saved.expected}
    known = architecture_of(config, published)
    assert known.expected.keys() == published and "model.layers.0.mlp.up_proj" in known.linears
    assert not known.renamed_modules.get("model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj").endswith("moe.up_proj")


def test_rules_name_a_linear_as_both_call_it(tmp_path: Path) -> None:
    """If rules had the checkpoint's name alone, transformers would look for a packed weight, or for other groups, and make them up."""
    from marlinctl.convert.repack import repack

    folder = zoo.build("laguna", tmp_path / "model")
    text = runs.write_text(tmp_path / "text.txt")
    rules: dict[str, Any] = {
        "quantize__skip": ["shared_expert.up_proj"],
        "quantize__overrides": {"shared_expert.down_proj": {"group_size": -1}},
    }
    runs.quantize(folder, tmp_path / "out", runs.recipe(text, **rules))
    repack(tmp_path / "out", tmp_path / "gptq", format="gptq")
    repack(tmp_path / "gptq", tmp_path / "again", format="ct")
    for name in ("out", "again"):
        assert verify(tmp_path / name, source=folder, load=True, console=Console.quiet()).logit_error == 0


def test_a_tied_head_and_a_linear_called_an_embedding_are_left_alone(tmp_path: Path) -> None:
    """BioGPT's tied head is not called `lm_head`: transformers looked for a packed one, and could not load what was written."""
    folder = zoo.build("biogpt", tmp_path / "model")
    runs.quantize(folder, tmp_path / "out", runs.recipe(runs.write_text(tmp_path / "text.txt")))
    assert verify(tmp_path / "out", source=folder, load=True, console=Console.quiet()).logit_error == 0


def test_names_without_a_way_back_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a name led to another tensor when transformers loads it, what is written would be lost or land elsewhere."""
    from transformers import core_model_loading

    model: Any = build(config_of("phi"), torch.float32)
    one, other = (f"model.layers.0.mlp.fc{i}.weight" for i in (1, 2))
    swapped = {one: other, other: one}
    monkeypatch.setattr(
        core_model_loading, "revert_weight_conversion", lambda _, state: {swapped.get(name, name): tensor for name, tensor in state.items()}
    )
    with pytest.raises(BadInput, match="does not load that name"):
        stored_names(model, "phi", {})


def test_who_reads_the_weights_of_linears_is_known() -> None:
    """If a family were missing in the list, `loads` would promise a folder that transformers cannot run."""
    for model_type in ("nanochat", "phi"):
        found = outcome(model_type)
        assert found.how == "derived" and bool(found.reason) == (model_type in READ_WEIGHTS), found.line


def test_shares_before_experts_are_refused() -> None:
    """If the two were taken for each other, every token would go to expert 0."""
    from marlinctl.models.fused_experts import _as_called
    from marlinctl.models.tracing import LENGTH, SAMPLES, Call

    known = Experts("mlp.experts", 4, 1, ("mlp.experts.{e}.up_proj",), "mlp.experts.{e}.down_proj")
    x, ids, shares = torch.ones(SAMPLES * LENGTH, 8), torch.zeros(SAMPLES * LENGTH, 2, dtype=torch.int64), torch.ones(SAMPLES * LENGTH, 2)
    assert _as_called(known, Call("e", None, None, 0, 0, {"x": x, "ids": ids, "shares": shares}), "toy").top_k == 2
    with pytest.raises(BadInput, match="in this order"):
        _as_called(known, Call("e", None, None, 0, 0, {"x": x, "shares": shares, "ids": ids}), "toy")
