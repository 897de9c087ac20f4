"""The document of compress, quantize, sparsify or pack as a page: what was done, how good it is, what needs attention, every layer.

`report` is marlinctl_report.json. `manifest` is the manifest of the folder, with its digest; both lie beside the weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from marlinctl.errors import number_of
from marlinctl.quantize.scheme import SIXTEEN_BIT
from marlinctl.report import pictures
from marlinctl.report.page import Block, Cell, Figure, Name, Page, Paragraph, Points, Section, Table
from marlinctl.report.provenance import Folder, activations_of, grid_of, peak_memory, provenance, reproduce
from marlinctl.report.scores import RECOVERY, Estimate, Score, figure, finite, flips_figure, notes, percent, recovery, scores
from marlinctl.report.speed import speed


@dataclass(frozen=True, slots=True)
class _Layer:
    """A row of the report, with the bytes that this folder's format takes."""

    record: Mapping[str, Any]
    bits: float

    @property
    def group(self) -> str:
        """A record has K where the whole row shares a scale."""
        size = self.record["group_size"]
        return "16-bit" if size is None else "row" if size == self.record["shape"][1] else str(size)

    @property
    def place(self) -> tuple[int, str] | None:
        """Block and kind: model.layers.3.mlp.experts.7.up_proj -> 3, experts.up_proj. None outside of the blocks (the head)."""
        parts = str(self.record["name"]).split(".")
        number = next((part for part in parts if part.isdecimal()), None)
        if number is None:
            return None
        return int(number[:9]), f"experts.{parts[-1]}" if "experts" in parts else parts[-1]


def page(report: Mapping[str, Any], folder: Folder) -> Page:
    """The whole page of one published folder."""
    layers = [_Layer(record, _bits(record, folder)) for record in report["layers"]]
    sections = [
        Section("Needs attention", _attention(report)),
        Section("Quality", _quality(report)),
        Section("Layers", _layers(report, layers)),
        Section("Training", _training(report)),
        Section("Kernel speed", speed(report.get("bench"))),
        Section("Where it comes from", provenance(report, folder)),
        Section("Make it again", reproduce(report, folder)),
    ]
    done = ", ".join(_counts(report))
    return Page(
        f"{report['source']['name']}, {folder.fmt.label}",
        f"{done}; recipe {report['recipe']['name']}, {_groups(report, layers)}{_scales(report)}{_activations(report, folder)}.",
        list(_figures(report, layers)),
        [section for section in sections if section.blocks],
        f"Written by marlinctl {report['versions']['marlinctl']} from marlinctl_report.json, which has every figure of this page.",
    )


def _bits(record: Mapping[str, Any], folder: Folder) -> float:
    n, k = record["shape"]
    group_size = record["group_size"]
    bytes_out = (
        record["bytes_out"] if group_size is None else folder.linear_bytes(n, k, -1 if group_size == k else group_size, grid_of(record))
    )
    return 8 * bytes_out / (n * k)


def _counts(report: Mapping[str, Any]) -> list[str]:
    """How many were quantized, pruned and left alone."""
    done = len(report["layers"]) if report["bits"] < SIXTEEN_BIT else 0
    counts = {"quantized": done, "pruned to 2:4": report["sparse"], "left 16-bit": len(report["kept"])}
    return [f"{number_of(count, 'linear')} {what}" for what, count in counts.items() if count]


def _groups(report: Mapping[str, Any], layers: Sequence[_Layer]) -> str:
    if report["bits"] == SIXTEEN_BIT:
        return "not quantized"
    sizes = Counter(layer.group for layer in layers).most_common()
    names = ["one scale a row" if size == "row" else f"group size {size}" for size, _ in sizes]
    if len(sizes) == 1:
        return names[0]
    return ", ".join(f"{name} ({number_of(count, 'linear')})" for name, (_, count) in zip(names, sizes, strict=True))


def _scales(report: Mapping[str, Any]) -> str:
    found = sum(bool(record.get("integer_scales")) for record in report["layers"])  # earlier versions noted none
    return f", integer group scales ({number_of(found, 'linear')})" if found else ""


def _activations(report: Mapping[str, Any], folder: Folder) -> str:
    """Those that are rounded when this folder is run."""
    counts = Counter(activations_of(record, folder.fmt) for record in report["layers"])
    rounded = ((kind, count) for kind, count in counts.most_common() if kind != "16-bit")
    return "".join(f", {kind} activations ({number_of(count, 'linear')})" for kind, count in rounded)


def _figures(report: Mapping[str, Any], layers: Sequence[_Layer]) -> Iterator[Figure]:
    size = report["bytes"]
    before, after = size["source"], size["result"]
    yield Figure("Size", f"{after / 1e6:,.1f} MB", f"of {before / 1e6:,.1f} MB, {before / after:.2f} times smaller")
    weights = sum(n * k for n, k in (layer.record["shape"] for layer in layers))
    if weights:
        bits = sum(layer.bits * layer.record["shape"][0] * layer.record["shape"][1] for layer in layers) / weights
        yield Figure("Bits per weight", f"{bits:.3g}", "of the linears, scales included")
    for score in _scores(report):
        value, error = _apart(score.ours, 2 if score.kind == "perplexity" else 4)
        if score.kind == "perplexity" and score.difference is not None:
            note = f"original {_apart(score.baseline, 2)[0]}; difference {figure(score.difference, digits=2, signed=True)}"
            yield Figure("Perplexity", value, note)
        elif score.metric.startswith("KL"):
            yield Figure("KL divergence", value, f"{error}nats a token, from the original")
    yield Figure("Time", f"{report['seconds']:,.1f} s", f"on {report['device']}, evaluation apart")
    yield peak_memory(report)


