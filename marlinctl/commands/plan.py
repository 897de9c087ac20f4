"""`marlinctl plan`: what compress would do, what it needs, whether it fits."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from marlinctl.commands.common import common_options
from marlinctl.commands.evaluation_flags import chosen_measuring, measuring_flags
from marlinctl.commands.help import Command
from marlinctl.commands.recipe_flags import chosen_recipe, plan_flags, recipe_flags, refuse_unknown_dtype
from marlinctl.errors import CheckFailed
from marlinctl.system.console import Console
from marlinctl.system.sizes import size_in_bytes

if TYPE_CHECKING:
    from marlinctl.planning.plan import Probe


@click.command("plan", cls=Command)
@click.argument("model", type=click.Path(), metavar="MODEL")
@click.option("--out", type=click.Path(path_type=Path), default=Path(), metavar="OUT", help="Where the result would lie. Default: here.")
@click.option("--format", "fmt", metavar="ct|gptq|marlin|marlin_24", help="Format of OUT. Default: the recipe's first, ct.")
@click.option("--also", multiple=True, metavar="FORMAT", help="Publish this format too; may be given again.")
@click.option("--distill-tokens", type=int, metavar="N", help="Train a pruned model on N tokens before it is quantized.")
@click.option("--distill-data", metavar="SOURCE", help="Text to train on: self, a .txt/.jsonl/.parquet file, or a hub data set.")
@click.option("--distill-sequence-length", type=int, metavar="N", help="Tokens per row of that text.")
@measuring_flags
@click.option("--ranks", type=click.IntRange(min=1), default=1, metavar="N", help="Processes of accelerate launch on one host. Default: 1.")
@click.option("--probe", is_flag=True, help="Run the largest solve once and estimate the time from it.")
@recipe_flags
@plan_flags
@common_options
def command(
    console: Console, model: str, out: Path, fmt: str | None, also: tuple[str, ...], distill_tokens: int | None, distill_data: str | None,
    distill_sequence_length: int | None, ranks: int, probe: bool, **values: Any,
) -> None:  # fmt: skip
    """Show what compress would do, what it needs, and whether it fits.

    \b
    Example:
        marlinctl plan Qwen/Qwen3-0.6B
        marlinctl plan ./llama-8b --device cuda --probe
        marlinctl plan ./llama-70b --device cuda --device-memory 80GiB
        marlinctl plan ./llama-70b --device cuda --ranks 4
        marlinctl plan ./model.gguf --recipe sparse-int4 --max-memory 8GiB

    Lists which linears are compressed, skipped or kept, and why; bytes and loaders of each output; peak memory, disk space and estimated
    time. Reads config.json and the headers of the shards only, also of a hub model. Exit code 1 if memory or disk space does not suffice;
    invalid inputs give the same errors as the run.

    \f
    --ranks plans a run whose samples and rows are shared by N processes, on GPUs one each: memory is that of each process, and of all
    together. --probe runs the largest solve once, on random numbers, to estimate the time.
    """
    refuse_unknown_dtype(values["dtype"])
    formats = list(dict.fromkeys([*([fmt] if fmt else ["ct"] if also else []), *also])) or None
    measuring, task_data = chosen_measuring(values)
    training = {"distill.tokens": distill_tokens, "distill.data": distill_data, "distill.sequence_length": distill_sequence_length}
    recipe = chosen_recipe(console, values, {"pack.formats": formats, **training, **measuring})
    from marlinctl.planning.plan import Settings, make_plan
    from marlinctl.planning.table import table

    settings = Settings(
        out,
        revision=values["revision"],
        device=values["device"],
        dtype=values["dtype"],
        cache_dir=values["cache_dir"],
        threads=values["threads"],
        max_memory=size_in_bytes(values["max_memory"], "--max-memory"),
        device_memory=size_in_bytes(values["device_memory"], "--device-memory"),
        ranks=ranks,
        module_map=values["module_map"],
        drop_unexpected=values["drop_unexpected"],
        task_data=task_data,
        files_are_here=True,
        probe=_probe(values["device"], values["threads"], console) if probe else None,
    )
    with _without_collection():
        document = make_plan(model, recipe, settings, console)
    console.result(table(document), document, hanging=14)
    if not document["fits"]:
        click.get_current_context().exit(CheckFailed.exit_code)


def _probe(device: str, threads: int | None, console: Console) -> Probe:
    from marlinctl.oneshot.probe import probe_on

    return probe_on(device, threads, console)


@contextmanager
def _without_collection() -> Iterator[None]:
    """Nothing that a plan makes is garbage before it ends, and looking for some while a vocabulary is parsed takes a fifth of that time."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()
