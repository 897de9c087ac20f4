"""Standard errors against the bootstrap, which needs no formula."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from marlinctl.evaluation import statistics

DRAWS = 4000
# The relative error of a standard error from B draws is 1/sqrt(2B) = 1.1 %; the plain bootstrap also has n in place of n - 1, and the
# delta method drops the second order. 8 % leaves room for all three at the sizes below, and is far below what a wrong formula costs.
CLOSE = 0.08


def bootstrap(n: int, figure: Callable[[Tensor], float]) -> float:
    """The spread of a figure over redrawn rows; `figure` gets the places."""
    generator = torch.Generator().manual_seed(1)
    draws = torch.tensor([figure(torch.randint(n, (n,), generator=generator)) for _ in range(DRAWS)], dtype=torch.float64)
    return draws.std().item()


def losses(seed: int, windows: int = 60, tokens: int = 40) -> Tensor:
    """Windows with a level of their own, so that tokens inside a window go together."""
    generator = torch.Generator().manual_seed(seed)
    level = torch.randn(windows, 1, generator=generator, dtype=torch.float64) * 0.4
    return 3 + level + torch.randn(windows, tokens, generator=generator, dtype=torch.float64)


def test_mean() -> None:
    """Every ± beside a mean would be wrong."""
    values = losses(0).flatten()[:400]
    found = statistics.mean(values.tolist())
    assert found.value == pytest.approx(values.mean().item(), rel=1e-12)
    assert found.stderr == pytest.approx(bootstrap(400, lambda i: values[i].mean().item()), rel=CLOSE)
    assert statistics.token_mean(values.reshape(10, 40)) == found


def test_perplexity_respects_what_goes_together() -> None:
    """The error of perplexity would ignore that tokens of one window are alike, and be about half of the truth here."""
    rows = losses(1)
    found = statistics.perplexity(rows)
    assert found.value == pytest.approx(math.exp(rows.mean().item()), rel=1e-12)
    assert found.stderr == pytest.approx(bootstrap(len(rows), lambda i: math.exp(rows[i].mean().item())), rel=CLOSE)
    by_token = found.value * rows.std().item() / math.sqrt(rows.numel())
    assert found.stderr is not None and found.stderr > 1.7 * by_token


def test_perplexity_difference_is_paired() -> None:
    """A difference that is sure would be drowned in the error that both models share."""
    ours, theirs = losses(2), losses(2) - 0.1 + 0.05 * losses(3)
    found = statistics.perplexity_difference(ours, theirs)
    apart = bootstrap(len(ours), lambda i: math.exp(ours[i].mean().item()) - math.exp(theirs[i].mean().item()))
    assert found.value == pytest.approx(math.exp(ours.mean().item()) - math.exp(theirs.mean().item()), rel=1e-12)
    assert found.stderr == pytest.approx(apart, rel=CLOSE)
    alone = statistics.perplexity(ours).stderr
    assert found.stderr is not None and alone is not None and found.stderr < alone / 2


def answers(seed: int, n: int, share: float) -> Tensor:
    return (torch.rand(n, generator=torch.Generator().manual_seed(seed)) < share).double()


def test_paired_scores() -> None:
    """A task's difference would carry the error of two unrelated models."""
    theirs = answers(4, 300, 0.6)
    flips = answers(5, 300, 0.1)
    ours = (theirs - flips).abs()
    found = statistics.paired_mean(ours.tolist(), theirs.tolist())
    apart = bootstrap(300, lambda i: (ours[i] - theirs[i]).mean().item())
    assert found.value == pytest.approx((ours - theirs).mean().item(), abs=1e-12)
    assert found.stderr == pytest.approx(apart, rel=CLOSE)
    redrawn = statistics.paired_bootstrap(ours.tolist(), theirs.tolist(), lambda v: sum(v) / len(v), seed=0, draws=DRAWS)
    assert redrawn.value == pytest.approx(found.value, abs=1e-12)
    assert redrawn.stderr == pytest.approx(found.stderr, rel=CLOSE)


@pytest.mark.parametrize("by_size", [True, False])
def test_group_from_its_parts(by_size: bool) -> None:
    """A group's difference would weigh its tasks otherwise than its score does."""
    parts = [answers(seed, n, share) for seed, n, share in ((6, 60, 0.3), (7, 300, 0.6), (8, 140, 0.9))]
    found = statistics.pooled([(statistics.mean(part.tolist()), len(part)) for part in parts], by_size=by_size)

    def figure(redraw: Callable[[Tensor], Tensor]) -> float:
        redrawn = [redraw(part) for part in parts]
        return (torch.cat(redrawn).mean() if by_size else torch.stack([part.mean() for part in redrawn]).mean()).item()

    generator = torch.Generator().manual_seed(1)
    draws = [figure(lambda part: part[torch.randint(len(part), (len(part),), generator=generator)]) for _ in range(DRAWS)]
    assert found.value == pytest.approx(figure(lambda part: part), abs=1e-12)
    assert found.stderr == pytest.approx(torch.tensor(draws, dtype=torch.float64).std().item(), rel=CLOSE)


def test_one_draw_has_no_spread() -> None:
    """An error of 0 would claim certainty from a single document."""
    assert statistics.mean([1.0]) == statistics.Estimate(1.0, None)
    assert statistics.perplexity(losses(9, windows=1)).stderr is None
    assert statistics.paired_bootstrap([1], [0], lambda v: float(sum(v)), seed=0).stderr is None
    known = statistics.mean([0.0, 1.0, 1.0])
    assert statistics.pooled([(known, 3), (statistics.mean([1.0]), 1)], by_size=True).stderr is None


def test_bootstrap_repeats_and_refuses_other_lengths() -> None:
    """Two runs would print two errors; documents of two different sets would be paired."""
    scores, other = [0.0, 1.0, 1.0, 0.0, 1.0], [1.0, 1.0, 0.0, 0.0, 1.0]
    assert statistics.paired_bootstrap(scores, other, max, seed=3) == statistics.paired_bootstrap(scores, other, max, seed=3)
    with pytest.raises(ValueError, match="5 scores against 4"):
        statistics.paired_bootstrap(scores, other[:4], max, seed=3)
