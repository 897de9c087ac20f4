"""The figures of an evaluation's JSON document, one by one: for the table at the terminal, the card and the report.

Each is an estimate, {"value", "stderr"}, of the model, of its baseline and of the paired difference. The difference's error is smaller than
the two errors beside it suggest: what is common to both models cancels (evaluation/statistics.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from marlinctl.errors import number_of

# Metrics of lm_eval's tasks whose shares of the original's score mean something: more is better, and 0 is the worst.
_SHARES = ("acc", "acc_norm", "acc_bytes", "acc_all", "exact_match", "f1", "bleu", "chrf", "chrf++")
_SHARES_LIKE = ("pass@", "rouge", "prompt_level_", "inst_level_")
RECOVERY = (
    "Recovery is this model's score as a share of the original's. It is given for tasks where more is better; "
    "near the score of guessing it stays high whatever was lost. Perplexity and KL divergence have none: less is better there."
)

Estimate = Mapping[str, Any]  # {"value": float or None, "stderr": float or None}


@dataclass(frozen=True, slots=True)
class Score:
    """`kind` is "task", "perplexity" or "distance" (KL and agreement, which no model has alone)."""

    kind: str
    name: str  # of the task or the text
    split: str
    metric: str
    digits: int
    ours: Estimate | None
    baseline: Estimate | None = None
    difference: Estimate | None = None
    whole: bool = True  # of all documents; a score of a part is for trying out
    flips: Mapping[str, Any] | None = None  # an estimate with "to_wrong" and "to_correct", of a task that is right or wrong


def scores(document: Mapping[str, Any]) -> list[Score]:
    """Every figure, tasks first."""
    return [*_of_tasks(document), *_of_text(document)]


def figure(estimate: Estimate | None, *, digits: int = 4, signed: bool = False) -> str:
    """0.5075 ± 0.0141; a dash where there is nothing; no ± where the error is not known."""
    if estimate is None:
        return "-"
    if not finite(estimate["value"]):
        return "not a number"
    value = f"{estimate['value']:{'+' if signed else ''}.{digits}f}"
    return f"{value} ± {estimate['stderr']:.{digits}f}" if finite(estimate.get("stderr")) else value


def flips_figure(flips: Mapping[str, Any] | None) -> str:
    """0.1500 ± 0.0819 (-0.1000 +0.0500): the share of answers that change, of it correct to wrong and wrong to correct."""
    if flips is None:
        return ""
    return f"{figure(flips)} (-{flips['to_wrong']['value']:.4f} +{flips['to_correct']['value']:.4f})"


def recovery(score: Score) -> float | None:
    """This model's score over the original's; None where that means nothing (perplexity, KL, a bias, an original without a score)."""
    metric = score.metric.partition(",")[0]
    if score.kind != "task" or not (metric in _SHARES or metric.startswith(_SHARES_LIKE)):
        return None
    ours, theirs = (None if side is None else side["value"] for side in (score.ours, score.baseline))
    if ours is None or theirs is None or not (math.isfinite(ours) and math.isfinite(theirs)) or theirs <= 0:
        return None
    return float(ours / theirs)


def percent(share: float | None) -> str:
    """98.4 %; empty without a share."""
    return "" if share is None else f"{100 * share:.1f} %"


def finite(value: float | None) -> bool:
    """JSON has no NaN: it is written as null."""
    return value is not None and math.isfinite(value)


def notes(document: Mapping[str, Any]) -> list[str]:
    """What the figures were measured on, and what a reader must not overlook."""
    lines = []
    if (text := document.get("text")) is not None:
        start = ", each after the beginning-of-sequence token" if text["starts_with"] is not None else ""
        lines.append(f"text: {text['note']}, SHA-256 {text['sha256']}")
        lines.append(f"      {number_of(text['windows'], 'window')} of {text['window']:,} tokens{start}")
    if (asked := document.get("settings", {}).get("activations")) is not None:
        lines.append(f"activations: {asked} in all quantized linears of the model, whatever its folder says (--activations)")
    records = document["model"].get("tasks", {})
    if (document.get("comparison") or {}).get("flips"):
        lines.append("flips: share of answers that change against the baseline (- correct to wrong, + wrong to correct)")
    limited = [name for name, record in records.items() if record["documents"] < record["of_documents"]]
    if limited:
        lines.append(f"limited: {len(limited)} of {len(records)} tasks ran on a part of their documents; such scores are for trying out")
    cut = [f"{record['cut']} of {record['documents']} questions of {name}" for name, record in records.items() if record.get("cut")]
    if cut:
        lines.append(f"cut: {', '.join(cut)} are longer than the model reads; their beginnings were left out")
    return lines


def _of_tasks(document: Mapping[str, Any]) -> Iterator[Score]:
    baseline = document.get("baseline") or {}
    comparison = document.get("comparison") or {}
    differences, flips = comparison.get("tasks", {}), comparison.get("flips", {})
    for name in document.get("names", []):
        theirs = _metrics(baseline, name)
        for metric, estimate in _metrics(document["model"], name).items():
            difference = differences.get(name, {}).get(metric)
            flipped = flips.get(name, {}).get(metric)
            records = _leaves(document["model"], name)
            splits = ", ".join(sorted({record["split"] for record in records}))
            whole = all(record["documents"] == record["of_documents"] for record in records)
            yield Score("task", name, splits, metric, 4, estimate, theirs.get(metric), difference, whole, flipped)


def _metrics(side: Mapping[str, Any], name: str) -> dict[str, Estimate]:
    record = side.get("groups", {}).get(name) or side.get("tasks", {}).get(name) or {}
    found: dict[str, Estimate] = record.get("metrics", {})
    return found


def _leaves(side: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    return [side["tasks"][leaf] for leaf in side.get("groups", {}).get(name, {}).get("tasks", [name])]


def _of_text(document: Mapping[str, Any]) -> Iterator[Score]:
    if (text := document.get("text")) is None:
        return
    comparison = document.get("comparison") or {}
    ours, theirs = document["model"].get("perplexity"), (document.get("baseline") or {}).get("perplexity")
    if ours is not None:
        yield Score("perplexity", text["name"], "-", "perplexity", 3, ours, theirs, comparison.get("perplexity"))
    for key, metric, digits in (("kl", "KL, nats", 5), ("top1", "top-1 agreement", 4)):
        if (estimate := comparison.get(key)) is not None:
            yield Score("distance", text["name"], "-", metric, digits, estimate)
