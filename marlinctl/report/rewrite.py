"""`report`: card and report of a published folder, rewritten from its JSON, after scores or speeds were added to it.

The run itself writes the same files when it publishes (report/files.py). They lie outside the manifest, so the model is not touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from marlinctl.checkpoint.folder import open_folder
from marlinctl.checkpoint.formats.base import Format
from marlinctl.checkpoint.formats.registry import layer_shape
from marlinctl.checkpoint.licence import NOTHING_STATED, Stated, stated
from marlinctl.checkpoint.manifest import UPDATE, written_by_newer
from marlinctl.checkpoint.ownership import remove_temporaries
from marlinctl.checkpoint.reader import require_folder
from marlinctl.errors import BadInput, CheckFailed
from marlinctl.report.files import JSON, report_files
from marlinctl.system.atomic import write_bytes
from marlinctl.system.console import SCHEMA_VERSION
from marlinctl.system.files import MAX_OWN_BYTES, MAX_OWN_VALUES, FileRefused, read_plain_json

_ABANDONED = 3600  # seconds; a file that was begun earlier and never got its name is of a `report` that was killed
_KINDS = ("compress", "quantize", "sparsify", "distill")


def rewrite(
    folder: Path,
    *,
    evaluation: Mapping[str, Any] | None = None,
    bench: Mapping[str, Any] | None = None,
    said: Stated = NOTHING_STATED,
) -> dict[str, Any]:
    """Rewrite card and report of a published folder from its JSON, after adding what is given here. Returns the document."""
    report = read_report(folder)
    if evaluation is not None:
        report["evaluation"] = {"document": evaluation}
    if bench is not None:
        report["bench"] = bench
    with open_folder(folder) as examined:
        info = examined.info
        shapes = {layer: layer_shape(examined.checkpoint, info, layer) for layer in info.layers}
    with reading(folder):
        report = restated(report, said)
        recorded = {record["name"]: tuple(record["shape"]) for record in report.get("layers", ()) if record["group_size"] is not None}
    if recorded and recorded != shapes:
        raise BadInput(
            "E374",
            "the report is of another model: its linears are not those of this folder",
            where=str(folder / JSON),
            fix="put the report back that was published with these weights, or write the checkpoint again",
        )
    written = checked_files(report, folder, name=folder.resolve().name, fmt=info.format, layers=info.layers)
    remove_temporaries(folder, older=_ABANDONED)
    for name, data in written.items():
        write_bytes(folder / name, data)
    return report


def restated(report: Mapping[str, Any], said: Stated) -> dict[str, Any]:
    """The document with what a person says of the original."""
    key = "teacher" if report["kind"] == "distill" else "source"
    original = dict(report[key])
    original |= {"base_model": said.base_model} if said.base_model else {}
    original |= {"license": stated(original.get("license"), said.license)} if said.license else {}
    return {**report, key: original}


def checked_files(report: Mapping[str, Any], folder: Path, *, name: str, fmt: Format, layers: Mapping[str, int]) -> dict[str, bytes]:
    """`report_files` of a document that may be foreign: BadInput where it has not the form of ours."""
    with reading(folder):
        return report_files(report, folder, name=name, fmt=fmt, layers=layers)


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """BadInput E374 where the report of a folder has not the form of ours."""
    try:
        yield
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        raise _damaged(folder / JSON, f"{type(error).__name__}: {error}") from error


def read_report(folder: Path) -> dict[str, Any]:
    """marlinctl_report.json of a published folder."""
    require_folder(folder)
    path = folder / JSON
    if not path.is_file():
        raise CheckFailed(
            "E101",
            f"there is no {JSON}, so nothing is known about how this folder was made",
            where=str(folder),
            fix="name a folder that compress, quantize, sparsify or distill published; other folders have `inspect` and `eval`",
        )
    return _document(path, _KINDS)


def read_bench(path: Path) -> dict[str, Any]:
    """The bench.json that `marlinctl bench` wrote."""
    return _document(path, ("bench",))


def _document(path: Path, kinds: Sequence[str]) -> dict[str, Any]:
    try:
        document = read_plain_json(path, limit=MAX_OWN_BYTES, values=MAX_OWN_VALUES)
    except FileRefused as refused:
        raise _damaged(path, refused.problem.what) from None
    if not isinstance(document, dict) or document.get("kind") not in kinds:
        raise _damaged(path, f"its kind is none of {', '.join(kinds)}")
    if newer := written_by_newer(document, SCHEMA_VERSION):
        raise BadInput("E374", f"this document cannot be read: {newer}", where=str(path), fix=UPDATE)
    return document


def _damaged(path: Path, reason: str) -> BadInput:
    return BadInput(
        "E374", f"this is not a document that can be reported: {reason}", where=str(path), fix="give the file that marlinctl wrote"
    )
