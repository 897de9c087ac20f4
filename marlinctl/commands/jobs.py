"""`marlinctl jobs`: list and remove unfinished jobs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from marlinctl.commands.common import common_options
from marlinctl.commands.help import Group
from marlinctl.errors import ResourceProblem, UsageError
from marlinctl.system.console import Console, duration
from marlinctl.system.log import printable

if TYPE_CHECKING:
    from marlinctl.jobs.listing import UnfinishedJob


@click.group("jobs", cls=Group)
def command() -> None:
    """List or remove unfinished jobs.

    \b
    Example:
        marlinctl jobs ls .
        marlinctl jobs rm ./qwen3-int4
        marlinctl jobs rm ./out/*.job --yes
    """


@command.command("ls")
@click.argument("folder", type=click.Path(path_type=Path), metavar="[FOLDER]", default=Path())
@common_options
def ls(console: Console, folder: Path) -> None:
    """List the jobs below a folder: verb, progress, age, size, and the process at work.

    \b
    Example:
        marlinctl jobs ls ./out
    """
    from marlinctl.jobs.listing import find

    if not folder.is_dir():
        raise UsageError("E240", "there is no such folder", where=str(folder), fix="name a folder below which jobs may lie")
    found = find(folder)
    lines = [printable(f"{item.path}: {_line(item)}", one_line=True) for item in found]
    console.result("\n".join(lines) or f"no jobs below {folder}", {"jobs": [item.document() for item in found]})


@command.command("rm")
@click.argument("outs", type=click.Path(path_type=Path), metavar="OUT...", nargs=-1, required=True)
@click.option("--yes", is_flag=True, help="Do not ask.")
@common_options
def rm(console: Console, outs: tuple[Path, ...], yes: bool) -> None:
    """Remove the jobs of these outputs, named as OUT or OUT.job. An output that was set aside is restored.

    \b
    Example:
        marlinctl jobs rm ./qwen3-int4
        marlinctl jobs rm ./out/*.job --yes
    """
    from marlinctl.jobs.listing import look, remove

    found = [look(out) for out in dict.fromkeys(outs)]
    busy = [item for item in found if item.running is not None]
    if busy:
        what = f"a process is at work on it: {_who(busy[0])}"
        raise ResourceProblem("E503", what, where=str(busy[0].path), fix="wait until it ends, or stop it")
    if not yes:
        if console.json or not sys.stdin.isatty():
            raise UsageError("E202", "stdin is not a terminal, so the removal cannot be confirmed", where="jobs rm", fix="add --yes")
        for item in found:
            click.echo(printable(f"{item.path}: {_line(item)}", one_line=True), err=True)
        if not click.confirm("remove?", err=True):
            console.result("nothing was removed", {"removed": []})
            return
    for item in found:
        remove(item)
    console.result("\n".join(f"removed {item.path}" for item in found), {"removed": [item.document() for item in found]})


def _line(item: UnfinishedJob) -> str:
    running = "" if item.running is None else f", at work ({_who(item)})"
    return f"{item.verb}, {item.stage}, {duration(item.age)} old, {item.size / 1e6:,.1f} MB{running}"


def _who(item: UnfinishedJob) -> str:
    who = item.running or {}
    return f"process {who['pid']} on {who['host']}" if {"pid", "host"} <= who.keys() else "which one is not known"
