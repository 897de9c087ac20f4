"""`marlinctl doctor`: is this machine fit for marlinctl, and if not, what would make it so."""

from __future__ import annotations

import click

from marlinctl.commands.common import common_options
from marlinctl.system.console import Console


@click.command("doctor")
@click.option("--quick", is_flag=True, help="Only what takes no time: no torch, no GPU, no question to the hub.")
@common_options
def command(console: Console, quick: bool) -> None:
    """Test what marlinctl needs of this machine.

    \b
    Example:
        marlinctl doctor --quick
        marlinctl doctor
        marlinctl doctor --json

    Each line is ok, warn or fail, with what was found and its cure. Tested are Python and the installed versions, names that hide a
    package, cache and disk, the hub, torch, GPU, driver and NVRTC, and a small product of MARLIN and Sparse-MARLIN tiles. Tokens and
    the home folder are left out, so the answer can go into a report. Exit code 4: something failed; warnings alone give 0.
    """
    from marlinctl.doctor.run import document, examine, table, worst
    from marlinctl.errors import EnvironmentProblem

    if not quick:
        console.say("testing; torch and the packed formats run in a process of their own, which takes some seconds")
    checks = list(examine(quick=quick, offline=console.offline))
    console.result(table(checks), document(checks, quick=quick))
    if worst(checks) == "fail":
        click.get_current_context().exit(EnvironmentProblem.exit_code)
