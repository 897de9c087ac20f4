"""`marlinctl pack`: another format for the same codes, or a look at who would accept them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from marlinctl.commands.card_flags import card_flags, chosen_card
from marlinctl.commands.common import common_options
from marlinctl.commands.help import Command
from marlinctl.commands.recipe_flags import MAX_SHARD_SIZE
from marlinctl.errors import CheckFailed, UsageError
from marlinctl.system.console import Console

if TYPE_CHECKING:
    from marlinctl.checkpoint.runtimes import Verdict

_SHOWN = 3  # reasons per verdict; the rest is counted


@click.command("pack", cls=Command)
@click.argument("source", type=click.Path(), metavar="SOURCE")
@click.argument("out", type=click.Path(path_type=Path), metavar="OUT", required=False)
@click.option("--format", "fmt", default="ct", show_default=True, metavar="ct|gptq|marlin|marlin_24|dense", help="What to write.")
@click.option("--also", multiple=True, metavar="FORMAT", help="Publish this format too, in OUT-FORMAT; may be given again.")
@click.option("--check", is_flag=True, help="Write nothing; show which runtimes accept the shapes.")
@click.option("--tp", type=click.IntRange(1, 1024), metavar="N", help="With --check: tensor-parallel splits up to N. Default: 1.")
@click.option("--gptq-v2", is_flag=True, help="Read the zero points of a GPTQ SOURCE as version 2, whatever config.json says.")
@click.option("--cache-dir", type=click.Path(path_type=Path), metavar="DIR", help="Cache of a SOURCE from the hub.")
@card_flags
@click.option("--overwrite", is_flag=True, help="Replace an existing OUT, after the new one is complete.")
@MAX_SHARD_SIZE
@click.option("--keep-job", is_flag=True, help="Keep OUT.job, the run's journal, when OUT is published.")
@common_options
def command(
    console: Console,
    source: str,
    out: Path | None,
    fmt: str,
    also: tuple[str, ...],
    check: bool,
    tp: int | None,
    gptq_v2: bool,
    cache_dir: Path | None,
    overwrite: bool,
    keep_job: bool,
    max_shard_size: str | None,
    **said: Any,
) -> None:
    """Write a quantized checkpoint in another format.

    \b
    Example:
        marlinctl pack ./smollm2-int4 ./smollm2-marlin --format marlin
        marlinctl pack ./smollm2-int4 ./smollm2-gptq --format gptq --overwrite
        marlinctl pack ./smollm2-sparse ./smollm2-24 --format marlin_24 --also ct
        marlinctl pack ./smollm2-int4 --check --tp 4

    SOURCE is a symmetric compressed-tensors or GPTQ folder of 4 or 8 bits, a native folder, or a hub id. Codes are moved,
    never rounded again; neither the model nor a GPU is needed. vLLM, SGLang and transformers load `ct`, GPTQModel loads `gptq`, marlinctl's
    kernels `marlin` and, for 2:4, `marlin_24`, which hold 4-bit codes alone; `dense` is a 16-bit copy (products rounded to float16).

    `marlin_24` stores only the kept weights of a 2:4 model. The mask is that of the mask file beside the weights, else derived from codes
    that are zero. Every other format gets such a file.

    --check prints which runtime accepts the shapes at each tensor-parallel split, and exits with 1 if marlinctl alone could load FORMAT at
    split N although servers read that format.
    """
    if check:
        if out is not None:
            raise UsageError("E288", "--check writes nothing, so it takes no OUT", where=str(out), fix=f"marlinctl pack {source} --check")
        _check(console, _folder(source, cache_dir, console), fmt, tp or 1, gptq_v2=gptq_v2)
        return
    if out is None:
        raise UsageError("E288", "OUT is missing", where="the command line", fix=f"marlinctl pack {source} OUT --format {fmt}, or --check")
    if tp is not None:
        raise UsageError("E288", "--tp goes with --check", where="--tp", fix=f"marlinctl pack {source} --check --tp {tp}")
    from marlinctl.checkpoint.shards import max_shard_bytes
    from marlinctl.checkpoint.writer import check_output
    from marlinctl.convert.repack import output_folders
    from marlinctl.jobs.journal import JobFolder

    card = chosen_card(said)
    local = [Path(source)] if Path(source).exists() else []
    for folder in output_folders(out, fmt, also).values():
        check_output(folder, overwrite=overwrite, sources=local)  # before anything is fetched
    JobFolder(out).refuse_foreign()
    asked = {"source": source, "format": fmt, "also": list(also), "overwrite": overwrite, "keep_job": keep_job, **asdict(card)}
    asked |= {"max_shard_bytes": max_shard_bytes(max_shard_size), "gptq_v2": gptq_v2}
    pack(console, out, {**asked, "cache_dir": None if cache_dir is None else str(cache_dir)}, resume=False)


def pack(console: Console, out: Path, asked: Mapping[str, Any], *, resume: bool) -> None:
    """Pack what is asked for (the arguments that a job's folder keeps) and show the result."""
    from marlinctl.checkpoint.licence import Stated
    from marlinctl.convert.repack import repack
    from marlinctl.jobs.journal import Request

    cache_dir = None if asked["cache_dir"] is None else Path(asked["cache_dir"])
    written = repack(
        _folder(asked["source"], cache_dir, console),
        out,
        format=asked["format"],
        also=asked["also"],
        overwrite=asked["overwrite"],
        keep_job=asked["keep_job"],
        max_shard_bytes=asked["max_shard_bytes"],
        said=Stated(asked["base_model"], asked["license"]),
        gptq_v2=asked.get("gptq_v2", False),  # jobs of earlier versions lack it
        console=console,
        request=Request("pack", asked),
        resume=resume,
    )
    console.result("\n".join(f"{entry['folder']} ({entry['format']})" for entry in written["outputs"]), written)


def _folder(source: str, cache_dir: Path | None, console: Console) -> Path:
    from marlinctl.checkpoint.source import resolve_model

    return resolve_model(source, revision=None, cache_dir=cache_dir, offline=console.offline, console=console).folder


def _check(console: Console, source: Path, fmt: str, tp: int, *, gptq_v2: bool) -> None:
    from marlinctl.checkpoint import runtimes
    from marlinctl.convert.repack import open_source, output_folders

    target = next(iter(output_folders(source, fmt, ())))
    opened = open_source(source, gptq_v2=gptq_v2)
    splits = sorted({1, tp, *(2**i for i in range(1, tp.bit_length()) if 2**i < tp)})
    packed = opened.packed(target)
    verdicts = runtimes.survey(packed, splits)
    warnings = runtimes.loads(packed).warnings(target)
    for line in warnings:
        console.warn(line)
    readers = [r.name for r in runtimes.RUNTIMES if r.serves and r.reads(target)]
    able = runtimes.servers_that_accept(verdicts, target, tp)
    document: dict[str, Any] = {
        "format": fmt,
        "tensor_parallel": splits,
        "verdicts": [{**asdict(v), "accepted": v.accepted} for v in verdicts],
        "warnings": warnings,
        "servers": able,
    }
    document["ok"] = not readers or bool(able)
    console.result(_table(verdicts, splits), document)
    if not document["ok"]:
        console.warn(f"no server that reads {fmt} loads this model split over {tp}; marlinctl itself does")
        click.get_current_context().exit(CheckFailed.exit_code)


def _table(verdicts: list[Verdict], splits: list[int]) -> str:
    from marlinctl.checkpoint.runtimes import RUNTIMES

    heads = ["runtime", "reads", *(f"tp={split}" for split in splits)]
    by_name = {(v.runtime, v.tensor_parallel): v for v in verdicts}
    rows = []
    for runtime in RUNTIMES:
        cells = [by_name.get((runtime.name, split)) for split in splits]
        reads = ", ".join(runtime.formats) or "-"
        rows.append([runtime.name, reads, *("-" if v is None else "yes" if v.accepted else "no" for v in cells)])
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [heads, *rows]]
    for verdict in verdicts:
        if verdict.refused:
            shown = "; ".join(verdict.refused[:_SHOWN])
            more = ", ..." * (len(verdict.refused) > _SHOWN)
            lines.append(f"{verdict.runtime}, tp={verdict.tensor_parallel} refuses {len(verdict.refused)}: {shown}{more}")
    lines += [f"{runtime.name}: {runtime.note}" for runtime in RUNTIMES if runtime.note]
    return "\n".join(lines)
