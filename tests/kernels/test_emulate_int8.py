"""Products with int8 activations, found by the rules of the hardware: they meet those of the maps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from marlinctl.kernels import emulate_int8, reference
from marlinctl.kernels.activations import in_tile_order, round_activations_for_tiles
from marlinctl.kernels.emulate_int8 import gemm_factored, gemm_int8, gemm_sparse_factored
from marlinctl.kernels.factored import factored_scales
from marlinctl.kernels.int8_metadata import metadata_for_int8
from marlinctl.pack.marlin import pack_marlin
from marlinctl.pack.sparse_marlin import pack_sparse_marlin
from marlinctl.pack.types import PackedLinear, PackedSparseLinear, padded
from tests.kernels.software_kernel import with_factors
from tests.pack.naive import random_linear, random_sparse
from tests.test_architecture import imports_of

SHAPES = [(64, 64, -1), (64, 128, 32), (128, 128, 64), (64, 256, 128), (80, 160, 32), (200, 80, -1), (16, 48, -1)]


def weights(p: PackedLinear) -> Tensor:
    """[N, K] float32 as the emulator reads it: the product with codes of the identity, whose scales are 1."""
    codes = in_tile_order(torch.eye(p.in_features))
    return gemm_int8(codes, torch.ones(1, p.in_features), p, None).T


@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
def test_identity_activations_give_the_weights(n: int, k: int, group_size: int) -> None:
    """If this failed, an 8-bit kernel would multiply other weights than were packed, or with their neighbours' scales."""
    q = random_linear(n, k, group_size)
    assert bool((q.codes == -8).any()) and bool((q.scales < 0).any())
    assert torch.equal(weights(pack_marlin(q)), q.dequantize())


@pytest.mark.parametrize("group", [None, 128])
@pytest.mark.parametrize(
    ("m", "n", "k", "group_size"), [(1, 64, 64, -1), (7, 80, 160, 32), (17, 64, 256, 128), (10, 128, 576, 64), (9, 64, 320, -1)]
)
def test_random_activations_agree_with_the_reference(m: int, n: int, k: int, group_size: int, group: int | None) -> None:
    """If this failed, sums would be scaled with another group's or token's scale, or groups would not be added up."""
    p = pack_marlin(random_linear(n, k, group_size))
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)) * torch.logspace(-1, 1, k) * torch.logspace(-2, 2, m)[:, None]
    made = round_activations_for_tiles(x, group)
    result = gemm_int8(made.codes, made.scales, p, group)
    assert result.dtype == torch.float32 and result.shape == (m, n)
    # float32 rounds once for each group of either, and once more in the reference.
    magnitude = x.double().abs() @ reference.dequantize(p).double().abs().T * (1 + 1 / 64)
    closings = padded(k) // 32 + 1
    bound = closings * 2**-24 * magnitude
    assert bool(((result.double() - reference.gemm_rounded(x, p, group).double()).abs() <= bound).all())


def test_another_order_of_activations_shows() -> None:
    """If this failed, it would not matter where activations lie."""
    q = random_linear(64, 64, 64)
    codes = torch.nn.functional.pad(torch.eye(32), (0, 32)).to(torch.int8)
    out = gemm_int8(codes, torch.ones(1, 32), pack_marlin(q), None).T
    assert int((out != q.dequantize()[:, :32]).any(0).sum()) >= 24


@pytest.mark.parametrize("bit", [0, 5, 21, 31])
def test_one_wrong_bit_shows_in_one_weight(bit: int) -> None:
    """If this failed, the emulator would agree with anything. Nibble 0, 1, 5 and 7 of a word."""
    p = pack_marlin(random_linear(128, 128, 32))
    words = p.qweight.clone()
    words[1, 201] ^= torch.tensor(1 << bit).to(torch.int32)
    bad = PackedLinear(words, p.scales, 128, 128, 32)
    assert int((weights(bad) != weights(p)).sum()) == 1
    assert torch.equal(weights(bad), reference.dequantize(bad))


