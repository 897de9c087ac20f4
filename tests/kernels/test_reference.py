"""The plain reference decodes tiles through the maps alone and agrees with the codes that went in."""

from __future__ import annotations

import pytest
import torch

from marlinctl.kernels.reference import ROWS_AT_ONCE, dequantize, dequantize_sparse, gemm, gemm_rounded
from marlinctl.pack.marlin import pack_marlin
from marlinctl.pack.sparse_marlin import pack_sparse_marlin
from marlinctl.pack.types import PackedLinear, PackedSparseLinear
from marlinctl.quantize.activations import rounded
from tests.pack.naive import random_linear, random_sparse

SHAPES = [(16, 16, -1), (48, 80, 16), (80, 200, -1), (200, 48, 24), (64, 256, 128), (ROWS_AT_ONCE + 20, 64, 32)]


@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
def test_dequantize_gives_the_weight_that_was_packed(n: int, k: int, group_size: int) -> None:
    """If this failed, the fast packer and the maps would disagree, or scales would sit on the wrong columns."""
    q = random_linear(n, k, group_size)
    assert torch.equal(dequantize(pack_marlin(q)), q.dequantize())


@pytest.mark.parametrize(("n", "k", "group_size"), [(16, 16, -1), (48, 80, 16), (80, 200, -1), (64, 256, 128), (ROWS_AT_ONCE + 20, 64, 32)])
def test_dequantize_sparse_gives_the_weight_that_was_packed(n: int, k: int, group_size: int) -> None:
    """If this failed, the fast packer and the maps would disagree, or survivors or scales would sit in the wrong columns."""
    q = random_sparse(n, k, group_size)
    assert torch.equal(dequantize_sparse(pack_sparse_marlin(q)), q.dequantize())


def test_dequantize_sparse_reads_words_written_by_hand() -> None:
    """If this failed, packer and reference could be wrong together: here no packer takes part."""
    words = torch.full((2, 128), 0x88888888 - (1 << 32), dtype=torch.int32)  # code 0 everywhere
    words[0, 1] = 0x888F8888 - (1 << 32)  # n = 1, nibble 4: survivor 1, the second of quad 0
    words[1, 10] = 0x88888808 - (1 << 32)  # lane 2, word 2: n = 2, nibble 1: survivor 16 + 4 + 8 = 28, the first of quad 14
    meta = torch.full((2, 128), 0x4444, dtype=torch.int16)
    meta[0, 4] = 0x444D  # n = 1: quad 0 keeps columns 1 and 3
    meta[1, 66] = 0x4E44  # n = 2, columns 16..31 of the second 32: quads 12..15, of which 14 keeps columns 2 and 3
    scales = torch.zeros(2, 64, dtype=torch.float16)
    scales[0, 2] = 2.0  # grouped order: slot 2 is column 1
    scales[1, 4] = -0.5  # and slot 4 is column 2
    weight = dequantize_sparse(PackedSparseLinear(words, meta, scales, 64, 64, 32))
    assert weight.nonzero().tolist() == [[1, 3], [2, 58]]
    assert (float(weight[1, 3]), float(weight[2, 58])) == (14.0, 4.0)


def test_dequantize_reads_words_written_by_hand() -> None:
    """If this failed, packer and reference could be wrong together: here no packer takes part."""
    words = torch.full((4, 128), 0x88888888 - (1 << 32), dtype=torch.int32)  # code 0 everywhere
    words[0, 16] = 0x8F888888 - (1 << 32)  # n = 1, nibble 6: k = 1 of column n + 8 = 9
    words[3, 0] = 0x88888880 - (1 << 32)  # k = 48, n = 0
    scales = torch.zeros(1, 64, dtype=torch.float16)
    scales[0, 0] = 2.0  # channel order: slot 0 is column 0
    scales[0, 3] = -0.5  # and slot 3 is column 9
    expected = torch.zeros(64, 64)
    expected[9, 1] = 7 * -0.5
    expected[0, 48] = -8 * 2.0
    assert torch.equal(dequantize(PackedLinear(words, scales, 64, 64, 64)), expected)


@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
def test_identity_activations_give_the_weight(n: int, k: int, group_size: int) -> None:
    """If this failed, gemm would multiply with something other than the transposed weight."""
    q = random_linear(n, k, group_size)
    assert torch.equal(gemm(torch.eye(k), pack_marlin(q)), q.dequantize().T)


