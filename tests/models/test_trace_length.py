"""Three tokens are enough: no linear runs above some length alone, in any model type that is derived."""

from __future__ import annotations

from collections import Counter
from typing import cast

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from marlinctl.models.fused_experts import expert_modules
from marlinctl.models.meta_model import build
from marlinctl.models.tracing import LENGTH, traced
from tests.models.model_list import read_table
from tests.models.test_derivation import config_of
from tests.test_architecture import ROOT

LONG = 48  # over the windows, chunks and numbers of kept tokens of a shrunk config, 8 to 16, and within its positions
LIST = read_table((ROOT / "docs" / "models.md").read_text().partition("<!-- models: begin -->\n")[2])
QUICK = ("deepseek_v32", "minimax_m3_vl_text", "recurrent_gemma")
DERIVED = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name, one in sorted(LIST.items())
    if one.how == "derived" and name != "modernbert-decoder"  # whose decoder transformers does not name
]


def runs(model_type: str, length: int) -> Counter[str]:
    """How often each linear and module of experts of the blocks runs."""
    model = cast(PreTrainedModel, build(config_of(model_type), torch.float32))
    names = {module: name for name, module in model.named_modules()}
    decoder = model.get_decoder()
    stack = next(
        module for module in decoder.modules() if isinstance(module, nn.ModuleList) and len(module) == decoder.config.num_hidden_layers
    )
    blocks = [names[block] for block in stack]
    trace = traced(model, model_type, blocks, tuple(expert_modules(model, blocks, model_type)), first=1, length=length)
    return Counter(call.name for call in trace.linears)


@pytest.mark.parametrize("model_type", DERIVED)
def test_no_linear_runs_above_some_length_alone(model_type: str) -> None:
    """If one did, it would be left at 16 bits, or run in another order than it was quantized in, and no trace of three tokens would show
    it."""
    assert runs(model_type, LENGTH) == runs(model_type, LONG)


def test_a_branch_for_long_texts_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the comparison saw nothing, it would say so of every model."""
    from transformers.models.phi.modeling_phi import PhiMLP

    short = PhiMLP.forward

    def forward(self: PhiMLP, hidden_states: torch.Tensor) -> torch.Tensor:
        return short(self, hidden_states) if hidden_states.shape[1] > LENGTH else hidden_states

    monkeypatch.setattr(PhiMLP, "forward", forward)
    assert runs("phi", LENGTH) != runs("phi", LONG)
