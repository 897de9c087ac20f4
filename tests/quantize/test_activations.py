"""Activations of 8 bits: the codes that servers make of a token, and products with them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from marlinctl.quantize.activations import Rounded, RoundingLinear, round_activations, rounded

E4M3 = sorted(
    {
        sign * number
        for sign in (1, -1)
        for number in [(8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
        + [m * 2.0**-9 for m in range(8)]
    }
)


def tokens(rows: int = 9, k: int = 64) -> torch.Tensor:
    """[1, rows, k], of very different magnitudes."""
    generator = torch.Generator().manual_seed(4)
    return (torch.randn(rows, k, generator=generator) * torch.logspace(-3, 2, rows).unsqueeze(1)).unsqueeze(0)


def reference(x: torch.Tensor, activations: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of x [.., K] in float64, number by number."""
    x = x.double()
    scale = x.abs().amax(-1, keepdim=True) / (127 if activations == "int8" else 448)
    numbers = torch.arange(-128, 128, dtype=torch.float64) if activations == "int8" else torch.tensor(E4M3, dtype=torch.float64)
    nearest = (x / scale).unsqueeze(-1).sub(numbers).abs().argmin(-1)
    return numbers[nearest], scale


@pytest.mark.parametrize("activations", ["int8", "fp8"])
def test_each_token_has_its_own_scale_and_its_nearest_codes(activations: Rounded) -> None:
    """If one large token set the scale of all, or codes were those of another grid, a measured KL would not be that of the served model."""
    x = tokens()
    codes, scales = rounded(x, activations)
    wanted, scale = reference(x, activations)
    torch.testing.assert_close(scales.double(), scale, rtol=2**-22, atol=0)
    assert float((codes.double() != wanted).double().mean()) < 0.01, "x / scale in float32 may cross a tie"
    assert float((codes.double() - wanted).abs().max()) <= (1 if activations == "int8" else 32)


@pytest.mark.parametrize("activations", ["int8", "fp8"])
@pytest.mark.parametrize("k", [64, 256, 200])
def test_groups_are_rounded_as_tokens_of_their_own(k: int, activations: Rounded) -> None:
    """If a large group set the scale of a small one, groups would buy nothing; a short one at the end has its own scale too."""
    x = tokens(9, k) * torch.logspace(-2, 2, k)
    codes, scales = rounded(x, activations, 128)
    apart = [rounded(part, activations) for part in x.split(128, -1)]
    assert codes.shape == x.shape and scales.shape == (1, 9, -(-k // 128))
    assert torch.equal(codes, torch.cat([part for part, _ in apart], -1))
    assert torch.equal(scales, torch.cat([scale for _, scale in apart], -1))


@pytest.mark.parametrize("activations", ["int8", "fp8"])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_product_with_what_is_not_finite_is_nan(value: float, activations: Rounded) -> None:
    """If codes of an infinity were finite numbers with a finite scale, a model that overflows would answer plausibly."""
    x = torch.ones(2, 8)
    x[1, 3] = value
    codes, scales = rounded(x, activations)
    assert (codes * scales).sum(-1).isfinite().tolist() == [True, False]


@pytest.mark.parametrize("activations", ["int8", "fp8"])
def test_a_token_of_zeros_stays_zero(activations: Rounded) -> None:
    """If a padding token were divided by its largest magnitude, the model would answer NaN."""
    codes, scales = rounded(torch.zeros(2, 8), activations)
    assert not codes.any() and bool(torch.isfinite(scales).all())
    linear = RoundingLinear(nn.Linear(8, 4), activations)
    assert torch.equal(linear(torch.zeros(1, 2, 8)), linear.bias.expand(1, 2, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activations", ["int8", "fp8"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_product_is_that_of_the_codes(activations: Rounded, dtype: torch.dtype, bias: bool) -> None:
    """If codes were rounded once more to the dtype of the model, an evaluation in bfloat16 would add an error that no server makes."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 32, bias=bias, dtype=dtype)
    x = tokens().to(dtype)
    codes, scale = reference(x, activations)
    linear.requires_grad_(False)
    wanted = codes @ linear.weight.double().T * scale + (linear.bias.double() if bias else 0.0)
    found = RoundingLinear(linear, activations)(x)
    size = codes.abs() @ linear.weight.double().abs().T * scale + (linear.bias.double().abs() if bias else 0.0)
    assert found.dtype == dtype
    # A sum in the dtype, and two roundings to it; a code on a tie may be the neighbour's, which is a 64th of the largest at most.
    most = 4 * torch.finfo(dtype).eps + (1 / 64 if activations == "fp8" else 1 / 127) * 2 / 64
    assert float(((found.double() - wanted).abs() / size).max()) < most


def test_only_named_linears_round_and_parameters_keep_their_names() -> None:
    """If other linears rounded too, or weights lost their names, a model could not be compared with its client."""
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    names = dict(model.named_parameters())
    round_activations(model, {"b": "int8"})
    assert type(model["a"]) is nn.Linear and isinstance(model["b"], RoundingLinear)
    after = dict(model.named_parameters())
    assert after.keys() == names.keys() and all(after[name] is names[name] for name in names)
    with pytest.raises(ValueError, match="not a linear"):
        round_activations(nn.ModuleDict({"n": nn.LayerNorm(4)}), {"n": "fp8"})
