"""Where a result comes from, down to the digests, and how to make it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from marlinctl.checkpoint.formats.base import Format
from marlinctl.checkpoint.formats.registry import linear_bytes
from marlinctl.checkpoint.licence import spoken
from marlinctl.checkpoint.runtimes import Loads
from marlinctl.errors import number_of
from marlinctl.quantize.scheme import INT4, Grid
from marlinctl.report.page import Block, Cell, Figure, Listing, Name, Paragraph, Table
from marlinctl.report.scores import notes
from marlinctl.system.console import gibibytes

_MOST_ANCESTORS = 20
_INSTALLED = ("marlinctl", "torch", "transformers", "safetensors", "tokenizers", "accelerate")


@dataclass(frozen=True, slots=True)
class Folder:
    """What the pages know of the folder beside which they lie."""

    name: str  # what the person called it
    fmt: Format
    manifest: Mapping[str, Any]
    manifest_sha256: str
    loads: Loads
    grids: Sequence[Grid] = (INT4,)  # that its codes have
    folded: tuple[str, ...] = ()  # what its weights have in them (checkpoint/orders.py)

    def linear_bytes(self, n: int, k: int, group_size: int, grid: Grid) -> int:
        """Of one quantized linear in this folder's format."""
        return linear_bytes(self.fmt, n, k, group_size, grid)


def grid_of(record: Mapping[str, Any]) -> Grid:
    """That of a layer of the report. Earlier versions noted no bits."""
    return Grid(record.get("bits", INT4.bits), record.get("symmetric", True), record.get("activations", "16-bit"))


def activations_of(record: Mapping[str, Any], fmt: Format) -> str:
    """Those of a layer of the report when a folder of this format is run. Earlier versions noted none."""
    rounding = record.get("rounding", "none") if fmt.rounds else "none"
    return str(record.get("activations", "16-bit") if rounding == "none" else rounding)


def grids_of(report: Mapping[str, Any]) -> dict[str, Grid]:
    """Of the quantized linears whose codes are not INT4."""
    quantized = (record for record in report["layers"] if record["group_size"] is not None)
    return {record["name"]: grid for record in quantized if (grid := grid_of(record)) != INT4}


def provenance(report: Mapping[str, Any], folder: Folder) -> list[Block]:
    source, recipe = report["source"], report["recipe"]
    rows: list[tuple[Cell, Cell]] = [("original", Name(named(source)))]
    rows += [("", source[key]) for key in ("note", "precision") if source.get(key)]
    rows += [("its licence", spoken(source.get("license")))]
    chain = ancestors(folder)
    rows += [("by way of", Name(", ".join(named(ancestor) for ancestor in chain[:-1])))] if len(chain) > 1 else []
    rows += _digests(chain[-1]) if chain else []
    if calibration := report.get("calibration"):
        rows += _calibration(calibration)
    rows += [
        ("recipe", recipe["name"]),
        ("SHA-256 of the recipe", Name(recipe["sha256"])),
        ("seeds", _seeds(recipe)),
        ("computed on", f"{report['device']}, forward pass in {report['dtype']}"),
        ("versions", ", ".join(f"{name} {number}" for name, number in report["versions"].items())),
        ("written", report.get("written", "")),
        *((title.lower(), said) for title, said in folder.loads.rows()),
        ("SHA-256 of the manifest", Name(folder.manifest_sha256)),
    ]
    blocks: list[Block] = [Table((), [row for row in rows if row[1] not in ("", Name(""))])]
    blocks += _checks(report)
    return blocks


def reproduce(report: Mapping[str, Any], folder: Folder) -> list[Block]:
    """The versions, the command, and the recipe with every value."""
    import yaml

    installed = " ".join(f"{name}=={number.partition('+')[0]}" for name, number in report["versions"].items() if name in _INSTALLED)
    recipe = {key: value for key, value in report["recipe"].items() if key != "sha256"}
    packed = report.get("packed")
    command = report["command"] + (f"\n{packed['command']}" if packed else "")
    said = "The same input, recipe, versions and number of threads give the same files on a CPU, card, report and log apart."
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100)
    return [Listing(f"pip install {installed}\n{command}"), Paragraph(said), Listing(text, folded="The recipe, with every value")]


def peak_memory(report: Mapping[str, Any]) -> Figure:
    """What making it took: resident memory of the host, and of a GPU what was alive there."""
    device = report["peak_device_memory_bytes"]
    note = "of the host" if device is None else f"of the host; {gibibytes(device)} alive on the GPU"
    return Figure("Peak memory", gibibytes(report["peak_memory_bytes"]), note)


def named(source: Mapping[str, Any]) -> str:
    return f"{source['name']} @ {source['revision']}" if source.get("revision") else str(source["name"])


def ancestors(folder: Folder) -> list[Mapping[str, Any]]:
    """What the folder was made from, the nearest first: a model that was pruned and distilled before it was quantized has three."""
    found: list[Mapping[str, Any]] = []
    source = folder.manifest.get("source")
    while isinstance(source, dict) and isinstance(source.get("name"), str) and len(found) < _MOST_ANCESTORS:
        found.append(source)
        earlier = source.get("made_from")
        source = (earlier.get("teacher") or earlier.get("source")) if isinstance(earlier, dict) else None
    return found


