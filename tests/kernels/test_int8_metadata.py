"""Metadata of 2:4 in the order of 8-bit products: every lane has that of the weights that it holds."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import pytest
import torch

from marlinctl.kernels import int8_metadata, linear
from marlinctl.kernels.factored import factored_scales
from marlinctl.kernels.int8_metadata import int8_operands, metadata_for_int8
from marlinctl.kernels.linear import SparseMarlinLinear
from marlinctl.pack import tile
from marlinctl.pack.sparse_marlin import pack_sparse_marlin
from tests.kernels.software_kernel import with_factors
from tests.pack.naive import random_sparse


def test_every_lane_has_the_survivors_and_metadata_of_its_rows() -> None:
    """If this failed, the A registers of a lane, its metadata and the activations would not be of the same columns. All 64 k x 64 n.

    Of a product (PTX ISA, 9.7.14.6.2 and 9.7.15.6): register i of lane t holds places 16 (i // 2) + 4 (t % 4) .. + 3 of 32 stored numbers
    of row t // 4 + 8 (i % 2); metadata of row r, columns 32 h .. 32 h + 31 lie in lane 4 (r % 8) + 2 h + r // 8.
    """
    columns = defaultdict(set)  # of a quad of places in a row of B: which k lie there
    for place in range(64):
        columns[place // 4].add(int(tile.sparse_activation_column(place)))
    for lane in range(32):
        for j in range(4):
            for register in range(4):
                row = lane // 4 + 8 * (register % 2)
                n = 8 * (lane // 4) + 4 * (register % 2) + j
                for byte in range(4):  # as the kernel takes them: permute(w0, w1, 0x6420 or 0x7531), low or high nibbles
                    word, nibble = byte // 2, 4 * (byte % 2) + 2 * (register % 2) + register // 2
                    survivor, its_n = tile.sparse_survivor(word, 4 * lane + j, nibble)
                    place = 16 * (register // 2) + 4 * (lane % 4) + byte
                    quad = int(survivor) // 2  # of 16
                    assert int(its_n) == n and int(survivor) % 2 == place % 2
                    assert columns[place // 2] == {4 * quad + i for i in range(4)}, "a quad of B is the quad of the two survivors"
                    holder = 4 * (row % 8) + 2 * (place // 16) + row // 8
                    found = tile.int8_meta_place(quad, n)
                    assert (found.row, found.column // 2) == (j // 2, 2 * holder + j % 2), "32 bits of that lane"
                    assert 4 * (found.column % 2) + found.nibble == place // 2 % 8


def test_every_nibble_has_a_place_of_its_own() -> None:
    """If this failed, metadata of two quads would overwrite each other."""
    quad, n = torch.meshgrid(torch.arange(32), torch.arange(128), indexing="ij")
    found = tile.int8_meta_place(quad, n)
    assert found.row.max() == 3 and found.column.max() == 255
    assert len(set(zip(*(index.flatten().tolist() for index in found), strict=True))) == quad.numel()
    assert tile.int8_meta_place(17, 70) == (3, 132, 2) and tile.meta_place(17, 70) == (2, 193, 1)


@pytest.mark.parametrize("at_once", [1, 1 << 24])
def test_metadata_move_to_their_places(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, the tensor would not be what the map says, or large ones would be put together wrongly."""
    monkeypatch.setattr("marlinctl.kernels.int8_metadata.AT_ONCE", at_once)
    meta = pack_sparse_marlin(random_sparse(128, 192, 64, seed=3)).meta
    made = metadata_for_int8(meta)
    for quad in range(48):
        for n in range(128):
            (row, column, nibble), (old_row, old_column, old_nibble) = tile.int8_meta_place(quad, n), tile.meta_place(quad, n)
            assert int(made[row, column]) >> 4 * nibble & 15 == int(meta[old_row, old_column]) >> 4 * old_nibble & 15
    with pytest.raises(ValueError, match=r"metadata must be int16 \[2 i, 128 j\], got torch.int32"):
        metadata_for_int8(meta.int())


class OnAGpu(torch.Tensor):
    is_cuda = True


def test_they_are_made_where_a_gpu_has_a_use_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, every 2:4 model would take a bit more for each weight, or one that could be multiplied in 8 bits would not be."""
    p = pack_sparse_marlin(with_factors(random_sparse(64, 128, 64, seed=3), seed=3))
    assert int8_operands(p) is None, "a CPU has none"
    there = replace(p, scales=p.scales.as_subclass(OnAGpu))
    monkeypatch.setattr(int8_metadata, "architecture_of", lambda device: "sm_90a")
    asked: list[tuple[object, ...]] = []
    fewest: list[int | None] = [None, 128, 128]

    def fewest_rounded(*of: object) -> int | None:
        asked.append(of)
        return fewest[len(asked) - 1]

    monkeypatch.setattr(int8_metadata, "fewest_rounded", fewest_rounded)
    assert int8_operands(there) is None and asked == [("sm_90a", 64, 128, "int8", True, True)]
    found = int8_operands(there)
    assert found is not None and found[0].shape == (3, 64) and torch.equal(found[1], metadata_for_int8(p.meta))
    there.scales[0, 5] *= 1.01
    assert int8_operands(there) is None, "scales that are not of the form"


def test_a_module_gives_them_to_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a module went on with the metadata of weights that have been changed or loaded again, every product would be silently wrong."""
    p = pack_sparse_marlin(with_factors(random_sparse(64, 128, 64, seed=3), seed=3))
    given: list[tuple[object, ...]] = []

    def gemm(x: torch.Tensor, *rest: object) -> torch.Tensor:
        given.append(rest[7:])
        return x

    monkeypatch.setattr(linear, "sparse_marlin_gemm", gemm)
    monkeypatch.setattr(linear, "int8_operands", lambda p: (factored_scales(p), metadata_for_int8(p.meta)))
    module, x = SparseMarlinLinear(p, None, "int8"), torch.zeros(1, 128).as_subclass(OnAGpu)
    for overlap in (True, False, True):
        module.overlap = overlap
        module._multiply(x)
    prepared = ("int8", module.factored, module.int8_meta)
    assert prepared[2] is not None and given[1] == ("int8", None, None)
    assert all(a is b for one in (given[0], given[2]) for a, b in zip(one, prepared, strict=True))
    assert {"factored", "int8_meta"} <= set(dict(module.named_buffers())) and not {"factored", "int8_meta"} & set(module.state_dict())
    module.load_state_dict(SparseMarlinLinear(p).state_dict())
    assert module.factored is None and module.int8_meta is None
    module._multiply(x)
    assert given[3][2] is not None and given[3][2] is not prepared[2]
    exact = SparseMarlinLinear(p, None, "int8-128")
    exact._multiply(x)
    SparseMarlinLinear(p)._multiply(x)
    assert given[4:] == [("int8-128", None, None), ()]
