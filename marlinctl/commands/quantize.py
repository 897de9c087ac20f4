"""`marlinctl quantize`: GPTQ to 4 or 8 bits, in the interchange form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import click

from marlinctl.checkpoint.formats.targets import FUSED
from marlinctl.commands.common import common_options
from marlinctl.commands.help import Command
from marlinctl.commands.recipe_flags import chosen_options, chosen_recipe, recipe_flags, run_flags
from marlinctl.errors import number_of
from marlinctl.quantize.scheme import INT4
from marlinctl.system.console import Console, gibibytes
from marlinctl.system.processes import silence_if_second


@click.command("quantize", cls=Command)
@click.argument("model", type=click.Path(), metavar="MODEL")
@click.argument("out", type=click.Path(path_type=Path), metavar="OUT")
@recipe_flags
@run_flags
@common_options
def command(console: Console, model: str, out: Path, **values: Any) -> None:
    """Quantize a model to 4 or 8 bits with GPTQ.

    \b
    Example:
        marlinctl quantize Qwen/Qwen3-0.6B ./qwen3-int4
        marlinctl quantize ./smollm2 ./smollm2-int4 --group-size 64 --calibration text.jsonl
        marlinctl quantize ./model.gguf ./model-int4 --override 'down_proj=bits:8' --skip 'layers.0.*'
        marlinctl quantize ./smollm2 ./smollm2-int4 --group-size 64 --override 'down_proj=bits:8,activations:int8'

    MODEL is a Hugging Face folder, a hub id or a GGUF file. OUT gets compressed-tensors, which vLLM, SGLang and transformers
    load.

    \f
    `marlinctl pack` turns it into other formats. Blocks stream from the source to OUT one at a time, and OUT
    appears whole or not at all. What is finished is kept in OUT.job: `marlinctl resume OUT` continues after Ctrl-C or a crash.
    Several GPUs: accelerate launch --multi_gpu -m marlinctl quantize ... (docs/quantize.md).
    """
    silence_if_second(console)
    recipe, options = chosen_recipe(console, values), chosen_options(console, values)
    from marlinctl.jobs.journal import JobFolder
    from marlinctl.oneshot.early import check_run

    check_run(model, [out], JobFolder(out), recipe, options, None, distils=False)
    from marlinctl.oneshot.run import run_job

    report, _ = run_job(model, out, recipe, options, console)
    show_result(console, out, report)


_STANDS_OUT = 1.5  # times the mean error of all kinds


def bits_of(report: dict[str, Any]) -> str:
    """4, or 4 and 8"""
    return " and ".join(map(str, sorted({layer["bits"] for layer in report["layers"]})))


def show_result(console: Console, out: Path, report: dict[str, Any]) -> None:
    """The result, for a person and for a machine."""
    size = report["bytes"]
    text = (
        f"{out}: {number_of(len(report['layers']), 'linear')} in {bits_of(report)} bits, "
        f"{size['source'] / 1e6:,.1f} MB -> {size['result'] / 1e6:,.1f} MB, mean layer error {report['error']['mean']:.5f}, "
        f"{report['seconds']:.1f} s, peak {gibibytes(report['peak_memory_bytes'])}"
    )
    console.result(text, {"out": str(out), **report}, hanging=4)
    if kept := inputs_of(report["layers"]):
        console.say(
            f"{kept}; {out} has 16-bit activations: `marlinctl pack {out} NEW --format marlin` writes a folder whose programs round"
        )
    if form := scales_of(report["layers"]):
        console.say(form)
    if candidates := largest_errors(report["layers"]):
        console.say(candidates)


def inputs_of(layers: Sequence[Mapping[str, Any]]) -> str:
    """How many linears may have their inputs rounded, and how many calibration kept out; nothing where it was not asked for."""
    measured = [layer for layer in layers if layer.get("rounding_error") is not None]  # earlier versions measured none
    if not measured:
        return ""
    rounded = [layer["rounding"] for layer in measured if layer["rounding"] != "none"]
    said = f"inputs of {number_of(len(rounded), 'linear')} may be rounded{f' ({rounded[0]})' if rounded else ''}"
    stay = [layer for layer in measured if layer["rounding"] == "none"]
    if not stay:
        return said
    worst = max(stay, key=lambda layer: layer["rounding_error"])
    lost = f"{worst['name']} would lose {worst['rounding_error']:.4f} of its output"
    return f"{said}, {number_of(len(stay), 'linear stays', 'linears stay')} at 16 bits: {lost}"


def scales_of(layers: Sequence[Mapping[str, Any]]) -> str:
    """How many linears have integer group scales; nothing where they were not asked for."""
    asked = [layer for layer in layers if layer.get("integer_scales") is not None]  # earlier versions had none
    found = sum(layer["integer_scales"] for layer in asked)
    return f"integer group scales: {found} of {number_of(len(asked), 'linear')}" if asked else ""


def largest_errors(layers: Sequence[Mapping[str, Any]]) -> str:
    """The kinds of 4-bit linears that lose most of their output, for whom 8 bits are worth a try; nothing where all lose alike."""
    kinds: dict[str, list[float]] = {}
    for layer in layers:
        if layer["bits"] == INT4.bits and isfinite(layer["error"]):
            kinds.setdefault(layer["name"].rpartition(".")[2], []).append(layer["error"])
    means = sorted(((sum(errors) / len(errors), kind) for kind, errors in kinds.items()), reverse=True)
    if len(means) < 2 or means[0][0] <= _STANDS_OUT * sum(mean for mean, _ in means) / len(means):
        return ""
    listed = ", ".join(f"{kind} {mean:.5f}" for mean, kind in means[:3])
    worst = means[0][1]
    loaded_as_one = next((shards for shards in FUSED.values() if worst in shards), (worst,))  # by servers, so quantized alike
    rules = " ".join(f"--override {name}=bits:8" for name in loaded_as_one)
    return f"largest mean layer errors: {listed}; with 8 bits for the first: {rules}"
