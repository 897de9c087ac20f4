"""The list of models in docs/models.md: how it is made, and how a part of it is made again."""

from __future__ import annotations

import os
import time

import pytest

from tests.models import sweep
from tests.models.model_list import read_table, table
from tests.models.shrink import FIRST_SPECIAL, HIDDEN, tiny_config
from tests.models.sweep import NOT_TRIED, Outcome, outcomes

REASON = "models of type 'x' cannot be compressed: "
FOUND = [
    Outcome("llama", "table"),
    Outcome("glm4", "derived"),
    Outcome("mamba", "derived", "x: the code of mamba in transformers reads the weights of linears"),
    Outcome("gemma3", "wrapper"),
    Outcome("bert", "refused", REASON + "it is not a decoder with one list of blocks, as many as config.json says"),
    Outcome("blt", "refused", NOT_TRIED + "more than 60 s"),
    Outcome("gpt2", "refused", REASON + "a | b"),
    Outcome("odd", "wrong", "the pipeline's hidden states are 1 off"),
]


def test_rows_of_other_types_stay_as_they_are() -> None:
    """If a part of the list were read wrongly, `--update glm4` would change what it says of all other types."""
    text = table(FOUND)
    read = read_table(text)
    assert table(read.values()) == text
    assert {name: one.how for name, one in read.items()} == {one.model_type: one.how for one in FOUND}
    read["glm4"] = Outcome("glm4", "refused", "no longer")
    assert "| `glm4` | no longer |" in table(read.values()) and "`mamba`" in table(read.values())


def test_a_type_that_hangs_or_dies_costs_its_own_time_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a type could hold up the list, one of 270 would cost the whole sweep."""

    def outcome(model_type: str) -> Outcome:
        if model_type == "hangs":
            time.sleep(60)
        if model_type == "dies":
            os._exit(3)
        return Outcome(model_type, "derived")

    monkeypatch.setattr(sweep, "outcome", outcome)
    found = {one.model_type: one for one in outcomes(["hangs", "dies", "works"], workers=2, seconds=1.0)}
    assert found["works"].how == "derived"
    assert found["hangs"].reason == f"{NOT_TRIED}more than 1 s"
    assert (found["dies"].how, found["dies"].reason) == ("wrong", "its process ended with exit code 3")


def test_a_config_is_shrunk_with_one_layer_of_each_kind() -> None:
    """If a kind of layer were cut away, a type would count as working that was never tried with it."""
    text = tiny_config("qwen3_5").get_text_config()
    assert (text.hidden_size, text.layer_types) == (HIDDEN, ["linear_attention", "full_attention"])
    shared = tiny_config("gemma3n_text")
    assert len(set(shared.layer_types)) == 2 and shared.num_kv_shared_layers == len(shared.layer_types) // 2
    image = tiny_config("qwen3_5")
    assert FIRST_SPECIAL <= image.image_token_id != image.video_token_id >= FIRST_SPECIAL
