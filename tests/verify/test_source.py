from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from marlinctl.checkpoint.formats.base import LinearParts
from marlinctl.verify.source import MAX_ERROR, MIN_SCALE_MATCH, measure
from tests.pack.naive import random_keep
from tests.packed import rtn


def random_weight(n: int = 96, k: int = 256, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def test_error_is_the_relative_distance_of_the_weights() -> None:
    """The figure is published; it must be the one it is said to be."""
    weight = random_weight()
    q = rtn(weight, 64)
    measured = measure("l", weight, LinearParts(q.codes, q.scales, 64))
    exact = ((weight.double() - q.dequantize().double()) ** 2).sum().sqrt() / (weight.double() ** 2).sum().sqrt()
    assert measured.error == pytest.approx(float(exact), rel=1e-5)
    assert measured.scale_match is not None and measured.scale_match > 0.95


@pytest.mark.parametrize("size", [32, 64, 128, 256])
def test_permuted_scales_cost_little_error_and_are_noticed_all_the_same(size: int) -> None:
    """Scales of one layer resemble each other: the error alone lets a wrong scale order pass."""
    weight = random_weight()
    q = rtn(weight, size)
    permuted = LinearParts(q.codes, q.scales[torch.randperm(96, generator=torch.Generator().manual_seed(1))], size)
    measured = measure("l", weight, permuted)
    assert measured.error < MAX_ERROR
    assert measured.scale_match is not None and measured.scale_match < MIN_SCALE_MATCH


@pytest.mark.parametrize("noise", [0.0, 0.3, 0.6])
def test_right_scales_pass_although_the_solver_moves_weights(noise: float) -> None:
    """GPTQ moves weights by up to a step or so; taking that for a wrong order would fail good models."""
    weight = random_weight(seed=3)
    q = rtn(weight, 64)
    step = q.scales.float().repeat_interleave(64, dim=1)
    moved = rtn(weight + noise * step * torch.randn(weight.shape, generator=torch.Generator().manual_seed(4)), 64)
    measured = measure("l", weight, LinearParts(moved.codes, q.scales, 64))
    assert measured.scale_match is not None and measured.scale_match > MIN_SCALE_MATCH


def test_signs_of_scales_do_not_matter() -> None:
    """Both signs are in use; a negative scale with negated codes is the same weight."""
    weight = random_weight()
    q = rtn(weight, 64)
    codes = q.codes.clamp(-7, 7)
    flipped = measure("l", weight, LinearParts(-codes, -q.scales, 64))
    assert flipped == measure("l", weight, LinearParts(codes, q.scales, 64))


def test_too_few_or_equal_scales_prove_nothing() -> None:
    """A correlation over a handful of groups, or over equal scales, is chance; it must not fail a model."""
    small = random_weight(8, 64)
    q = rtn(small, 64)
    assert measure("l", small, LinearParts(q.codes, q.scales, 64)).scale_match is None
    codes = torch.randint(-8, 8, (96, 64), dtype=torch.int8)
    equal = LinearParts(codes, torch.full((96, 1), 0.5, dtype=torch.float16), 64)
    assert measure("l", equal.weight(), equal).scale_match is None


def test_a_weight_of_zeros_is_no_division_by_zero() -> None:
    """Dead layers exist (pruned heads, padded experts)."""
    zero = torch.zeros(96, 64)
    parts = LinearParts(torch.zeros(96, 64, dtype=torch.int8), torch.ones(96, 1, dtype=torch.float16), 64)
    measured = measure("l", zero, parts)
    assert (measured.error, measured.scale_match) == (0.0, None)


def test_of_a_sparse_linear_only_kept_weights_are_compared() -> None:
    """Pruning half of a weight costs a third of it, on purpose; with all weights, good 2:4 models would fail."""
    weight = random_weight()
    keep = random_keep(96, 256)
    q = rtn(weight, 64)
    parts = LinearParts(q.codes * keep, q.scales, 64)
    everything = measure("l", weight, parts)
    kept = measure("l", weight, replace(parts, keep=keep))
    exact = ((weight.double() - q.dequantize().double()) * keep).norm() / (weight.double() * keep).norm()
    assert kept.error == pytest.approx(float(exact), rel=1e-5)
    assert everything.error > MAX_ERROR > 0.2 > kept.error
    assert kept.scale_match is not None and kept.scale_match > 0.95
    elsewhere = replace(parts, codes=parts.codes.roll(1, 0), keep=keep.roll(1, 0))
    assert measure("l", weight, elsewhere).error > MAX_ERROR  # kept weights of another row are still noticed
