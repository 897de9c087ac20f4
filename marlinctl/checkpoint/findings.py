"""What looks wrong in a model or in its text, and can be worked with all the same: one line each, on stderr and in the report (`warnings`).

    folder     a shard that no index names, an index without metadata (checkpoint/reader.py)         --strict: E307, exit 3
               tensors beside the model, 8-bit floats, switches of config.json (checkpoint/folder.py)
    weights    a matrix that holds nothing but zeros, or columns with one value in every row         --strict: E605, exit 6
    inputs     of a linear, that were zero in all of calibration                                     --strict: E605, exit 6
    text       chats that were cut to the length of a sample, rows that were skipped

A column of a weight that holds one value adds the same to every output: nothing that was trained looks like that. An input that is always
zero leaves its column out of the Hessian, so its weights are rounded without knowing what they do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marlinctl.errors import BadInput, NumericalProblem, Problem, number_of
from marlinctl.system.files import shown

if TYPE_CHECKING:
    from marlinctl.checkpoint.contents import Contents
    from marlinctl.checkpoint.reader import Checkpoint

_SHOWN = 5


def refuse_notes(checkpoint: Checkpoint, *, strict: bool) -> None:
    """BadInput E307 that lists what is wrong in a folder, where `strict`; else it is said, and noted, where a folder is looked at
    (planning/preflight.py)."""
    if strict and checkpoint.notes:
        where, fix = str(checkpoint.folder), "put the folder in order, or no --strict"
        raise BadInput.from_problems("E307", [Problem(f"{note}; --strict forbids that", where, fix) for note in checkpoint.notes])


def of_weights(contents: Contents, *, strict: bool) -> list[str]:
    """NumericalProblem E605 that names every such matrix, where `strict`."""
    zero, constant = contents.zero_tensors, contents.constant_columns
    if strict and (zero or constant):
        where, fix = str(contents.folder), "the checkpoint may be damaged, compare it with the original; or no --strict"
        what = [f"{shown(name)} holds nothing but zeros" for name in zero]
        what += [f"{number_of(count, 'column')} of {shown(name)} with one value in every row" for name, count in constant.items()]
        raise NumericalProblem.from_problems("E605", [Problem(f"{text}, and --strict forbids that", where, fix) for text in what])
    found = [f"weights that hold nothing but zeros: {_some(zero)}"] if zero else []
    columns = [f"{name} ({count})" for name, count in constant.items()]
    return found + ([f"weights with columns that hold one value in every row: {_some(columns)}"] if columns else [])


def of_inputs(counts: Mapping[str, int]) -> list[str]:
    """counts: linear -> how many of its inputs were zero in all of calibration."""
    dead = [f"{name} ({count})" for name, count in counts.items() if count]
    return [f"linears with inputs that were zero in all of calibration: {_some(dead)}"] if dead else []


def of_text(facts: Mapping[str, Any], flag: str) -> list[str]:
    """facts: of a calibration, or of the rows of a distillation. flag: what sets the length."""
    cut = facts.get("cut", 0)  # a job of an earlier version did not count them
    chats = number_of(cut, f"chat is longer than {flag} and was", f"chats are longer than {flag} and were")
    found = [f"{chats} cut to {facts['sequence_length']} tokens"] if cut else []
    for part in facts.get("parts", ()):
        rows = part["rows"]
        if rows["skipped"]:
            which = "; ".join(rows["first"]) + ("; ..." if rows["skipped"] > len(rows["first"]) else "")
            found.append(
                f"{rows['skipped']:,} of {rows['read']:,} rows of {Path(part['source']).name} cannot be used and were skipped: {which}"
            )
    return found


def _some(names: Sequence[str]) -> str:
    return ", ".join(shown(name) for name in names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
