from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marlinctl.checkpoint.formats.targets import GroupOf, matches, name_patterns, split_fused, with_fused_names

BLOCKS, EXPERTS = 13, 5
ATTENTION = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(BLOCKS) for p in "qkvo"]
MOE = [f"model.layers.{i}.mlp.experts.{e}.{p}_proj" for i in range(BLOCKS) for e in range(EXPERTS) for p in ("gate", "up", "down")]
EVERYTHING = [*ATTENTION, *MOE, "lm_head"]


def meant(patterns: list[str]) -> set[str]:
    return {name for name in EVERYTHING if any(matches(name, pattern) for pattern in patterns)}


@given(st.sets(st.sampled_from(EVERYTHING)))
def test_patterns_mean_exactly_the_chosen_linears(chosen: set[str]) -> None:
    """A layer that the recipe did not choose would be read with another layer's group size."""
    assert meant(name_patterns(chosen, EVERYTHING)) == chosen


def test_block_1_does_not_mean_block_11() -> None:
    """Clients use re.match: an expression without an end would take blocks 10 to 12 along with block 1."""
    chosen = [name for name in MOE if ".layers.1." in name]
    patterns = name_patterns(chosen, EVERYTHING)
    assert all(pattern.startswith("re:^") and pattern.endswith("$") for pattern in patterns)
    assert meant(patterns) == set(chosen)


def test_whole_families_become_one_expression() -> None:
    """A list of all experts of a real model has tens of thousands of names, each compared with each module by every client."""
    assert len(name_patterns([*ATTENTION, *MOE], EVERYTHING)) == 4 + 3


def test_experts_are_always_an_expression() -> None:
    """transformers recognises the experts' scheme by an expression that mentions them; exact names would give them another one's."""
    few = [name for name in MOE if ".layers.2." in name and name.endswith("down_proj")]
    assert name_patterns(few, EVERYTHING) == [r"re:^model\.layers\.(2)\.mlp\.experts\.\d+\.down_proj$"]


def test_a_name_beats_an_expression_beats_a_class() -> None:
    """The precedence of compressed-tensors: with another one, foreign checkpoints with several groups would be unpacked wrongly."""
    groups = {"a": ["Linear"], "b": [r"re:.*q_proj$"], "c": ["model.layers.3.self_attn.q_proj"]}
    group_of = GroupOf(groups)
    assert group_of("model.layers.0.self_attn.o_proj") == "a"
    assert group_of("model.layers.0.self_attn.q_proj") == "b"
    assert group_of("model.layers.3.self_attn.q_proj") == "c"
    assert GroupOf({"b": groups["b"]})("model.layers.0.self_attn.o_proj") is None


@pytest.mark.parametrize("target", ["re:(", "re:" + "a" * 5000])
def test_expressions_that_are_none_are_said(target: str) -> None:
    """A config of a stranger must not end in a traceback."""
    with pytest.raises(ValueError, match="expression"):
        matches("model.layers.0.self_attn.o_proj", target)


@pytest.mark.parametrize(
    ("sizes", "fused"),
    [
        ({"l.q_proj": 32, "l.k_proj": 64, "l.v_proj": 32}, ["l.qkv_proj"]),
        ({"l.gate_proj": 32, "l.up_proj": None}, ["l.gate_up_proj"]),
        ({"m.experts.0.up_proj": 32, "m.experts.1.up_proj": 64}, ["m.experts"]),
        ({"l.q_proj": 32, "l.k_proj": 32, "l.v_proj": 32, "l.o_proj": 64, "m.down_proj": None}, []),
    ],
)
def test_uneven_shards_are_found(sizes: dict[str, int | None], fused: list[str]) -> None:
    """A server refuses a fused linear whose shards differ; without this the person learns it there, after hours of work."""
    assert [name for name, _ in split_fused(sizes)] == fused


def test_fused_names_join_when_all_shards_are_there() -> None:
    """Servers match GPTQ's `dynamic` after fusing: a rule for q_proj alone would not reach qkv_proj."""
    given = ["m.0.q_proj", "m.0.k_proj", "m.0.v_proj", "m.0.gate_proj"]
    assert with_fused_names(given, given)[4:] == ["m.0.qkv_proj"]


def test_all_experts_of_a_block_are_one_module() -> None:
    """vLLM asks for the rule of `mlp.experts`: without it a folder with 16-bit experts was not served, and with it for a part of them
    the others would be noise."""
    experts = [f"m.{block}.mlp.experts.{i}.up_proj" for block in range(2) for i in range(3)]
    assert with_fused_names(experts[:3], experts)[3:] == ["m.0.mlp.experts"]
    assert with_fused_names(experts[:5], experts)[5:] == ["m.0.mlp.experts"]
