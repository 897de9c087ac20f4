"""compressed-tensors and GPTQ words: exact inverses, equal to the maps, and refusals where a file means something else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from marlinctl.pack import tile
from marlinctl.pack.interchange import ZEROS_V1, ZEROS_V2, pack_ct, pack_gptq, unpack_ct, unpack_gptq
from marlinctl.pack.marlin import pack_marlin
from marlinctl.pack.sparse_marlin import pack_sparse_marlin
from marlinctl.quantize.scheme import INT8, UINT4
from marlinctl.quantize.types import QuantizedLinear
from marlinctl.sparsify.types import SparseQuantizedLinear
from tests.pack.naive import or_together, random_linear, same_bits

SIZES = [16, 48, 80, 200]


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 200), k=st.integers(1, 300), seed=st.integers(0, 9))
def test_ct_unpack_is_the_inverse(n: int, k: int, seed: int) -> None:
    """If this failed, the interchange form would not hold the codes that the solver chose."""
    codes = random_linear(n, k, -1, seed).codes
    packed = pack_ct(codes)
    assert packed.dtype == torch.int32 and packed.shape == (n, -(-k // 8)) and packed.is_contiguous()
    back = unpack_ct(packed, n, k)
    assert same_bits(back, codes) and back.is_contiguous()


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 25),
    group_size=st.sampled_from([32, 64, 128, -1, 8]),
    k=st.integers(1, 7),
    seed=st.integers(0, 9),
    v2=st.booleans(),
)
def test_gptq_unpack_is_the_inverse(n: int, group_size: int, k: int, seed: int, v2: bool) -> None:
    """If this failed, GPTQ clients would run other codes or scales than the solver chose."""
    q = random_linear(8 * n, 24 * k if group_size == -1 else group_size * k, group_size, seed)
    tensors: dict[str, Any] = pack_gptq(q)
    if v2:
        tensors["qzeros"] = torch.full_like(tensors["qzeros"], ZEROS_V2[4])
    back = unpack_gptq(**tensors, v2=v2)
    assert same_bits(back.codes, q.codes) and same_bits(back.scales, q.scales) and back.group_size == q.group_size


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("k", [*SIZES, 13])
def test_ct_words_equal_the_map(n: int, k: int) -> None:
    """If this failed, vLLM and transformers would decode other codes; columns beyond K must be zero bits."""
    codes = random_linear(n, k, -1, seed=n + k).codes
    columns = -(-k // 8)
    assert torch.equal(pack_ct(codes), or_together(codes, tile.ct_place, n, columns, padded_n=n, padded_k=8 * columns, fill=0))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("k", SIZES)
def test_gptq_words_equal_the_map(n: int, k: int) -> None:
    """If this failed, GPTQ clients would decode other codes than compressed-tensors clients."""
    q = random_linear(n, k, -1, seed=n + k)
    qweight = pack_gptq(q)["qweight"]
    assert torch.equal(qweight, or_together(q.codes, tile.gptq_place, k // 8, n, padded_n=n, padded_k=k, fill=0))
    assert torch.equal(qweight, pack_ct(q.codes).T)


WRONG_MAPS: dict[str, Callable] = {
    "high nibble first": lambda k, n: (n, k // 8, 7 - k % 8),
    "even columns first, as AWQ interleaves": lambda k, n: (n, k // 8, k % 2 * 4 + k % 8 // 2),
    "neighbours swapped": lambda k, n: (n, k // 8, (k ^ 1) % 8),
    "rows counted from below": lambda k, n: (47 - n, k // 8, k % 8),
    "words of a row in stride": lambda k, n: (n, k % 6, k // 6),
}


@pytest.mark.parametrize("wrong", WRONG_MAPS.values(), ids=WRONG_MAPS.keys())
def test_wrong_permutations_are_noticed(wrong: Callable) -> None:
    """If this failed, comparing with the map could not tell a plausible wrong layout from the right one."""
    codes = random_linear(48, 48, -1).codes
    assert not torch.equal(pack_ct(codes), or_together(codes, wrong, 48, 6, padded_n=48, padded_k=48, fill=0))


def test_worked_examples() -> None:
    """If this failed, the words printed in docs/formats, worked out by hand, would not be ours."""
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(8, 1)  # nibbles 0, 1, .. 15
    assert pack_ct(codes)[0].tolist() == [0x76543210, 0xFEDCBA98 - (1 << 32)] == [1985229328, -19088744]
    gptq = pack_gptq(QuantizedLinear(codes, torch.ones(8, 2, dtype=torch.float16), 8))
    assert gptq["qweight"].tolist() == [[1985229328] * 8, [-19088744] * 8]
    assert gptq["qzeros"].tolist() == [[2004318071], [2004318071]]
    assert gptq["g_idx"].tolist() == [0] * 8 + [1] * 8
    assert ZEROS_V2[4] == -2004318072


def test_gptq_tensors_have_the_names_shapes_and_dtypes_clients_ask_for() -> None:
    """If this failed, a client would miss a tensor, and some clients then compute with memory nobody wrote."""
    tensors = pack_gptq(random_linear(48, 80, 16))
    assert {name: (t.dtype, tuple(t.shape), t.is_contiguous()) for name, t in tensors.items()} == {
        "qweight": (torch.int32, (10, 48), True),
        "qzeros": (torch.int32, (5, 6), True),
        "scales": (torch.float16, (5, 48), True),
        "g_idx": (torch.int32, (80,), True),
    }


@pytest.mark.parametrize(("n", "k"), [(20, 64), (64, 20)])
def test_gptq_needs_multiples_of_eight(n: int, k: int) -> None:
    """If this failed, a GPTQ file would hold half-filled words that no client expects."""
    with pytest.raises(ValueError, match=f"multiples of 8: N={n}, K={k}"):
        pack_gptq(random_linear(n, k, -1))


@pytest.mark.parametrize(("n", "k"), [(48, 80), (5, 13), (300, 1)])
def test_compressed_tensors_packs_the_same_words(n: int, k: int) -> None:
    """If this failed, our reading of the format would differ from the package that defines it."""
    from compressed_tensors.compressors import pack_to_int32, unpack_from_int32

    codes = random_linear(n, k, -1).codes
    assert torch.equal(pack_ct(codes), pack_to_int32(codes, 4))
    assert torch.equal(unpack_from_int32(pack_ct(codes), 4, torch.Size((n, k))), codes)


def gptq_file(**changed: Tensor | None) -> dict[str, Any]:
    return {**pack_gptq(random_linear(16, 64, 32)), **changed}


def test_the_version_decides_what_a_zero_means() -> None:
    """If this failed, v1 tensors read as v2 (or the reverse) would shift every weight by one step, silently."""
    v2 = torch.full((2, 2), ZEROS_V2[4], dtype=torch.int32)
    with pytest.raises(ValueError, match="store 7 everywhere, which is symmetric in gptq and not in gptq_v2"):
        unpack_gptq(**gptq_file(), v2=True)
    with pytest.raises(ValueError, match="store 8 everywhere, which is symmetric in gptq_v2 and not in gptq:"):
        unpack_gptq(**gptq_file(qzeros=v2), v2=False)


def test_asymmetric_zeros_are_refused_with_their_place() -> None:
    """If this failed, an asymmetric checkpoint would be converted as if its zero points were 8."""
    qzeros = torch.full((2, 2), ZEROS_V1[4], dtype=torch.int32)
    qzeros[1, 1] = 0x77A77777  # nibble 5 of the second word: output 13
    with pytest.raises(ValueError, match=r"must store 7 everywhere \(gptq\), but group 1, output 13 stores 10; 1 words differ"):
        unpack_gptq(**gptq_file(qzeros=qzeros), v2=False)
    qzeros[:] = ZEROS_V2[4]
    qzeros[0, 0] = 0x08888888  # the sign nibble, output 7
    with pytest.raises(ValueError, match=r"must store 8 everywhere \(gptq_v2\), but group 0, output 7 stores 0; 1 words differ"):
        unpack_gptq(**gptq_file(qzeros=qzeros), v2=True)


def test_act_order_is_refused_with_its_place() -> None:
    """If this failed, columns would be multiplied with the scales of another group."""
    g_idx = torch.arange(64, dtype=torch.int32) // 32
    g_idx[[5, 40]] = g_idx[[40, 5]]
    with pytest.raises(ValueError, match=r"act-order: with group_size 32, g_idx\[5\] must be 0 and is 1 \(2 of 64 columns"):
        unpack_gptq(**gptq_file(g_idx=g_idx), v2=False)


def test_g_idx_may_be_long_or_absent() -> None:
    """If this failed, foreign files with int64 g_idx, or without one, would be refused although their order is plain."""
    expected = random_linear(16, 64, 32).codes
    assert torch.equal(unpack_gptq(**gptq_file(g_idx=torch.arange(64) // 32), v2=False).codes, expected)
    assert torch.equal(unpack_gptq(**gptq_file(g_idx=None), v2=False).codes, expected)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"qweight": torch.zeros(8, 16)}, r"qweight must be a non-empty matrix of int32, got torch.float32 \[8, 16\]"),
        ({"qweight": torch.zeros(0, 16, dtype=torch.int32)}, r"qweight must be a non-empty matrix of int32, got torch.int32 \[0, 16\]"),
        ({"qweight": torch.zeros(8, 12, dtype=torch.int32)}, r"qweight \[8, 12\] has N=12 columns, which is not a multiple of 8"),
        ({"scales": torch.ones(2, 16)}, r"scales must be a non-empty matrix of float16 or bfloat16, got torch.float32 \[2, 16\]"),
        ({"scales": torch.ones(16, 2).half()}, r"scales of N=16, K=64 must be \[G, 16\] with G dividing 64, got \[16, 2\]"),
        ({"scales": torch.ones(3, 16).half()}, r"with G dividing 64, got \[3, 16\]"),
        ({"qzeros": torch.zeros(2, 2)}, r"qzeros must be a non-empty matrix of int32, got torch.float32"),
        ({"qzeros": torch.zeros(1, 2, dtype=torch.int32)}, r"qzeros of N=16 and 2 groups must be \[2, 2\], got \[1, 2\]"),
        ({"g_idx": torch.zeros(63, dtype=torch.int32)}, r"g_idx must be integers \[64\], got torch.int32 \[63\]"),
        ({"g_idx": torch.zeros(64)}, r"g_idx must be integers \[64\], got torch.float32 \[64\]"),
    ],
)
def test_wrong_dtypes_and_shapes_are_refused(changed: dict[str, Tensor], message: str) -> None:
    """If this failed, a damaged or foreign file would be read as something it is not, or end in a traceback without shapes."""
    with pytest.raises(ValueError, match=message):
        unpack_gptq(**gptq_file(**changed), v2=False)


def test_bfloat16_scales_survive_reading_and_stop_packing_when_inexact() -> None:
    """If this failed, foreign scales would be rounded on the way through."""
    scales = torch.full((2, 16), 1e-6, dtype=torch.bfloat16)
    q = unpack_gptq(**gptq_file(scales=scales), v2=False)
    assert q.scales.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"32 of 32 scales .* not exact in float16"):
        pack_gptq(q)


def test_ct_refuses_what_is_not_codes() -> None:
    """If this failed, a code outside -8..7 would change its neighbour in the word."""
    with pytest.raises(ValueError, match=r"codes \[1, 8\] lie in 0..8, outside -8..7"):
        pack_ct(torch.tensor([[0, 1, 2, 3, 4, 5, 6, 8]], dtype=torch.int8))
    with pytest.raises(ValueError, match=r"codes must be a non-empty matrix of int8, got torch.int32 \[1, 8\]"):
        pack_ct(torch.zeros(1, 8, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"weight_packed of N=4, K=17 must be \[4, 3\], got \[4, 2\]"):
        unpack_ct(torch.zeros(4, 2, dtype=torch.int32), 4, 17)


@pytest.mark.parametrize(("n", "k"), [(33, 20), (33, 24), (1, 24), (5, 1)])
def test_memory_layout_does_not_matter(n: int, k: int) -> None:
    """If this failed, a slice out of stacked rows or a transposed view would raise or pack its neighbours."""
    codes = random_linear(n, k, -1).codes
    packed = pack_ct(codes)
    assert torch.equal(pack_ct(codes.T.contiguous().T), packed)
    assert torch.equal(pack_ct(torch.cat((codes[:1], codes))[1:]), packed)
    assert torch.equal(pack_ct(torch.cat((codes, codes), 1)[:, :k]), packed)
    assert torch.equal(unpack_ct(packed.T.contiguous().T, n, k), codes)
    assert torch.equal(unpack_ct(torch.cat((packed[:1], packed))[1:], n, k), codes)


@pytest.mark.gpu
def test_cuda_packs_the_same_bits() -> None:
    """If this failed, a model packed on a GPU would differ from one packed on the CPU."""
    q = random_linear(200, 448, 64)
    there = QuantizedLinear(q.codes.cuda(), q.scales.cuda(), 64)
    packed: dict[str, Any] = pack_gptq(there)
    assert all(torch.equal(t.cpu(), pack_gptq(q)[name]) and t.is_cuda for name, t in packed.items())
    assert torch.equal(unpack_gptq(**packed, v2=False).codes.cpu(), q.codes)
    assert torch.equal(unpack_ct(pack_ct(there.codes), 200, 448).cpu(), q.codes)


# ---- 8 bits --------------------------------------------------------------------------------------------------------------------------


def bytewise(n: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("k", [1, 4, 13, 64])
def test_8_bit_words_are_what_compressed_tensors_packs(k: int) -> None:
    """If this failed, vLLM and transformers would decode other codes."""
    from compressed_tensors.compressors import pack_to_int32

    codes = bytewise(5, k, seed=k)
    packed = pack_ct(codes, 8)
    assert same_bits(packed, pack_to_int32(codes, 8))
    words = [sum((int(code) + 128) << (8 * i) for i, code in enumerate(codes[0, j : j + 4])) for j in range(0, k, 4)]
    assert [word & 0xFFFFFFFF for word in packed[0].tolist()] == words, "the first code in the lowest byte, nothing beyond K"
    assert same_bits(unpack_ct(packed, 5, k, 8), codes)


@pytest.mark.parametrize("v2", [False, True])
def test_8_bit_gptq_is_the_transpose(v2: bool) -> None:
    """If this failed, GPTQ clients would decode other codes, or subtract another zero point than 128."""
    q = QuantizedLinear(bytewise(16, 64), torch.ones(16, 2, dtype=torch.float16), 32, grid=INT8)
    tensors = pack_gptq(q)
    assert tensors["qweight"].shape == (16, 16) and torch.equal(tensors["qweight"], pack_ct(q.codes, 8).T)
    assert tensors["qzeros"].shape == (2, 4) and tensors["qzeros"].view(torch.uint8).unique().tolist() == [127]
    if v2:
        tensors["qzeros"] = torch.full_like(tensors["qzeros"], ZEROS_V2[8])
    back = unpack_gptq(**tensors, v2=v2, grid=INT8)
    assert same_bits(back.codes, q.codes) and back.grid == INT8
    with pytest.raises(ValueError, match=r"store 12[78] everywhere, which is symmetric in gptq"):
        unpack_gptq(**tensors, v2=not v2, grid=INT8)


def test_a_grid_bounds_its_codes() -> None:
    """If this failed, an 8-bit code could be packed into four bits, where it changes its neighbours."""
    codes, scales = bytewise(8, 32), torch.ones(8, 1, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"outside -8\.\.7"):
        QuantizedLinear(codes, scales, 32)
    with pytest.raises(ValueError, match=r"outside -8\.\.7"):
        pack_ct(codes)


def test_tiles_refuse_8_bit_codes() -> None:
    """If this failed, a native folder would hold the low halves of 8-bit codes."""
    q = QuantizedLinear(bytewise(64, 64), torch.ones(64, 1, dtype=torch.float16), 64, grid=INT8)
    keep = torch.tensor([True, True, False, False]).repeat(64, 16)
    with pytest.raises(ValueError, match="tiles hold 4-bit codes, and these are 8-bit"):
        pack_marlin(q)
    with pytest.raises(ValueError, match="tiles hold 4-bit codes, and these are 8-bit"):
        pack_sparse_marlin(SparseQuantizedLinear(q.codes * keep, q.scales, 64, keep, grid=INT8))


def test_zero_points_are_packed_along_n() -> None:
    """If this failed, vLLM and GPTQModel would subtract the zero of another output."""
    from compressed_tensors.compressors import pack_to_int32

    from marlinctl.checkpoint.formats.base import LinearParts
    from marlinctl.checkpoint.formats.registry import FORMATS

    codes = random_linear(24, 64, 32).codes
    zeros = torch.randint(-8, 8, (24, 2), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    q = QuantizedLinear(codes, torch.ones(24, 2, dtype=torch.float16), 32, grid=UINT4, zeros=zeros)
    tensors = FORMATS["ct"].pack("layer", LinearParts.of(q))
    assert torch.equal(tensors["weight_zero_point"], pack_to_int32(zeros, 4, packed_dim=0)) and tensors["weight_zero_point"].shape == (3, 2)
    assert int(tensors["weight_zero_point"][0, 0]) & 15 == int(zeros[0, 0]) + 8
    gptq = pack_gptq(q)
    assert torch.equal(gptq["qzeros"], tensors["weight_zero_point"].T), "version 2 stores the zero itself"
    back = unpack_gptq(**gptq, v2=True, grid=UINT4)
    assert back.zeros is not None and same_bits(back.zeros, zeros) and same_bits(back.codes, codes)
    for name, packed, variant in (("ct", tensors, ""), ("gptq", gptq, "v2")):
        fmt = FORMATS[name]
        assert fmt.second_reading is not None
        assert torch.equal(fmt.unpack(packed, 32, variant, UINT4).weight(), q.dequantize())
        assert torch.equal(fmt.second_reading(packed, 24, 64, 32, UINT4), q.dequantize())
