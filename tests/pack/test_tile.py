"""The maps of marlinctl/pack/tile.py: bijections, and equal to small tables written by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from marlinctl.pack import tile

MATRIX_MAPS = [  # place, its inverse, [rows, columns] of words and nibbles of a word, for 32 of what lies along K and N = 128
    pytest.param(tile.marlin_place, tile.marlin_weight, (2, 256, 8), id="marlin"),
    pytest.param(tile.sparse_place, tile.sparse_survivor, (2, 256, 8), id="sparse"),
    pytest.param(tile.meta_place, tile.meta_quad, (4, 256, 4), id="meta"),
    pytest.param(tile.ct_place, tile.ct_weight, (128, 4, 8), id="ct"),
    pytest.param(tile.gptq_place, tile.gptq_weight, (4, 128, 8), id="gptq"),
    pytest.param(tile.gptq_zero_place, tile.gptq_zero, (32, 16, 8), id="gptq-zeros"),
]


@pytest.mark.parametrize(("place", "weight", "words"), MATRIX_MAPS)
def test_every_weight_has_a_nibble_of_its_own(place: Callable, weight: Callable, words: tuple[int, int, int]) -> None:
    """If this failed, two weights would share four bits, or some bits would belong to none."""
    every = {tuple(place(k, n)) for k in range(32) for n in range(128)}
    assert every == {(row, column, nibble) for row in range(words[0]) for column in range(words[1]) for nibble in range(words[2])}


@pytest.mark.parametrize(("place", "weight", "words"), MATRIX_MAPS)
def test_the_way_back_ends_where_it_began(place: Callable, weight: Callable, words: tuple[int, int, int]) -> None:
    """If this failed, unpacking by the inverse map would return weights to the wrong row or column."""
    assert all(weight(*place(k, n)) == (k, n) for k in range(32) for n in range(128))


@pytest.mark.parametrize(("place", "weight", "words"), MATRIX_MAPS)
def test_tensors_and_ints_agree(place: Callable, weight: Callable, words: tuple[int, int, int]) -> None:
    """If this failed, a map would mean one thing to the drawings (ints) and another to the reference (index tensors)."""
    k, n = torch.meshgrid(torch.arange(32), torch.arange(128), indexing="ij")
    places = torch.stack(torch.broadcast_tensors(*place(k, n)), dim=-1)  # [32, 128, 3]
    assert places.tolist() == [[list(place(i, j)) for j in range(128)] for i in range(32)]
    back = torch.stack(torch.broadcast_tensors(*weight(*place(k, n))), dim=-1)
    assert torch.equal(back, torch.stack((k, n), dim=-1))


@pytest.mark.parametrize(
    ("k", "n", "column", "nibble"),
    [(0, 0, 0, 0), (1, 0, 0, 4), (8, 0, 0, 1), (0, 8, 0, 2), (9, 8, 0, 7), (2, 0, 4, 0), (0, 1, 16, 0), (0, 16, 1, 0), (15, 63, 127, 7)]
    + [(0, 64, 128, 0), (6, 7, 124, 0), (7, 15, 124, 6), (8, 48, 3, 1)],
)
def test_marlin_places_worked_out_by_hand(k: int, n: int, column: int, nibble: int) -> None:
    """If this failed, our tiles would differ from those of the original MARLIN kernel, which these places were taken from."""
    assert tile.marlin_place(k, n) == (0, column, nibble)
    assert tile.marlin_place(k + 32, n) == (2, column, nibble)


def test_a_lane_holds_what_the_tensor_core_wants_of_it() -> None:
    """If this failed, lane t would not hold k = 2(t % 4) + {0, 1, 8, 9} of columns t // 4 and t // 4 + 8 in each 16 wide block."""
    for lane in range(32):
        for j in range(4):
            held = {tile.marlin_weight(0, 4 * lane + j, nibble) for nibble in range(8)}
            k = {2 * (lane % 4) + i for i in (0, 1, 8, 9)}
            assert held == {(i, 16 * j + lane // 4 + pair) for i in k for pair in (0, 8)}


def test_masks_give_neighbours_in_k() -> None:
    """If this failed, `w & 0x000f000f` (nibbles 0 and 4) would no longer be one half2 of a fragment."""
    for low in range(4):  # nibbles low and low + 4 lie in the two halves of the word
        for column in range(128):
            (k_low, n_low), (k_high, n_high) = tile.marlin_weight(0, column, low), tile.marlin_weight(0, column, low + 4)
            assert (k_high, n_high) == (k_low + 1, n_low)


def test_scale_orders_written_by_hand() -> None:
    """If this failed, scales would multiply the wrong columns: plausible numbers, garbage text."""
    grouped, channel = [0] * 64, [0] * 64
    for n in range(64):
        grouped[tile.grouped_slot(n)] = channel[tile.channel_slot(n)] = n
    assert grouped[:18] == [0, 8, 16, 24, 32, 40, 48, 56, 1, 9, 17, 25, 33, 41, 49, 57, 2, 10]
    assert channel[:16] == [0, 1, 8, 9, 16, 17, 24, 25, 2, 3, 10, 11, 18, 19, 26, 27]
    assert channel[32:36] == [32, 33, 40, 41]


def test_activations_have_places_of_their_own() -> None:
    """If this failed, two columns of K would share an activation, or an index tensor would mean another column than an int."""
    places = [tile.activation_place(k) for k in range(96)]
    assert sorted(places) == list(range(96)) and [tile.activation_column(place) for place in places] == list(range(96))
    assert all(place // 32 == k // 32 for k, place in enumerate(places))
    assert tile.activation_place(torch.arange(96)).tolist() == places
    assert tile.activation_column(torch.arange(96))[places].tolist() == list(range(96))
    places = [tile.sparse_activation_place(k) for k in range(192)]
    assert sorted(places) == list(range(192)) and [tile.sparse_activation_column(place) for place in places] == list(range(192))
    assert all(place // 64 == k // 64 and place % 4 == k % 4 for k, place in enumerate(places)), "quads stay whole"


def test_four_neighbouring_places_are_two_words_at_one_height() -> None:
    """If this failed, a lane would not find the four weights that meet four neighbouring activations in the same bits of two words."""
    for place in range(0, 32, 4):
        places = [tile.marlin_place(tile.activation_column(place + i), 0) for i in range(4)]
        assert len({found.column for found in places}) == 1
        assert [found.row for found in places] == [0, 0, 1, 1]
        assert [found.nibble for found in places] == [place // 16 + 4 * (i % 2) for i in range(4)]


@pytest.mark.parametrize("slot", [tile.grouped_slot, tile.channel_slot])
def test_scale_orders_are_their_own_inverse(slot: Callable) -> None:
    """If this failed, packing and unpacking scales with one and the same index would scramble them."""
    assert [slot(slot(n)) for n in range(192)] == list(range(192))
    assert slot(torch.arange(192)).tolist() == [slot(n) for n in range(192)]


@pytest.mark.parametrize(
    ("c", "n", "column", "nibble"),
    [(0, 0, 0, 0), (1, 0, 0, 4), (8, 0, 0, 1), (0, 4, 0, 2), (9, 4, 0, 7), (2, 0, 4, 0), (0, 1, 1, 0), (0, 8, 16, 0), (15, 63, 127, 7)]
    + [(0, 64, 128, 0), (6, 0, 12, 0), (7, 59, 127, 4), (8, 62, 114, 3)],
)
def test_survivor_places_worked_out_by_hand(c: int, n: int, column: int, nibble: int) -> None:
    """If this failed, our 2:4 tiles would differ from those of the original Sparse-MARLIN kernel, which these places were taken from."""
    assert tile.sparse_place(c, n) == (0, column, nibble)
    assert tile.sparse_place(c + 32, n) == (2, column, nibble)


def test_a_lane_holds_what_the_sparse_tensor_core_wants_of_it() -> None:
    """If this failed, lane t would not hold survivors 2(t % 4) + {0, 1, 8, 9} of fragment rows t // 4 and t // 4 + 8 for each word."""
    for lane in range(32):
        for j in range(4):
            held = {tile.sparse_survivor(0, 4 * lane + j, nibble) for nibble in range(8)}
            survivors = {2 * (lane % 4) + i for i in (0, 1, 8, 9)}
            assert held == {(c, 8 * (lane // 4) + j + pair) for c in survivors for pair in (0, 4)}


@pytest.mark.parametrize(
    ("k", "n", "column"), [(0, 0, 0), (16, 0, 2), (0, 1, 4), (0, 2, 64), (0, 4, 1), (0, 8, 8), (16, 63, 127), (0, 64, 128), (28, 3, 70)]
)
def test_metadata_places_worked_out_by_hand(k: int, n: int, column: int) -> None:
    """If this failed, the hardware would read the places of another row's survivors: plausible numbers, garbage text."""
    assert tile.meta_place(k // 4, n) == (0, column, k // 4 % 4)
    assert tile.meta_place((k + 96) // 4, n) == (3, column, k // 4 % 4)


def test_metadata_nibbles_written_by_hand() -> None:
    """If this failed, a survivor would be multiplied by its neighbour's activation."""
    nibbles = {(0, 1): 0x4, (0, 2): 0x8, (1, 2): 0x9, (0, 3): 0xC, (1, 3): 0xD, (2, 3): 0xE}
    for columns, nibble in nibbles.items():
        assert tile.meta_nibble(*columns) == nibble
        assert tile.meta_columns(nibble) == columns


def test_sparse_scale_order_written_by_hand() -> None:
    """If this failed, scales would multiply the wrong columns. The order is not its own inverse, so both ways are looked at."""
    stored = [0] * 128
    for n in range(128):
        stored[tile.sparse_grouped_slot(n)] = n
    assert stored[:10] == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12] and stored[120:] == [120, 124, 121, 125, 122, 126, 123, 127]
    assert [tile.sparse_grouped_column(slot) for slot in range(128)] == stored
    assert tile.sparse_grouped_column(torch.arange(128)).tolist() == stored
