"""Sparse-MARLIN packing: an exact inverse, survivors included; equal to the maps, and to what a warp of the hardware reads."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from marlinctl.kernels.emulate import gemm
from marlinctl.pack import sparse_marlin, tile
from marlinctl.pack.sparse_marlin import pack_sparse_marlin, remask, unpack_sparse_marlin
from marlinctl.pack.types import SLAB, PackedSparseLinear, padded, transposed
from marlinctl.quantize.types import QuantizedLinear
from marlinctl.sparsify.mask import two_of_four
from marlinctl.sparsify.types import SparseQuantizedLinear
from tests.pack.naive import random_keep, random_linear, random_sparse, same_bits, sparse


@st.composite
def linears(draw: st.DrawFn) -> SparseQuantizedLinear:
    """Any N; any K that 2:4 and some usual group size divide."""
    n = draw(st.integers(1, 330))
    group_size = draw(st.sampled_from([32, 64, 128, -1, 8, 24, 6]))
    k = 4 * draw(st.integers(1, 75)) if group_size == -1 else 2 * group_size * draw(st.integers(1, 4))
    return random_sparse(n, k, group_size, seed=draw(st.integers(0, 9)))


@settings(max_examples=60, deadline=None)
@given(linears())
def test_unpack_is_the_inverse(q: SparseQuantizedLinear) -> None:
    """If this failed, a written checkpoint would hold other codes, scales or survivors than the solver chose."""
    p = pack_sparse_marlin(q)
    back = unpack_sparse_marlin(p)
    assert same_bits(back.codes, q.codes)
    assert same_bits(back.scales, q.scales)
    assert same_bits(back.keep, q.keep)
    assert back.group_size == q.group_size
    parts = (p.qweight, p.meta, p.scales, back.codes, back.scales, back.keep)
    assert all(t.is_contiguous() for t in parts)  # safetensors writes nothing else


# ---- the maps, one weight at a time --------------------------------------------------------------------------------------------------


def by_the_maps(q: SparseQuantizedLinear) -> tuple[Tensor, Tensor]:
    """(qweight, meta) built survivor by survivor."""
    n_true, k_true = q.codes.shape
    rows, columns = padded(k_true) // 32, 2 * padded(n_true)
    words, meta = np.zeros((rows, columns), dtype=np.uint32), np.zeros((rows, columns), dtype=np.uint16)
    codes, keep = q.codes.tolist(), q.keep.tolist()
    for n in range(padded(n_true)):
        for quad in range(padded(k_true) // 4):
            inside = n < n_true and 4 * quad < k_true
            first, second = [i for i in range(4) if keep[n][4 * quad + i]] if inside else (0, 1)
            place = tile.meta_place(quad, n)
            meta[place.row, place.column] |= tile.meta_nibble(first, second) << 4 * place.nibble
            for c, i in ((2 * quad, first), (2 * quad + 1, second)):
                place = tile.sparse_place(c, n)
                words[place.row, place.column] |= (codes[n][4 * quad + i] + 8 if inside else 8) << 4 * place.nibble
    return torch.from_numpy(words.view(np.int32)), torch.from_numpy(meta.view(np.int16))


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 140), st.integers(1, 40), st.integers(0, 99))
def test_words_and_metadata_equal_the_maps(n: int, quads: int, seed: int) -> None:
    """If this failed, the fast packer and the documented layout would be two different formats."""
    q = random_sparse(n, 4 * quads, -1, seed)
    p = pack_sparse_marlin(q)
    words, meta = by_the_maps(q)
    assert torch.equal(p.qweight, words) and torch.equal(p.meta, meta)


def test_words_equal_the_maps_across_slabs() -> None:
    """If this failed, rows beyond the first slab of the packer would land in the wrong columns."""
    q = random_sparse(2 * SLAB + 80, 32, 32)
    words, meta = by_the_maps(q)
    p = pack_sparse_marlin(q)
    assert torch.equal(p.qweight, words) and torch.equal(p.meta, meta)


# ---- the hardware, in software -------------------------------------------------------------------------------------------------------


def warp_reads(p: PackedSparseLinear) -> Tensor:
    """The dense codes [N', K'] that mma.sp multiplies with: what the emulator makes of the identity when every scale is 1.

    Nothing of tile.py takes part, see tests/kernels/test_emulate.py.
    """
    n, k = padded(p.out_features), padded(p.in_features)
    whole = PackedSparseLinear(p.qweight, p.meta, torch.ones(1, n, dtype=torch.float16), n, k, k)
    return gemm(torch.eye(k, dtype=torch.float16), whole).T.to(torch.int8)


@pytest.mark.parametrize(("n", "k"), [(64, 128), (256, 256), (128, 512), (80, 160)])
def test_a_warp_reads_the_weights_that_were_packed(n: int, k: int) -> None:
    """If this failed, the tensor core would multiply other weights, or the right ones with the wrong activations."""
    q = random_sparse(n, k, -1, seed=n + k)
    dense = warp_reads(pack_sparse_marlin(q))
    assert torch.equal(dense[:n, :k], q.codes)
    assert not bool(dense[n:].any()) and not bool(dense[:, k:].any())


def test_the_warp_notices_one_wrong_bit() -> None:
    """If this failed, the software warp would agree with anything."""
    q = random_sparse(64, 64, -1)
    p = pack_sparse_marlin(q)
    words, meta = p.qweight.clone(), p.meta.clone()
    words[1, 77] ^= 1 << 21
    assert int((warp_reads(PackedSparseLinear(words, meta, p.scales, 64, 64, 64)) != q.codes).sum()) == 1
    words, meta = p.qweight, p.meta.clone()
    meta[1, [4, 5]] = meta[1, [5, 4]]  # rows 1 and 5 exchanged
    wrong = (warp_reads(PackedSparseLinear(words, meta, p.scales, 64, 64, 64)) != q.codes).any(1).nonzero()[:, 0]
    assert wrong.tolist() == [1, 5]


# ---- worked out by hand --------------------------------------------------------------------------------------------------------------


def test_worked_example() -> None:
    """If this failed, the words printed in docs/formats/marlin_24.md, worked out by hand, would not be ours."""
    codes, keep = torch.zeros(64, 32, dtype=torch.int8), (torch.arange(32) % 4 < 2).repeat(64, 1)
    keep[0, :16] = torch.tensor([0, 1, 0, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 1, 0], dtype=torch.bool)
    codes[0, :16] = torch.tensor([0, 5, 0, -2, 1, 2, 0, 0, 0, 0, -8, 7, 3, 0, -3, 0], dtype=torch.int8)
    p = pack_sparse_marlin(SparseQuantizedLinear(codes, torch.ones(64, 1, dtype=torch.float16), 32, keep))
    words = [int(word) & 0xFFFFFFFF for word in p.qweight[0]]
    assert (words[0], words[4], words[8], words[12]) == (0x8886888D, 0x888A8889, 0x888F8880, 0x8885888B)
    assert [i for i, word in enumerate(words) if word != 0x88888888] == [0, 4, 8, 12]
    meta = [int(word) & 0xFFFF for word in p.meta[0]]
    assert meta[0] == 0x8E4D and meta[1:] == [0x4444] * 127
    assert bool((p.qweight[1] == words[1] - (1 << 32)).all()) and bool((p.meta[1] == 0x4444).all())  # K' = 64: padding


@pytest.mark.parametrize(("n", "k", "word"), [(0, 16, 2), (1, 0, 4), (2, 0, 64), (4, 0, 1), (8, 0, 8), (63, 16, 127)])
def test_metadata_words_of_other_places(n: int, k: int, word: int) -> None:
    """If this failed, metadata would be right for row 0 alone."""
    keep = (torch.arange(32) % 4 < 2).repeat(64, 1)
    keep[n, k : k + 16] = torch.tensor([0, 0, 1, 1] * 4, dtype=torch.bool)
    codes = torch.zeros(64, 32, dtype=torch.int8)
    p = pack_sparse_marlin(SparseQuantizedLinear(codes, torch.ones(64, 1, dtype=torch.float16), 32, keep))
    different = (p.meta != 0x4444).nonzero().tolist()
    assert different == [[0, word]] and int(p.meta[0, word]) & 0xFFFF == 0xEEEE


# ---- what other packers lose ---------------------------------------------------------------------------------------------------------


def test_survivors_with_code_zero_stay_survivors() -> None:
    """If this failed, a mask found from nonzeros would replace the solver's: the next fine-tuning would train other weights."""
    keep = torch.tensor([[0, 1, 0, 1]], dtype=torch.bool).repeat(64, 16)
    codes = torch.zeros(64, 64, dtype=torch.int8)
    codes[:, 1::4] = 3  # the survivors of column 3 are 0
    q = SparseQuantizedLinear(codes, torch.ones(64, 1, dtype=torch.float16), 64, keep)
    found = two_of_four(codes)
    assert found is not None and not torch.equal(found, keep), "the codes alone would tell the mask, so this tests nothing"
    assert same_bits(unpack_sparse_marlin(pack_sparse_marlin(q)).keep, keep)


