"""Report and card of a distilled checkpoint, from one JSON document."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from marlinctl import __version__
from marlinctl.checkpoint.formats import LOADERS
from marlinctl.console import SCHEMA_VERSION

_FORMS = {"dense": "16-bit weights", "ct": "4-bit weights, compressed-tensors `pack-quantized`"}
CURVE_LINES = 25


def report_files(report: Mapping[str, Any]) -> dict[str, bytes]:
    """What is published beside the checkpoint, outside the manifest."""
    return {
        "README.md": card(report).encode(),
        "marlinctl_report.json": (json.dumps({"schema_version": SCHEMA_VERSION, **report}, indent=1) + "\n").encode(),
        "marlinctl_report.md": markdown(report).encode(),
    }


def markdown(report: Mapping[str, Any]) -> str:
    """One page: what was done, what it changed, how the loss went."""
    training = report["training"]
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    parts = [
        "# marlinctl distill report\n",
        _table(("", ""), _facts(report)),
        "## Held-out loss\n",
        _table(("", "before", "after"), _held_out(report)),
        "## Loss curve\n",
        _table(tuple(training["curve"][0]), ([_number(v) for v in row.values()] for row in _thinned(training["curve"]))),
        "## Reproduce\n",
        f"    {report['command']}\n",
        f"Versions: {versions}. Recipe SHA-256 {report['recipe']['sha256']}.\n",
    ]
    return "\n".join(parts)


def card(report: Mapping[str, Any]) -> str:
    """README.md: the model card."""
    form = _FORMS[report["format"]]
    title = f"{form}, 2:4 sparse" if report["sparse_linears"] else form
    original = report["teacher"]["name"] if report["teacher"]["kind"] == "hub" else None
    tags = ["marlinctl", "distillation", *(["2:4"] if report["sparse_linears"] else [])]
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    lines += [f"base_model: {json.dumps(original)}"] if original else []
    lines += ["tags:", *(f"- {json.dumps(tag)}" for tag in tags), "---", "", f"# {title}", ""]
    rows = [
        ("Trained", _trained(report)),
        ("Original", f"`{original}`" if original else ""),
        ("Written by", f"marlinctl {__version__}"),
        ("Loads in", ", ".join(LOADERS[report["format"]])),
    ]
    lines += [_table(("", ""), [row for row in rows if row[1]]), "## Held-out loss", "", _table(("", "before", "after"), _held_out(report))]
    lines += ["## How it was made", "", "```", report["command"].replace("```", "'''"), "```", ""]
    return "\n".join(lines)


def _facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    asked, training, data = report["recipe"]["distill"], report["training"], report["data"]
    blockwise = asked["mode"] == "blockwise"
    losses = ", ".join(f"{name} {asked[name]:g}" for name in ("ce", "squarehead", "kl") if asked[name])
    losses = "relative error of each block's output" if blockwise else f"{losses}, temperature {asked['temperature']:g}"
    return [
        ("student", report["student"]["name"]),
        ("teacher", report["teacher"]["name"]),
        ("trained", _trained(report)),
        ("losses", losses),
        ("data", f"{data['source']} ({data['how']}): {data['rows']['trained']} rows, {data['rows']['held_out']} held out"),
        ("tokens", f"{training['tokens']:,} in {training['steps']} steps" + (" for each block" if blockwise else "")),
        ("learning rate", f"{asked['learning_rate']:g}"),
        ("time", f"{training['seconds']:,.1f} s of training on {report['device']}, {report['processes']} processes, {report['dtype']}"),
        ("speed", f"{training['tokens_per_second'] or 0:,.0f} tokens/s"),
        ("peak memory", _memory(report)),
    ]


def _trained(report: Mapping[str, Any]) -> str:
    what = {"full": "linears and norms", "blockwise": "linears and norms, block by block", "scales": "scales and norms, codes fixed"}
    sparse = report["sparse_linears"]
    return what[report["recipe"]["distill"]["mode"]] + (f"; 2:4 masks of {sparse} linears fixed" if sparse else "")


def _memory(report: Mapping[str, Any]) -> str:
    host = f"{report['peak_memory_bytes'] / 2**30:.2f} GiB"
    device = report["peak_device_memory_bytes"]
    return f"{host} on the host, {device / 2**30:.2f} GiB on the device" if device else host


def _held_out(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    before, after = report["held_out"]["before"], report["held_out"]["after"]
    return [(name, _number(before[name]), _number(after[name])) for name in before]


def _thinned(curve: Sequence[Mapping[str, float]]) -> Sequence[Mapping[str, float]]:
    """Every so many lines of it, the last one always."""
    step = -(-len(curve) // CURVE_LINES)
    return [*curve[: len(curve) - 1 : step], curve[-1]]


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.5g}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [_row(header), _row(["---"] * len(header)), *(_row(row) for row in rows)]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
