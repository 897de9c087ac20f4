"""`marlinctl distill`: train a pruned or quantized model toward its original."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from marlinctl.commands.common import common_options
from marlinctl.commands.help import Command
from marlinctl.commands.recipe_flags import chosen_distillation, chosen_options, distill_flags, distill_run_flags
from marlinctl.errors import number_of
from marlinctl.system.console import Console, gibibytes
from marlinctl.system.processes import silence_if_second


@click.command("distill", cls=Command)
@click.argument("student", type=click.Path(), metavar="STUDENT")
@click.argument("out", type=click.Path(path_type=Path), metavar="OUT")
@click.option("--teacher", required=True, metavar="MODEL", help="The original: a folder, a hub id or a GGUF file.")
@distill_flags
@distill_run_flags
@common_options
def command(console: Console, student: str, out: Path, teacher: str, **values: Any) -> None:
    """Train a 2:4 model toward its original, with the mask fixed; or the scales of a 4-bit model, with the codes fixed.

    \b
    Example:
        marlinctl distill ./qwen3-2of4 ./qwen3-2of4-kd --teacher Qwen/Qwen3-0.6B --tokens 20000000 --data text.jsonl
        marlinctl distill ./qwen3-int4 ./qwen3-int4-kd --teacher Qwen/Qwen3-0.6B --tokens 2000000 --mode scales
        marlinctl resume ./qwen3-2of4-kd

    STUDENT is a 2:4 folder, or a 4-bit folder for --mode scales, or any 16-bit one for --mask renewed. OUT gets the same form, whole or
    not at all.

    \f
    Several GPUs: accelerate
    launch --multi_gpu -m marlinctl distill ... (docs/distill.md).
    """
    silence_if_second(console)
    recipe, options = chosen_distillation(console, values), chosen_options(console, values)
    from marlinctl.jobs.journal import JobFolder
    from marlinctl.oneshot.early import check_training

    check_training(student, teacher, out, JobFolder(out), recipe, options)
    from marlinctl.distillation.run import run_distill

    report = run_distill(student, out, teacher, recipe, options, console)
    show_result(console, out, report)


def show_result(console: Console, out: Path, report: dict[str, Any]) -> None:
    """The result, for a person and for a machine."""
    training, held_out = report["training"], report["held_out"]
    losses = ", ".join(f"{name} {held_out['before'][name]:.4f} -> {value:.4f}" for name, value in held_out["after"].items())
    text = (
        f"{out}: {training['tokens']:,} tokens in {number_of(training['steps'], 'step')}, {training['seconds']:,.1f} s; "
        f"held out: {losses}; peak {gibibytes(report['peak_memory_bytes'])}"
    )
    console.result(text, {"out": str(out), **report}, hanging=4)
