"""Survivors would be lost or moved on their way through the mask file, or a wrong file would be believed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from marlinctl.checkpoint import mask
from marlinctl.checkpoint.formats.registry import FORMATS
from marlinctl.checkpoint.writer import StagedCheckpoint
from marlinctl.errors import BadInput


def random_keep(n: int, k: int, seed: int = 0) -> torch.Tensor:
    chosen = torch.rand(n, k // 4, 4, generator=torch.Generator().manual_seed(seed)).argsort(-1)[..., :2]
    return torch.zeros(n, k // 4, 4, dtype=torch.bool).scatter_(-1, chosen, True).reshape(n, k)


@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 99))
def test_bits_come_back_as_they_went(n: int, quads: int, seed: int) -> None:
    keep = random_keep(n, 4 * quads, seed)
    assert torch.equal(mask.unpack_bits(mask.pack_bits(keep), 4 * quads), keep)


def test_the_lowest_bit_is_the_first_column() -> None:
    keep = torch.tensor([[True, False, True, False, False, False, True, True, False, True, False, True]])
    assert mask.pack_bits(keep).tolist() == [[0b11000101, 0b1010]]


def written(folder: Path, keeps: dict[str, torch.Tensor]) -> Path:
    with StagedCheckpoint(folder, overwrite=False, fmt=FORMATS["dense"]) as staged:
        for name, keep in keeps.items():
            staged.write_shard({f"{name}.weight": torch.ones(keep.shape, dtype=torch.float16)})
            staged.write_mask(name, keep)
        staged.publish({"model_type": "llama"}, manifest={}, verify=lambda _: None, report_files={})
    return folder


def test_masks_written_one_by_one_are_read_back(tmp_path: Path) -> None:
    keeps = {"b.q": random_keep(8, 16, 1), "a.o": random_keep(3, 12, 2), "a.k": random_keep(5, 20, 3)}
    folder = written(tmp_path / "out", keeps)
    with mask.open_masks(folder) as masks:
        assert masks is not None
        assert sorted(masks.layers) == sorted(keeps)
        for name, keep in keeps.items():
            assert torch.equal(masks.keep(name, *keep.shape), keep)
    by_safetensors = load_file(folder / mask.NAME)
    assert torch.equal(mask.unpack_bits(by_safetensors["a.k.keep"], 20), keeps["a.k"])
    assert not list(folder.glob("*.spool"))


def test_the_manifest_covers_the_mask(tmp_path: Path) -> None:
    from marlinctl.checkpoint.manifest import read

    assert mask.NAME in read(written(tmp_path / "out", {"a": random_keep(4, 8)}))["files"]


def test_a_folder_without_a_mask_file_has_none(tmp_path: Path) -> None:
    with mask.open_masks(tmp_path) as masks:
        assert masks is None


def test_a_mask_of_another_shape_is_refused(tmp_path: Path) -> None:
    with mask.open_masks(written(tmp_path / "out", {"a.q": random_keep(4, 16)})) as masks:
        assert masks is not None
        with pytest.raises(BadInput, match=r"mask of a\.q is U8 \[4, 2\]") as caught:
            masks.keep("a.q", 4, 24)
    assert caught.value.error_id == "E356"


def test_three_kept_in_a_four_are_refused_with_their_place(tmp_path: Path) -> None:
    keep = random_keep(4, 16)
    keep[2, 4:8] = torch.tensor([True, True, False, True])
    with mask.open_masks(written(tmp_path / "out", {"a.q": keep})) as masks:
        assert masks is not None
        with pytest.raises(BadInput, match=r"a\.q is not 2:4.*row 2, columns 4\.\.7, keeps 3") as caught:
            masks.keep("a.q", 4, 16)
    assert caught.value.error_id == "E356"


def test_a_file_that_is_no_mask_is_refused(tmp_path: Path) -> None:
    save_file({"a.weight": torch.zeros(2, 2)}, tmp_path / mask.NAME)
    with pytest.raises(BadInput, match="is not a mask") as caught, mask.open_masks(tmp_path):
        pass
    assert caught.value.error_id == "E356"
    (tmp_path / mask.NAME).write_bytes(b"\xff" * 64)
    with pytest.raises(BadInput), mask.open_masks(tmp_path):
        pass


def test_a_mask_and_a_weight_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    """The weight would be lost without a word: packed 2:4 it has no place."""
    keep = random_keep(6, 16)
    with mask.open_masks(written(tmp_path / "out", {"a.q": keep})) as masks:
        assert masks is not None and "a.q" in masks and "a.k" not in masks
        weight = torch.ones(6, 16, dtype=torch.float16) * keep
        assert torch.equal(masks.checked_keep("a.q", weight), keep)
        assert torch.equal(masks.checked_keep("a.q", torch.zeros(6, 16, dtype=torch.int8)), keep)  # kept weights may be zero
        row, column = (~keep).nonzero()[7].tolist()
        weight[row, column] = -0.5
        with pytest.raises(BadInput) as caught:
            masks.checked_keep("a.q", weight)
    assert caught.value.error_id == "E356"
    assert f"a.q: row {row}, column {column}" in caught.value.problems[0].what and "-0.5" in caught.value.problems[0].what
