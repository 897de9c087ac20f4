from __future__ import annotations

from typing import Any

import pytest
import yaml

from marlinctl.card import CardFacts, render


def front_matter(card: str) -> dict[str, Any]:
    assert card.startswith("---\n")
    document: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return document


FACTS = CardFacts(
    "ct",
    {"model.layers.0.mlp.up_proj": 128, "model.layers.0.mlp.down_proj": 128, "model.layers.1.mlp.down_proj": -1},
    [f"skipped_{i}" for i in range(9)],
    "marlinctl quantize org/Model OUT --recipe int4",
    base_model="org/Model-1B",
    license="apache-2.0",
    calibration="128 samples of 2,048 tokens of self",
    recipe_hash="ab" * 32,
    scores=[("winogrande", "acc", "0.51 ± 0.01", "0.52 ± 0.01")],
)


def test_the_hub_understands_the_front_matter() -> None:
    """base_model is how the hub links a quantized model to its original; the licence is a duty."""
    meta = front_matter(render(FACTS))
    assert meta["base_model"] == "org/Model-1B" and meta["base_model_relation"] == "quantized"
    assert meta["license"] == "apache-2.0" and meta["pipeline_tag"] == "text-generation"
    assert "compressed-tensors" in meta["tags"]


def test_the_card_says_what_was_done() -> None:
    """Who gets the model must know groups, what was left out, where it runs, the scores, and how to repeat and check it."""
    card = render(FACTS)
    for text in (
        "128 (2 linears), whole rows (1 linears)",
        "and 3 more",
        "vLLM, SGLang",
        "marlinctl quantize org/Model OUT --recipe int4",
        "| winogrande | acc | 0.51 ± 0.01 | 0.52 ± 0.01 |",
        "marlinctl verify FOLDER --source ORIGINAL",
        "ab" * 32,
        "# Model-1B:",
    ):
        assert text in card, text


@pytest.mark.parametrize("fmt", ["ct", "gptq", "marlin", "dense"])
def test_a_card_without_optional_facts_is_whole(fmt: str) -> None:
    """Foreign input comes without base model, recipe and scores: no `None` may stand in the card."""
    card = render(CardFacts(fmt, {"a": 64}, ["lm_head"], "marlinctl pack IN OUT"))
    assert "None" not in card and "## Scores" not in card and "base_model" not in front_matter(card)
    assert ("finds no model file" in card) is (fmt == "marlin")
    assert ("rounded to 11" in card) is (fmt == "dense")


def test_hostile_names_stay_inside_their_place() -> None:
    """Names come from configs and command lines of strangers: they must not add keys, rows or end a code block."""
    hostile = 'x"\nlicense: mit\n---\n| a | b |'
    card = render(
        CardFacts("ct", {"a": 64}, ["l|m"], "run ``` now", base_model=hostile, license=hostile, scores=[("t|u", "m\nn", "1", "2")])
    )
    meta = front_matter(card)
    assert meta["base_model"] == hostile and meta["license"] == hostile
    assert card.count("```") == 2 and "t\\|u | m n" in card
