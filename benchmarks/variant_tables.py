"""The tables of variants.py, from what its steps have left in WORK."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marlinctl.evaluation.statistics import flips, paired_mean

METRICS = ("acc_norm", "exact_match,strict-match", "acc")  # of a task that has several, the first of these; else its first


@dataclass(frozen=True, slots=True)
class Score:
    value: float
    stderr: float | None
    documents: Sequence[float]  # the score of each document: empty where the metric does not average them


def tables(work: Path, titles: Mapping[str, str], texts: Sequence[str], folders: Mapping[str, Path]) -> str:
    """Two Markdown tables. `titles`: the rows, in their order; a row is left out where nothing was measured."""
    header = ["", "s", "host GiB", "GPU GiB", *(cell for text in texts for cell in (f"{text}: KL", "perplexity", "top-1"))]
    rows, original = [], None
    for variant, title in titles.items():
        documents = [read(work, f"{variant}.{text}") for text in texts]
        original = original or (documents if documents and all(documents) else None)
        if any(documents):
            made = making(work, variant, folders.get(variant))
            rows.append([title, *made, *(cell for document in documents for cell in text_cells(document))])
    if original:
        perplexities = [document["baseline"]["perplexity"] for document in original if document]
        rows.insert(0, ["original", "-", "-", "-", *(cell for value in perplexities for cell in ("-", figure(value, 2), "-"))])
    return "\n\n".join(table for table in (markdown(header, rows), task_table(work, titles)) if table)


def task_table(work: Path, titles: Mapping[str, str]) -> str:
    """Per cent with its standard error; in brackets the difference to the original, paired by document, and the share of flips."""
    found = {variant: task_scores(read(work, f"{variant}.tasks")) for variant in ("dense", *titles)}
    names = list(dict.fromkeys(name for scores in found.values() for name in scores))
    rows = [
        [{"dense": "original", **titles}[variant], *(task_cell(scores.get(name), found["dense"].get(name), variant) for name in names)]
        for variant, scores in found.items()
        if scores
    ]
    return markdown(["", *(f"{task} ({metric})" for task, metric in names)], rows)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|---|" + "---:|" * (len(header) - 1), *lines[1:]]) if rows else ""


def read(work: Path, name: str) -> dict[str, Any] | None:
    path = work / "results" / f"{name}.json"
    document: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
    return document if document and document["finished"] else None


def making(work: Path, variant: str, folder: Path | None) -> list[str]:
    """Seconds, GiB of the host and GiB of the GPU: by the step of this run, else as the maker of the folder has written them."""
    place = folder or work / "models" / variant
    beside, inside = place.with_name(f"{place.name}.json"), place / "marlinctl_report.json"
    record: dict[str, Any] = next((json.loads(path.read_text()) for path in (beside, inside) if path.exists()), {})
    step = work / "done" / variant
    seconds = json.loads(step.read_text())["seconds"] if folder is None and step.exists() else record.get("seconds")
    peaks = [record.get(name) for name in ("peak_memory_bytes", "peak_device_memory_bytes")]
    return [
        "-" if seconds is None else f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.1f}",
        *("-" if peak is None else f"{peak / 2**30:.2f}" for peak in peaks),
    ]


def text_cells(document: dict[str, Any] | None) -> list[str]:
    if document is None:
        return ["-", "-", "-"]
    compared = document["comparison"]
    return [figure(compared["kl"], 4), figure(document["model"]["perplexity"], 2), figure(compared["top1"], 3)]


def figure(estimate: Mapping[str, float | None], digits: int) -> str:
    error = estimate["stderr"]
    return f"{estimate['value']:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def task_scores(document: dict[str, Any] | None) -> dict[tuple[str, str], Score]:
    """(Task, metric) -> score, for what was asked for: a group is one score over the documents of all its tasks."""
    if document is None:
        return {}
    found, side = {}, document["model"]
    for task in document["names"]:
        record = side["groups"].get(task) or side["tasks"][task]
        metric = next((metric for metric in METRICS if metric in record["metrics"]), next(iter(record["metrics"])))
        parts = [side["tasks"][leaf]["samples"].get(metric, ()) for leaf in record.get("tasks", [task])]
        documents = [value for part in parts for value in part]
        found[task, metric] = Score(record["metrics"][metric]["value"], record["metrics"][metric]["stderr"], documents)
    return found


def task_cell(score: Score | None, original: Score | None, variant: str) -> str:
    if score is None:
        return "-"
    text = f"{100 * score.value:.1f}" + ("" if score.stderr is None else f" ± {100 * score.stderr:.1f}")
    if variant == "dense" or original is None or not score.documents:
        return text
    difference = paired_mean(score.documents, original.documents)
    text += f" ({100 * difference.value:+.1f} ± {100 * (difference.stderr or 0.0):.1f}"
    if {*score.documents, *original.documents} <= {0.0, 1.0}:
        text += f"; {100 * flips(score.documents, original.documents).share.value:.1f}"
    return f"{text})"