def _apart(estimate: Estimate | None, digits: int) -> tuple[str, str]:
    """A figure and its error, for places that are too narrow for both in one line."""
    value, _, error = figure(estimate, digits=digits).partition(" ± ")
    return value, f"± {error} " if error else ""


def _attention(report: Mapping[str, Any]) -> list[Block]:
    items: list[list[Cell]] = [[Name(item["name"]), item["fallback"]] for item in report["fallbacks"]]
    items += [[Name(item["name"]), item["remark"]] for item in report["underfed"]]
    items += [
        [
            Name(item["name"]),
            f"{number_of(item['count'], 'input was', 'inputs were')} zero in all of calibration; the weights there are rounded and kept",
        ]
        for item in report["dead_inputs"]
    ]
    items += [[line] for line in report.get("warnings", [])]
    return [Points(items)] if items else []


def _scores(report: Mapping[str, Any]) -> list[Score]:
    document = report.get("evaluation", {}).get("document")
    return scores(document) if document else []


def _quality(report: Mapping[str, Any]) -> list[Block]:
    evaluation = report.get("evaluation")
    if not evaluation:
        return []
    document = evaluation.get("document")
    if document is None:
        return [Paragraph(evaluation["table"])]  # why nothing could be measured
    found = scores(document)
    rows = [
        (
            s.name if s.split == "-" else f"{s.name} ({s.split})",
            s.metric,
            figure(s.ours, digits=s.digits),
            "" if s.kind == "distance" else figure(s.baseline, digits=s.digits),
            "" if s.kind == "distance" else figure(s.difference, digits=s.digits, signed=True),
            percent(recovery(s)),
            flips_figure(s.flips),
        )
        for s in found
    ]
    header = ("measured on", "metric", "this model", "original", "difference", "recovery", "flips")
    width = 7 if any(s.flips for s in found) else 6
    blocks: list[Block] = [Table(header[:width], [row[:width] for row in rows], numbers=frozenset(range(2, width)))]
    if any(recovery(s) is not None for s in found):
        blocks.append(Paragraph(RECOVERY))
    if any(s.ours and s.baseline for s in found if s.kind != "distance"):
        caption = "This model beside its original, with one standard error to each side. That of the paired difference (table) is smaller."
        blocks.append(pictures.comparison(found, caption))
    if gate := evaluation.get("gate"):
        blocks.append(Paragraph(_gate(gate)))
    return [*blocks, *(Paragraph(line.strip()) for line in notes(document))]


def _gate(gate: Mapping[str, Any]) -> str:
    asked = [
        f"{flag} {gate[key]:g}" for key, flag in (("max_kl", "--max-kl"), ("max_ppl_ratio", "--max-ppl-ratio")) if gate[key] is not None
    ]
    found = f"KL {gate['kl']:.4f}, perplexity {gate['ppl_ratio']:.3f} times the original's"
    return f"Asked for: {', '.join(asked)}; found: {found}: {'passed' if gate['passed'] else 'not passed, published all the same'}."


def _layers(report: Mapping[str, Any], layers: Sequence[_Layer]) -> list[Block]:
    error = report["error"]
    blocks: list[Block] = [
        Table((), [("mean error", f"{_share(error['mean'])} of the output energy"), ("largest error", Name(error["worst"]))])
    ]
    shown = [(layer.place, layer) for layer in layers]
    drawn = tuple(
        pictures.Layer(*place, layer.record["error"], layer.bits, layer.record["seconds"])
        for place, layer in shown
        if place and finite(layer.record["error"])
    )
    if drawn:
        caption = "Over the decoder blocks: error of each kind of linear, bits per weight with scales, and the time of the solve."
        blocks.append(pictures.layers(drawn, caption))
    rounds = any(r.get("rounding_error") is not None for r in report["layers"])
    rows = [
        (
            Name(r["name"]),
            f"{r['shape'][0]} x {r['shape'][1]}",
            layer.group,
            r["pattern"] or "-",
            f"{layer.bits:.3f}",
            _share(r["error"]),
            f"{r['damping']:g}",
            f"{r['tokens']:,}",
            f"{r['seconds']:.2f}",
            *((r["rounding"], _share(r["rounding_error"])) if rounds else ()),
        )
        for layer in layers
        for r in (layer.record,)
    ]
    header: tuple[str, ...] = ("linear", "N x K", "group", "pattern", "bits", "error", "damping", "tokens", "seconds")
    header += ("inputs rounded", "error of rounding") if rounds else ()
    blocks.append(Table(header, rows, numbers=frozenset((*range(4, 9), *((10,) if rounds else ()))), folded=f"Every linear ({len(rows)})"))
    if report["kept"]:
        kept = [(Name(item["name"]), item["reason"]) for item in report["kept"]]
        blocks.append(Table(("linear", "why"), kept, folded=f"Left at 16 bits ({len(kept)})"))
    return blocks


def _share(error: float | None) -> str:
    return f"{error:.5f}" if error is not None and finite(error) else "not a number"


def _training(report: Mapping[str, Any]) -> list[Block]:
    """Of a recipe that prunes, distils and then quantizes: what the first two did."""
    stages = report.get("stages")
    if not stages:
        return []
    from marlinctl.report.training import curve, held_out

    pruned, distilled = stages["pruned"], stages["distilled"]
    facts: list[tuple[Cell, Cell]] = [
        ("pruned", f"{number_of(len(pruned['layers']), 'linear')}, mean error {pruned['error']['mean']:.5f}, {pruned['seconds']:,.1f} s"),
        ("distilled", f"{distilled['training']['tokens']:,} tokens in {number_of(distilled['training']['steps'], 'step')}"),
    ]
    return [Table((), facts), held_out(distilled["held_out"]), curve(distilled["training"])]
