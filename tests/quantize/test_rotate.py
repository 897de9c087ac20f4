"""The rotation that spreads large channels over all."""

from __future__ import annotations

from math import cos, pi, sin

import pytest
import torch

from marlinctl.quantize.rotate import random_signs, rotated

WIDTHS = (1, 2, 6, 7, 64, 576, 896, 640, 4096)


def as_documented(width: int, signs: torch.Tensor) -> torch.Tensor:
    """R in float64, entry by entry from the module's formula."""
    power = 1
    while width % (2 * power) == 0:
        power *= 2
    m = width // power
    hadamard = torch.tensor([[(-1.0) ** bin(i & j).count("1") for j in range(power)] for i in range(power)]) / power**0.5
    hartley = torch.tensor([[(cos(2 * pi * j * k / m) + sin(2 * pi * j * k / m)) / m**0.5 for k in range(m)] for j in range(m)])
    return signs.double()[:, None] * torch.kron(hartley.double(), hadamard.double())


@pytest.mark.parametrize("width", [1, 2, 6, 7, 64, 576, 896])
def test_it_is_the_matrix_of_its_formula(width: int) -> None:
    """Signs lie in published folders: with another matrix their weights could not be compared with the original's any more."""
    signs = random_signs(width, 3)
    torch.testing.assert_close(rotated(torch.eye(width, dtype=torch.float64), signs), as_documented(width, signs), atol=1e-6, rtol=0)


@pytest.mark.parametrize("width", [pytest.param(width, marks=pytest.mark.slow if width > 1000 else ()) for width in WIDTHS])
def test_it_is_orthogonal_and_spreads_one_channel_over_all(width: int) -> None:
    """A matrix that is not orthogonal changes the model; one with large entries leaves large channels."""
    whole = rotated(torch.eye(width, dtype=torch.float64), random_signs(width, 0))
    torch.testing.assert_close(whole @ whole.T, torch.eye(width, dtype=torch.float64), atol=1e-12, rtol=0)
    assert float(whole.abs().max()) <= (2 / width) ** 0.5 + 1e-12


def test_leading_dimensions_are_rows() -> None:
    """Heads are rotated in place, [N, heads, head_dim]."""
    signs = random_signs(12, 1)
    x = torch.randn(3, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotated(x, signs), torch.stack([rotated(rows, signs) for rows in x]), atol=1e-14, rtol=0)


def test_signs_are_the_same_everywhere() -> None:
    """A resumed job would otherwise write half of a model in another rotation."""
    signs = random_signs(32, 1)
    assert signs.dtype == torch.int8
    assert signs.tolist() == KNOWN
    assert not torch.equal(random_signs(32, 2), signs)
    with pytest.raises(ValueError, match="rows of 8 channels, and 32 signs"):
        rotated(torch.ones(2, 8), signs)


KNOWN = [1, 1, -1, -1, 1, 1, 1, 1, 1, -1, -1, 1, -1, 1, 1, -1, -1, 1, -1, -1, -1, 1, -1, -1, 1, -1, -1, -1, 1, -1, -1, -1]
