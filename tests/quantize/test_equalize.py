"""Exponents of columns, and what they are expected to gain."""

from __future__ import annotations

import pytest
import torch

from marlinctl.quantize.equalize import LEAST, MOST, STRENGTH, column_exponents, estimated_error
from marlinctl.quantize.gptq import SolveSettings, solve
from marlinctl.quantize.types import Hessian


def weight_with_large_columns(large: int, factor: float = 16.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 256, generator=generator)
    weight[:, torch.randperm(256, generator=generator)[:large]] *= factor
    return weight


def test_large_columns_are_divided_and_small_ones_multiplied_around_the_mean() -> None:
    """With the sign turned around, the spread would grow. The formula in float64, column by column."""
    weight = weight_with_large_columns(16)
    weight[:, 7] = 0
    weight[:, 8] *= 2.0**-9
    found = column_exponents(weight.square().sum(0))
    norms = weight.double().norm(dim=0).log2()
    mean = norms[torch.isfinite(norms)].mean()
    wanted = [0 if k == 7 else min(max(round(float(-STRENGTH * (norms[k] - mean))), LEAST), MOST) for k in range(256)]
    assert found.tolist() == wanted and min(wanted) < 0 < max(wanted)
    assert not column_exponents(torch.zeros(8)).any()
    assert column_exponents(torch.tensor([torch.inf, 1.0, 1.0, 4.0**6])).tolist() == [0, 1, 1, -2]


@pytest.mark.parametrize("group_size", [64, -1])
def test_the_estimate_is_its_formula(group_size: int) -> None:
    """An estimate with other groups, or with energies multiplied instead of divided, would choose what harms."""
    weight = weight_with_large_columns(5)
    energies = torch.rand(256, generator=torch.Generator().manual_seed(1)) + 0.1
    exponents = column_exponents(weight.square().sum(0))
    size, total = 256 if group_size == -1 else group_size, 0.0
    for first in range(0, 256, size):
        part = range(first, first + size)
        loss = sum(float(energies[k]) ** 0.5 * 4.0 ** -int(exponents[k]) for k in part)
        for row in weight.tolist():
            total += max(abs(row[k]) * 2.0 ** int(exponents[k]) for k in part) ** 2 * loss
    assert estimated_error(weight, energies, exponents, group_size) == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize(("sign", "gains"), [(1, True), (-1, False)])
def test_the_estimate_and_a_solve_agree_on_whether_it_pays(sign: int, gains: bool) -> None:
    """It decides for a whole model before anything is solved."""
    weight = weight_with_large_columns(4)
    inputs = torch.randn(2048, 256, generator=torch.Generator().manual_seed(2))
    hessian = inputs.T @ inputs / len(inputs)
    exponents = sign * column_exponents(weight.square().sum(0))
    settings = SolveSettings(64, True, False, "static", "hessian", None, 0)

    def error(chosen: torch.Tensor) -> float:
        factors = chosen.float().exp2()
        scaled = Hessian((hessian / factors / factors.unsqueeze(-1)).contiguous(), len(inputs))
        left = weight - solve(weight * factors, scaled, settings).linear.dequantize() / factors
        return float(((left @ hessian) * left).sum())

    nothing = torch.zeros_like(exponents)
    estimate = estimated_error(weight, hessian.diagonal(), exponents, 64) / estimated_error(weight, hessian.diagonal(), nothing, 64)
    assert (estimate < 1) == gains
    assert (error(exponents) < error(nothing)) == gains
