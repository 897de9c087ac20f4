"""`marlinctl completion`: what a shell must read to complete verbs, options and paths."""

from __future__ import annotations

import click

from marlinctl.commands.common import COMPLETION_VARIABLE, common_options
from marlinctl.commands.help import Command
from marlinctl.system.console import Console


@click.command("completion", cls=Command)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@common_options
def command(console: Console, shell: str) -> None:
    """Print the completion script of a shell.

    \b
    Example:
        marlinctl completion bash > ~/.local/share/bash-completion/completions/marlinctl
        marlinctl completion zsh > ~/.zfunc/_marlinctl
        marlinctl completion fish > ~/.config/fish/completions/marlinctl.fish

    Verbs, options, their values and paths are completed. The script asks the program itself, so it stays valid after an
    update. bash 4.4 or later; zsh needs `fpath+=~/.zfunc` before compinit.
    """
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None  # click knows the three
    script = found(click.get_current_context().find_root().command, {}, "marlinctl", COMPLETION_VARIABLE).source().strip()
    console.result(script, {"shell": shell, "script": script})
