"""Trained scales: the weight they make, what comes back out, and how they are rounded."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from marlinctl.checkpoint.formats.base import LinearParts
from marlinctl.distillation.parameters import Place
from marlinctl.distillation.scales import exact_in_bfloat16, freeze_codes, settle, trained_scales
from marlinctl.errors import UsageError
from marlinctl.quantize.grid import SMALLEST_SCALE
from marlinctl.quantize.scheme import UINT4


class Fused(nn.Module):
    """Experts as transformers holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(2, 8, 8))
        self.proj = nn.Linear(8, 4, bias=False)


def parts(seed: int, n: int, k: int, size: int) -> LinearParts:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (n, k), generator=generator, dtype=torch.int8)
    return LinearParts(codes, (torch.rand(n, k // size, generator=generator) + 0.1).to(torch.float16), size)


def test_the_weight_is_codes_times_scales_and_its_gradient_reaches_them() -> None:
    """A transposed group or a lost factor would train scales that belong to other weights."""
    module, given = Fused(), parts(0, 4, 8, 4)
    freeze_codes(module, {"proj.weight": Place("proj.weight")}, {"proj": given})
    assert torch.equal(module.proj.weight, given.weight())
    factors = module.get_parameter("proj.parametrizations.weight.original")
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    module.proj(x).square().sum().backward()
    with torch.no_grad():
        y = x @ given.weight().T
        outer = 2 * (y.T @ x) * given.weight()  # d loss / d weight, times weight
        expected = outer.reshape(4, 2, 4).sum(-1)
    torch.testing.assert_close(factors.grad, expected)
    with torch.no_grad():
        factors.mul_(1.5)
    torch.testing.assert_close(trained_scales(module, Place("proj.weight")), given.scales.float() * 1.5)
    torch.testing.assert_close(module.proj.weight, given.weight() * 1.5)


def test_zero_points_stay_where_they_are() -> None:
    """Scales of asymmetric codes would be trained as if the zero were code 0, and the student would not be the model that was given."""
    module, plain = Fused(), parts(0, 4, 8, 4)
    zeros = torch.tensor([[-8, 7], [0, 3], [-5, 1], [2, -1]], dtype=torch.int8)
    given = replace(plain, grid=UINT4, zeros=zeros)
    freeze_codes(module, {"proj.weight": Place("proj.weight")}, {"proj": given})
    assert torch.equal(module.proj.weight, given.weight()) and not torch.equal(given.weight(), plain.weight())


def test_fused_experts_are_put_together_and_taken_apart() -> None:
    """Gate and up of an expert are rows of one parameter; each must get its own scales back."""
    module = Fused()
    places = {f"e{e}.{name}.weight": Place("gate_up_proj", (e, rows)) for e in (0, 1) for name, rows in
              (("gate", slice(0, 4)), ("up", slice(4, 8)))}  # fmt: skip
    given = {name.removesuffix(".weight"): parts(i, 4, 8, 4) for i, name in enumerate(places)}
    freeze_codes(module, places, given)
    for layer, part in given.items():
        place = places[f"{layer}.weight"]
        assert torch.equal(module.gate_up_proj[place.index], part.weight())
        assert torch.equal(trained_scales(module, place), part.scales.float())


def test_experts_with_different_group_sizes_are_refused() -> None:
    """Their scales have no common shape in one parameter."""
    module = Fused()
    places = {"gate.weight": Place("gate_up_proj", (0, slice(0, 4))), "up.weight": Place("gate_up_proj", (0, slice(4, 8)))}
    with pytest.raises(UsageError, match=r"different group sizes: \[4, 8\]"):
        freeze_codes(module, places, {"gate": parts(0, 4, 8, 4), "up": parts(1, 4, 8, 8)})


@pytest.mark.parametrize("exact", [True, False])
def test_settled_scales_are_ones_that_a_checkpoint_holds(exact: bool) -> None:
    """What is measured at the end must be what float16 (and bfloat16, where it was so before) can hold."""
    module = Fused()
    freeze_codes(module, {"proj.weight": Place("proj.weight")}, {"proj": parts(0, 4, 8, 4)})
    factors = module.get_parameter("proj.parametrizations.weight.original")
    with torch.no_grad():
        factors.copy_(torch.rand(factors.shape, generator=torch.Generator().manual_seed(2)) + 0.5)
        factors[0, 0] = 1e-9
    expected = trained_scales(module, Place("proj.weight")).clone()
    settle(module, {"proj.weight": exact})
    found = trained_scales(module, Place("proj.weight"))
    assert torch.equal(found.to(torch.float16).float(), found) and exact_in_bfloat16(found) == exact
    assert float(found[0, 0]) == SMALLEST_SCALE
    torch.testing.assert_close(found[1:], expected[1:], rtol=2**-8 if exact else 2**-11, atol=0)
    assert bool((factors == 1).all())
