"""The document of `distill` as a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from marlinctl.checkpoint.licence import spoken
from marlinctl.errors import number_of
from marlinctl.report import pictures
from marlinctl.report.page import Block, Cell, Figure, Name, Page, Points, Section, Table
from marlinctl.report.provenance import Folder, named, peak_memory, reproduce
from marlinctl.report.scores import finite

_TRAINED = {"full": "linears and norms", "blockwise": "linears and norms, block by block", "scales": "scales and norms, codes fixed"}
_CURVE_LINES = 25
_NO_LOSS = ("step", "tokens", "learning_rate", "mask_changed", "pruned_norm")


def page(report: Mapping[str, Any], folder: Folder) -> Page:
    """What was done, what it changed, how the loss went."""
    training, losses = report["training"], report["held_out"]
    odd = [[line] for line in report.get("warnings", [])]
    sections = [
        Section("Needs attention", [Points(odd)] if odd else []),
        Section("Held-out loss", [held_out(losses)]),
        Section("Loss curve", [curve(training), _curve_table(training["curve"])]),
        Section("Where it comes from", [Table((), _facts(report, folder))]),
        Section("Make it again", reproduce(report, folder)),
    ]
    figures = [
        _headline(losses),
        Figure(
            "Tokens",
            f"{training['tokens']:,}",
            f"in {number_of(training['steps'], 'step')}" + (" for each block" if _is_blockwise(report) else ""),
        ),
        Figure("Speed", f"{training['tokens_per_second'] or 0:,.0f} tokens/s", f"on {report['device']}"),
        Figure("Time", f"{training['seconds']:,.1f} s", "of training"),
        peak_memory(report),
    ]
    lead = f"Trained toward {report['teacher']['name']}: {trained(report)}."
    by = f"Written by marlinctl {report['versions']['marlinctl']} from marlinctl_report.json, which has every figure of this page."
    shown = [section for section in sections if section.blocks]
    return Page(f"{report['student']['name']}, distilled", lead, figures, shown, by)


def _headline(losses: Mapping[str, Mapping[str, float]]) -> Figure:
    """The loss; of mode blockwise, which has one for each block, that of the last, behind which all errors have met."""
    name = "loss" if "loss" in losses["after"] else [*losses["after"]][-1]
    title = "Held-out loss" if name == "loss" else f"Held-out loss, {name}"
    return Figure(title, _number(losses["after"][name]), f"before: {_number(losses['before'][name])}")


def held_out(losses: Mapping[str, Mapping[str, float]]) -> Block:
    before, after = losses["before"], losses["after"]
    rows = [(name, _number(before[name]), _number(after[name])) for name in before]
    return Table(("held-out loss", "before", "after"), rows, numbers=frozenset((1, 2)))


def curve(training: Mapping[str, Any]) -> Block:
    """The losses over the steps; of mode blockwise one line for each block."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in training["curve"]:
        values = {f"block {row['block']}": row["loss"]} if "block" in row else {k: v for k, v in row.items() if k not in _NO_LOSS}
        for name, value in values.items():
            if finite(value):
                lines.setdefault(name, []).append((row["step"], value))
    return pictures.curves(lines, "step", "Losses of the training, each the mean since the point before it.")


def trained(report: Mapping[str, Any]) -> str:
    sparse = report["sparse_linears"]
    how = "renewed" if "mask" in report["training"] else "fixed"
    return _TRAINED[report["recipe"]["distill"]["mode"]] + (f"; 2:4 masks of {number_of(sparse, 'linear')} {how}" if sparse else "")


def _mask(training: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """What renewing changed; nothing of a fixed mask."""
    if "mask" not in training:
        return ""
    mask = training["mask"]
    renewals = f"{number_of(mask['renewals'], 'renewal')}, every {number_of(asked['mask_interval'], 'step')}"
    return f"{renewals}; {mask['changed']:.2%} of the kept weights are others; {mask['pruned_norm']['after']:.2%} of the norm set to zero"


def _is_blockwise(report: Mapping[str, Any]) -> bool:
    return bool(report["recipe"]["distill"]["mode"] == "blockwise")


def _facts(report: Mapping[str, Any], folder: Folder) -> list[tuple[Cell, Cell]]:
    asked, training, data = report["recipe"]["distill"], report["training"], report["data"]
    losses = ", ".join(f"{name} {asked[name]:g}" for name in ("ce", "squarehead", "kl") if asked[name])
    losses = "relative error of each block's output" if _is_blockwise(report) else f"{losses}, temperature {asked['temperature']:g}"
    rows = f"{number_of(data['rows']['trained'], 'row')}, {data['rows']['held_out']} held out ({data['how']})"
    return [
        ("student", Name(report["student"]["name"])),
        ("teacher", Name(named(report["teacher"]))),
        ("its licence", spoken(report["teacher"].get("license"))),
        ("losses", losses),
        *((("mask", changed),) if (changed := _mask(training, asked)) else ()),
        ("data", Name(str(data["source"]))),
        ("", rows),
        ("learning rate", f"{asked['learning_rate']:g}, batches of {asked['batch_tokens']:,} tokens"),
        ("tokens", f"{training['tokens']:,} in {number_of(training['steps'], 'step')}"),
        ("seed", str(asked["seed"])),
        ("computed on", f"{report['device']}, {number_of(report['processes'], 'process', 'processes')}, products in {report['dtype']}"),
        ("versions", ", ".join(f"{name} {number}" for name, number in report["versions"].items())),
        ("written", report.get("written", "")),
        ("SHA-256 of the recipe", Name(report["recipe"]["sha256"])),
        ("SHA-256 of the manifest", Name(folder.manifest_sha256)),
    ]


def _curve_table(rows: Sequence[Mapping[str, float]]) -> Block:
    """Every so many lines of it, the last one always."""
    step = -(-len(rows) // _CURVE_LINES)
    thinned = [*rows[: len(rows) - 1 : step], rows[-1]]
    cells = [[_number(value) for value in row.values()] for row in thinned]
    return Table(tuple(rows[0]), cells, numbers=frozenset(range(len(rows[0]))), folded="The curve as numbers")


def _number(value: float | None) -> str:
    if value is None or not finite(value):
        return "not a number"
    return f"{value:,}" if isinstance(value, int) else f"{value:.5g}"
