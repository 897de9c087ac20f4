"""What a run writes about itself: the model's config, the facts of the manifest, the report."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch

from marlinctl import __version__
from marlinctl.checkpoint.formats.base import Format
from marlinctl.checkpoint.formats.registry import INTERCHANGE, quantization_config, without_quantization, working_format
from marlinctl.checkpoint.licence import licence_of, stated
from marlinctl.checkpoint.manifest import TUNED, made_from
from marlinctl.checkpoint.tied_head import stored_bytes
from marlinctl.checkpoint.writer import StagedCheckpoint
from marlinctl.errors import number_of
from marlinctl.models.config import named_otherwise
from marlinctl.models.switches import without
from marlinctl.oneshot.layers import LayerRecord
from marlinctl.oneshot.open import Options, RunInputs
from marlinctl.planning.preflight import sixteen_bit
from marlinctl.recipes.schema import Recipe, recipe_hash
from marlinctl.report.files import report_files
from marlinctl.report.provenance import public_source
from marlinctl.report.rewrite import read_report
from marlinctl.system.devices import device_peaks
from marlinctl.system.host import peak_rss

ALGORITHM_VERSION = 3  # goes up when the same recipe on the same input gives other codes


def model_config(opened: RunInputs, recipe: Recipe, records: Sequence[LayerRecord]) -> dict[str, Any]:
    config: dict[str, Any] = without(without_quantization(opened.checkpoint.config))
    if not recipe.scheme.quantizes:
        return config
    layers, known = dict(opened.plan.group_sizes), opened.architecture
    ignore = sixteen_bit(opened.checkpoint, known, layers)
    provenance = {"version": __version__, "recipe_sha256": recipe_hash(recipe)}
    named, grids = known.by_all_names(layers), known.by_all_names(opened.plan.grids)
    rounding = known.by_all_names({record.name: record.rounding for record in records if record.rounding != "none"})
    config["quantization_config"] = quantization_config(INTERCHANGE, named, ignore, provenance, grids, named_otherwise(config), rounding)
    return config


def published_report(out: Path) -> dict[str, Any]:
    """The report of a folder that is published already."""
    return {key: value for key, value in read_report(out).items() if key != "schema_version"}


def write_reports(staged: StagedCheckpoint, report: Mapping[str, Any], opened: RunInputs, fmt: Format) -> None:
    """They name the digest of the manifest, so they come after it."""
    layers = opened.plan.group_sizes if fmt.quantized else {}
    for name, data in report_files(report, staged.path, name=staged.out.name, fmt=fmt, layers=layers).items():
        staged.write_file(name, data)


def versions() -> dict[str, str]:
    return {"marlinctl": __version__, "algorithm": str(ALGORITHM_VERSION), **_of_packages()}


@cache
def _of_packages() -> dict[str, str]:
    """What is installed does not change while a process runs, and each of these is a file that is parsed."""
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "safetensors", "tokenizers", "accelerate")}


def _source_facts(opened: RunInputs) -> dict[str, Any]:
    source = opened.source
    name = Path(source.name).name if source.kind != "hub" else source.name
    precision = {"precision": opened.checkpoint.precision} if opened.checkpoint.precision else {}
    return {"kind": source.kind, "name": name, "revision": source.revision, **precision}


def manifest_of(
    opened: RunInputs, recipe: Recipe, calibration: Mapping[str, Any], records: list[LayerRecord], tuned: Sequence[str]
) -> dict[str, Any]:
    """tuned: tensors besides linears that are not the source's."""
    layers = [{k: v for k, v in asdict(record).items() if k != "seconds"} for record in records]
    source = {key: value for key, value in calibration.items() if key != "source"}
    if "parts" in source:  # local paths are private: of a file its name
        source["parts"] = [{**part, "source": public_source(part["source"])} for part in source["parts"]]
    earlier = made_from(opened.source.folder)
    return {
        "format": working_format(recipe.scheme).name,
        "recipe": {"sha256": recipe_hash(recipe)},
        "source": {**_source_facts(opened), "fingerprint": opened.contents.fingerprint, **({"made_from": earlier} if earlier else {})},
        "calibration": source,
        "versions": versions(),
        "device": opened.device.type,
        "dtype": str(opened.dtype).removeprefix("torch."),
        "layers": layers,
        **({TUNED: sorted(tuned)} if tuned else {}),
        "finished": True,
    }


def report_of(
    opened: RunInputs, recipe: Recipe, options: Options, calibration: Mapping[str, Any], records: list[LayerRecord],
    warnings: list[str], seconds: float, processes: int, device_memory: int | None,
) -> dict[str, Any]:  # fmt: skip
    device = opened.device
    tensors = opened.checkpoint.tensors
    dense = stored_bytes(tensors)
    named = sum(info.nbytes for info in tensors.values())  # a tied head that was compressed had no bytes of its own
    saved = sum(r.bytes_in - r.bytes_out for r in records)
    return {
        "kind": "quantize" if recipe.scheme.quantizes else "sparsify",
        "command": options.command,
        "written": time.strftime("%Y-%m-%d", time.gmtime()),
        "source": {
            **_source_facts(opened),
            "note": opened.source.note,
            "license": stated(licence_of(opened.source), options.license),
            "base_model": options.base_model,
        },
        "recipe": {"sha256": recipe_hash(recipe), **recipe.model_dump(mode="json")},
        "calibration": dict(calibration),
        "versions": versions(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {number_of(torch.get_num_threads(), 'thread')}",
        "processes": processes,
        "dtype": str(opened.dtype).removeprefix("torch."),
        "bits": recipe.scheme.bits,
        "sparse": sum(r.pattern is not None for r in records),
        "bytes": {"source": dense, "result": named - saved},
        "kept": [{"name": name, "reason": reason} for name, reason in opened.plan.kept.items()],
        "fallbacks": [{"name": r.name, "fallback": r.fallback} for r in records if r.fallback],
        "underfed": [{"name": r.name, "tokens": r.tokens, "remark": r.remark} for r in records if r.remark],
        "dead_inputs": [{"name": r.name, "count": r.dead} for r in records if r.dead],
        "warnings": warnings,
        "error": {"mean": sum(r.error for r in records) / len(records), "worst": max(records, key=lambda r: r.error).name},
        "seconds": round(seconds, 1),
        "peak_memory_bytes": peak_rss(),
        "device_memory_bytes": device_memory,  # what the run could take
        **device_peaks(device),
        "layers": [asdict(record) for record in records],
    }
