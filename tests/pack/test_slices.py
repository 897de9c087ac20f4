"""A slice of packed tensors is the packed slice: tensor parallelism loads what the packer would have made of a device's codes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from marlinctl.pack import marlin
from marlinctl.pack.interchange import pack_ct, pack_gptq
from marlinctl.pack.marlin import order_scales, pack_marlin, repack
from marlinctl.pack.slices import Slice
from marlinctl.pack.sparse_marlin import pack_sparse_marlin
from marlinctl.quantize.types import QuantizedLinear
from marlinctl.sparsify.types import SparseQuantizedLinear


def linear(n: int, k: int, group_size: int, *, sparse: bool = False) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(n + k + group_size)
    codes = torch.randint(-8, 8, (n, k), dtype=torch.int8, generator=generator)
    scales = torch.rand(n, k // group_size, generator=generator).to(torch.float16)
    if not sparse:
        return QuantizedLinear(codes, scales, group_size)
    order = torch.rand(n, k // 4, 4, generator=generator).argsort(-1)
    keep = (order < 2).reshape(n, k)
    return SparseQuantizedLinear(codes * keep, scales, group_size, keep)


def cut(q: QuantizedLinear, outputs: tuple[int, int], inputs: tuple[int, int]) -> QuantizedLinear:
    """The same slice of codes, scales and mask."""
    (n0, n1), (k0, k1) = outputs, inputs
    codes = q.codes[n0:n1, k0:k1].contiguous()
    whole_rows = q.group_size == q.in_features
    scales = q.scales[n0:n1] if whole_rows else q.scales[n0:n1, k0 // q.group_size : k1 // q.group_size]
    size = k1 - k0 if whole_rows else q.group_size
    if isinstance(q, SparseQuantizedLinear):
        return SparseQuantizedLinear(codes, scales.contiguous(), size, q.keep[n0:n1, k0:k1].contiguous())
    return QuantizedLinear(codes, scales.contiguous(), size)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "2:4"])
@pytest.mark.parametrize(
    ("n", "k", "group_size", "outputs", "inputs"),
    [
        (192, 256, 128, (64, 192), (0, 256)),  # column-parallel
        (192, 256, 64, (0, 192), (128, 256)),  # row-parallel
        (128, 256, 128, (0, 128), (128, 256)),  # one group is left: another order of scales
        (128, 512, 256, (64, 128), (256, 512)),  # the same, with both cut
        (128, 256, 256, (64, 128), (128, 256)),  # a scale for each row, on each device
        (128, 192, 32, (64, 128), (64, 128)),
        (100, 200, 40, (64, 100), (0, 200)),  # the last slice ends in padding
        (100, 200, 200, (0, 100), (0, 200)),  # all of it
    ],
)
def test_slice_of_tiles_is_tiles_of_slice(
    sparse: bool, n: int, k: int, group_size: int, outputs: tuple[int, int], inputs: tuple[int, int]
) -> None:
    q = linear(n, k, group_size, sparse=sparse)
    part = Slice(n, k, group_size, outputs, inputs)
    if isinstance(q, SparseQuantizedLinear):
        whole, wanted = pack_sparse_marlin(q), pack_sparse_marlin(cut(q, outputs, inputs))  # type: ignore[arg-type]
        assert torch.equal(part.words(whole.meta), wanted.meta)
    else:
        whole, wanted = pack_marlin(q), pack_marlin(cut(q, outputs, inputs))  # type: ignore[assignment]
    assert torch.equal(part.words(whole.qweight), wanted.qweight)
    assert torch.equal(part.scales(whole.scales, sparse=sparse), wanted.scales)
    assert part.one_group == wanted.channel_wise


@pytest.mark.parametrize(
    ("outputs", "inputs", "why"),
    [
        ((32, 128), (0, 256), "outputs 32..128 of 128 cut a tile of 64"),
        ((0, 96), (0, 256), "outputs 0..96 of 128 cut a tile of 64"),
        ((0, 128), (64, 192), "inputs 64..192 of 256 cut a group of 128"),
        ((0, 128), (0, 96), "inputs 0..96 of 256 cut a tile of 64"),
        ((64, 192), (0, 256), "outputs 64..192 of 128"),
    ],
)
def test_cuts_through_tiles_and_groups_are_refused(outputs: tuple[int, int], inputs: tuple[int, int], why: str) -> None:
    """They would load, and multiply with the neighbour's weights."""
    with pytest.raises(ValueError, match=why.replace(".", r"\.")):
        Slice(128, 256, 128, outputs, inputs)


@pytest.mark.parametrize("at_once", [1 << 25, 1 << 13])
@pytest.mark.parametrize(("n", "k", "group_size"), [(64, 64, 32), (192, 576, 64), (128, 256, 256), (320, 128, 128), (64, 960, 64)])
def test_words_of_others_become_our_tiles(n: int, k: int, group_size: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM loads GPTQ or compressed-tensors words; a bit in a wrong place would be a wrong model. Chunks must meet without a seam."""
    monkeypatch.setattr(marlin, "WEIGHTS_AT_ONCE", at_once)
    q = linear(n, k, group_size)
    wanted = pack_marlin(q)
    gptq = pack_gptq(q)
    assert torch.equal(repack(gptq["qweight"]), wanted.qweight)
    assert torch.equal(repack(pack_ct(q.codes).T), wanted.qweight)
    for scales in (gptq["scales"], q.scales.T):
        ordered = order_scales(scales, channel_wise=group_size == k)
        assert torch.equal(ordered, wanted.scales) and ordered.is_contiguous()


def test_repacking_a_slice_is_slicing_what_was_repacked() -> None:
    """Each device repacks its own words: GPTQ words cut along K and N."""
    q = linear(256, 512, 128)
    words = pack_gptq(q)["qweight"]
    part = Slice(256, 512, 128, (128, 256), (256, 512))
    assert torch.equal(repack(words[32:64, 128:]), part.words(pack_marlin(q).qweight))


@pytest.mark.parametrize("words", [torch.zeros(8, 96, dtype=torch.int32), torch.zeros(4, 64, dtype=torch.int32), torch.zeros(8, 64)])
def test_words_that_fill_no_tiles_are_refused(words: Tensor) -> None:
    with pytest.raises(ValueError, match="words must be int32"):
        repack(words)
