"""What looks wrong in a model or in its text, and can be worked with all the same: one line each, on stderr and in the report (`warnings`).

    folder     a shard that no index names, an index without metadata (checkpoint/reader.py)         --strict: E307, exit 3
    weights    a matrix that holds nothing but zeros                                                 --strict: E605, exit 6
    linears    columns with one value in every row, inputs that were zero in all of calibration      --strict: E605, exit 6
    text       chats that were cut to the length of a sample

A column of a weight that holds one value adds the same to every output, whatever the model: nothing that was trained looks like that. An
input that is always zero leaves its column out of the Hessian, so its weights are rounded without knowing what they do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from marlinctl.errors import BadInput, NumericalProblem, Problem

if TYPE_CHECKING:
    from torch import Tensor

    from marlinctl.checkpoint.contents import Contents
    from marlinctl.checkpoint.reader import Checkpoint
    from marlinctl.solving import LayerRecord

_SHOWN = 5


def of_folder(checkpoint: Checkpoint, *, strict: bool) -> list[str]:
    """BadInput E307 that lists them, where `strict`. They are said where a folder is looked at (preflight.py)."""
    if strict and checkpoint.notes:
        where, fix = str(checkpoint.folder), "put the folder in order, or no --strict"
        raise BadInput.from_problems("E307", [Problem(f"{note}; --strict forbids that", where, fix) for note in checkpoint.notes])
    return list(checkpoint.notes)


def of_weights(contents: Contents, *, strict: bool) -> list[str]:
    """NumericalProblem E605 that names every such matrix, where `strict`."""
    found = contents.zero_tensors
    if strict and found:
        fix = "the checkpoint may be incomplete, compare it with the original; or no --strict"
        problems = [Problem(f"{name} holds nothing but zeros; --strict forbids that", str(contents.folder), fix) for name in found]
        raise NumericalProblem.from_problems("E605", problems)
    return [f"{len(found)} of the weights hold nothing but zeros: {_some(found)}"] if found else []


def refuse_odd_linear(name: str, constant: int, dead: int) -> None:
    """NumericalProblem E605, for --strict."""
    odd = [f"{constant} columns hold one value in every row"] if constant else []
    odd += [f"{dead} inputs were zero in all of calibration"] if dead else []
    if odd:
        fix = "compare the weights with the original's, calibrate with more or other text, or no --strict"
        raise NumericalProblem("E605", f"{' and '.join(odd)}; --strict forbids that", where=name, fix=fix)


def of_linears(records: Sequence[LayerRecord]) -> list[str]:
    constant = [f"{record.name} ({record.constant})" for record in records if record.constant]
    dead = [f"{record.name} ({record.dead})" for record in records if record.dead]
    found = [f"columns with one value in every row, in {len(constant)} linears: {_some(constant)}"] if constant else []
    return found + ([f"inputs that were zero in all of calibration, in {len(dead)} linears: {_some(dead)}"] if dead else [])


def of_text(facts: Mapping[str, Any], flag: str) -> list[str]:
    """facts: of a calibration, or of the rows of a distillation. flag: what sets the length."""
    cut = facts.get("cut", {"samples": 0, "tokens": 0})  # a job of marlinctl 0.1.0 did not count them
    if not cut["samples"]:
        return []
    return [f"{cut['samples']} chats are longer than {flag} {facts['sequence_length']} and were cut; {cut['tokens']:,} tokens are left out"]


def constant_columns(weight: Tensor) -> int:
    """How many columns of a weight [N, K] hold one value in every row. 0 for a row, where each does, and for one that is all zero."""
    if weight.shape[0] < 2:
        return 0
    least, most = weight.aminmax(dim=0)
    return int((least == most).sum()) if bool(least.any()) or bool(most.any()) else 0


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
