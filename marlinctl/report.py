"""The report of a run: one JSON document, and the Markdown page and model card made from it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from marlinctl.card import CardFacts
from marlinctl.card import render as render_card
from marlinctl.console import SCHEMA_VERSION


def report_files(
    report: Mapping[str, Any],
    *,
    fmt: str,
    layers: Mapping[str, int],
    ignore: Sequence[str],
    scores: Sequence[tuple[str, str, str, str]] = (),
) -> dict[str, bytes]:
    """What is published about a checkpoint beside it, outside the manifest: card, JSON and Markdown."""
    calibration, source = report["calibration"], report["source"]
    facts = CardFacts(
        fmt=fmt,
        layers=layers,
        ignore=ignore,
        command=report["command"],
        base_model=source["name"] if source["kind"] == "hub" else None,
        calibration=f"{calibration['samples']['got']} samples, {calibration['tokens']['counted']:,} tokens ({calibration['how']})",
        recipe_hash=report["recipe"]["sha256"],
        scores=scores,
        two_of_four=report["sparse"] > 0,
    )
    return {
        "README.md": render_card(facts).encode(),
        "marlinctl_report.json": (json.dumps({"schema_version": SCHEMA_VERSION, **report}, indent=1) + "\n").encode(),
        "marlinctl_report.md": markdown(report).encode(),
    }


def markdown(report: Mapping[str, Any]) -> str:
    """One page: what was done, how good it is, what needs attention, every layer."""
    parts = [_summary(report), _attention(report), _quality(report), _layers(report), _reproduce(report)]
    return "\n".join(part for part in parts if part)


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [_row(header), _row(["---"] * len(header)), *(_row(row) for row in rows)]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _summary(report: Mapping[str, Any]) -> str:
    source, calibration, size = report["source"], report["calibration"], report["bytes"]
    recipe = report["recipe"]
    rows = [
        (
            "source",
            f"{source['name']}{' @ ' + source['revision'] if source['revision'] else ''}"
            + (f" ({source['note']})" if source["note"] else ""),
        ),
        ("recipe", f"{recipe['name']}, group size {recipe['quantize']['group_size']}"),
        (
            "calibration",
            f"{calibration['source']}: {calibration['samples']['got']} samples, {calibration['tokens']['counted']:,} tokens counted, "
            f"SHA-256 of the ids {calibration['sha256'][:16]}...",
        ),
        ("linears", ", ".join(_linears(report))),
        ("size", f"{size['source'] / 1e6:,.1f} MB -> {size['result'] / 1e6:,.1f} MB ({size['source'] / size['result']:.2f} times smaller)"),
        ("mean layer error", f"{report['error']['mean']:.5f} of the output energy; worst: {report['error']['worst']}"),
        ("time", f"{report['seconds']:.1f} s on {report['device']}, forward in {report['dtype']}"),
        ("peak memory", f"{report['peak_memory_bytes'] / 2**30:.2f} GiB"),
    ]
    return "# marlinctl report\n\n" + table(("", ""), rows)


def _linears(report: Mapping[str, Any]) -> list[str]:
    """How many were quantized, pruned and left alone."""
    done = len(report["layers"]) if report["bits"] == 4 else 0
    counts = {"quantized": done, "pruned to 2:4": report["sparse"], "left 16-bit": len(report["kept"])}
    return [f"{count} {what}" for what, count in counts.items() if count]


def _attention(report: Mapping[str, Any]) -> str:
    lines = [f"- {item['name']}: {item['fallback']}" for item in report["fallbacks"]]
    lines += [f"- {item['name']}: {item['remark']}" for item in report["underfed"]]
    lines += [
        f"- {item['name']}: {item['count']} inputs were zero in all of calibration; their weights are rounded and kept"
        for item in report["dead_inputs"]
    ]
    return "## Needs attention\n\n" + "\n".join(lines) + "\n" if lines else ""


def _quality(report: Mapping[str, Any]) -> str:
    measured = report.get("evaluation")
    return "## Quality\n\n" + str(measured["table"]) + "\n" if measured else ""


def _layers(report: Mapping[str, Any]) -> str:
    rows = [
        (
            r["name"],
            f"{r['shape'][0]} x {r['shape'][1]}",
            r["group_size"] or "16-bit",
            f"{r['error']:.5f}",
            f"{r['damping']:g}",
            r["tokens"],
            f"{r['seconds']:.2f}",
        )
        for r in report["layers"]
    ]
    return "## Layers\n\n" + table(("linear", "N x K", "group", "error", "damping", "tokens", "seconds"), rows)


def _reproduce(report: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    return f"## Reproduce\n\n    {report['command']}\n\nVersions: {versions}. Recipe SHA-256 {report['recipe']['sha256']}.\n"
