"""Which part of which tensor a device gets, and what has arrived: plain functions."""

from __future__ import annotations

import pytest

from marlinctl.errors import BadInput
from marlinctl.serve.native.layout import Arrivals, Part, check_tensor, layout

QKV = ("q", "k", "v")


def cuts(names: tuple[str, ...], parts: list[Part], rank: int, **changes: int) -> list[list[tuple[tuple[int, int], int]]]:
    sizes = {"in_features": 4096, "inputs_here": 4096, "group_size": 128} | changes
    found = layout(names, parts, rank=rank, **sizes)
    return [[(place.cut.outputs, place.first) for place in places] for places in found.places]


def test_heads_are_divided_and_lie_side_by_side() -> None:
    parts = [Part(4096, 2048), Part(1024, 512), Part(1024, 512)]
    assert cuts(QKV, parts, 1) == [[((2048, 4096), 0)], [((512, 1024), 2048)], [((512, 1024), 2560)]]
    found = layout(QKV, parts, in_features=4096, inputs_here=4096, group_size=128, rank=1)
    assert (found.out_features, found.gaps, found.covered, found.product_group) == (3072, False, True, 128)


def test_devices_that_share_a_key_head_have_the_same_one() -> None:
    """8 devices and 2 heads of keys: devices 0 to 3 have the first, 4 to 7 the second."""
    parts = [Part(2048, 256), Part(256, 128, 4), Part(256, 128, 4)]
    assert [cuts(QKV, parts, rank)[1] for rank in (0, 3, 4, 7)] == [[((0, 128), 256)]] * 2 + [[((128, 256), 256)]] * 2
    assert cuts(QKV, parts, 4)[0] == [((1024, 1280), 0)]


def test_what_is_joined_in_the_folder_is_cut_in_each_of_its_parts() -> None:
    """Phi-3 stores gate and up as one tensor: a device needs a piece of each half."""
    halves = [Part(1024, 512), Part(1024, 512)]
    assert cuts(("gate_up",), halves, 1) == [[((512, 1024), 0), ((1536, 2048), 512)]]
    whole = [Part(1000, 1000), Part(1000, 1000)]
    assert cuts(("gate_up",), whole, 0) == [[((0, 2000), 0)]]  # and one device all of it, whatever the width of a tile


def test_widths_that_64_does_not_divide_leave_gaps() -> None:
    found = layout(QKV, [Part(96, 96), Part(32, 32), Part(32, 32)], in_features=96, inputs_here=96, group_size=32, rank=0)
    assert found.outputs == ((0, 96), (128, 32), (192, 32))
    assert (found.out_features, found.gaps, found.covered) == (224, True, True)


@pytest.mark.parametrize(
    ("k", "here", "group_size", "left"), [(4096, 2048, 128, 128), (256, 128, 128, -1), (4096, 2048, -1, -1), (4096, 4096, -1, -1)]
)
def test_inputs_are_divided_in_whole_groups(k: int, here: int, group_size: int, left: int) -> None:
    """Where a device has a single group, or all have one scale for each row, the product is channel-wise there."""
    found = layout(("o",), [Part(512, 512)], in_features=k, inputs_here=here, group_size=group_size, rank=k // here - 1)
    ((place,),) = found.places
    assert place.cut.inputs == (k - here, k) and found.inputs == here and found.product_group == left


def test_the_last_devices_of_a_head_may_have_less_or_nothing() -> None:
    assert cuts(("lm_head",), [Part(130, 64)], 1) == [[((64, 128), 0)]]
    assert cuts(("lm_head",), [Part(130, 64)], 2) == [[((128, 130), 0)]]
    nothing = layout(("lm_head",), [Part(130, 64)], in_features=128, inputs_here=128, group_size=128, rank=3)
    assert nothing.places == ((),) and nothing.out_features == 64 and not nothing.covered


@pytest.mark.parametrize(
    ("parts", "sizes", "what"),
    [
        ([Part(192, 96)], {}, "x cannot be divided: outputs 96..192 of 192 cut a tile of 64"),
        ([Part(128, 128)], {"inputs_here": 2016}, "x cannot be divided: inputs 2016..4032 of 4096 cut a tile"),
        ([Part(128, 128)], {"inputs_here": 64}, "x cannot be divided: inputs 64..128 of 4096 cut a group of 128"),
        ([Part(128, 128)], {"group_size": 256}, "groups of 256; the kernels have 32, 64, 128"),
    ],
)
def test_what_cannot_be_divided_is_said(parts: list[Part], sizes: dict[str, int], what: str) -> None:
    with pytest.raises(BadInput) as refused:
        cuts(("x",), parts, 1, **sizes)
    assert str(refused.value).startswith(what)


def test_shards_have_names_and_numbers() -> None:
    found = layout(QKV, [Part(64, 64)] * 3, in_features=64, inputs_here=64, group_size=64, rank=0)
    assert [found.index(shard) for shard in ("q", "v", 1)] == [0, 2, 1]
    for stranger in (None, "index_q", 3, (0, 1), True):
        with pytest.raises(BadInput, match="of a linear that the folder has as q, k, v"):
            found.index(stranger)


def test_missing_and_doubled_tensors_are_named() -> None:
    """Servers notice neither: a missing tensor is memory as it was, and of two the last one wins."""
    arrivals = Arrivals(("a.q", "a.k"), ("B", "s"))
    for tensor in ("a.q.B", "a.k.s"):
        arrivals.note(tensor)
    with pytest.raises(BadInput) as missing:
        arrivals.complete()
    assert [problem.what for problem in missing.value.problems] == ["a.q.s was not loaded", "a.k.B was not loaded"]
    with pytest.raises(BadInput, match=r"a\.k\.s is there twice"):
        arrivals.note("a.k.s")


def test_weights_can_be_loaded_anew() -> None:
    arrivals = Arrivals(("a",), ("B",))
    for _ in range(2):
        arrivals.note("a.B")
        arrivals.complete()


def test_a_wrong_shape_or_dtype_names_the_tensor() -> None:
    check_tensor("a.B", "I32", [4, 128], ("I32",), (4, 128))
    for dtype, shape in (("I32", [4, 64]), ("I64", [4, 128])):
        with pytest.raises(BadInput, match=r"a\.B is .* expected I32 \[4, 128\]"):
            check_tensor("a.B", dtype, shape, ("I32",), (4, 128))
