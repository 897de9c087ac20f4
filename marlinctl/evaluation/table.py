"""An evaluation as text: aligned columns, every figure with its standard error.

task       split  metric                   score              baseline         difference        flips
ifeval     train  prompt_level_strict_acc  0.2000 ± 0.1333    0.3000 ± 0.1528  -0.1000 ± 0.1795  0.3000 ± 0.1528 (-0.2000 +0.1000)
pythondoc  -      perplexity               16.137 ± 0.821     13.359 ± 0.651   +2.778 ± 0.170
pythondoc  -      KL, nats                 0.18767 ± 0.00447
"""

from __future__ import annotations

from typing import Any

from marlinctl.report.scores import Score, figure, flips_figure, notes, scores
from marlinctl.system.log import printable

Row = tuple[str, str, str, str, str, str, str]


def rows(document: dict[str, Any]) -> list[Row]:
    """Every figure: task or text, split, metric, score, baseline, difference, flips."""
    return [_row(score) for score in scores(document)]


def render_table(document: dict[str, Any]) -> str:
    compared = document.get("baseline") is not None
    head: Row = ("task", "split", "metric", "score", "baseline", "difference", "flips")
    flipped = any(score.flips for score in scores(document))
    width = 7 if flipped else 6 if compared else 4
    cells = [[printable(cell, one_line=True) for cell in row[:width]] for row in [head, *rows(document)]]
    widths = [max(len(row[column]) for row in cells) for column in range(width)]
    lines = ["  ".join(cell.ljust(size) for cell, size in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([*lines, *notes(document)])


def _row(score: Score) -> Row:
    alone = score.kind == "distance"
    baseline = "" if alone else figure(score.baseline, digits=score.digits)
    difference = "" if alone else figure(score.difference, digits=score.digits, signed=True)
    ours = figure(score.ours, digits=score.digits)
    return score.name, score.split, score.metric, ours, baseline, difference, flips_figure(score.flips)
