"""`marlinctl verify`: digests, structure, contents, a load, and on request the source."""

from __future__ import annotations

from pathlib import Path

import click

from marlinctl.commands.common import common_options
from marlinctl.commands.help import Command
from marlinctl.errors import number_of
from marlinctl.system.console import Console


@click.command("verify", cls=Command)
@click.argument("folder", type=click.Path(path_type=Path), metavar="FOLDER")
@click.option("--source", metavar="MODEL", help="Compare with the model it was made from: a folder, a hub id or a GGUF file.")
@click.option("--cache-dir", type=click.Path(path_type=Path), metavar="DIR", help="Cache of a fetched or converted --source.")
@click.option("--load/--no-load", default=None, help="Load it with transformers on the CPU, compare logits. Default: if memory allows.")
@click.option(
    "--kernels/--no-kernels", default=True, help="Run packed layers on the GPU, or in the CPU emulator if there is none. Default: yes."
)
@click.option("--module-map", type=click.Path(path_type=Path), metavar="FILE", help="Description of an unknown architecture.")
@common_options
def command(
    console: Console, folder: Path, source: str | None, cache_dir: Path | None, load: bool | None, kernels: bool, module_map: Path | None
) -> None:
    """Check a folder that marlinctl published.

    \b
    Example:
        marlinctl verify ./smollm2-int4
        marlinctl verify ./smollm2-int4 --source ./SmolLM2-135M

    Compares every file with the manifest and every tensor with what the model needs, packs the codes again and compares bytes, compares 2:4
    masks with the weights, and loads the model with transformers to compare its logits with those of the dequantized weights. Packed layers
    are run by the CUDA kernel, or by an emulator of it without a GPU (a sample of each linear), with int8 activations too where config.json
    allows them. --source compares each linear with the
    original (of a 2:4 linear, its kept weights) and fails where the difference is implausible. Exit code 1: a check failed.
    """
    from marlinctl.verify.run import verify
    from marlinctl.verify.source import summary

    original = None
    if source is not None:
        from marlinctl.checkpoint.source import resolve_model

        original = resolve_model(source, revision=None, cache_dir=cache_dir, offline=console.offline, console=console).folder
    checked = verify(folder, source=original, load=load, console=console, module_map=module_map, kernels=kernels)
    facts = checked.document()
    lines = [f"{folder}: ok", f"  {number_of(facts['files'], 'file')}, {number_of(facts['linears'], 'linear')} in {facts['format']}"]
    if checked.pattern is not None:
        zero = f"{checked.pattern['zero_kept']:,} kept weights are zero"
        count = number_of(checked.pattern["linears"], "linear")
        lines.append(f"  2:4 in {count} by the {checked.pattern['origin']}, what was pruned is zero, {zero}")
    if checked.kernels is not None:
        read = f"{checked.kernels.blocks} of {checked.kernels.of_blocks} blocks of 64 outputs"
        lines.append(f"  tiles read by the {checked.kernels.by}, {read}: the same products, relative error {checked.kernels.error:.1e}")
        if checked.kernels.rounded:
            count = number_of(checked.kernels.rounded, "linear")
            lines.append(f"  int8 activations in {count} by the {checked.kernels.rounded_by}: the products of what is rounded")
    if checked.logit_error is not None:
        lines.append(f"  logits of transformers against the dequantized weights: relative error {checked.logit_error:.1e}")
    if checked.source is not None:
        lines.append(f"  {summary(checked.source)}")
    console.result("\n".join([*lines, *(f"  {reason}" for reason in checked.skipped)]), {"folder": str(folder), **facts}, hanging=4)