@pytest.mark.parametrize(("k", "group_size"), [(128, 32), (64, -1)], ids=["grouped", "channel-wise"])
@pytest.mark.parametrize("slot", [1, 8, 40])
def test_exchanged_scales_show_in_two_outputs(slot: int, k: int, group_size: int) -> None:
    """If this failed, the order of the scales would not matter to the emulator."""
    p = pack_marlin(random_linear(64, k, group_size))
    scales = p.scales.clone()
    scales[0, [slot, slot + 1]] = scales[0, [slot + 1, slot]]
    bad = PackedLinear(p.qweight, scales, 64, k, p.group_size)
    assert len({n for n, _ in (weights(bad) != weights(p)).nonzero().tolist()}) == 2
    assert torch.equal(weights(bad), reference.dequantize(bad))


def test_exchanged_tokens_scales_show_in_two_tokens() -> None:
    """If this failed, a token would be scaled with another one's scale; a scale that is NaN stays with its token."""
    p = pack_marlin(random_linear(64, 256, 64))
    made = round_activations_for_tiles(torch.randn(11, 256, generator=torch.Generator().manual_seed(3)), 128)
    good = gemm_int8(made.codes, made.scales, p, 128)
    scales = made.scales.clone()
    scales[1, [2, 9]] = scales[1, [9, 2]]
    assert (gemm_int8(made.codes, scales, p, 128) != good).any(1).nonzero().flatten().tolist() == [2, 9]
    scales[1, 9] = torch.nan
    assert gemm_int8(made.codes, scales, p, 128).isnan().all(1).nonzero().flatten().tolist() == [9]


def test_what_does_not_fit_is_refused() -> None:
    """If this failed, a wrong call would give a plausible product of something else."""
    p = pack_marlin(random_linear(64, 200, 40))
    codes, scales = torch.zeros(2, 256, dtype=torch.int8), torch.ones(1, 4)
    with pytest.raises(ValueError, match=r"codes must be int8 \[M, 256\] with M > 0, got torch\.int8 \[2, 200\]"):
        gemm_int8(codes[:, :200], scales, p, None)
    with pytest.raises(ValueError, match=r"codes must be int8 .* got torch\.int32"):
        gemm_int8(codes.int(), scales, p, None)
    with pytest.raises(ValueError, match=r"scales must be float32 \[2, 2 or more\], got torch\.float32 \[1, 4\]"):
        gemm_int8(codes, scales, p, 128)
    with pytest.raises(ValueError, match=r"groups of 40 and 256 are no multiples of 32"):
        gemm_int8(codes, scales, p, None)


def test_nothing_is_shared_with_packers_or_maps() -> None:
    """If this failed, a mistake in a map or a packer could be made by the emulator too, and agree with itself."""
    own = {found.target for found in imports_of(Path(str(emulate_int8.__file__))) if found.target.startswith("marlinctl")}
    assert {target.rpartition(".")[0] for target in own} == {"marlinctl.kernels.emulate", "marlinctl.kernels.warp", "marlinctl.pack.types"}
    types = {f"marlinctl.pack.types.{name}" for name in ("PackedLinear", "PackedSparseLinear")}
    assert {target for target in own if ".pack." in target} == types


def factored(n: int, k: int, group_size: int, seed: int = 0) -> tuple[PackedLinear, Tensor]:
    q = random_linear(n, k, group_size)
    p = pack_marlin(with_factors(q, seed))
    found = factored_scales(p)
    assert found is not None
    return p, found


@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
def test_factored_weights_are_the_same_weights(n: int, k: int, group_size: int) -> None:
    """If this failed, a code would meet another factor than that of its group and output, or a byte would carry into its neighbour."""
    p, scales = factored(n, k, group_size)
    codes = in_tile_order(torch.eye(k))
    out = gemm_factored(codes, torch.ones(1, k), p, scales).T
    assert torch.equal(out, reference.dequantize(p))


