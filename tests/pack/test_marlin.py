"""MARLIN packing: an exact inverse, equal to the map bit for bit, padding that multiplies by zero."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from marlinctl.pack import tile
from marlinctl.pack.marlin import pack_marlin, unpack_marlin
from marlinctl.pack.tile import Place
from marlinctl.pack.types import SLAB, PackedLinear, padded, transposed
from marlinctl.quantize.types import QuantizedLinear
from tests.pack.naive import or_together, random_linear, same_bits

SIZES = [16, 48, 80, 200]


@st.composite
def linears(draw: st.DrawFn) -> QuantizedLinear:
    """Any N; any K that some usual group size divides, with the odd sizes of the issue well represented."""
    n = draw(st.sampled_from(SIZES) | st.integers(1, 330))
    group_size = draw(st.sampled_from([32, 64, 128, -1, 8, 24]))
    k = draw(st.sampled_from(SIZES) | st.integers(1, 300)) if group_size == -1 else group_size * draw(st.integers(1, 7))
    return random_linear(n, k, group_size, seed=draw(st.integers(0, 9)))


@settings(max_examples=60, deadline=None)
@given(linears())
def test_unpack_is_the_inverse(q: QuantizedLinear) -> None:
    """If this failed, a written checkpoint would hold other codes or scales than the solver chose."""
    p = pack_marlin(q)
    back = unpack_marlin(p)
    assert same_bits(back.codes, q.codes)
    assert same_bits(back.scales, q.scales)
    assert back.group_size == q.group_size
    assert all(t.is_contiguous() for t in (p.qweight, p.scales, back.codes, back.scales))  # safetensors writes nothing else


def words_of(q: QuantizedLinear, place: Callable) -> torch.Tensor:
    n, k = padded(q.out_features), padded(q.in_features)
    return or_together(q.codes, place, k // 16, 2 * n, padded_n=n, padded_k=k, fill=8)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("k", SIZES)
def test_words_equal_the_map(n: int, k: int) -> None:
    """If this failed, the fast packer and the documented layout would be two different formats."""
    q = random_linear(n, k, -1, seed=n + k)
    assert torch.equal(pack_marlin(q).qweight, words_of(q, tile.marlin_place))


def test_words_equal_the_map_across_slabs() -> None:
    """If this failed, rows beyond the first slab of the packer would land in the wrong columns."""
    q = random_linear(2 * SLAB + 80, 32, 32)
    assert torch.equal(pack_marlin(q).qweight, words_of(q, tile.marlin_place))


WRONG_MAPS = {
    "halves of k swapped in the word": lambda k, n: tile.marlin_place(k ^ 8, n),
    "pairs of columns swapped in the word": lambda k, n: tile.marlin_place(k, n ^ 8),
    "neighbours in k swapped": lambda k, n: tile.marlin_place(k ^ 1, n),
    "words of a lane in the order of the 2:4 tile": lambda k, n: tile.marlin_place(k, n // 64 * 64 + n % 4 * 16 + n % 64 // 4),
    "lanes numbered by k first": lambda k, n: (p := tile.marlin_place(k, n))._replace(
        column=p.column - 4 * tile.marlin_lane(k, n) + 4 * (8 * (k % 8 // 2) + n % 8)
    ),
    "nibbles without interleave": lambda k, n: tile.marlin_place(k, n)._replace(nibble=n % 16 // 8 * 4 + k % 16 // 8 * 2 + k % 2),
}


@pytest.mark.parametrize("wrong", WRONG_MAPS.values(), ids=WRONG_MAPS.keys())
def test_wrong_permutations_are_noticed(wrong: Callable[[int, int], Place[int]]) -> None:
    """If this failed, comparing with the map could not tell a plausible wrong layout from the right one."""
    tile_of = [(k, n) for k in range(16) for n in range(64)]
    assert {tuple(wrong(k, n)) for k, n in tile_of} == {tuple(tile.marlin_place(k, n)) for k, n in tile_of}, "not a permutation of a tile"
    q = random_linear(64, 64, -1)
    assert not torch.equal(pack_marlin(q).qweight, words_of(q, wrong))


def test_worked_example() -> None:
    """If this failed, the words printed in docs/formats/marlin.md, worked out by hand, would not be ours."""
    k, n = torch.arange(64), torch.arange(64).unsqueeze(1)
    codes = ((k + n) % 16 - 8).to(torch.int8)  # nibble (k + n) mod 16
    words = pack_marlin(QuantizedLinear(codes, torch.ones(64, 1, dtype=torch.float16), 64)).qweight
    assert words.shape == (4, 128)
    assert words[0, :4].tolist() == [0x19910880] * 4
    assert words[0, 4:8].tolist() == [0x3BB32AA2] * 4


@pytest.mark.parametrize(("n", "k", "group_size"), [(16, 48, 16), (80, 160, 32), (200, 80, -1), (48, 200, 8), (64, 64, 32)])
def test_padding_multiplies_by_zero(n: int, k: int, group_size: int) -> None:
    """If this failed, a kernel that walks whole tiles would add garbage from beyond the edge."""
    q = random_linear(n, k, group_size)
    p = pack_marlin(q)
    assert p.qweight.shape == (padded(k) // 16, 2 * padded(n))
    place = tile.marlin_place(torch.arange(padded(k)), torch.arange(padded(n)).unsqueeze(1))
    nibbles = p.qweight[place.row, place.column] >> 4 * place.nibble & 15  # [N', K']
    assert bool((nibbles[n:] == 8).all()) and bool((nibbles[:, k:] == 8).all())
    assert p.scales.shape == (1 if group_size == -1 else -(-padded(k) // group_size), padded(n))
    slot = tile.channel_slot if group_size == -1 else tile.grouped_slot
    plain = p.scales[:, slot(torch.arange(padded(n)))]  # [G', N']
    assert not bool(plain[:, n:].any())
    assert not bool(plain[q.scales.shape[1] :].any())
    assert same_bits(plain[: q.scales.shape[1], :n], transposed(q.scales))


def test_every_code_and_both_signs_survive() -> None:
    """If this failed, -8 (nibble 0), 7 (nibble 15), a negative scale or a negative zero would come back as something else."""
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(64, 4)
    scales = torch.tensor([-1.5, -0.0, 0.0, 65504.0, -65504.0, 6e-8, -6e-8, 2.0]).to(torch.float16).repeat(8, 2).reshape(64, 2)
    back = unpack_marlin(pack_marlin(QuantizedLinear(codes, scales, 32)))
    assert same_bits(back.codes, codes)
    assert same_bits(back.scales, scales)


@pytest.mark.parametrize("group_size", [32, 64, -1])
def test_fused_projections_concatenate(group_size: int) -> None:
    """If this failed, q, k and v packed one by one could not be joined along columns into the fused linear that runtimes use."""
    parts = [random_linear(n, 128, group_size, seed=n) for n in (192, 64, 64)]
    fused = QuantizedLinear(torch.cat([q.codes for q in parts]), torch.cat([q.scales for q in parts]), parts[0].group_size)
    packed = [pack_marlin(q) for q in parts]
    whole = pack_marlin(fused)
    assert torch.equal(torch.cat([p.qweight for p in packed], dim=1), whole.qweight)
    assert same_bits(torch.cat([p.scales for p in packed], dim=1), whole.scales)


@pytest.mark.parametrize(
    "view",
    [
        lambda codes: codes.T.contiguous().T,
        lambda codes: torch.cat((codes[:1], codes))[1:],
        lambda codes: torch.cat((codes, codes), 1)[:, :20],
    ],
    ids=["transposed", "unaligned offset", "columns of a wider matrix"],
)
def test_memory_layout_does_not_matter(view: Callable) -> None:
    """If this failed, a slice out of stacked q/k/v rows would raise or pack its neighbours."""
    q = random_linear(70, 20, -1)
    seen = QuantizedLinear(view(q.codes), view(q.codes.to(torch.float16))[:, :1], 20)
    plain = QuantizedLinear(q.codes, q.codes[:, :1].to(torch.float16), 20)
    assert torch.equal(pack_marlin(seen).qweight, pack_marlin(plain).qweight)
    assert torch.equal(pack_marlin(seen).scales, pack_marlin(plain).scales)
    p = pack_marlin(plain)
    strided = PackedLinear(p.qweight.T.contiguous().T, p.scales, 70, 20, 20)
    assert torch.equal(unpack_marlin(strided).codes, q.codes)


def test_input_is_left_alone() -> None:
    """If this failed, packing would change the codes that verification compares with, and never find a difference."""
    q = random_linear(64, 128, 64)
    codes, scales = q.codes.clone(), q.scales.clone()
    p = pack_marlin(q)
    words, steps = p.qweight.clone(), p.scales.clone()
    unpack_marlin(p)
    assert torch.equal(q.codes, codes) and torch.equal(q.scales, scales)
    assert torch.equal(p.qweight, words) and torch.equal(p.scales, steps)


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k", "group_size"), [(200, 448, 64), (576, 1536, 128), (80, 200, -1)])
def test_cuda_packs_the_same_bits(n: int, k: int, group_size: int) -> None:
    """If this failed, a model packed on a GPU would differ from one packed on the CPU."""
    q = random_linear(n, k, group_size)
    here = pack_marlin(q)
    there = pack_marlin(QuantizedLinear(q.codes.cuda(), q.scales.cuda(), q.group_size))
    assert there.qweight.is_cuda
    assert torch.equal(there.qweight.cpu(), here.qweight) and torch.equal(there.scales.cpu(), here.scales)
    back = unpack_marlin(there)
    assert torch.equal(back.codes.cpu(), q.codes) and torch.equal(back.scales.cpu(), q.scales)
