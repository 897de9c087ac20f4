"""Orders of channels for 2:4, against what was planted and against all possibilities."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from marlinctl.sparsify import permute
from marlinctl.sparsify.permute import channel_order, kept_score


def all_ways(scores: Tensor) -> list[float]:
    """What two groups of four keep of eight channels, over all 35 ways."""
    ways = [(0, *others) for others in combinations(range(1, 8), 3)]
    orders = [torch.tensor([*one, *(c for c in range(8) if c not in one)]) for one in ways]
    return [kept_score(scores, order) for order in orders]


@pytest.mark.parametrize("channels", [4, 8, 64, 2056])
def test_every_channel_comes_exactly_once(channels: int) -> None:
    """A channel that came twice would overwrite another one's weights, silently."""
    order = channel_order(torch.rand(16, channels, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(order.sort().values, torch.arange(channels))


@pytest.mark.parametrize("seed", range(5))
def test_two_groups_gain_most_of_what_the_best_of_all_ways_gains(seed: int) -> None:
    """An exchange that lowered what is kept, or ran against the wrong group, would be no better than a way by chance."""
    scores = torch.rand(40, 8, generator=torch.Generator().manual_seed(seed)) ** 4
    ways = all_ways(scores)
    chance = sum(ways) / len(ways)
    assert kept_score(scores, channel_order(scores)) - chance >= 0.6 * (max(ways) - chance)


def test_strong_channels_are_spread_over_the_groups() -> None:
    """In the order of the model half of the strong ones would be pruned: all lie side by side."""
    scores = torch.full((8, 256), 0.01)
    scores[:, :128] = 1.0
    assert kept_score(scores, torch.arange(256)) < 0.6 * scores[:, :128].sum()
    assert kept_score(scores, channel_order(scores)) == pytest.approx(float(scores[:, :128].double().sum()))


def test_channels_that_take_turns_share_a_group() -> None:
    """If only totals decided, channels that are large in the same rows would be pruned there: a third of the score."""
    generator = torch.Generator().manual_seed(1)
    kind = torch.arange(128) % 2  # a channel is large in even or in odd rows
    scores = torch.where(torch.arange(32)[:, None] % 2 == kind, 1.0, 0.01) * (1 + 0.05 * torch.rand(32, 128, generator=generator))
    scores = scores[:, torch.randperm(128, generator=generator)]
    all_large = float(scores[scores > 0.5].double().sum())
    assert kept_score(scores, torch.arange(128)) < 0.9 * all_large
    assert kept_score(scores, channel_order(scores)) > 0.999 * all_large


def test_many_groups_exchange_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model with 14,336 channels would wait for hours for one assignment of all of them."""
    scores = torch.rand(32, 512, generator=torch.Generator().manual_seed(3)) ** 4
    whole = kept_score(scores, channel_order(scores))
    monkeypatch.setattr(permute, "GROUPS_TOGETHER", 32)
    parts = channel_order(scores)
    assert torch.equal(parts.sort().values, torch.arange(512))
    assert kept_score(scores, torch.arange(512)) < kept_score(scores, parts)
    assert kept_score(scores, parts) > 0.97 * whole


def test_a_width_that_four_does_not_divide_is_refused() -> None:
    """It has no groups of four, and the last channels would be lost."""
    with pytest.raises(ValueError, match="10 channels are not a multiple of 4"):
        channel_order(torch.ones(3, 10))
