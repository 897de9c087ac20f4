"""`compress`: prune, distil, quantize, pack, verify, evaluate and report, as one run with one result.

    OUT.work-1f0c9a2e/ct   ◄── quantize, or prune and quantize in one walk, or prune ─► distil ─► quantize where tokens are given
    OUT.work-1f0c9a2e/...  ◄── pack, once for each format
                               verify each ─► evaluate against the original ─► gate ─► reports ─► rename all of them into place, or none

Nothing appears under its final name before everything is checked. A result that the gate refuses is kept as OUT.rejected.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from marlinctl.checkpoint.formats import detect
from marlinctl.checkpoint.reader import open_checkpoint
from marlinctl.checkpoint.source import Source
from marlinctl.checkpoint.writer import check_output, keep_rejected, publish_together
from marlinctl.console import Console
from marlinctl.evaluation.tasks import require_lm_eval
from marlinctl.gate import Gate, GateRefused, measure
from marlinctl.job import run_job
from marlinctl.opening import Options
from marlinctl.pages.files import report_files
from marlinctl.recipe import Recipe, divided, recipe_hash
from marlinctl.repack import repack
from marlinctl.verify import verify


@dataclass(frozen=True, slots=True)
class Finished:
    """A checked folder on its way to its place (what publish_together needs)."""

    path: Path
    out: Path
    overwrite: bool


def run_compress(
    model: str,
    out: Path,
    recipe: Recipe,
    options: Options,
    console: Console,
    *,
    evaluate_result: bool = True,
    task_data: Path | None = None,
    gate: Gate | None = None,
) -> dict[str, Any]:
    """The whole way from a model to published folders: OUT in the recipe's first format, OUT-<format> for each further one."""
    first, *others = recipe.pack.formats
    places = {first: out} | {fmt: out.with_name(f"{out.name}-{fmt}") for fmt in others}
    sources = [Path(model)] if Path(model).exists() else []
    for place in places.values():
        check_output(place, overwrite=options.overwrite, sources=sources)
    if evaluate_result and recipe.evaluate.tasks:
        require_lm_eval()
    console.log_to(out.with_name(out.name + ".log"))
    work = out.resolve().with_name(f"{out.name}.work-{secrets.token_hex(4)}")
    work.mkdir()
    try:
        report, source = _interchange(model, work, recipe, options, console)
        for fmt in places:
            if fmt != "ct":
                repack(work / "ct", work / fmt, format=fmt, console=console)
        report = {**report, "kind": "compress", "outputs": [{"folder": str(place), "format": fmt} for fmt, place in places.items()]}
        distilled = work / "distilled"  # trained weights and norms are what the codes were made from
        made_from = distilled if distilled.is_dir() else source.folder
        report["verified"] = {fmt: verify(work / fmt, source=made_from, load=None, console=console).document() for fmt in places}
        if evaluate_result or (gate is not None and gate.asked):
            report["evaluation"] = measure(recipe, gate or Gate(), console, task_data)(work / "ct", source)
        for fmt in places:
            _write_reports(work / fmt, fmt, report)
        publish_together([Finished(work / fmt, place.resolve(), options.overwrite) for fmt, place in places.items()])
    except GateRefused:
        keep_rejected(work, out.resolve())
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return report


def _interchange(model: str, work: Path, recipe: Recipe, options: Options, console: Console) -> tuple[dict[str, Any], Source]:
    """The 4-bit checkpoint in the interchange form, as work/ct, by one walk or by three stages."""
    parts = divided(recipe)
    if parts is None:
        return run_job(model, work / "ct", recipe, options, console)
    from marlinctl.distill import run_distill

    pruning, quantizing = parts
    pruned, source = run_job(model, work / "pruned", pruning, options, console)
    distilled = run_distill(str(work / "pruned"), work / "distilled", str(source.folder), recipe, options, console)
    shutil.rmtree(work / "pruned")
    report, _ = run_job(str(work / "distilled"), work / "ct", quantizing, replace(options, revision=None), console)
    stages = {
        "pruned": {key: pruned[key] for key in ("error", "seconds", "layers")},
        "distilled": {key: distilled[key] for key in ("training", "held_out")},
    }
    whole_recipe = {"sha256": recipe_hash(recipe), **recipe.model_dump(mode="json")}  # each stage saw a part of it
    report |= {"source": pruned["source"], "recipe": whole_recipe, "stages": stages}
    report["bytes"] = {**report["bytes"], "source": pruned["bytes"]["source"]}
    report["seconds"] = round(pruned["seconds"] + distilled["training"]["seconds"] + report["seconds"], 1)
    return report, source


def _write_reports(folder: Path, fmt: str, report: Mapping[str, Any]) -> None:
    """Card and report of each folder, with what was measured. They lie outside the manifest and may be rewritten."""
    with open_checkpoint(folder, weight_files="auto") as checkpoint:
        layers = detect(checkpoint.config, checkpoint.tensors).layers
        report = {**report, "bytes": {**report["bytes"], "result": sum(info.nbytes for info in checkpoint.tensors.values())}}
    kept = [item["name"] for item in report["kept"]]
    for name, data in report_files(report, folder, fmt=fmt, layers=layers, ignore=kept).items():
        (folder / name).write_bytes(data)