def base_model(source: Mapping[str, Any], folder: Folder) -> str | None:
    """The hub's name of the model that all of it began with: as the person gave it, else where it came from there."""
    if given := source.get("base_model"):
        return str(given)
    if source["kind"] == "hub":
        return str(source["name"])
    return next((str(source["name"]) for source in reversed(ancestors(folder)) if source.get("kind") == "hub"), None)


def _digests(source: Mapping[str, Any]) -> list[tuple[str, Cell]]:
    """One name for everything that was read: the digest of the fingerprint, whose parts are in the manifest."""
    import hashlib

    from marlinctl.system.atomic import canonical

    fingerprint = source.get("fingerprint")
    return [("SHA-256 of the fingerprint of the original", Name(hashlib.sha256(canonical(fingerprint)).hexdigest()))] if fingerprint else []


def _calibration(calibration: Mapping[str, Any]) -> list[tuple[Cell, Cell]]:
    samples, tokens = calibration["samples"], calibration["tokens"]
    parts = calibration.get("parts", ())
    mixed = (
        [("", f"{part['share']:.0%} of it, {number_of(part['samples'], 'sample')}: {public_source(part['source'])}") for part in parts]
        if len(parts) > 1
        else []
    )
    text = f"{number_of(samples['got'], 'sample')} of at most {calibration['sequence_length']} tokens, {tokens['counted']:,} tokens counted"
    return [
        ("calibration", Name(str(calibration["source"]))),
        *mixed,
        ("", f"{text} ({calibration['how']})"),
        ("SHA-256 of the token ids", Name(calibration["sha256"])),
    ]


def _seeds(recipe: Mapping[str, Any]) -> str:
    seeds = [f"calibration {recipe['calibration']['seed']}"]
    if recipe["distill"]["tokens"]:
        seeds.append(f"distillation {recipe['distill']['seed']}")
    return ", ".join(seeds)


def _checks(report: Mapping[str, Any]) -> list[Block]:
    """What `verify` found before anything was published."""
    rows: list[Sequence[Cell]] = []
    for fmt, checked in report.get("verified", {}).items():
        kernels, source = checked.get("kernels"), checked.get("source")
        found = [f"{number_of(checked['files'], 'file')} and {number_of(checked['linears'], 'linear')} as they must be"]
        found += (
            [f"logits within {checked['logit_error']:.1e} of the dequantized weights"] if checked.get("logit_error") is not None else []
        )
        found += [f"products of its tiles within {kernels['error']:.1e} ({kernels['by']})"] if kernels else []
        found += ["each linear compared with the original"] if source else []
        rows.append((fmt, "; ".join(found)))
    return [Paragraph("Checked before it was published:"), Table(("format", "found"), rows)] if rows else []


# ---- the same, short, for a model card -------------------------------------------------------------------------------------------------


def card_rows(report: Mapping[str, Any], folder: Folder) -> list[tuple[str, Cell]]:
    """Data, seeds, versions and digests. Local paths are private: of a calibration file only its name is shown."""
    rows: list[tuple[str, Cell]] = []
    source = report["source"]
    rows += [("Its commit", Name(source["revision"]))] if source.get("revision") else []
    rows += [("Its weights", source["precision"])] if source.get("precision") else []
    chain = ancestors(folder)
    rows += _digests(chain[-1]) if chain else []
    if calibration := report.get("calibration"):
        samples, tokens = calibration["samples"], calibration["tokens"]
        count = number_of(samples["got"], "sample")
        text = f"{public_source(calibration['source'])}: {count}, {tokens['counted']:,} tokens ({calibration['how']})"
        rows += [("Calibration", text), ("SHA-256 of its token ids", Name(calibration["sha256"]))]
    return [*rows, *_card_tail(report, folder, _seeds(report["recipe"]))]


def training_rows(report: Mapping[str, Any], folder: Folder) -> list[tuple[str, Cell]]:
    data, training = report["data"], report["training"]
    text = f"{public_source(data['source'])}: {training['tokens']:,} tokens in {number_of(training['steps'], 'step')} ({data['how']})"
    return [("Data", text), *_card_tail(report, folder, str(report["recipe"]["distill"]["seed"]))]


def _card_tail(report: Mapping[str, Any], folder: Folder, seeds: str) -> list[tuple[str, Cell]]:
    recipe = report["recipe"]
    return [
        ("Recipe", f"{recipe['name']}, every value in recipe.yaml"),
        ("SHA-256 of the recipe", Name(recipe["sha256"])),
        ("Seeds", seeds),
        ("Versions", ", ".join(f"{name} {number}" for name, number in report["versions"].items())),
        ("SHA-256 of the manifest", Name(folder.manifest_sha256)),
    ]


def public_notes(document: Mapping[str, Any]) -> list[str]:
    """What an evaluation was measured on. Of a text only the name of its file is shown."""
    if text := document.get("text"):
        document = {**document, "text": {**text, "note": public_source(text["note"])}}
    return [line.strip() for line in notes(document)]


def public_source(source: str) -> str:
    """`self` and data sets of the hub as they are; of a path the last part."""
    import re

    file = re.compile(r"\.(txt|jsonl|json|parquet)(\.gz)?(:[\d.]+)?$")  # behind it a part of a mixture has its share
    return ", ".join(re.split(r"[/\\]", part)[-1] if file.search(part) else part for part in source.split(","))