def test_gemm_agrees_with_fp64_and_adds_the_bias_once() -> None:
    """If this failed, the yardstick of every kernel would itself be off."""
    q = random_linear(80, 200, 40)
    generator = torch.Generator().manual_seed(1)
    activations = torch.randn(7, 200, generator=generator).to(torch.float16)
    bias = torch.randn(80, generator=generator).to(torch.bfloat16)
    weight = q.dequantize(torch.float64)
    exact = activations.double() @ weight.T + bias.double()
    # K + 1 roundings of 2**-24 each, relative to the sum of magnitudes
    bound = (activations.double().abs() @ weight.abs().T + bias.double().abs()) * 201 * 2**-24
    result = gemm(activations, pack_marlin(q), bias)
    assert result.dtype == torch.float32 and result.shape == (7, 80)
    assert bool(((result.double() - exact).abs() <= bound).all())


def test_gemm_reads_sparse_tiles_too() -> None:
    """If this failed, 2:4 kernels would have no yardstick. An identity as input makes the product the weight itself."""
    q = random_sparse(80, 200, 40)
    assert torch.equal(gemm(torch.eye(200), pack_sparse_marlin(q)), q.dequantize().T)


@pytest.mark.parametrize("group", [None, 128])
@pytest.mark.parametrize(("k", "group_size"), [(200, 40), (256, 64), (320, -1), (256, 128)])
def test_gemm_rounded_is_the_sum_over_groups(k: int, group_size: int, group: int | None) -> None:
    """If this failed, 8-bit kernels would have no yardstick. Here integers are added up where both scales stay the same, then scaled."""
    q, generator = random_linear(ROWS_AT_ONCE + 8, k, group_size), torch.Generator().manual_seed(k)
    x = torch.randn(5, k, generator=generator).to(torch.float16) * torch.logspace(-1, 1, k).to(torch.float16)
    bias = torch.randn(ROWS_AT_ONCE + 8, generator=generator).to(torch.bfloat16)
    codes, scales = rounded(x, "int8", group)
    exact = bias.double().expand(5, -1)
    for first in range(0, k, 8):  # all these groups are multiples of 8
        ks = slice(first, first + 8)
        integers = codes[:, ks].long() @ q.codes[:, ks].long().T
        exact = (
            exact + integers * scales[:, 0 if group is None else first // 128, None].double() * q.scales[:, first // q.group_size].double()
        )
    result = gemm_rounded(x, pack_marlin(q), group, bias)
    assert result.dtype == torch.float32 and result.shape == exact.shape
    magnitude = codes.abs().double() @ q.dequantize(torch.float64).abs().T * scales.amax(1, keepdim=True).double()
    assert bool(((result.double() - exact).abs() <= 2**-24 * exact.abs() + 2 * k * 2**-53 * (magnitude + bias.double().abs())).all())
    plain = gemm(x, pack_marlin(q), bias)
    assert 1e-3 < float((result - plain).norm() / plain.norm()) < 0.03, "rounded to 8 bits, and no more"


def test_gemm_rounded_reads_sparse_tiles_too() -> None:
    """If this failed, 2:4 with int8 activations could not be evaluated on a CPU. 127 is a code of its own, of scale 1."""
    q = random_sparse(80, 200, 40)
    assert torch.equal(gemm_rounded(127 * torch.eye(200), pack_sparse_marlin(q), None), 127 * q.dequantize().T)


@pytest.mark.parametrize("group", [None, 128])
def test_a_token_that_is_not_finite_gives_nan_alone(group: int | None) -> None:
    """If this failed, an overflow would pass for a number, or spoil the tokens beside it."""
    x = torch.ones(3, 256)
    x[1, 200] = torch.inf
    out = gemm_rounded(x, pack_marlin(random_linear(16, 256, 64)), group)
    assert out.isnan().tolist() == [[row == 1] * 16 for row in range(3)]


def test_wrong_shapes_are_refused() -> None:
    """If this failed, broadcasting would turn a wrong bias or activation into a plausible result."""
    p = pack_marlin(random_linear(16, 48, -1))
    with pytest.raises(ValueError, match=r"activations must be \[M, 48\], got \[2, 64\]"):
        gemm(torch.zeros(2, 64), p)
    with pytest.raises(ValueError, match=r"activations must be \[M, 48\], got \[48\]"):
        gemm(torch.zeros(48), p)
    with pytest.raises(ValueError, match=r"bias must be \[16\], got \[1\]"):
        gemm(torch.zeros(2, 48), p, torch.zeros(1))
    with pytest.raises(ValueError, match=r"activations must be \[M, 48\], got \[2, 64\]"):
        gemm_rounded(torch.zeros(2, 64), p, None)


@pytest.mark.gpu
def test_cuda_decodes_the_same_weight() -> None:
    """If this failed, kernels tested against the reference on a GPU would be held to another weight than on the CPU."""
    p = pack_marlin(random_linear(200, 448, 64))
    there = PackedLinear(p.qweight.cuda(), p.scales.cuda(), 200, 448, 64)
    assert torch.equal(dequantize(there).cpu(), dequantize(p))
