"""`marlinctl doctor`: is this machine fit for marlinctl, and if not, what would make it so."""

from __future__ import annotations

import click

from marlinctl.commands.common import common_options
from marlinctl.commands.help import Command
from marlinctl.system.console import Console


@click.command("doctor", cls=Command)
@click.option("--quick", is_flag=True, help="Skip slow checks: torch, GPU and hub.")
@common_options
def command(console: Console, quick: bool) -> None:
    """Check whether this machine has what marlinctl needs.

    \b
    Example:
        marlinctl doctor --quick
        marlinctl doctor
        marlinctl doctor --json

    Each line is ok, warn or fail, with what was found and a fix. Checked are Python and the installed versions, modules that hide a
    package, cache and disk, the hub, torch, GPU, driver and NVRTC, and a small product of MARLIN and Sparse-MARLIN tiles. The output has no
    tokens and no home folder, so it can go into a bug report. Exit code 4: something failed; warnings alone give 0.
    """
    from marlinctl.doctor.run import document, examine, table, worst
    from marlinctl.errors import EnvironmentProblem

    if not quick:
        console.say("testing; torch and the packed formats run in a process of their own, which takes some seconds")
    checks = list(examine(quick=quick, offline=console.offline))
    console.result(table(checks), document(checks, quick=quick), hanging=22)
    if worst(checks) == "fail":
        click.get_current_context().exit(EnvironmentProblem.exit_code)
