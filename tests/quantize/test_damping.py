"""The ridge of a Hessian by its tokens: the rule itself, who uses it, and that it helps where tokens are few."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from marlinctl.quantize.damping import damping_for, damping_of
from marlinctl.quantize.gptq import SolveSettings, solve, solve_many
from marlinctl.quantize.types import Hessian
from marlinctl.sparsify.sparsegpt import PruneSettings, fit_mask, prune, prune_and_quantize

SETTINGS = SolveSettings(
    group_size=32, both_signs=True, bfloat16_exact=False, act_order="static", scale_search="hessian", damping=None, refine=2
)  # fmt: skip
PRUNING = PruneSettings(method="iterative", damping=None, mask_sweeps=2, iterations=20)
K = 64


def inputs(tokens: int, seed: int) -> Tensor:
    """[T, K] of correlated channels, and noise that is of each alone."""
    mixing = torch.randn(K, K, generator=torch.Generator().manual_seed(1)) / K**0.5
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, K, generator=generator) @ (mixing * torch.logspace(0, -0.5, K)[:, None]) + 0.3 * torch.randn(
        tokens, K, generator=generator
    )


def hessian(x: Tensor) -> Hessian:
    return Hessian(x.T @ x / len(x), len(x))


@pytest.mark.parametrize(
    ("tokens", "k", "expected"), [(600 * 64, 64, 0.01), (10**9, 64, 0.01), (384, 64, 1.0), (0, 64, 1.0), (3840, 64, 0.1)]
)
def test_the_fraction_is_six_over_the_tokens_per_input(tokens: int, k: int, expected: float) -> None:
    """Without bounds a long calibration would not be damped at all, and one of no tokens would divide by zero."""
    assert damping_for(tokens, k) == pytest.approx(expected)
    assert damping_of(None, Hessian(torch.eye(k), tokens)) == damping_for(tokens, k)
    assert damping_of(0.25, Hessian(torch.eye(k), tokens)) == 0.25, "a number that is given stands"


def test_every_solve_damps_by_its_own_tokens() -> None:
    """If experts that are solved together had the damping of one of them, those with few tokens would keep its trust."""
    weights = torch.randn(3, 8, K, generator=torch.Generator().manual_seed(0))
    hessians = [hessian(inputs(tokens, seed)) for seed, tokens in enumerate((384, 3840, 60 * 640))]
    expected = [1.0, 0.1, 0.01]
    assert [solved.damping for solved in solve_many(weights, hessians, SETTINGS)] == pytest.approx(expected)
    for weight, one, damping in zip(weights, hessians, expected, strict=True):
        assert solve(weight, one, SETTINGS).damping == pytest.approx(damping)
        assert prune(weight, one, PRUNING).damping == pytest.approx(damping)
        assert prune_and_quantize(weight, one, PRUNING, SETTINGS)[0].damping == pytest.approx(damping)


def test_auto_is_the_number_that_it_means() -> None:
    """If a step of the solve (factor, descent, re-fit, least squares) took another ridge, its codes would differ."""
    weight, one = torch.randn(8, K, generator=torch.Generator().manual_seed(0)), hessian(inputs(3840, 0))
    auto, given = solve(weight, one, SETTINGS), solve(weight, one, replace(SETTINGS, damping=0.1))
    assert torch.equal(auto.linear.codes, given.linear.codes) and torch.equal(auto.linear.scales, given.linear.scales)
    pruned, wanted = prune(weight, one, PRUNING), prune(weight, one, replace(PRUNING, damping=0.1))
    assert torch.equal(pruned.weight, wanted.weight)
    assert torch.equal(fit_mask(weight, pruned.mask, one, PRUNING), fit_mask(weight, pruned.mask, one, replace(PRUNING, damping=0.1)))


@pytest.mark.parametrize("what", ["int4", "2:4"])
def test_few_tokens_lose_less_on_tokens_that_were_not_seen(what: str) -> None:
    """This is what damping is for: with two tokens per input, 0.01 fits noise of the calibration."""
    lost = {}
    for damping in (0.01, None):
        errors = []
        for seed in range(4):
            weight = torch.randn(16, K, generator=torch.Generator().manual_seed(seed))
            seen, unseen = hessian(inputs(2 * K, seed + 10)), inputs(4096, seed + 100).double()
            if what == "int4":
                found = solve(weight, seen, replace(SETTINGS, damping=damping)).linear.dequantize()
            else:
                found = prune(weight, seen, replace(PRUNING, damping=damping)).weight
            errors.append(float(((unseen @ (weight - found).T.double()) ** 2).sum() / ((unseen @ weight.T.double()) ** 2).sum()))
        lost[damping] = sum(errors)
    assert lost[None] < 0.95 * lost[0.01]
