"""Models that are not in the table: their architecture is found by following transformers' own code."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from marlinctl.errors import BadInput, UsageError
from marlinctl.models.derivation import derived_architecture
from marlinctl.models.families import FAMILIES, architecture
from marlinctl.models.lookup import any_architecture
from tests import zoo
from tests.models.sweep import outcome

DENSE = sorted(name for name, family in FAMILIES.items() if not family.experts)
SAMPLE = ["biogpt", "falcon_h1", "phimoe"]  # all of them, and the others, with `-m slow` below


def config_of(model_type: str, **changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = zoo.config_of(model_type, **changes).to_dict()
    return made


@pytest.mark.parametrize("model_type", DENSE)
def test_derivation_finds_what_the_table_says(model_type: str) -> None:
    """If either were wrong, the two would differ: they have nothing in common."""
    config = config_of(model_type)
    by_table, derived = architecture(config), derived_architecture(config)
    assert [replace(b, others={}) for b in derived.blocks] == [replace(b, others={}) for b in by_table.blocks]
    assert [dict(b.others) for b in derived.blocks] == [dict(b.others) for b in by_table.blocks]
    assert dict(derived.expected) == dict(by_table.expected)
    names = ("decoder", "embedding", "norm", "head", "tied", "hidden_size", "vocab_size", "outside")
    assert [getattr(derived, name) for name in names] == [getattr(by_table, name) for name in names]


@pytest.mark.parametrize("model_type", SAMPLE)
def test_models_outside_the_table_are_quantized(model_type: str) -> None:
    """If an argument, a buffer, learned positions or a tuple were lost on the way, hidden states would not be those of transformers; if
    `ignore` lacked a tied head (biogpt) or a router (phimoe) by the name of its module, transformers would not load the result."""
    found = outcome(model_type)
    assert found.how in ("derived", "table"), found.line


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(zoo.DERIVED))
def test_every_model_of_the_list_is_quantized(model_type: str) -> None:
    """If a release of transformers changed a model, docs/models.md would promise what does not work."""
    found = outcome(model_type)
    assert found.how in ("derived", "table"), found.line


def test_derived_buffers_are_carried_and_not_trained() -> None:
    """If Gemma 4's layer scalar were taken for a norm, distillation would train a buffer, and fail."""
    from marlinctl.distillation.parameters import trained_places

    known = derived_architecture(config_of("gemma4_text"))
    assert known.blocks[0].buffers == {"model.layers.0.layer_scalar"}
    assert "model.layers.0.layer_scalar" in known.expected
    assert not known.blocks[0].buffers & set(trained_places(known))


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "several streams": ("gemma3n_text", {}, "pass on several hidden states for each token"),
    "one weight in several blocks": ("zamba2", {}, "is the same tensor as another one"),
    "Conv1D": ("gpt2", {}, "Conv1D"),
    "Conv1D before norms": ("openai-gpt", {}, "Conv1D"),
    "an encoder": ("bert", {}, "not a decoder with one list of blocks"),
    "experts of another kind": ("jetmoe", {"num_local_experts": 4}, "no module of gate, up and down"),
    "hyper connections": ("deepseek_v4", {}, "pass on several hidden states for each token"),
    "what another block computed": ("glm_moe_dsa", {"indexer_types": ["full", "shared"]}, "returns something besides the hidden states"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_gives_the_reason(case: str) -> None:
    """If it said `use a module map`, a user would write one for a model that no map can describe."""
    model_type, changes, reason = REFUSED[case]
    with pytest.raises(BadInput) as caught:
        any_architecture(config_of(model_type, **changes))
    problem = caught.value.problems[0]
    assert caught.value.error_id == "E390" and reason in problem.what
    assert "--module-map" not in problem.fix


def test_compressed_tensors_packs_no_conv1d() -> None:
    """If a release did, GPT-2 would be refused without reason (docs/decisions/README.md)."""
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(zoo.config_of("gpt2"))
    weights = {"num_bits": 4, "group_size": 32, "strategy": "group", "symmetric": True, "type": "int"}
    group = {"targets": ["Linear", "Conv1D", "re:.*c_attn"], "weights": weights}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}, "ignore": ["lm_head"]}
    apply_quantization_config(model, QuantizationConfig.model_validate(config))
    assert not any(hasattr(module, "quantization_scheme") for module in model.modules())


def test_a_type_that_transformers_lacks_is_refused_without_a_map() -> None:
    """If a map were offered, it would fail for the same reason: transformers must build the model."""
    with pytest.raises(BadInput, match="mamba9") as caught:
        any_architecture({"model_type": "mamba9"})
    assert caught.value.error_id == "E390" and "--module-map" not in caught.value.problems[0].fix


def test_the_model_is_as_it_was_after_tracing() -> None:
    """If stand-ins stayed in a model, whoever builds on the traced one would compute zeros."""
    from marlinctl.models import tracing
    from marlinctl.models.meta_model import build

    model = build(config_of("phi"), torch.float32)
    tracing.traced(model, "phi", ["model.layers.0", "model.layers.1"], (), first=1)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any("forward" in vars(module) for module in model.modules())


def test_experts_are_what_the_table_has_rows_for() -> None:
    """If a mixture were derived, its experts would be one tensor that nothing quantizes."""
    for name, family in FAMILIES.items():
        if family.experts:
            blocks = architecture(config_of(name)).blocks
            assert any(block.experts for block in blocks)


def test_infinity_is_read_as_transformers_writes_it() -> None:
    """If {"__float__": "Infinity"} stayed a mapping, every Granite 4 and Bamba that transformers saved would be called damaged."""
    from marlinctl.models.transformers_config import transformers_config

    limit = [0.0, {"__float__": "Infinity"}]
    parsed: Any = transformers_config({"model_type": "granitemoehybrid", "num_local_experts": 0, "time_step_limit": limit})
    assert parsed.time_step_limit == (0.0, float("inf"))


def test_the_hidden_size_is_that_of_the_blocks() -> None:
    """If it were the width of the embedding, an OPT with narrower ones would end in a traceback when its tokens are embedded."""
    known = derived_architecture(config_of("opt", word_embed_proj_dim=32))
    assert known.hidden_size == 64 and known.expected[f"{known.embedding}.weight"] == (zoo.VOCAB_SIZE, 32)
    assert "model.decoder.project_in.weight" in known.outside


def test_a_head_of_another_name_is_not_packed() -> None:
    """If embed_out of GPT-NeoX were packed, transformers would look for lm_head, and fill it with random numbers."""
    from marlinctl.planning.layer_rules import plan

    known = derived_architecture(config_of("gpt_neox"))
    assert known.head is not None and known.head.name == "embed_out"
    with pytest.raises(UsageError, match="embed_out") as caught:
        plan(known, group_size=32, skip=(), overrides={}, include=("lm_head",))
    assert caught.value.error_id == "E255"
