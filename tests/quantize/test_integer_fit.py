"""Integer group scales are exact where they are promised to be, close to the best ones, and never worse than what they replace."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from marlinctl.quantize.gptq import SolveSettings, solve
from marlinctl.quantize.grid import search_scales
from marlinctl.quantize.integer_fit import fit_to_weights, has_form, rescaled, round_channel_scales
from marlinctl.quantize.integer_scales import split
from marlinctl.quantize.refine import layer_error, refit_scales
from marlinctl.quantize.solver import factor, sweep
from marlinctl.quantize.types import Hessian
from tests.quantize.test_solver import hessian

FACTORS = [factor for factor in range(-15, 17) if factor]
DTYPES = {False: (torch.float16,), True: (torch.float16, torch.bfloat16)}


@pytest.mark.parametrize("bfloat16_exact", [False, True])
def test_every_product_is_exact(bfloat16_exact: bool) -> None:
    """If one were rounded when it is stored, a kernel that multiplies code by factor would compute with other weights."""
    generator = torch.Generator().manual_seed(0)
    wanted = torch.cat([torch.randn(150, generator=generator) * torch.logspace(-7, 5, 150), torch.tensor([0.0, -1e-9, 1e9, 4095.0])])
    rounded = round_channel_scales(wanted, bfloat16_exact)
    for given, channel in zip(wanted.tolist(), rounded.tolist(), strict=True):
        for factor_ in FACTORS:
            product = Fraction(channel) * factor_
            for dtype in DTYPES[bfloat16_exact]:
                assert Fraction(float(torch.tensor(float(product), dtype=torch.float64).to(dtype))) == product, (channel, factor_)
        if 1e-5 < abs(given) < 3800:
            assert abs(channel / given - 1) <= 2.0 ** -(4 if bfloat16_exact else 7)


def weights(rows: int = 24, k: int = 256) -> tuple[Tensor, Tensor]:
    """Groups of unlike size, and importances."""
    generator = torch.Generator().manual_seed(5)
    sizes = torch.exp(torch.randn(rows, k // 32, 1, generator=generator) * 0.25) * 0.02
    return (torch.randn(rows, k // 32, 32, generator=generator) * sizes).reshape(rows, k), torch.rand(k, generator=generator) * 5 + 0.1


def rounding_error(weight: Tensor, importance: Tensor, scales: Tensor) -> Tensor:
    """[R], in float64."""
    w, s = weight.double().reshape(len(weight), -1, 32), scales.double().unsqueeze(-1)
    return (((w / s).round().clamp(-8, 7) * s - w).square() * importance.double().reshape(-1, 32)).sum((-1, -2))


@pytest.mark.parametrize("both_signs", [False, True])
@pytest.mark.parametrize("bfloat16_exact", [False, True])
def test_scales_of_weights_are_the_best_that_are_tried(both_signs: bool, bfloat16_exact: bool) -> None:
    """If factors were merely rounded, or a group lost its sign, the whole solve would begin with a coarser grid."""
    weight, importance = weights()
    free = search_scales(
        weight, importance, group_size=32, both_signs=both_signs, bfloat16_exact=bfloat16_exact, ratios=(0.9, 0.75), margin=0.35
    )
    found = fit_to_weights(weight, importance, free, group_size=32, bfloat16_exact=bfloat16_exact)
    assert torch.equal(found.sign(), free.sign()) and split(found) is not None
    for dtype in DTYPES[bfloat16_exact]:
        assert torch.equal(found.to(dtype).float(), found)
    ours = rounding_error(weight, importance, found)
    largest = free.gather(1, free.abs().argmax(1, keepdim=True))
    for most in range(8, 17):
        channel = round_channel_scales(largest / most, bfloat16_exact)
        rounded = (free / channel).round()
        nearest = torch.where(rounded == 0, free.sign() * channel.sign(), rounded).clamp(-15, 16) * channel
        assert (ours <= rounding_error(weight, importance, nearest) * (1 + 1e-5)).all(), most
    assert float(ours.sum()) < 1.03 * float(rounding_error(weight, importance, free).sum())


def test_a_row_of_nothing_and_a_row_of_huge_weights_have_usable_scales() -> None:
    """If a scale were 0, infinite or subnormal beyond float16, dequantizing would give NaN or another weight."""
    weight = torch.zeros(4, 96)
    weight[1], weight[2, :5], weight[3, 40] = 3e5, 1e-7, -3e5
    free = search_scales(weight, None, group_size=32, both_signs=True, bfloat16_exact=True, ratios=(1.0,))
    for bfloat16_exact in (False, True):
        found = fit_to_weights(weight, None, free, group_size=32, bfloat16_exact=bfloat16_exact)
        assert split(found) is not None and torch.equal(found.half().float(), found) and bool((found.half() != 0).all())


def refitted(integer: bool, bfloat16_exact: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Layer error of each row before and after a re-fit, and the scales [G, R]."""
    weight, importance = weights()
    matrix = hessian(256, seed=8)
    w = weight.T.contiguous()
    free = search_scales(weight, importance, group_size=32, both_signs=True, bfloat16_exact=bfloat16_exact, ratios=(0.9,))
    s = fit_to_weights(weight, importance, free, group_size=32, bfloat16_exact=bfloat16_exact).T.contiguous()
    group_of = torch.randperm(256, generator=torch.Generator().manual_seed(7)) // 32
    codes, _ = sweep(w, w, factor(matrix, 0.01).feedback, s, group_of)
    after = refit_scales(w, codes, s, matrix, group_of, positive=False, bfloat16_exact=bfloat16_exact, integer=integer)
    one, two = (layer_error((w - codes * scales[group_of]).double(), matrix.double()) for scales in (s, after))
    if integer:
        assert torch.equal(after.sign(), s.sign())
    return one, two, after


