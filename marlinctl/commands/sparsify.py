"""`marlinctl sparsify`: 2:4 pruning, with or without int4."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from marlinctl.commands.common import common_options, go_offline
from marlinctl.commands.evaluation_flags import chosen_gate, chosen_measuring, evaluation_flags
from marlinctl.commands.help import Command
from marlinctl.commands.recipe_flags import chosen_options, chosen_recipe, recipe_flags, run_flags
from marlinctl.errors import number_of
from marlinctl.system.console import Console, gibibytes
from marlinctl.system.processes import silence_if_second


@click.command("sparsify", cls=Command)
@click.argument("model", type=click.Path(), metavar="MODEL")
@click.argument("out", type=click.Path(path_type=Path), metavar="OUT")
@click.option("--pattern", default="2:4", show_default=True, metavar="2:4", help="Sparsity pattern; tensor cores support 2:4 only.")
@evaluation_flags
@recipe_flags
@run_flags
@common_options
def command(console: Console, model: str, out: Path, pattern: str, **values: Any) -> None:
    """Prune a model to 2:4, at 16 bits or together with int4.

    \b
    Example:
        marlinctl sparsify Qwen/Qwen3-0.6B ./qwen3-2of4
        marlinctl sparsify ./smollm2 ./smollm2-2of4-int4 --bits 4 --group-size 64 --refine 2
        marlinctl sparsify ./smollm2 ./smollm2-2of4 --method wanda

    OUT is a 16-bit model, ready for `marlinctl distill` and then `marlinctl quantize`, which keep the pattern; or with --bits 4 a
    compressed-tensors checkpoint for `marlinctl pack --format marlin_24`. One-shot 2:4 hurts modern models badly: the damage is measured.

    \f
    Without --bits 4, the mask lies beside the model (marlinctl_mask.safetensors). With --bits 4, mask, codes and scales are solved
    together, and `marlinctl pack --format marlin_24` turns OUT into sparse tensor-core tiles. Perplexity and KL divergence to the
    original are measured and reported, and --max-kl and --max-ppl-ratio keep a bad result from being published. Several GPUs: as for
    quantize (docs/quantize.md).
    """
    silence_if_second(console)
    measuring, task_data = chosen_measuring(values)
    if task_data is not None:
        go_offline()
    from marlinctl.evaluation.gate import Measurement
    from marlinctl.evaluation.settings import EvalSettings
    from marlinctl.recipes.schema import load_recipe

    gate, evaluated = chosen_gate(values), values.pop("evaluated") is not False
    named = values["recipe_name"]
    recipe = chosen_recipe(console, values, measuring, verb={"sparsify.pattern": pattern, "quantize.bits": 16})
    if not recipe.scheme.quantizes and load_recipe(named).sparsify.pattern != "none":
        console.say(f"--recipe {named} has codes; without --bits 4, sparsify leaves the weights at 16 bits")
    looking = measured = None
    if evaluated or gate.asked:
        looking = Measurement(EvalSettings.of_recipe(recipe.evaluate, task_data), gate, console)
        measured = {"gate": gate.document(), "task_data": None if task_data is None else str(task_data)}
    options = chosen_options(console, values)
    from marlinctl.jobs.journal import JobFolder
    from marlinctl.oneshot.early import check_run

    check_run(model, [out], JobFolder(out), recipe, options, None if looking is None else looking.settings, distils=False)
    from marlinctl.oneshot.run import run_job

    report, _ = run_job(model, out, recipe, options, console, looking, measured=measured)
    show_result(console, out, report)


def show_result(console: Console, out: Path, report: dict[str, Any]) -> None:
    """The result, for a person and for a machine."""
    size = report["bytes"]
    sizes = f"{size['source'] / 1e6:,.1f} MB -> {size['result'] / 1e6:,.1f} MB"
    lines = [
        f"{out}: {number_of(report['sparse'], 'linear')} 2:4 at {report['bits']} bits, {sizes}, "
        f"mean layer error {report['error']['mean']:.5f}, {report['seconds']:.1f} s, peak {gibibytes(report['peak_memory_bytes'])}"
    ]
    if "evaluation" in report:
        lines += ["", report["evaluation"]["table"]]
    console.result("\n".join(lines), {"out": str(out), **report})
