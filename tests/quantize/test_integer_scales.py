"""Scales that are factors -15..16 times one scale for each output: found where they are, and nowhere else."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from marlinctl.quantize.integer_scales import split


def found_by_hand(row: list[float]) -> tuple[Fraction, list[int]] | None:
    """Channel scale and factors of one output's scales, in whole numbers: the largest channel scale that float16 holds."""
    exact = [Fraction(scale) for scale in row]
    largest = max(exact, key=abs)
    for most in range(1, 17) if largest else ():
        channel = largest / most
        factors = [scale / channel for scale in exact]
        in_float16 = float(torch.tensor(float(channel), dtype=torch.float64).half())
        if all(factor.denominator == 1 and -15 <= factor <= 16 and factor for factor in factors) and Fraction(in_float16) == channel:
            return channel, [int(factor) for factor in factors]
    return None


def of_the_form(rows: int, groups: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    channel = torch.randint(64, 128, (rows, 1), generator=generator) * 2.0 ** torch.randint(-20, -8, (rows, 1), generator=generator)
    sign = torch.randint(0, 2, (rows, 1), generator=generator) * 2 - 1
    factors = torch.randint(-15, 16, (rows, groups), generator=generator)
    return (channel * sign * torch.where(factors <= 0, factors - 1, factors).clamp(-15)).half()


def test_the_form_is_found_and_multiplies_back_exactly() -> None:
    """If factors or channel scales were off, the kernel for such scales would compute with other weights than the file has."""
    for groups in (1, 2, 3, 12, 64):
        scales = of_the_form(257, groups, groups)
        found = split(scales)
        assert found is not None
        factors, channel = found
        assert factors.dtype == torch.int8 and channel.dtype == torch.float16
        assert int(factors.min()) >= -15 and int(factors.max()) <= 16 and bool(factors.all())
        assert torch.equal(factors.double() * channel.double().unsqueeze(-1), scales.double())
        for row in range(0, 257, 16):
            assert found_by_hand(scales[row].tolist()) == (Fraction(float(channel[row])), factors[row].tolist())


def test_every_pair_of_scales_is_judged_as_in_whole_numbers() -> None:
    """If rounding decided, a folder whose scales only nearly have the form would run with wrong weights."""
    generator = torch.Generator().manual_seed(1)
    near = of_the_form(400, 3, 2)
    moved = (near.view(torch.int16) + torch.randint(-1, 2, near.shape, generator=generator).to(torch.int16)).view(torch.float16)
    small = torch.randint(1, 40, (400, 3), generator=generator).half() * 2.0**-24  # subnormal float16
    for scales in (moved, small, torch.cat([moved[:, :1], -moved[:, :1], moved[:, 1:2]], -1)):
        for row in scales.unbind(0):
            by_hand, found = found_by_hand(row.tolist()), split(row.unsqueeze(0))
            assert (found is None) == (by_hand is None), row.tolist()
            if found is not None and by_hand is not None:
                assert (Fraction(float(found[1])), found[0].squeeze(0).tolist()) == by_hand


@pytest.mark.parametrize("bad", [0.0, float("inf"), float("nan"), 0.0625 / 17, -0.0625])
def test_one_scale_without_the_form_takes_it_from_all(bad: float) -> None:
    """If one output of other scales were passed over, its weights would be wrong. -16 is no factor: -8 times it is 128."""
    scales = of_the_form(5, 4, 3)
    scales[2] = torch.tensor([0.0625, 0.00390625, -0.05859375, 0.015625])  # 16, 1, -15, 4
    found = split(scales[2:3])
    assert found is not None and found[0].tolist() == [[16, 1, -15, 4]] and split(scales) is not None
    scales[2, 2] = bad
    assert split(scales[2:3]) is None and split(scales) is None
