"""Every figure with its standard error.

Three kinds of figure, three rules:

    a mean over tokens         KL, top-1 agreement      s / sqrt(n) over tokens
    perplexity = exp(mean nll) perplexity               the standard error of the mean nll, from the means of the windows (tokens of
                                                        one window share their context and topic, so they are no independent
                                                        draws; windows nearly are), times the perplexity (delta method)
    a score over documents     task scores              lm_eval's own

A difference of two models on the same tokens or documents is *paired*: what is common to both cancels, and the standard error of the
differences is what counts. Perplexity of SmolLM2-135M and of its int4 copy, 20 windows of 1,024 tokens of WikiText-2: 23.48 ± 2.12 and
27.28 ± 2.54, but their difference is 3.80 ± 0.43 (bf16, CPU, 2026-11-20).

One document or one window has no spread: its standard error is unknown, `None`, never 0.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

BOOTSTRAP_DRAWS = 500  # the error of a standard error from B draws is 1/sqrt(2B): 3 % here


@dataclass(frozen=True, slots=True)
class Estimate:
    value: float
    stderr: float | None

    def document(self) -> dict[str, float | None]:
        return {"value": self.value, "stderr": self.stderr}


def mean(values: Sequence[float]) -> Estimate:
    n = len(values)
    centre = math.fsum(values) / n
    if n < 2:
        return Estimate(centre, None)
    variance = math.fsum((value - centre) ** 2 for value in values) / (n - 1)
    return Estimate(centre, math.sqrt(variance / n))


def token_mean(values: Tensor) -> Estimate:  # [windows, predictions] float64
    return mean(values.flatten().tolist())


def perplexity(losses: Tensor) -> Estimate:  # [windows, predictions] float64, nats
    log = mean(losses.mean(dim=1).tolist())
    value = math.exp(log.value)
    return Estimate(value, None if log.stderr is None else value * log.stderr)


def perplexity_difference(losses: Tensor, baseline: Tensor) -> Estimate:  # both [windows, predictions] float64, of the same windows
    """ppl - ppl_baseline; to first order each window moves it by ppl * its nll - ppl_baseline * its baseline nll."""
    value, base = math.exp(losses.mean().item()), math.exp(baseline.mean().item())
    moved = mean((value * losses.mean(dim=1) - base * baseline.mean(dim=1)).tolist())
    return Estimate(value - base, moved.stderr)


def paired_mean(scores: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """The mean of score - baseline over the same documents."""
    return mean([a - b for a, b in zip(scores, baseline, strict=True)])


def paired_bootstrap(
    scores: Sequence[Any], baseline: Sequence[Any], aggregate: Callable[[list[Any]], float], *, seed: int, draws: int = BOOTSTRAP_DRAWS
) -> Estimate:
    """For metrics that are no plain mean (F1, word perplexity, ...): both models on the same redrawn documents."""
    n = len(scores)
    if n != len(baseline):
        raise ValueError(f"{n} scores against {len(baseline)}")
    value = aggregate(list(scores)) - aggregate(list(baseline))
    if n < 2:
        return Estimate(value, None)
    generator = random.Random(seed)
    redrawn = []
    for _ in range(draws):
        places = generator.choices(range(n), k=n)
        redrawn.append(aggregate([scores[i] for i in places]) - aggregate([baseline[i] for i in places]))
    centre = math.fsum(redrawn) / draws
    return Estimate(value, math.sqrt(math.fsum((r - centre) ** 2 for r in redrawn) / (draws - 1)))


@dataclass(frozen=True, slots=True)
class Flips:
    """The share of answers that are right for one model and wrong for the other. A score may stay while they change."""

    share: Estimate
    to_wrong: Estimate  # right for the baseline, wrong for the model
    to_correct: Estimate

    def document(self) -> dict[str, Any]:
        return {**self.share.document(), "to_wrong": self.to_wrong.document(), "to_correct": self.to_correct.document()}


def flips(scores: Sequence[float], baseline: Sequence[float]) -> Flips:
    """Of scores that are 0 or 1, over the same documents."""
    moved = [int(a) - int(b) for a, b in zip(scores, baseline, strict=True)]
    return Flips(mean([abs(step) for step in moved]), mean([step < 0 for step in moved]), mean([step > 0 for step in moved]))


def pooled_flips(parts: Sequence[tuple[Flips, int]], *, by_size: bool) -> Flips:
    """As `pooled`."""
    shares = [[(getattr(part, name), size) for part, size in parts] for name in ("share", "to_wrong", "to_correct")]
    return Flips(*(pooled(share, by_size=by_size) for share in shares))


def pooled(parts: Sequence[tuple[Estimate, int]], *, by_size: bool) -> Estimate:
    """The score of a group from its parts (estimate, documents): weighted by size, or every part alike. The parts are independent."""
    weights = [size if by_size else 1 for _, size in parts]
    total = sum(weights)
    value = math.fsum(weight * part.value for weight, (part, _) in zip(weights, parts, strict=True)) / total
    errors = [part.stderr for part, _ in parts]
    if any(error is None for error in errors):
        return Estimate(value, None)
    spread = math.fsum((weight * error) ** 2 for weight, error in zip(weights, errors, strict=True) if error is not None)
    return Estimate(value, math.sqrt(spread) / total)
