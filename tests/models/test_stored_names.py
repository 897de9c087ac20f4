"""Names of experts in checkpoints, as transformers' own conversions have them."""

from __future__ import annotations

import pytest
import torch

from marlinctl.checkpoint.runtimes import WHOLE_EXPERTS
from marlinctl.errors import BadInput
from marlinctl.models.architectures import Experts
from marlinctl.models.derivation import derived_architecture
from marlinctl.models.families import FAMILIES, architecture
from tests.models.test_derivation import config_of

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


def test_shares_before_experts_are_refused() -> None:
    """If the two were taken for each other, every token would go to expert 0."""
    from marlinctl.models.fused_experts import _as_called
    from marlinctl.models.tracing import LENGTH, SAMPLES, Call

    known = Experts("mlp.experts", 4, 1, ("mlp.experts.{e}.up_proj",), "mlp.experts.{e}.down_proj")
    x, ids, shares = torch.ones(SAMPLES * LENGTH, 8), torch.zeros(SAMPLES * LENGTH, 2, dtype=torch.int64), torch.ones(SAMPLES * LENGTH, 2)
    assert _as_called(known, Call("e", None, None, 0, 0, {"x": x, "ids": ids, "shares": shares}), "toy").top_k == 2
    with pytest.raises(BadInput, match="in this order"):
        _as_called(known, Call("e", None, None, 0, 0, {"x": x, "shares": shares, "ids": ids}), "toy")