@pytest.mark.parametrize("bfloat16_exact", [False, True])
def test_refitted_scales_keep_the_form_and_gain_most_of_what_free_ones_do(bfloat16_exact: bool) -> None:
    """If a re-fit lost the form the kernel would be slow; if it only rounded free scales it would mostly be worse and change nothing."""
    before, after, scales = refitted(True, bfloat16_exact)
    _, free, other = refitted(False)
    assert has_form(scales.T) and not has_form(other.T)
    for dtype in DTYPES[bfloat16_exact]:
        assert torch.equal(scales.to(dtype).float(), scales)
    assert (after <= before * (1 + 1e-5)).all()
    assert float((before - after).sum()) > 0.6 * float((before - free).sum())


def test_factors_are_found_one_by_one_and_not_by_rounding_alone() -> None:
    """If no step of one factor were tried, the correlations between groups would be ignored. Brute force over single steps in float64."""
    weight, importance = weights(rows=6, k=128)
    matrix, w = hessian(128, seed=9), weight.T.contiguous()
    free = search_scales(weight, importance, group_size=32, both_signs=True, bfloat16_exact=False, ratios=(0.9,))
    s = fit_to_weights(weight, importance, free, group_size=32, bfloat16_exact=False).T.contiguous()
    group_of = torch.arange(128) // 32
    codes, _ = sweep(w, w, factor(matrix, 0.01).feedback, s, group_of)
    for _ in range(3):
        s = refit_scales(w, codes, s, matrix, group_of, positive=False, bfloat16_exact=False, integer=True)

    def error(scales: Tensor) -> Tensor:
        return layer_error((w - codes * scales[group_of]).double(), matrix.double())

    found = split(s.T)
    assert found is not None
    best = error(s)
    for g in range(4):
        for step in (-1, 1):
            moved = found[0].double()
            moved[:, g] += step
            stepped = (moved * found[1].double().unsqueeze(1)).T
            allowed = (moved[:, g] != 0) & (moved[:, g] >= -15) & (moved[:, g] <= 16)
            assert (error(stepped.float())[allowed] >= best[allowed] * (1 - 1e-4)).all(), (g, step)


@pytest.mark.parametrize("bfloat16_exact", [False, True])
@pytest.mark.parametrize("refine", [0, 2])
def test_a_solve_loses_little(refine: int, bfloat16_exact: bool) -> None:
    """If scales were fitted after the codes were chosen, or a re-fit gave them up, the layer error would rise by tenths."""
    weight, _ = weights()
    settings = {
        integer: SolveSettings(32, True, bfloat16_exact, "static", "hessian", 0.01, refine, integer_scales=integer)
        for integer in (False, True)
    }
    free, ours = (solve(weight, Hessian(hessian(256, seed=8), 4096), settings[integer]) for integer in (False, True))
    assert has_form(ours.linear.scales) and not has_form(free.linear.scales)
    assert float(ours.error.sum()) < (1.08 if bfloat16_exact else 1.05) * float(free.error.sum())  # channel scales of 4 bits, or 7
    again = (weight - ours.linear.dequantize()).double()
    torch.testing.assert_close((again @ hessian(256, seed=8).double() * again).sum(1), ours.error, rtol=1e-3, atol=0)


def test_stacks_are_solved_as_one_after_another() -> None:
    """If a dimension were broadcast wrongly, the experts of a block would have each other's scales on a GPU."""
    weight, importance = weights()
    stack, importances = torch.stack([weight, weight.flip(1) * 2]), torch.stack([importance, importance.flip(0)])
    free = torch.stack([search_scales(w, h, group_size=32, both_signs=True, bfloat16_exact=False, ratios=(0.9,)) for w, h in
                        zip(stack, importances, strict=True)])  # fmt: skip
    found = fit_to_weights(stack, importances, free, group_size=32, bfloat16_exact=False)
    matrices = torch.stack([hessian(256, seed=8), hessian(256, seed=9)])
    orders = torch.stack([torch.randperm(256, generator=torch.Generator().manual_seed(i)) // 32 for i in (1, 2)])
    w = stack.mT.contiguous()
    parts = [sweep(w[e], w[e], factor(matrices[e], 0.01).feedback, found[e].T.contiguous(), orders[e])[0] for e in (0, 1)]
    keys = {"positive": False, "bfloat16_exact": False, "integer": True}
    together = refit_scales(w, torch.stack(parts), found.mT.contiguous(), matrices, orders, **keys)
    for e in (0, 1):
        alone = fit_to_weights(stack[e], importances[e], free[e], group_size=32, bfloat16_exact=False)
        assert torch.equal(found[e], alone)
        refit = refit_scales(w[e], parts[e], alone.T.contiguous(), matrices[e], orders[e], **keys)
        torch.testing.assert_close(together[e], refit)


def test_rescaled_scales_keep_their_factors() -> None:
    """If training moved scales one by one the form would be gone, and with it the kernel for such scales."""
    weight, importance = weights()
    free = search_scales(weight, importance, group_size=32, both_signs=True, bfloat16_exact=True, ratios=(0.9,))
    scales = fit_to_weights(weight, importance, free, group_size=32, bfloat16_exact=True)
    share = torch.linspace(0.8, 1.2, len(scales)).unsqueeze(1)
    moved = rescaled(scales, share, True)
    ratio = moved.double() / scales.double()
    assert torch.allclose(ratio, ratio[:, :1], rtol=1e-12) and has_form(moved) and torch.equal(moved.bfloat16().float(), moved)
    assert ((ratio[:, :1] / share.double() - 1).abs() <= 1 / 16).all()
