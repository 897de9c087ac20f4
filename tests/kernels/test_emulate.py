"""The emulator finds the weights by the rules of the hardware; reference and packers by the maps. Here they meet, bit for bit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from marlinctl.kernels import emulate, reference, warp
from marlinctl.kernels.emulate import Scaling, gemm, gemm_blocks
from marlinctl.pack.marlin import pack_marlin
from marlinctl.pack.sparse_marlin import pack_sparse_marlin
from marlinctl.pack.types import PackedLinear, PackedSparseLinear, padded
from marlinctl.quantize.types import QuantizedLinear
from marlinctl.sparsify.types import SparseQuantizedLinear
from tests.pack.naive import random_keep, random_linear, random_sparse, sparse
from tests.test_architecture import imports_of

DTYPES = [torch.float16, torch.bfloat16]
BITS = {torch.float16: 11, torch.bfloat16: 8}  # of the significand
SHAPES = [
    (64, 64, -1),
    (64, 128, 32),
    (128, 128, 64),
    (64, 256, 128),
    (80, 160, 32),
    (200, 80, -1),
    (16, 48, -1),
]  # the last three are padded


def packed(n: int, k: int, group_size: int, is_sparse: bool, seed: int = 0) -> tuple[QuantizedLinear, PackedLinear | PackedSparseLinear]:
    if is_sparse:
        survivors = random_sparse(n, k, group_size, seed)
        return survivors, pack_sparse_marlin(survivors)
    q = random_linear(n, k, group_size, seed)
    return q, pack_marlin(q)


def weights(p: PackedLinear | PackedSparseLinear, dtype: torch.dtype = torch.float16, scaling: Scaling = "sums") -> Tensor:
    """[N, K] float32 as the emulator reads it: the product with the identity."""
    return gemm(torch.eye(p.in_features, dtype=dtype), p, scaling=scaling).T


def by_the_maps(p: PackedLinear | PackedSparseLinear) -> Tensor:
    return reference.dequantize_sparse(p) if isinstance(p, PackedSparseLinear) else reference.dequantize(p)


# ---- the weights, bit for bit --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
def test_identity_activations_give_the_weights(n: int, k: int, group_size: int, dtype: torch.dtype, is_sparse: bool) -> None:
    """If this failed, a kernel would multiply other weights than were packed, or scale the right ones with their neighbours' scales."""
    q, p = packed(n, k, group_size, is_sparse)
    assert bool((q.codes == -8).any()) and bool((q.scales < 0).any())
    assert torch.equal(weights(p, dtype), q.dequantize())
    rounded = q.dequantize() if group_size == -1 else q.dequantize(dtype).to(torch.float32)  # one scale per output is for sums alone
    assert torch.equal(weights(p, dtype, "weights"), rounded)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([(64, 64, 64), (128, 64, 32), (70, 96, 32), (64, 192, 64)]), st.booleans(), st.integers(0, 9999))
