"""Losses, KL and agreement against independent float64, hand-made logits and closed forms."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from marlinctl.checkpoint.transformers_model import load_dense
from marlinctl.errors import NumericalProblem, UsageError
from marlinctl.evaluation import divergence
from marlinctl.system.console import Console
from tests.tiny import make_tiny

QUIET = Console.quiet()


class Scripted:
    """A model that answers every window with given logits."""

    def __init__(self, logits: Tensor) -> None:
        self.logits, self.device = logits, torch.device("cpu")

    def __call__(self, **_: Any) -> Any:
        return SimpleNamespace(logits=self.logits[None])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load_dense(folder, dtype=torch.float32, device="cpu")


def windows(count: int = 3, length: int = 17) -> Tensor:
    return torch.randint(0, 280, (count, length), generator=torch.Generator().manual_seed(0))


def test_losses_are_those_of_float64(model: Any, folder: Path) -> None:
    """Perplexity would be that of other tokens (an off-by-one between logits and targets), or wrong in the digits we print."""
    rows = windows()
    found = divergence.measure_losses(model, rows, QUIET, label="tiny")
    exact = load_dense(folder, dtype=torch.float64, device="cpu")
    with torch.no_grad():
        for window, losses in zip(rows, found, strict=True):
            logits = exact(input_ids=window[None]).logits[0]
            expected = [-(logits[t] - logits[t].logsumexp(0))[window[t + 1]].item() for t in range(len(window) - 1)]
            # fp32: 24 bits over two blocks and a softmax of 288 words
            torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-5)


def test_a_model_and_itself(model: Any) -> None:
    """KL of equal models would not be 0: the two sides are treated differently."""
    found = divergence.measure_divergence(model, model, windows(), QUIET)
    assert found.kl.shape == (3, 16)
    assert found.kl.abs().max() == 0
    assert found.agrees.min() == 1
    assert torch.equal(found.losses, found.baseline_losses)


def test_two_models_are_not_swapped(model: Any, tmp_path: Path) -> None:
    """The losses of the original would be reported as those of the compressed model."""
    other = load_dense(make_tiny(tmp_path / "other", seed=1), dtype=torch.float32, device="cpu")
    found = divergence.measure_divergence(model, other, windows(), QUIET)
    assert torch.equal(found.losses, divergence.measure_losses(model, windows(), QUIET, label=""))
    assert torch.equal(found.baseline_losses, divergence.measure_losses(other, windows(), QUIET, label=""))
    assert found.kl.min() > 0


def test_hand_made_logits() -> None:
    """KL would be reversed (Q against P), in bits instead of nats, or agreement would be counted on the wrong side."""
    theirs = torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.9, 0.1]]).log()
    ours = torch.tensor([[0.5, 0.5], [0.25, 0.75], [0.2, 0.8]]).log() + 3.0  # a shift of all logits changes nothing
    losses, base, kl, agrees = divergence.compare_logits(ours, theirs, torch.tensor([0, 1, 1]))
    expected = [
        0.75 * math.log(1.5) + 0.25 * math.log(0.5),
        0.5 * math.log(2) + 0.5 * math.log(2 / 3),
        0.9 * math.log(4.5) + 0.1 * math.log(1 / 8),
    ]
    torch.testing.assert_close(kl, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(losses, -torch.tensor([0.5, 0.75, 0.8], dtype=torch.float64).log(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(base, -torch.tensor([0.75, 0.5, 0.1], dtype=torch.float64).log(), rtol=1e-6, atol=1e-7)
    assert agrees.tolist() == [1, 0, 0]  # a tie goes to the first word on both sides


def test_words_that_the_original_rules_out() -> None:
    """The -inf of a padded vocabulary would make KL NaN."""
    theirs = torch.tensor([[0.0, 1.0, -math.inf]])
    ours = torch.tensor([[0.0, 1.0, -math.inf]])
    assert divergence.compare_logits(ours, theirs, torch.tensor([1]))[2].item() == 0
    ours = torch.tensor([[0.0, 1.0, 0.0]])
    q = torch.softmax(ours[0].double(), 0)
    p = torch.softmax(theirs[0].double(), 0)[:2]
    expected = (p * (p / q[:2]).log()).sum().item()
    assert divergence.compare_logits(ours, theirs, torch.tensor([1]))[2].item() == pytest.approx(expected, rel=1e-6)


def test_against_float64_with_bf16_logits_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The softmax would be taken in bf16 (errors of a percent), or tokens at the edges of chunks would be lost."""
    generator = torch.Generator().manual_seed(2)
    theirs = (torch.randn(50, 1000, generator=generator) * 4).bfloat16()
    ours = (theirs + torch.randn(50, 1000, generator=generator) * 0.3).bfloat16()
    targets = torch.randint(0, 1000, (50,), generator=generator)
    log_p, log_q = theirs.double().log_softmax(-1), ours.double().log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)
    for elements in (2**24, 7000, 1):
        monkeypatch.setattr(divergence, "CHUNK_ELEMENTS", elements)
        losses, _, kl, agrees = divergence.compare_logits(ours, theirs, targets)
        torch.testing.assert_close(kl, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(losses, -log_q[torch.arange(50), targets], rtol=1e-6, atol=1e-6)
        assert agrees.sum().item() == (theirs.argmax(-1) == ours.argmax(-1)).sum().item()


def test_nan_is_named(model: Any) -> None:
    """A broken model would be reported with a perplexity of nan, or as a good one."""
    bad = torch.zeros(17, 288)
    bad[5, 7] = math.nan
    with pytest.raises(NumericalProblem, match="tiny predicts NaN") as caught:
        divergence.measure_losses(Scripted(bad), windows(), QUIET, label="tiny")
    assert "window 1" in caught.value.problems[0].where
    with pytest.raises(NumericalProblem, match="the model predicts NaN"):
        divergence.measure_divergence(Scripted(bad), model, windows(), QUIET)
    with pytest.raises(NumericalProblem, match="the baseline predicts NaN"):
        divergence.measure_divergence(model, Scripted(bad), windows(), QUIET)


def test_other_vocabularies_are_refused(model: Any) -> None:
    """Word 5 of one model would be compared with another word 5."""
    with pytest.raises(UsageError, match="288 words against 300") as caught:
        divergence.measure_divergence(model, Scripted(torch.zeros(17, 300)), windows(), QUIET)
    assert caught.value.error_id == "E261"