def test_survivors_with_code_minus_eight_are_not_lost() -> None:
    """If this failed, -8 would vanish: it is nibble 0, which the first packer of Sparse-MARLIN takes for pruned."""
    q = sparse(QuantizedLinear(torch.full((64, 64), -8, dtype=torch.int8), torch.ones(64, 1, dtype=torch.float16), 64), random_keep(64, 64))
    p = pack_sparse_marlin(q)
    assert not bool(p.qweight.any())
    assert same_bits(unpack_sparse_marlin(p).codes, q.codes) and torch.equal(warp_reads(p), q.codes)


def test_two_groups_have_the_grouped_scale_order() -> None:
    """If this failed, K = 2 group_size would be taken for one group, as by a packer that compares group_size with K / 2."""
    q = random_sparse(64, 256, 128)
    p = pack_sparse_marlin(q)
    assert p.scales.shape == (2, 64)
    assert same_bits(p.scales[:, :8].contiguous(), transposed(q.scales)[:, [0, 4, 1, 5, 2, 6, 3, 7]].contiguous())
    whole = pack_sparse_marlin(random_sparse(64, 256, -1, seed=1))
    assert same_bits(whole.scales, transposed(random_linear(64, 256, -1, seed=1).scales))


# ---- edges ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k", "group_size"), [(16, 48, 16), (80, 160, 32), (200, 80, -1), (48, 200, 8), (64, 64, 32)])
def test_padding_multiplies_by_zero(n: int, k: int, group_size: int) -> None:
    """If this failed, a kernel that walks whole tiles would add garbage from beyond the edge, or meet undefined metadata."""
    q = random_sparse(n, k, group_size)
    p = pack_sparse_marlin(q)
    assert p.qweight.shape == p.meta.shape == (padded(k) // 32, 2 * padded(n))
    n_all = torch.arange(padded(n)).unsqueeze(1)
    place = tile.sparse_place(torch.arange(padded(k) // 2), n_all)
    nibbles = p.qweight[place.row, place.column] >> 4 * place.nibble & 15  # [N', K'/2]
    assert bool((nibbles[n:] == 8).all()) and bool((nibbles[:, k // 2 :] == 8).all())
    place = tile.meta_place(torch.arange(padded(k) // 4), n_all)
    nibbles = p.meta[place.row, place.column] >> 4 * place.nibble & 15  # [N', K'/4]
    assert bool((nibbles[n:] == 4).all()) and bool((nibbles[:, k // 4 :] == 4).all())
    slots = torch.arange(padded(n)) if group_size == -1 else tile.sparse_grouped_slot(torch.arange(padded(n)))
    plain = p.scales[:, slots]
    assert not bool(plain[:, n:].any()) and not bool(plain[q.scales.shape[1] :].any())
    assert same_bits(plain[: q.scales.shape[1], :n], transposed(q.scales))


@pytest.mark.parametrize("nibble", [i0 | i1 << 2 for i0 in range(4) for i1 in range(i0 + 1)])
def test_metadata_that_no_packer_writes_is_refused(nibble: int) -> None:
    """If this failed, damaged metadata would unpack into a mask that keeps one of four, or the device would do as it likes."""
    p = pack_sparse_marlin(random_sparse(SLAB + 64, 64, -1))
    meta = p.meta.clone()
    place = tile.meta_place(9, SLAB + 5)
    word = (int(meta[place.row, place.column]) & 0xFFFF) & ~(15 << 4 * place.nibble) | nibble << 4 * place.nibble
    meta[place.row, place.column] = word - (1 << 16) * (word >> 15)
    with pytest.raises(ValueError, match=rf"row {SLAB + 5}, columns 36..39 is {nibble:#x}"):
        unpack_sparse_marlin(PackedSparseLinear(p.qweight, meta, p.scales, SLAB + 64, 64, 64))


def test_every_word_of_metadata_is_judged_by_its_nibbles() -> None:
    """If four quads at once were compared wrongly in one word of 65,536, a kernel would be launched with it, or good tiles refused."""
    words = torch.arange(-(1 << 15), 1 << 15)
    nibbles = (words & 0xFFFF).unsqueeze(1) >> torch.arange(0, 16, 4) & 15
    ordered = torch.isin(nibbles, torch.tensor([0x4, 0x8, 0x9, 0xC, 0xD, 0xE])).all(1)  # PTX ISA, ordered_metadata
    assert torch.equal(sparse_marlin._unordered(words.to(torch.int16)), ~ordered)
    sparse_marlin.check_metadata(words[ordered].to(torch.int16).view(36, 36))  # 6 ** 4 words


def test_a_wrong_place_is_found_in_every_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large metadata are looked at in parts: a part left out, or counted from 0 again, would launch a kernel or name another row."""
    monkeypatch.setattr(sparse_marlin, "PLACES_AT_ONCE", 100)
    good = torch.full((4, 256), 0x4444, dtype=torch.int16)
    for row, column in itertools.product(range(4), (0, 99, 100, 101, 255)):
        meta = good.clone()
        meta[row, column] = 0x4054
        for i in (1, 2):  # nibbles 5 and 0: the first survivor behind, or beside, the second
            quad, n = tile.meta_quad(row, column, i)
            with pytest.raises(ValueError, match=f"row {n}, columns {4 * quad}\\.\\.{4 * quad + 3} is {(0x4054 >> 4 * i) & 15:#x},"):
                sparse_marlin.check_metadata(meta)
            meta[row, column] = 0x4044


@pytest.mark.parametrize("group_size", [32, 64, -1])
def test_fused_projections_concatenate(group_size: int) -> None:
    """If this failed, q, k and v packed one by one could not be joined along columns into the fused linear that runtimes use."""
    parts = [random_sparse(n, 128, group_size, seed=n) for n in (192, 64, 64)]
    codes, scales, keep = (torch.cat([getattr(q, name) for q in parts]) for name in ("codes", "scales", "keep"))
    whole = pack_sparse_marlin(SparseQuantizedLinear(codes, scales, parts[0].group_size, keep))
    packed = [pack_sparse_marlin(q) for q in parts]
    for name in ("qweight", "meta", "scales"):
        assert same_bits(torch.cat([getattr(p, name) for p in packed], dim=1), getattr(whole, name))


@pytest.mark.parametrize(
    "view",
    [
        lambda matrix: matrix.T.contiguous().T,
        lambda matrix: torch.cat((matrix[:1], matrix)).reshape(-1)[20:].view(70, 20),
        lambda matrix: torch.cat((matrix.reshape(-1)[:3], matrix.reshape(-1)))[3:].view(70, 20),
        lambda matrix: torch.cat((matrix, matrix), 1)[:, :20],
    ],
    ids=["transposed", "offset", "unaligned offset", "columns of a wider matrix"],
)
def test_memory_layout_does_not_matter(view: Callable[[Tensor], Tensor]) -> None:
    """If this failed, a slice out of stacked q/k/v rows would raise or pack its neighbours."""
    q = random_sparse(70, 20, -1)
    seen = pack_sparse_marlin(SparseQuantizedLinear(view(q.codes), q.scales, 20, view(q.keep)))
    plain = pack_sparse_marlin(q)
    assert torch.equal(seen.qweight, plain.qweight) and torch.equal(seen.meta, plain.meta)
    strided = PackedSparseLinear(plain.qweight.T.contiguous().T, plain.meta.T.contiguous().T, plain.scales, 70, 20, 20)
    assert same_bits(unpack_sparse_marlin(strided).codes, q.codes) and same_bits(unpack_sparse_marlin(strided).keep, q.keep)
    odd = random_linear(64, 64, -1)
    target = pack_sparse_marlin(random_sparse(64, 64, -1))
    remask(target, QuantizedLinear(odd.codes.T.contiguous().T, odd.scales, 64))
    same_as_packed(target, odd, best_two(odd, None))


def test_input_is_left_alone() -> None:
    """If this failed, packing would change the codes that verification compares with, and never find a difference."""
    q = random_sparse(64, 128, 64)
    before = [t.clone() for t in (q.codes, q.scales, q.keep)]
    p = pack_sparse_marlin(q)
    packed = [t.clone() for t in (p.qweight, p.meta, p.scales)]
    unpack_sparse_marlin(p)
    assert all(torch.equal(a, b) for a, b in zip(before, (q.codes, q.scales, q.keep), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(packed, (p.qweight, p.meta, p.scales), strict=True))


# ---- survivors chosen while a model runs ---------------------------------------------------------------------------------------------


def best_two(q: QuantizedLinear, importance: Tensor | None) -> Tensor:
    """keep [N, K]: the two of each quad with the largest |code * scale| * sqrt(importance), in float64 and by a stable sort."""
    score = q.dequantize(torch.float64).abs()
    if importance is not None:
        score = score * importance.double().sqrt()
    order = score.reshape(len(score), -1, 4).argsort(dim=-1, descending=True, stable=True)
    return torch.zeros(order.shape, dtype=torch.bool).scatter_(-1, order[..., :2], True).reshape(score.shape)


def same_as_packed(p: PackedSparseLinear, q: QuantizedLinear, keep: Tensor) -> None:
    want = pack_sparse_marlin(sparse(q, keep))
    assert torch.equal(p.qweight.cpu(), want.qweight) and torch.equal(p.meta.cpu(), want.meta)


def nonzero_scales(q: QuantizedLinear) -> QuantizedLinear:
    return QuantizedLinear(q.codes, torch.where(q.scales.abs() < 1e-4, 1e-3, q.scales).to(torch.float16), q.group_size)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 330), st.integers(1, 60), st.integers(0, 99), st.booleans())
def test_remask_equals_packing_with_the_chosen_mask(n: int, quads: int, seed: int, weighted: bool) -> None:
    """If this failed, a model would run with survivors that nobody chose, or with codes at other places than metadata says."""
    q = nonzero_scales(random_linear(n, 4 * quads, -1, seed))
    importance = torch.rand(4 * quads, generator=torch.Generator().manual_seed(seed)) + 0.01 if weighted else None
    p = pack_sparse_marlin(random_sparse(n, 4 * quads, -1, seed + 1))
    scales, places = p.scales.clone(), (p.qweight.data_ptr(), p.meta.data_ptr())
    remask(p, q, importance)
    same_as_packed(p, q, best_two(q, importance))
    assert same_bits(p.scales, scales) and places == (p.qweight.data_ptr(), p.meta.data_ptr())


def test_remask_over_groups_and_slabs() -> None:
    """If this failed, rows beyond the first slab, or beyond the first group, would keep their old survivors."""
    q = nonzero_scales(random_linear(2 * SLAB + 80, 128, 32))
    importance = torch.rand(128, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).square().float().bfloat16()
    p = pack_sparse_marlin(sparse(q, random_keep(2 * SLAB + 80, 128)))
    remask(p, q, importance)
    same_as_packed(p, q, best_two(q, importance))
    remask(p, q)
    same_as_packed(p, q, best_two(q, None))


EVERY_QUAD = torch.cartesian_prod(*[torch.tensor([-8, -7, -1, 0, 1, 3, 7])] * 4).to(torch.int8)  # 2401 quads, most with ties


def test_ties_go_to_the_lowest_columns() -> None:
    """If this failed, two runs, or a CPU and a GPU, could choose differently for the same input."""
    codes = EVERY_QUAD[:2400].reshape(600, 16).contiguous()
    q = QuantizedLinear(codes, torch.ones(600, 1, dtype=torch.float16), 16)
    p = pack_sparse_marlin(sparse(q, random_keep(600, 16)))
    for importance in (None, torch.ones(16), torch.tensor([4.0, 1, 4, 1]).repeat(4)):
        remask(p, q, importance)
        same_as_packed(p, q, best_two(q, importance))


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), 3e38, 1e-45])
def test_any_importance_leaves_two_of_four(value: float) -> None:
    """If this failed, one bad activation would write metadata that the device has no meaning for."""
    q = random_linear(64, 64, -1)
    p = pack_sparse_marlin(sparse(q, random_keep(64, 64)))
    importance = torch.rand(64, generator=torch.Generator().manual_seed(0))
    importance[::3] = value
    remask(p, q, importance)
    kept = unpack_sparse_marlin(p).keep  # refuses what is not two of four
    if value == 0.0:
        same_as_packed(p, q, best_two(q, importance))
        assert not bool((kept[:, :4].sum(0) == 64)[[0, 3]].any())  # columns 0 and 3 count nothing


class NoWaiting(TorchDispatchMode):
    """Fails where a tensor's value would have to be known on the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "masked_select", "equal"), func
        return func(*args, **(kwargs or {}))


def test_remask_looks_at_no_value() -> None:
    """If this failed, every call would wait for the GPU, and no CUDA graph could hold it."""
    q = random_linear(80, 96, 32)
    p = pack_sparse_marlin(sparse(q, random_keep(80, 96)))
    with NoWaiting():
        remask(p, q, torch.rand(96))
        with pytest.raises(AssertionError):
            unpack_sparse_marlin(p)


def test_remask_refuses_what_does_not_fit() -> None:
    """If this failed, codes of another linear would be written into this one's tiles."""
    p = pack_sparse_marlin(random_sparse(64, 96, 32))
    with pytest.raises(ValueError, match=r"packed is \[64, 96\] with group_size 32, the codes are \[64, 96\] with group_size 96"):
        remask(p, random_linear(64, 96, -1))
    with pytest.raises(ValueError, match=r"importance must be float \[96\], got torch.float32 \[64\]"):
        remask(p, random_linear(64, 96, 32), torch.ones(64))
    with pytest.raises(ValueError, match=r"got torch\.int64"):
        remask(p, random_linear(64, 96, 32), torch.ones(96, dtype=torch.int64))
    with pytest.raises(ValueError, match="group_size 6 is not a multiple of 4"):
        remask(pack_sparse_marlin(random_sparse(8, 12, 6)), random_linear(8, 12, 6))
    strided = PackedSparseLinear(p.qweight.T.contiguous().T, p.meta, p.scales, 64, 96, 32)
    with pytest.raises(ValueError, match="must be contiguous"):
        remask(strided, random_linear(64, 96, 32))


# ---- GPU -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k", "group_size"), [(200, 448, 64), (576, 1536, 128), (80, 200, -1)])
def test_cuda_packs_the_same_bits(n: int, k: int, group_size: int) -> None:
    """If this failed, a model packed on a GPU would differ from one packed on the CPU."""
    q = random_sparse(n, k, group_size)
    here = pack_sparse_marlin(q)
    there = pack_sparse_marlin(SparseQuantizedLinear(q.codes.cuda(), q.scales.cuda(), q.group_size, q.keep.cuda()))
    assert there.qweight.is_cuda and there.meta.is_cuda
    for name in ("qweight", "meta", "scales"):
        assert torch.equal(getattr(there, name).cpu(), getattr(here, name))
    back = unpack_sparse_marlin(there)
    assert torch.equal(back.codes.cpu(), q.codes) and torch.equal(back.scales.cpu(), q.scales) and torch.equal(back.keep.cpu(), q.keep)


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k", "group_size"), [(200, 448, 64), (4096, 4096, 128)])
def test_cuda_remasks_without_waiting(n: int, k: int, group_size: int) -> None:
    """If this failed, the GPU would choose other survivors than the CPU, or every call would stall the model."""
    q = random_linear(n, k, group_size)
    importance = torch.rand(k, generator=torch.Generator().manual_seed(0))
    here = pack_sparse_marlin(sparse(q, random_keep(n, k)))
    there = PackedSparseLinear(here.qweight.cuda(), here.meta.cuda(), here.scales.cuda(), n, k, group_size)
    codes, weights = QuantizedLinear(q.codes.cuda(), q.scales.cuda(), group_size), importance.cuda()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        remask(there, codes, weights)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    remask(here, q, importance)
    assert torch.equal(there.qweight.cpu(), here.qweight) and torch.equal(there.meta.cpu(), here.meta)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        remask(there, codes, weights)
    weights.copy_(weights.flip(0))
    graph.replay()
    remask(here, q, importance.flip(0))
    assert torch.equal(there.qweight.cpu(), here.qweight) and torch.equal(there.meta.cpu(), here.meta)
