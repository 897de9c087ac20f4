"""Exponents of columns, and what they are expected to gain."""

from __future__ import annotations

import pytest
import torch

from marlinctl.quantize.equalize import (
    LEAST,
    MOST,
    STRENGTH,
    NormFed,
    column_exponents,
    estimated_error,
    fitted_exponents,
    relative_error,
    relative_squares,
)
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
    assert estimated_error(NormFed(weight, group_size), energies, exponents) == pytest.approx(total, rel=1e-6)


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
    assert (relative_error([NormFed(weight, 64)], hessian.diagonal(), exponents) < 1) == gains
    assert (error(exponents) < error(nothing)) == gains


def linears_of_different_size(*group_sizes: int) -> list[NormFed]:
    """Behind one norm, each with large columns of its own, and the last with weights a thousandth as large as the first's."""
    generator = torch.Generator().manual_seed(4)
    found = []
    for place, group_size in enumerate(group_sizes):
        weight = torch.randn(6 + place, 24, generator=generator) * 1000.0 ** -(place / (len(group_sizes) - 1))
        weight[:, torch.randperm(24, generator=generator)[:3]] *= 8
        found.append(NormFed(weight, group_size))
    return found


def reference(linears: list[NormFed], energies: torch.Tensor, exponents: list[int]) -> float:
    """The mean of E(e) / E(0), number by number in Python's float64."""

    def error(linear: NormFed, chosen: list[int]) -> float:
        rows, k, total = linear.weight.tolist(), len(chosen), 0.0
        size = k if linear.group_size == -1 else linear.group_size
        for first in range(0, k, size):
            part = range(first, first + size)
            loss = sum(float(energies[c]) ** 0.5 * 4.0 ** -chosen[c] for c in part)
            total += sum(max(abs(row[c]) * 2.0 ** chosen[c] for c in part) ** 2 for row in rows) * loss
        return total

    return sum(error(linear, exponents) / error(linear, [0] * len(exponents)) for linear in linears) / len(linears)


@pytest.mark.parametrize("group_sizes", [(8, 8, 8), (4, 8, 12), (-1, 8, 4), (-1, -1, -1)])
def test_the_search_ends_where_no_step_lowers_the_mean_of_relative_errors(group_sizes: tuple[int, ...]) -> None:
    """With groups, signs or weights of another sum it would end elsewhere, and take what harms for what helps."""
    linears = linears_of_different_size(*group_sizes)
    energies = torch.rand(24, generator=torch.Generator().manual_seed(5)) + 0.1
    start = column_exponents(relative_squares(linear.weight for linear in linears))
    found = fitted_exponents(linears, energies, start).tolist()
    least = reference(linears, energies, found)
    assert relative_error(linears, energies, torch.tensor(found)) == pytest.approx(least, rel=1e-6)
    assert least < 0.98 * min(1.0, reference(linears, energies, start.tolist()))
    for k in range(24):
        for step in (-1, 1):
            if LEAST <= found[k] + step <= MOST:
                other = [exponent + step * (c == k) for c, exponent in enumerate(found)]
                assert reference(linears, energies, other) > least * (1 - 1e-5), f"column {k}: {found[k]} and {step}"


def test_no_linear_decides_by_the_size_of_its_weights() -> None:
    """Qwen2.5's q and k have larger outputs than v: weighed by size they gained a third, and v lost a quarter."""
    linears = linears_of_different_size(8, 8, 8)
    energies = torch.rand(24, generator=torch.Generator().manual_seed(5)) + 0.1
    alike = [NormFed(linear.weight * 2.0**power, 8) for linear, power in zip(linears, (-9, 3, 11), strict=True)]

    def found(chosen: list[NormFed]) -> torch.Tensor:
        return fitted_exponents(chosen, energies, column_exponents(relative_squares(linear.weight for linear in chosen)))

    assert found(linears).any() and torch.equal(found(alike), found(linears))
    assert relative_error(alike, energies, found(linears)) == pytest.approx(relative_error(linears, energies, found(linears)), rel=1e-6)


def test_a_search_in_pieces_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large models are searched in pieces: a column that two pieces share, or none, would show in models of 70 billion alone."""
    linears = linears_of_different_size(4, 8, 8)
    energies, start = torch.linspace(0.1, 1, 24), torch.zeros(24, dtype=torch.int32)
    whole = fitted_exponents(linears, energies, start)
    monkeypatch.setattr("marlinctl.quantize.equalize._AT_ONCE", 1)
    assert whole.any() and torch.equal(fitted_exponents(linears, energies, start), whole)


def test_linears_without_an_error_or_with_one_that_is_not_finite_change_nothing() -> None:
    """A pruned head's zeros must not divide by zero, nor an overflow pass for a gain."""
    linears = linears_of_different_size(8, 8)
    energies, start = torch.ones(24), torch.zeros(24, dtype=torch.int32)
    zeros = NormFed(torch.zeros(5, 24), 8)
    assert torch.equal(fitted_exponents([*linears, zeros], energies, start), fitted_exponents(linears, energies, start))
    assert relative_error([zeros], energies, start) == 1 and torch.equal(fitted_exponents([zeros], energies, start), start)
    assert torch.equal(relative_squares([linears[0].weight, zeros.weight]), relative_squares([linears[0].weight]))
    energies[3] = torch.nan
    assert not relative_error(linears, energies, fitted_exponents(linears, energies, start)) <= 1