@pytest.mark.parametrize(("m", "n", "k", "group_size"), [(7, 80, 160, 32), (17, 64, 256, 128), (10, 128, 576, 64), (9, 64, 320, -1)])
def test_random_activations_with_factored_weights(m: int, n: int, k: int, group_size: int) -> None:
    """If this failed, sums over all of K would be scaled with another output's or token's scale."""
    p, scales = factored(n, k, group_size)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)) * torch.logspace(-1, 1, k) * torch.logspace(-2, 2, m)[:, None]
    made = round_activations_for_tiles(x, None)
    result = gemm_factored(made.codes, made.scales, p, scales)
    exact = reference.gemm_rounded(x, p, None).double()
    assert bool(((result.double() - exact).abs() <= 4 * 2**-24 * exact.abs() + 2**-30 * exact.abs().max()).all())


@pytest.mark.parametrize("row", [0, 1, -1])
def test_exchanged_factors_show(row: int) -> None:
    """If this failed, the order of factors or of channel scales would not matter to the emulator."""
    p, scales = factored(64, 128, 64)
    bad = scales.clone()
    bad[row, 8:16] = bad[row, 8:16].flip(0)
    codes, ones = in_tile_order(torch.eye(128)), torch.ones(1, 128)
    assert not torch.equal(gemm_factored(codes, ones, p, bad), gemm_factored(codes, ones, p, scales))


def sparse_factored(n: int, k: int, group_size: int) -> tuple[PackedSparseLinear, Tensor, Tensor]:
    p = pack_sparse_marlin(with_factors(random_sparse(n, k, group_size, seed=1), seed=0))
    found = factored_scales(p)
    assert found is not None
    return p, found, metadata_for_int8(p.meta)


@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
def test_sparse_factored_weights_are_the_same_weights(n: int, k: int, group_size: int) -> None:
    """If this failed, the 8-bit kernel would put a survivor of 2:4 at another column, or scale it with another group's factor."""
    p, factors, meta = sparse_factored(n, k, group_size)
    out = gemm_sparse_factored(in_tile_order(torch.eye(k), sparse=True), torch.ones(1, k), p, factors, meta).T
    assert torch.equal(out, reference.dequantize_sparse(p))


@pytest.mark.parametrize(("m", "n", "k", "group_size"), [(7, 80, 160, 32), (17, 64, 256, 128), (10, 128, 576, 64), (9, 64, 320, -1)])
def test_random_activations_with_sparse_factored_weights(m: int, n: int, k: int, group_size: int) -> None:
    """If this failed, 2:4 sums over all of K would be scaled with another output's or token's scale."""
    p, factors, meta = sparse_factored(n, k, group_size)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)) * torch.logspace(-1, 1, k) * torch.logspace(-2, 2, m)[:, None]
    made = round_activations_for_tiles(x, None, sparse=True)
    result = gemm_sparse_factored(made.codes, made.scales, p, factors, meta)
    exact = reference.gemm_rounded(x, p, None).double()
    assert bool(((result.double() - exact).abs() <= 4 * 2**-24 * exact.abs() + 2**-30 * exact.abs().max()).all())


def test_metadata_as_it_lies_on_the_disk_shows() -> None:
    """If this failed, it would not matter to the emulator where metadata lie."""
    p, factors, meta = sparse_factored(64, 128, 64)
    codes, ones = in_tile_order(torch.eye(128), sparse=True), torch.ones(1, 128)
    good = gemm_sparse_factored(codes, ones, p, factors, meta)
    assert int((gemm_sparse_factored(codes, ones, p, factors, p.meta) != good).sum()) > 1000
    with pytest.raises(ValueError, match="do not rise"):
        gemm_sparse_factored(codes, ones, p, factors, torch.zeros_like(meta))
    with pytest.raises(ValueError, match=r"int8_meta must be int16 \[4, 128\]"):
        gemm_sparse_factored(codes, ones, p, factors, meta[:2])
