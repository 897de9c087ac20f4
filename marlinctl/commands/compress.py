"""`marlinctl compress`: the whole job in one command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from marlinctl.commands.common import common_options, go_offline
from marlinctl.commands.evaluation_flags import chosen_gate, chosen_measuring, evaluation_flags
from marlinctl.commands.help import Command
from marlinctl.commands.quantize import bits_of, inputs_of, largest_errors, scales_of
from marlinctl.commands.recipe_flags import chosen_options, chosen_recipe, recipe_flags, run_flags
from marlinctl.errors import number_of
from marlinctl.system.console import Console
from marlinctl.system.processes import silence_if_second


@click.command("compress", cls=Command)
@click.argument("model", type=click.Path(), metavar="MODEL")
@click.argument("out", type=click.Path(path_type=Path), metavar="OUT")
@click.option("--format", "fmt", metavar="ct|gptq|marlin|marlin_24", help="Format of OUT. Default: the recipe's first, ct.")
@click.option("--also", multiple=True, metavar="FORMAT", help="Publish this format too; may be given again.")
@click.option("--distill-tokens", type=int, metavar="N", help="Train a pruned model on N tokens before it is quantized.")
@click.option("--distill-data", metavar="SOURCE", help="Text to train on: self, a .txt/.jsonl/.parquet file, or a hub data set.")
@click.option("--distill-sequence-length", type=int, metavar="N", help="Tokens per row of that text.")
@evaluation_flags
@recipe_flags
@run_flags
@common_options
def command(
    console: Console, model: str, out: Path, fmt: str | None, also: tuple[str, ...],
    distill_tokens: int | None, distill_data: str | None, distill_sequence_length: int | None, **values: Any,
) -> None:  # fmt: skip
    """Prune, distil, quantize, pack, verify, evaluate and report, in one go.

    \b
    Example:
        marlinctl compress Qwen/Qwen3-0.6B ./qwen3-int4
        marlinctl compress ./smollm2 ./smollm2-marlin --group-size 64 --also marlin
        marlinctl compress ./smollm2 ./smollm2-2of4 --recipe sparse-int4

    The result is measured against the original: perplexity, KL divergence and top-token agreement on a text, and the tasks you name.

    \f
    OUT and its siblings OUT-FORMAT of --also appear together when everything is checked, or not at all. Several GPUs: accelerate launch
    --multi_gpu -m marlinctl compress ... (docs/quantize.md).
    """
    silence_if_second(console)
    measuring, task_data = chosen_measuring(values)
    if task_data is not None:
        go_offline()
    formats = list(dict.fromkeys([*([fmt] if fmt else []), *also])) if fmt or also else None
    if also and not fmt:
        formats = list(dict.fromkeys(["ct", *also]))
    extra = {
        "pack.formats": formats,
        "distill.tokens": distill_tokens,
        "distill.data": distill_data,
        "distill.sequence_length": distill_sequence_length,
        **measuring,
    }
    gate, evaluated = chosen_gate(values), values.pop("evaluated") is not False
    recipe, options = chosen_recipe(console, values, extra), chosen_options(console, values)
    from marlinctl.evaluation.settings import EvalSettings
    from marlinctl.jobs.staged_job import CompressJob
    from marlinctl.oneshot.early import check_run
    from marlinctl.planning.preflight import folders_of

    measured = EvalSettings.of_recipe(recipe.evaluate, task_data) if evaluated or gate.asked else None
    check_run(model, list(folders_of(recipe, out).values()), CompressJob(out), recipe, options, measured, distils=True)
    from marlinctl.compress import run_compress

    report = run_compress(model, out, recipe, options, console, evaluate_result=evaluated, task_data=task_data, gate=gate)
    show_result(console, report)


def show_result(console: Console, report: dict[str, Any]) -> None:
    """The result, for a person and for a machine."""
    size = report["bytes"]
    lines = [f"{item['folder']} ({item['format']})" for item in report["outputs"]]
    sizes = f"{size['source'] / 1e6:,.1f} MB -> {size['result'] / 1e6:,.1f} MB"
    lines.append(f"{number_of(len(report['layers']), 'linear')} in {bits_of(report)} bits, {sizes}, {report['seconds']:.1f} s to quantize")
    if "evaluation" in report:
        lines += ["", report["evaluation"]["table"]]
    lines += ["", f"report: {Path(report['outputs'][0]['folder']) / 'marlinctl_report.html'}"]
    console.result("\n".join(lines), report)
    if kept := inputs_of(report["layers"]):
        console.say(kept)
    if form := scales_of(report["layers"]):
        console.say(form)
    if candidates := largest_errors(report["layers"]):
        console.say(candidates)