def test_random_bits_mean_what_the_maps_say(shape: tuple[int, int, int], is_sparse: bool, seed: int) -> None:
    """If this failed, emulator and maps would agree on what the packers write alone: here no packer takes part."""
    n, k, group_size = shape
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if group_size == k else -(-padded(k) // group_size)
    scales = torch.randn(groups, padded(n), generator=generator).to(torch.float16)
    words = torch.randint(-(1 << 31), 1 << 31, (padded(k) // 16, 2 * padded(n)), generator=generator).to(torch.int32)
    p: PackedLinear | PackedSparseLinear = PackedLinear(words, scales, n, k, group_size)
    if is_sparse:
        rows = padded(k) // 32
        choices = torch.tensor([0x4, 0x8, 0x9, 0xC, 0xD, 0xE])[torch.randint(0, 6, (rows, 2 * padded(n), 4), generator=generator)]
        meta = (choices << 4 * torch.arange(4)).sum(-1).to(torch.int16)
        p = PackedSparseLinear(words[:rows], meta, scales, n, k, group_size)
    assert torch.equal(weights(p), by_the_maps(p))


def test_dense_words_worked_out_by_hand() -> None:
    """If this failed, emulator and maps could be wrong together. The words are those of docs/formats/marlin.md, traced by hand."""
    words = torch.full((4, 128), 0x88888888 - (1 << 32), dtype=torch.int32)  # code 0 everywhere
    words[0, 0] = 0x19910880  # lane 0: k = 0, 1, 8, 9 of n = 0 and 8
    words[0, 127] = 0xE66ED55D - (1 << 32)  # lane 31, word 3: k = 6, 7, 14, 15 of n = 55 and 63
    scales = torch.zeros(2, 64, dtype=torch.float16)
    scales[0, 0], scales[0, 1] = 1.0, -2.0  # n = 0, 8
    scales[0, 62], scales[0, 63] = 0.5, 4.0  # n = 55, 63
    expected = torch.zeros(64, 64)
    ks = torch.tensor([0, 8, 1, 9])
    expected[0, ks], expected[8, ks] = torch.tensor([-8.0, 0, -7, 1]), -2 * torch.tensor([0.0, -8, 1, -7])
    expected[55, ks + 6], expected[63, ks + 6] = 0.5 * torch.tensor([5.0, -3, 6, -2]), 4 * torch.tensor([-3.0, 5, -2, 6])
    p = PackedLinear(words, scales, 64, 64, 32)
    assert torch.equal(weights(p), expected) and torch.equal(weights(p, torch.bfloat16, "weights"), expected)
    whole = torch.zeros(1, 64, dtype=torch.float16)
    whole[0, 0], whole[0, 2], whole[0, 61], whole[0, 63] = 1.0, -2.0, 0.5, 4.0  # n = 0, 8, 55, 63 in channel-wise order
    assert torch.equal(weights(PackedLinear(words, whole, 64, 64, 64)), expected)


def test_sparse_words_worked_out_by_hand() -> None:
    """If this failed, emulator and maps could be wrong together. The words are those of docs/formats/marlin_24.md, traced by hand."""
    words = torch.full((2, 128), 0x88888888 - (1 << 32), dtype=torch.int32)
    words[0, [0, 4, 8, 12]] = torch.tensor([w - (1 << 32) for w in (0x8886888D, 0x888A8889, 0x888F8880, 0x8885888B)], dtype=torch.int32)
    words[1, 127] = 0xF8888888 - (1 << 32)  # lane 31, word 3, nibble 7: the last survivor of n = 63
    meta = torch.full((2, 128), 0x4444, dtype=torch.int16)
    meta[0, 0] = 0x8E4D - (1 << 16)  # n = 0: columns 1 3, 0 1, 2 3, 0 2
    meta[1, 127] = 0xC444 - (1 << 16)  # n = 63: columns 0 and 3 of the last quad
    scales = torch.ones(2, 64, dtype=torch.float16)
    scales[0, 0], scales[1, 63] = -0.5, 3.0
    expected = torch.zeros(64, 64)
    expected[0, :16] = -0.5 * torch.tensor([0.0, 5, 0, -2, 1, 2, 0, 0, 0, 0, -8, 7, 3, 0, -3, 0])
    expected[63, 63] = 3 * 7.0
    p = PackedSparseLinear(words, meta, scales, 64, 64, 32)
    assert torch.equal(weights(p), expected) and torch.equal(weights(p, torch.bfloat16, "weights"), expected)


@pytest.mark.parametrize("code", [-8, 0, 7])
def test_survivors_of_one_code(code: int) -> None:
    """If this failed, nibble 0 (code -8) or a survivor that is zero would be taken for pruned."""
    keep = random_keep(64, 128)
    q = sparse(QuantizedLinear(torch.full((64, 128), code, dtype=torch.int8), torch.ones(64, 2, dtype=torch.float16), 64), keep)
    assert torch.equal(weights(pack_sparse_marlin(q)), code * keep.float())


def test_a_zero_survivor_beside_another() -> None:
    """If this failed, the survivor that is not zero would move to the place of the one that is."""
    keep = torch.tensor([[0, 1, 0, 1]], dtype=torch.bool).repeat(64, 16)
    codes = torch.zeros(64, 64, dtype=torch.int8)
    codes[:32, 1::4], codes[32:, 3::4] = 3, -8
    q = SparseQuantizedLinear(codes, torch.ones(64, 1, dtype=torch.float16), 64, keep)
    assert torch.equal(weights(pack_sparse_marlin(q)), codes.float())


# ---- products ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("scaling", ["sums", "weights"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k", "group_size"), [(1, 64, 64, -1), (7, 80, 160, 32), (17, 64, 256, 128), (65, 128, 576, 64)])
def test_random_activations_agree_with_the_reference(
    m: int, n: int, k: int, group_size: int, dtype: torch.dtype, scaling: Scaling, is_sparse: bool
) -> None:
    """If this failed, weights and activations would meet, but not be added up, or not all of them, or in too low a precision."""
    q, p = packed(n, k, group_size, is_sparse)
    activations = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)
    result = gemm(activations, p, scaling=scaling)
    assert result.dtype == torch.float32 and result.shape == (m, n)
    magnitude = activations.double().abs() @ q.dequantize(torch.float64).abs().T
    exact = activations.double() @ q.dequantize(torch.float64).T
    # float32 rounds once for each instruction, of which one covers at least 16 of K, and once for each group
    bound = (padded(k) / 16 + p.padded_groups) * 2**-24 * magnitude
    if scaling == "weights" and group_size != -1:  # each weight is rounded to half a last bit, or half of float16's smallest number
        bound += 2.0 ** -BITS[dtype] * magnitude + 2**-25 * activations.double().abs().sum(1, keepdim=True)
    assert bool(((result.double() - exact).abs() <= bound).all())
    reference_bound = bound + (k + 1) * 2**-24 * magnitude
    assert bool(((result.double() - reference.gemm(activations, p).double()).abs() <= reference_bound).all())


@pytest.mark.parametrize("is_sparse", [False, True], ids=["dense", "sparse"])
def test_sums_do_not_overflow_float16(is_sparse: bool) -> None:
    """If this failed, sums would be held in float16: this one is six times its largest number."""
    codes = torch.full((64, 1024), 7, dtype=torch.int8)
    q = QuantizedLinear(codes, torch.ones(64, 8, dtype=torch.float16), 128)
    keep = (torch.arange(1024) % 4 < 2).repeat(64, 1)
    p = pack_sparse_marlin(sparse(q, keep)) if is_sparse else pack_marlin(q)
    activations = torch.full((3, 1024), 64.0, dtype=torch.float16)
    want = 64.0 * 7 * (512 if is_sparse else 1024)
    for scaling in ("sums", "weights"):
        assert bool((gemm(activations, p, scaling=scaling) == want).all())


@pytest.mark.parametrize("is_sparse", [False, True], ids=["dense", "sparse"])
def test_blocks_are_columns_of_the_whole(is_sparse: bool) -> None:
    """If this failed, a check of sampled blocks would look at other outputs than it names, or not see what lies in the padding."""
    _, p = packed(200, 128, 32, is_sparse)
    activations = torch.randn(5, 128, generator=torch.Generator().manual_seed(0)).to(torch.float16)
    whole = gemm(activations, p)
    some = gemm_blocks(activations, p, [2, 0, 3])
    assert torch.equal(some[:, :128], torch.cat((whole[:, 128:192], whole[:, :64]), 1))
    assert torch.equal(some[:, 128:136], whole[:, 192:]) and not bool(some[:, 136:].any())


# ---- the emulator can fail -----------------------------------------------------------------------------------------------------------


def damaged(p: PackedLinear | PackedSparseLinear, **changes: Tensor) -> PackedLinear | PackedSparseLinear:
    """A copy with other tensors in place of some."""
    parts = {"qweight": p.qweight, "scales": p.scales} | changes
    if isinstance(p, PackedSparseLinear):
        parts = {"meta": p.meta} | parts
        return PackedSparseLinear(parts["qweight"], parts["meta"], parts["scales"], p.out_features, p.in_features, p.group_size)
    return PackedLinear(parts["qweight"], parts["scales"], p.out_features, p.in_features, p.group_size)


def exchanged(tensor: Tensor, row: int, first: int, second: int) -> Tensor:
    copy = tensor.clone()
    copy[row, [first, second]] = copy[row, [second, first]]
    assert not torch.equal(copy, tensor), "equal neighbours test nothing"
    return copy


def touched(p: PackedLinear | PackedSparseLinear, bad: PackedLinear | PackedSparseLinear) -> list[list[int]]:
    """Places [n, k] at which damage shows. The maps must read the damaged tiles in the same way."""
    seen = weights(bad)
    assert torch.equal(seen, by_the_maps(bad))
    return (seen != weights(p)).nonzero().tolist()


@pytest.mark.parametrize("is_sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("bit", [0, 5, 21, 31])
def test_one_wrong_bit_shows_in_one_weight(bit: int, is_sparse: bool) -> None:
    """If this failed, the emulator would agree with anything. Nibble 0, 1, 5 and 7 of a word."""
    _, p = packed(128, 128, 32, is_sparse)
    words = p.qweight.clone()
    words[1, 201] ^= torch.tensor(1 << bit).to(torch.int32)
    assert len(touched(p, damaged(p, qweight=words))) == 1


@pytest.mark.parametrize("is_sparse", [False, True], ids=["dense", "sparse"])
def test_exchanged_nibbles_show_in_two_weights(is_sparse: bool) -> None:
    """If this failed, the order inside a word would not matter to the emulator. Nibble 1 and 4, which one wrong mask would exchange."""
    _, p = packed(64, 64, 32, is_sparse)
    words = p.qweight.clone()
    word = int(words[1, 77]) & 0xFFFFFFFF
    low, high = word >> 4 & 15, word >> 16 & 15
    assert low != high
    word = word & ~0xF00F0 | high << 4 | low << 16
    words[1, 77] = word - (word >> 31 << 32)
    assert len(touched(p, damaged(p, qweight=words))) == 2


@pytest.mark.parametrize("is_sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("other", [6, 8, 16, 64], ids=["word of the lane", "next lane", "next group of lanes", "far lane"])
def test_exchanged_words_show(other: int, is_sparse: bool) -> None:
    """If this failed, it would not matter which lane loads which word."""
    _, p = packed(64, 64, 32, is_sparse)
    assert len(touched(p, damaged(p, qweight=exchanged(p.qweight, 0, 4, other)))) > 4


@pytest.mark.parametrize("is_sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize(("k", "group_size"), [(128, 32), (64, -1)], ids=["grouped", "channel-wise"])
@pytest.mark.parametrize("slot", [1, 8, 40])
def test_exchanged_scales_show_in_two_outputs(slot: int, k: int, group_size: int, is_sparse: bool) -> None:
    """If this failed, the order of the scales would not matter to the emulator."""
    q, p = packed(64, k, group_size, is_sparse)
    bad = damaged(p, scales=exchanged(p.scales, 0, slot, slot + 1))
    outputs = {n for n, _ in touched(p, bad)}
    assert len(outputs) == 2 and all(column < q.group_size for _, column in touched(p, bad))
    assert torch.equal(weights(bad, scaling="weights"), weights(bad).to(torch.float16 if group_size != -1 else torch.float32).float())


@pytest.mark.parametrize("other", [1, 2, 4, 8, 64], ids=["row + 4", "columns + 16", "row + 1", "row + 8", "row + 2"])
def test_exchanged_metadata_shows_in_its_outputs(other: int) -> None:
    """If this failed, it would not matter to which half register, lane pair or word metadata goes."""
    _, p = packed(64, 64, 32, True)
    assert isinstance(p, PackedSparseLinear)
    bad = damaged(p, meta=exchanged(p.meta, 1, 0, other))
    step = {1: 4, 2: 0, 4: 1, 8: 8, 64: 2}[other]  # of the outputs, as drawn in docs/formats/marlin_24.md
    assert {n for n, _ in touched(p, bad)} == {0, step}
    assert {k // 16 for _, k in touched(p, bad)} == ({2, 3} if step == 0 else {2})


def test_one_wrong_quad_of_metadata_shows_there() -> None:
    """If this failed, a survivor could sit in the wrong column of its quad."""
    _, p = packed(64, 64, 32, True)
    assert isinstance(p, PackedSparseLinear)
    meta = p.meta.clone()
    word = int(meta[0, 4]) & 0xFFFF
    nibble = 0xE if word >> 8 & 15 != 0xE else 0x4
    word = word & ~0xF00 | nibble << 8
    meta[0, 4] = word - (word >> 15 << 16)
    places = touched(p, damaged(p, meta=meta))
    assert places and all(n == 1 and 8 <= k < 12 for n, k in places)
    meta[0, 4] = 0x4544
    with pytest.raises(ValueError, match="columns do not rise"):
        weights(damaged(p, meta=meta))


# ---- edges ---------------------------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused() -> None:
    """If this failed, a wrong call would give a plausible product of something else."""
    p = pack_marlin(random_linear(64, 64, 32))
    with pytest.raises(ValueError, match=r"activations must be float16 or bfloat16, got torch\.float32"):
        gemm(torch.zeros(2, 64), p)
    for shape in ([2, 48], [0, 64], [64]):
        with pytest.raises(ValueError, match=re.escape(f"activations must be [M, 64] with M > 0, got {shape}")):
            gemm(torch.zeros(shape, dtype=torch.float16), p)
    for blocks in ([1], [-1], []):
        with pytest.raises(ValueError, match=r"blocks of 64 outputs are 0\.\.0, got \["):
            gemm_blocks(torch.zeros(2, 64, dtype=torch.float16), p, blocks)
    with pytest.raises(ValueError, match="group_size 24 is not a multiple of 16"):
        gemm(torch.zeros(2, 48, dtype=torch.float16), pack_marlin(random_linear(16, 48, 24)))
    with pytest.raises(ValueError, match="group_size 16 is not a multiple of 32"):
        gemm(torch.zeros(2, 48, dtype=torch.float16), pack_sparse_marlin(random_sparse(16, 48, 16)))


@pytest.mark.parametrize("module", [emulate, warp])
def test_nothing_is_shared_with_packers_or_maps(module: object) -> None:
    """If this failed, a mistake in a map or a packer could be made by the emulator too, and agree with itself."""
    own = [found.target for found in imports_of(Path(str(module.__file__))) if found.target.startswith("marlinctl")]  # type: ignore[attr-defined]
    assert {target.rpartition(".")[0] for target in own} <= {"marlinctl.kernels.warp", "marlinctl.pack.types"}
    assert {target for target in own if ".pack." in target} <= {
        f"marlinctl.pack.types.{name}" for name in ("PackedLinear", "PackedSparseLinear")
    }
