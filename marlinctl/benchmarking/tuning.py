"""From measurements to the table by which the operators choose: `dispatch.json` in the user's folder of compiled kernels.

    bench document with every configuration ─► rows of times ─► kernels/dispatch.py: table_of ─► <cache>/kernels/dispatch.json

The user's file goes before the packaged one, table by table (architecture, dense or 2:4). What this run did not measure stays as it was.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from marlinctl.benchmarking.cases import OPERATORS, Kind
from marlinctl.benchmarking.documents import Case, Document
from marlinctl.benchmarking.implementations import OVERLAP, dequantized_name
from marlinctl.errors import BadInput
from marlinctl.kernels import dispatch, jit

SETS = ("llama3-8b", "llama3-8b-unfused", "llama3-70b", "ideal")  # where none is asked for: small, middle and large
REPLAYS = 5  # of each configuration: enough to find the best, in some minutes on an H200
TOKENS = (1, 16, 32, 48, 64, 96, 128, 256, 512)


def read_own_table() -> dict[str, Any]:
    """The user's table as it is, or an empty one. BadInput E374 where it is damaged, before anything is measured."""
    path = own_table()
    try:
        data = jit.read_own(path.parent, path.name)
        if data is None:
            return {"schema_version": dispatch.SCHEMA_VERSION, "architectures": {}}
        dispatch.parse(data, path)
    except (ValueError, PermissionError) as error:
        raise BadInput("E374", str(error), where=str(path), fix="remove it; the packaged table and --tune do without") from error
    table: dict[str, Any] = json.loads(data)
    return table


def own_table() -> Path:
    return jit.default_folder() / dispatch.OWN


def merged(table: dict[str, Any], document: Document) -> dict[str, Any]:
    """The table with this run's choices in place of those of its architecture and kinds."""
    machine, settings = document.machine, document.settings
    measured = {
        "gpu": machine.gpu,
        "torch": machine.torch,
        "date": machine.date,
        "dtype": settings.dtype,
        "group_size": settings.group_size,
    }
    kinds = {
        str(kind): dispatch.table_of(machine.architecture, measured, list(_rows(document.cases, kind, machine.architecture)))
        for kind in ("dense", "sparse")
        if kind in settings.kinds
    }
    architectures = table["architectures"]
    return {**table, "architectures": {**architectures, machine.architecture: {**architectures.get(machine.architecture, {}), **kinds}}}


def write_own_table(table: dict[str, Any]) -> Path:
    """Under a temporary name, then renamed: a program that starts now reads the old table or the new one.

    An operator of this process that has chosen already keeps its choice.
    """
    path = own_table()
    data = dispatch.text_of(table).encode()
    dispatch.parse(data, path)
    jit.write_own(path.parent, path.name, data)
    dispatch.tables.cache_clear()
    dispatch.choose.cache_clear()
    return path


def _rows(cases: list[Case], kind: Kind, architecture: str) -> Iterator[dict[str, Any]]:
    """As dispatch.table_of takes them. What the operators choose now is known by their own time where it was not timed by its name: a
    call that the machine disturbed can make a configuration look hopeless.
    """
    for case in cases:
        row: dict[str, Any] = {"sparse": kind == "sparse", "m": case.m, "n": case.n, "k": case.k, "group_size": case.group_size}
        for timed in case.candidates:
            if timed.name == dequantized_name(kind):
                row[dispatch.DEQUANTIZE] = timed.us
            elif timed.family == kind and "/" in timed.name:
                row[timed.name.removesuffix(OVERLAP)] = timed.us
        now = dispatch.choose(architecture, kind == "sparse", case.m, case.n, case.k)
        own = [timed.us for timed in case.candidates if timed.name == OPERATORS[kind] + OVERLAP]
        if now is not None and own:
            row.setdefault(now.name, own[0])
        yield row
