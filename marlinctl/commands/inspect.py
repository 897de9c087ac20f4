"""`marlinctl inspect`: what a checkpoint is, from its headers."""

from __future__ import annotations

from pathlib import Path

import click

from marlinctl.commands.common import common_options
from marlinctl.commands.help import Command
from marlinctl.system.console import Console


@click.command("inspect", cls=Command)
@click.argument("folder", type=click.Path(path_type=Path), metavar="FOLDER")
@click.option(
    "--weights",
    is_flag=True,
    help="Read all weights too: finds an undeclared 2:4 pattern and integer group scales, counts kept weights that are zero.",
)
@common_options
def command(console: Console, folder: Path, weights: bool) -> None:
    """Describe a checkpoint.

    \b
    Example:
        marlinctl inspect ./smollm2-int4
        marlinctl inspect ./smollm2-int4 --json
        marlinctl inspect ./smollm2-sparse --weights

    Prints architecture, size, format, bits, group sizes, the 2:4 pattern and where it is stated, bytes on disk, and which programs can load
    it. Reads only config.json and headers; --weights reads everything. FOLDER may be dense, compressed-tensors, GPTQ or native.
    """
    from marlinctl.verify.inspect import inspect, table

    facts = inspect(folder, weights=weights)
    console.result(table(facts), facts, hanging=16)
