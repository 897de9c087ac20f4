"""An evaluation as text: aligned columns, every figure with its standard error.

    task        split       metric           score              baseline         difference
    winogrande  validation  acc              0.5201 ± 0.0140    0.5028 ± 0.0141  +0.0174 ± 0.0119
    pythondoc   -           perplexity       14.766 ± 0.777     12.427 ± 0.661   +2.340 ± 0.131
    pythondoc   -           KL, nats         0.18246 ± 0.00158

The difference's error is the paired one (statistics.py): smaller than the two errors beside it suggest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Row = tuple[str, str, str, str, str, str]


def rows(document: dict[str, Any]) -> list[Row]:
    """Every figure: task or text, split, metric, score, baseline, difference."""
    return [*_task_rows(document), *_text_rows(document)]


def render_table(document: dict[str, Any]) -> str:
    compared = document.get("baseline") is not None
    head: Row = ("task", "split", "metric", "score", "baseline", "difference")
    width = 6 if compared else 4
    cells = [row[:width] for row in [head, *rows(document)]]
    widths = [max(len(row[column]) for row in cells) for column in range(width)]
    lines = ["  ".join(cell.ljust(size) for cell, size in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([*lines, *_notes(document)])


def figure(estimate: dict[str, Any] | None, *, digits: int = 4, signed: bool = False) -> str:
    """0.5075 ± 0.0141; a dash where there is nothing; no ± where the error is not known."""
    if estimate is None:
        return "-"
    if estimate["value"] is None:
        return "not a number"
    value = f"{estimate['value']:{'+' if signed else ''}.{digits}f}"
    return value if estimate.get("stderr") is None else f"{value} ± {estimate['stderr']:.{digits}f}"


def _task_rows(document: dict[str, Any]) -> Iterator[Row]:
    baseline = document.get("baseline") or {}
    differences = (document.get("comparison") or {}).get("tasks", {})
    for name in document.get("names", []):
        ours = _scores(document["model"], name)
        theirs = _scores(baseline, name)
        for metric, estimate in ours.items():
            difference = figure(differences.get(name, {}).get(metric), signed=True)
            yield name, _splits(document["model"], name), metric, figure(estimate), figure(theirs.get(metric)), difference


def _scores(side: dict[str, Any], name: str) -> dict[str, Any]:
    record = side.get("groups", {}).get(name) or side.get("tasks", {}).get(name) or {}
    scores: dict[str, Any] = record.get("metrics", {})
    return scores


def _splits(side: dict[str, Any], name: str) -> str:
    leaves = side.get("groups", {}).get(name, {}).get("tasks", [name])
    return ", ".join(sorted({side["tasks"][leaf]["split"] for leaf in leaves}))


def _text_rows(document: dict[str, Any]) -> Iterator[Row]:
    if (text := document.get("text")) is None:
        return
    name = text["name"]
    comparison = document.get("comparison") or {}
    ours, theirs = document["model"].get("perplexity"), (document.get("baseline") or {}).get("perplexity")
    if ours is not None:
        difference = figure(comparison.get("perplexity"), digits=3, signed=True)
        yield name, "-", "perplexity", figure(ours, digits=3), figure(theirs, digits=3), difference
    for key, metric, digits in (("kl", "KL, nats", 5), ("top1", "top-1 agreement", 4)):
        if (estimate := comparison.get(key)) is not None:
            yield name, "-", metric, figure(estimate, digits=digits), "", ""


def _notes(document: dict[str, Any]) -> Iterator[str]:
    if (text := document.get("text")) is not None:
        start = ", each after the beginning-of-sequence token" if text["starts_with"] is not None else ""
        yield f"text: {text['note']}, SHA-256 {text['sha256']}"
        yield f"      {text['windows']} windows of {text['window']:,} tokens{start}"
    records = document["model"].get("tasks", {})
    if records:
        limited = [name for name, record in records.items() if record["documents"] < record["of_documents"]]
        if limited:
            yield f"limited: {len(limited)} of {len(records)} tasks ran on a part of their documents; such scores are for trying out"
