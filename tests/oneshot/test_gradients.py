"""Gradients block by block against those of the whole model, and tokens that are drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from marlinctl.checkpoint.reader import open_checkpoint
from marlinctl.data.tokens import Tokens
from marlinctl.errors import NumericalProblem
from marlinctl.models.lookup import any_architecture
from marlinctl.models.meta_model import build
from marlinctl.oneshot import gradients
from marlinctl.oneshot.gradients import drawn, squared_gradients, stages_of
from marlinctl.oneshot.sequential import SequentialPipeline
from marlinctl.system.offload import Scratch
from tests import zoo
from tests.oneshot.test_sequential import LENGTH, SAMPLES, tokens

CPU = torch.device("cpu")
DRAWS = torch.rand(SAMPLES, LENGTH, generator=torch.Generator().manual_seed(7), dtype=torch.float64)

DENSE: dict[str, dict[str, Any]] = {"deepseek_v3": {"first_k_dense_replace": 2}, "qwen3_next": {"mlp_only_layers": [0, 1]}}


def pipeline(folder: Path, scratch: Path, given: Tokens, dtype: torch.dtype = torch.float64) -> SequentialPipeline:
    checkpoint = open_checkpoint(folder)
    return SequentialPipeline(
        build(checkpoint.config, dtype), any_architecture(checkpoint.config), checkpoint, given,
        device=CPU, dtype=dtype, scratch=Scratch(scratch, CPU), chunk_tokens=2 * LENGTH,
    )  # fmt: skip


@torch.no_grad()
def found(walk: SequentialPipeline) -> tuple[dict[str, Tensor], int]:
    """What the pass finds, and how often it said that a block is done."""
    done: list[None] = []
    blocks = squared_gradients(walk, DRAWS, expect=lambda block: None, done=lambda: done.append(None))
    return {name: squares for block in blocks for name, squares in block.items()}, len(done)


def whole_model(folder: Path, given: Tokens) -> dict[str, Tensor]:
    """Squared gradients [S, L] of the outputs of every linear, summed over outputs, by the whole model's own backward pass."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    outputs: dict[str, Tensor] = {}

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _, __, output, name=name: outputs.__setitem__(name, output))
    logits = model(given.ids).logits
    upto = logits.detach().softmax(-1).cumsum(-1)
    labels = (upto < DRAWS.unsqueeze(-1) * upto[..., -1:]).sum(-1)  # the first that is not below
    chosen = logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    expected = torch.autograd.grad(chosen[given.counted].sum(), list(outputs.values()))
    return {name: gradient.reshape(SAMPLES, LENGTH, -1).square().sum(-1) for name, gradient in zip(outputs, expected, strict=True)}


# A cap on the logits, a factor on them, linears of the block itself whose decoder is not the model's child, parallel branches, latent
# attention; biases, tied heads.
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma2", "granite", "opt", "gpt_neox", "phi3", "deepseek_v3", "qwen3_next"])
def test_gradients_are_those_of_the_whole_model(model_type: str, tmp_path: Path) -> None:
    """If a block were run on other states than its own, the head's cap left out, or padding counted, weights would be of another loss."""
    folder = zoo.build(model_type, tmp_path / "model", **DENSE.get(model_type, {}))
    walk = pipeline(folder, tmp_path, tokens())
    squares, done = found(walk)
    expected = whole_model(folder, tokens())
    blocks = walk.architecture.blocks
    assert done == 2 * len(blocks) and squares.keys() == {name for block in blocks for name in stages_of(block)}
    for block in blocks:
        for first, names in stages_of(block).items():
            wanted = torch.stack([expected[name] for name in names]).sum(0) / sum(block.linears[name].out_features for name in names)
            assert torch.allclose(squares[first].double(), wanted, rtol=1e-3, atol=1e-5 * float(wanted.max())), first
    assert all(float(square.max()) > 0 for square in squares.values())
    assert all(parameter.is_meta for parameter in walk.model.parameters()), "weights of a block or of the head stayed"


def test_a_token_without_gradient_has_none_of_its_neighbours(tmp_path: Path) -> None:
    """Padding behind a text would have weights if it were part of the loss: nothing that counts can read it."""
    squares, _ = found(pipeline(zoo.build("qwen2", tmp_path / "model"), tmp_path, tokens()))
    assert all(not square[1, 15:].any() for square in squares.values())
    assert bool(squares["model.layers.0.self_attn.q_proj"][:, 0].all()), "BOS is read by what follows it, though it does not count"


def test_gradients_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    """One broken weight makes all gradients NaN; weights of 0 for every token would end in a Hessian of zeros."""
    walk = pipeline(zoo.build("llama", tmp_path / "model"), tmp_path, tokens(), torch.float32)
    walk.hidden[2:] = torch.nan
    with pytest.raises(NumericalProblem, match=r"NaN or infinite for \d+ of \d+") as refused:
        found(walk)
    assert refused.value.error_id == "E620"


def test_few_gradients_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    """A token that overflows would take all blocks before it along, or end a run whose Hessians would have dropped it."""
    given = tokens()
    given.counted[0, 6:] = False  # 5 of 94 tokens are lost
    walk = pipeline(zoo.build("llama", tmp_path / "model"), tmp_path, given, torch.float32)
    whole, _ = found(pipeline(tmp_path / "model", tmp_path, given, torch.float32))
    walk.hidden[0] = torch.nan
    squares, _ = found(walk)
    for name, square in squares.items():
        assert torch.equal(square[2:], whole[name][2:]), "chunks are of two samples"
        assert torch.allclose(square[1], whole[name][1], rtol=1e-3)


def test_a_gradient_that_overflows_takes_no_other_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its infinity would be NaN at every earlier token of the sample, one block further down."""
    of_rows = gradients._gradient_of

    def overflowing(logits_of: Any, hidden: Tensor, draws: Tensor) -> Tensor:
        gradient = of_rows(logits_of, hidden, draws)
        gradient[3] = torch.inf
        return gradient

    monkeypatch.setattr(gradients, "_gradient_of", overflowing)
    squares, _ = found(pipeline(zoo.build("llama", tmp_path / "model"), tmp_path, tokens(), torch.float32))
    assert all(bool(torch.isfinite(square).all()) for square in squares.values())


# ---- drawn tokens --------------------------------------------------------------------------------------------------------------------


def test_tokens_are_drawn_from_the_distribution() -> None:
    """Tokens of the wrong probabilities, or the most probable ones, have gradients that say nothing of the model's uncertainty."""
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0, -float("inf"), 0.5, -3.0])
    probabilities = logits.softmax(-1)
    count = 200_000
    draws = torch.rand(count, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    seen = torch.bincount(drawn(probabilities.expand(count, -1), draws), minlength=7).double()
    expected = probabilities.double() * count
    assert seen[4] == 0
    possible = expected > 0
    chi_square = ((seen - expected)[possible].square() / expected[possible]).sum()
    assert chi_square < 20.5  # 5 degrees of freedom, one in a thousand
    assert drawn(probabilities.unsqueeze(0), torch.tensor([0.0], dtype=torch.float64)).tolist() == [0]
    assert drawn(probabilities.unsqueeze(0), torch.tensor([1 - 2.0**-53], dtype=torch.float64)).tolist() == [6]
