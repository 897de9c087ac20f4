"""Scales as the kernel for factored weights takes them: found where they are of the form, and nowhere else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from marlinctl.kernels.activations import round_activations_for_tiles
from marlinctl.kernels.emulate_int8 import gemm_factored
from marlinctl.kernels.factored import MOST_IN_FEATURES, factored_scales
from marlinctl.kernels.linear import MarlinLinear
from marlinctl.kernels.reference import gemm_rounded
from marlinctl.pack.marlin import pack_marlin
from marlinctl.pack.types import PackedLinear, side_by_side
from tests.kernels.software_kernel import with_factors
from tests.pack.naive import random_linear


def packed(n: int, k: int, group_size: int) -> PackedLinear:
    return pack_marlin(with_factors(random_linear(n, k, group_size), seed=n))


def product(p: PackedLinear, x: Tensor) -> Tensor:
    found, made = factored_scales(p), round_activations_for_tiles(x, None)
    assert found is not None
    return gemm_factored(made.codes, made.scales, p, found)


@pytest.mark.parametrize(("k", "group_size"), [(96, 32), (256, 128), (160, -1)])
def test_outputs_without_scales_stay_zero(k: int, group_size: int) -> None:
    """If a gap between joined linears kept them from the form, servers would run the slower kernel; its outputs must be 0, not NaN."""
    p = packed(128, k, group_size)
    p.scales[:, 16:24] = 0
    x = torch.randn(5, k)
    out, exact = product(p, x), gemm_rounded(x, p, None)
    assert torch.allclose(out, exact, rtol=1e-6, atol=1e-6 * float(exact.abs().max()))
    assert int((out == 0).all(0).sum()) == 8


def test_joined_linears_have_the_form_of_each() -> None:
    """If this failed, q, k and v of a server would be multiplied by the slower kernel."""
    parts = [packed(64, 256, 64), packed(128, 256, 64)]
    whole = side_by_side(parts)
    assert isinstance(whole, PackedLinear)
    joined, alone = factored_scales(whole), [factored_scales(p) for p in parts]
    assert joined is not None and torch.equal(joined, torch.cat([one for one in alone if one is not None], 1))


def test_other_scales_are_left_alone() -> None:
    """If a scale that only nearly has the form were taken, weights would be multiplied that no file has."""
    p = packed(64, 256, 64)
    bits = p.scales.view(torch.int16)
    bits[1, 5] += 1  # the next float16
    assert factored_scales(p) is None
    assert factored_scales(replace(packed(64, 256, 64), scales=torch.zeros_like(p.scales))) is not None, "all padding"


def test_sums_that_int32_does_not_hold() -> None:
    """If so long a K were taken, the sum of the largest codes would wrap around."""
    assert 128 * 127 * MOST_IN_FEATURES < 2**31 <= 128 * 127 * (MOST_IN_FEATURES + 2048)
    k = MOST_IN_FEATURES + 128
    long = PackedLinear(torch.zeros(k // 16, 128, dtype=torch.int32), torch.ones(k // 128, 64).half(), 64, k, 128)
    assert factored_scales(long) is None


def test_a_module_whose_scales_may_change_uses_them_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a module went on with factors of scales that have been changed, every product would be silently wrong."""
    given: list[Tensor | None] = []

    class OnAGpu(Tensor):
        is_cuda = True

    def gemm(x: Tensor, *rest: object) -> Tensor:
        last = rest[-1]
        given.append(last if isinstance(last, Tensor) else None)
        return x

    monkeypatch.setattr("marlinctl.kernels.linear.marlin_gemm", gemm)
    module, x = MarlinLinear(packed(64, 256, 64), None, "int8"), torch.zeros(1, 256).as_subclass(OnAGpu)
    module._multiply(x)
    module.overlap = False
    module._multiply(x)
    module.overlap = True
    module._multiply(x)
    assert given[0] is not None and given[1] is None and given[2] is given[0]
    module.load_state_dict(MarlinLinear(packed(64, 256, 64)).state_dict())
    module._multiply(x)
    assert given[3] is not None and given[3] is not given[0], "other weights have other factors"
    exact = MarlinLinear(packed(64, 256, 64), None, "int8-128")
    exact._multiply(x)
    assert given[4] is None and exact.factored is None, "sums of groups need none"
