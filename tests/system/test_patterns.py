"""marlinctl/system/patterns.py: the answers of `re`, in bounded time."""

from __future__ import annotations

import re
import time
from contextlib import suppress

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from marlinctl.planning.layer_rules import plan
from marlinctl.system.patterns import LONGEST, MOST_PATTERNS, Expressions, Time, compiled
from tests.tiny import tiny_config

LETTERS = st.sampled_from(
    ["a", "b", "ab", ".", r"\.", "[ab]", "[^a]", "[a-c1]", r"\d", r"\D", r"\w", r"\s", "1", "_", "^", "$", r"\b", r"\Z"]
)
REPEATED = st.sampled_from(["*", "+", "?", "*?", "+?", "??", "{2}", "{1,2}", "{0,3}?", "{2,}"])


def larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda two: f"(?:{two[0]}|{two[1]})"),
        st.tuples(inner, REPEATED).map(lambda two: f"({two[0]}){two[1]}"),
        st.tuples(st.sampled_from(["(?=", "(?!"]), inner).map(lambda two: f"{two[0]}{two[1]})"),
    )


@given(st.recursive(LETTERS, larger, max_leaves=12), st.text("abc1._ \n", min_size=1, max_size=8))
def test_the_answer_is_that_of_re(expression: str, text: str) -> None:
    """A layer of a stranger's checkpoint would be read with another layer's group size than the runtimes read it with."""
    try:
        theirs = re.compile(expression)
    except re.error:
        assume(False)
    ours = compiled(expression)
    assert Time().matches(ours.match, text) == bool(theirs.match(text))
    assert Time().matches(ours.search, text) == bool(theirs.search(text))


@pytest.mark.parametrize(
    ("expression", "name", "expected"),
    [
        (r".*\.18\..*gate.*", "model.layers.18.mlp.gate_proj", True),
        (r"^model\.layers\.(2|11)\.mlp\.experts\.\d+\.down_proj$", "model.layers.11.mlp.experts.117.down_proj", True),
        (r"^(?!.*(lm_head|embed)).*$", "lm_head", False),
        (r".*mlp.gate$", "model.layers.0.mlp.gate", True),
        (r"visual.*", "model.visual.blocks.0", False),
        (r".*self_attn\.(q|k|v)_proj", "model.layers.0.self_attn.k_proj", True),
    ],
)
def test_expressions_of_real_configs(expression: str, name: str, expected: bool) -> None:
    """What GPTQModel and llm-compressor write would be refused, or mean something else."""
    assert Time().matches(compiled(expression).match, name) is expected


@pytest.mark.parametrize("expression", ["(a+)+$", "((a*)*)*b", "(a|a)*$", "(a|aa)+$", "(?=(a+)+b)a*", "(a{1,60}){1,60}b", "(.*)*x"])
def test_what_hangs_re_is_answered_or_refused_in_time(expression: str) -> None:
    """A config.json of one line would hold `inspect` for ever: re takes 2^n steps for these."""
    started, budget = time.process_time(), Time(0.5)
    with suppress(ValueError):
        budget.matches(compiled(expression).match, "a" * 4000 + "!")
    assert time.process_time() - started < 5


def test_what_is_no_layer_pattern_is_refused() -> None:
    """It would end in a traceback, or the parser would take minutes."""
    cases = {"(": "not a regular expression", "(" * 101 + "a" + ")" * 101: "more than 100 groups", "a" * (LONGEST + 1): "too long"}
    for expression, expected in cases.items():
        with pytest.raises(ValueError, match=expected):
            compiled(expression)


def test_names_spelled_out_cost_a_look_up() -> None:
    """GPTQ's `dynamic` lists layers one by one: a hundred thousand of them, asked for as many layers, would take hours."""
    names = [f"model.layers.{i}.mlp.experts.{e}.up_proj" for i in range(100) for e in range(300)]
    started = time.monotonic()
    expressions = Expressions(f"^{re.escape(name)}$" for name in names)
    assert [expressions.first(name) for name in names] == list(range(len(names)))
    assert expressions.first("model.layers.0.mlp.experts.0.up_projX") is None
    assert time.monotonic() - started < 5


def test_the_first_expression_wins_whatever_its_kind() -> None:
    """A rule for one layer that stands behind a rule for all would win."""
    assert Expressions([r"model\..*", r"^model\.a$"]).first("model.a") == 0
    assert Expressions([r"^model\.a$", r"model\..*"]).first("model.a") == 0
    assert Expressions([r"other", r"^model\.a$", r"model\..*"]).first("model.a") == 1


def test_a_list_of_expressions_has_a_budget() -> None:
    """Each expression alone may be quick enough, and five thousand of them for each of a hundred thousand layers are not."""
    with pytest.raises(ValueError, match="more than"):
        Expressions(f"a.*{i}" for i in range(MOST_PATTERNS + 1))
    expressions = Expressions(["(a{1,60}){1,60}b"])
    expressions._time.left = 0.2
    with pytest.raises(ValueError, match="takes too long"):
        expressions.first("a" * 200)
    with pytest.raises(ValueError, match="takes too long"):
        expressions.first("a" * 200)


def test_recipes_are_bounded_too() -> None:
    """A recipe may come from a stranger as well: its patterns would hold `plan` for ever."""
    from marlinctl.errors import UsageError
    from marlinctl.models.families import architecture

    known = architecture(tiny_config(num_hidden_layers=40))
    started = time.monotonic()
    with pytest.raises(UsageError, match="matches no linear"):
        plan(known, group_size=32, skip=["re:(.+)+\\.x$", *(f"nothing_{i}" for i in range(20_000))], overrides={}, include=[])
    found = plan(known, group_size=32, skip=["k_proj", "layers.1?.mlp.*", r"re:\.3\.self_attn\.(q|v)_proj$"], overrides={}, include=[])
    assert len([name for name in found.kept if name.endswith("_proj")]) == 40 + 30 + 2
    assert time.monotonic() - started < 10
