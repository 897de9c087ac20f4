"""What every verb shares: the common options, and how they become a Console.

A command file reads

    @click.command("inspect", cls=Command)
    @click.argument("folder", ...)
    @common_options
    def command(console: Console, folder: Path) -> None: ...

The common options may also stand before the verb (`marlinctl --json inspect F`); both places end up in the same Console.
Importing this module costs click and nothing more.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from marlinctl.errors import EnvironmentProblem, UsageError
from marlinctl.system.console import Console

COMPLETION_VARIABLE = "_MARLINCTL_COMPLETE"  # click's protocol: a shell sets it to ask what may follow
Command = TypeVar("Command", bound=Callable[..., Any])


class FiniteFloat(click.FloatRange):
    """A number in a range; neither NaN, which is in every range because it compares with nothing, nor infinity."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


_OPTIONS = (
    click.option("--json", "as_json", is_flag=True, help="Write the result as one JSON document to stdout."),
    click.option("-q", "--quiet", is_flag=True, help="Suppress progress messages; show warnings and errors only."),
    click.option("-v", "--verbose", is_flag=True, help="Show more on stderr."),
    click.option("--log-file", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Append the log to this file."),
    click.option("--no-color", is_flag=True, help="No colour (NO_COLOR does the same)."),
    click.option("--debug", is_flag=True, help="Print the traceback of an error."),
    click.option("--offline", is_flag=True, help="Never ask the hub; use what is on this machine."),
)
_NAMES = ("as_json", "quiet", "verbose", "log_file", "no_color", "debug", "offline")


class FormerFlag(click.Option):
    """A flag under its former name: hidden, accepted for one version. `common_options` says the new name and hands the value on to it."""

    def __init__(self, names: Sequence[str], **attributes: Any) -> None:
        former, self.now = names
        super().__init__([former], hidden=True, default=None, **attributes)


def common_options(function: Command) -> Command:
    """Adds the common options to a verb and hands it `console` instead of them."""

    @functools.wraps(function)
    def with_console(**values: Any) -> Any:
        context = click.get_current_context()
        before_verb = context.find_root().params
        given = {name: values.pop(name) or before_verb.get(name) for name in _NAMES}
        if given["offline"]:
            go_offline()
        console = Console(
            json=bool(given["as_json"]),
            quiet=bool(given["quiet"]),
            verbose=bool(given["verbose"]),
            colour=not given["no_color"],
            offline=bool(given["offline"]),
            log_file=given["log_file"],
        )
        if isinstance(context.obj, list):
            context.obj.append(console)  # marlinctl/cli.py reports errors through it and closes it
        else:
            context.call_on_close(console.close)
        _move_former_flags(context.command, values, console)
        if context.command.name == "doctor":  # which reports it among its findings
            return function(console=console, **values)
        with _somewhere(console, _typed_paths(context)):
            return function(console=console, **values)

    return add_common_options(with_console)  # type: ignore[return-value]  # click keeps the callable's type


def add_common_options(function: Command) -> Command:
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def _move_former_flags(command: click.Command, values: dict[str, Any], console: Console) -> None:
    """What was given under a former name becomes the value of the flag that it is called now. UsageError E202 where both were given."""
    names = {flag: option.name for option in command.params for flag in option.opts}
    for former in command.params:
        if not isinstance(former, FormerFlag) or former.name is None or (value := values.pop(former.name)) is None:
            continue
        was, now = former.opts[0], names[former.now]
        assert now is not None
        if values[now] is not None:
            raise UsageError("E202", f"{was} and {former.now} are the same option", where=was, fix=f"give {former.now} alone")
        console.warn(f"{was} is called {former.now} now")
        values[now] = value


def _typed_paths(context: click.Context) -> list[str | Path]:
    """The paths on the command line. A text may be the id of a model on the hub instead."""
    typed = [
        context.params[parameter.name]
        for parameter in context.command.params
        if parameter.name is not None
        and isinstance(parameter.type, click.Path)
        and context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE
    ]
    return [path for value in typed for path in (value if isinstance(value, tuple) else (value,))]


@contextmanager
def _somewhere(console: Console, paths: list[str | Path]) -> Iterator[None]:
    """Run in a folder that exists: in an empty one, where the current folder was deleted and absolute paths say where everything is.

    Without it, libraries that ask where they are end the process when they are loaded (oneMKL). EnvironmentProblem E490 for a relative
    path: what it names is not there, and what is written to it would be lost.
    """
    try:
        Path.cwd()
    except FileNotFoundError:
        pass
    else:
        yield
        return
    what = "the current folder was deleted"
    relative = [path for path in paths if isinstance(path, Path) and not path.is_absolute()]
    if relative or not any(Path(path).is_absolute() for path in paths):
        where = str(relative[0]) if relative else os.environ.get("PWD", "the current folder")
        raise EnvironmentProblem("E490", what, where=where, fix="change to a folder that exists, or give absolute paths")
    console.warn(f"{what}; relative paths lead nowhere")
    import tempfile

    before = os.open(".", os.O_RDONLY)
    with tempfile.TemporaryDirectory(prefix="marlinctl-") as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.fchdir(before)
            os.close(before)


def go_offline() -> None:
    """The hub clients read these when they are imported, which no command has done yet."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
