"""What every verb shares: the common options, and how they become a Console.

A command file reads

    @click.command("inspect")
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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from marlinctl.console import Console
from marlinctl.errors import UsageError

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
    click.option("-q", "--quiet", is_flag=True, help="No story on stderr; warnings and errors only."),
    click.option("-v", "--verbose", is_flag=True, help="Tell more on stderr."),
    click.option("--log-file", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Append the log to this file."),
    click.option("--no-color", is_flag=True, help="No colour (NO_COLOR does the same)."),
    click.option("--debug", is_flag=True, help="Print the traceback of an error."),
    click.option("--offline", is_flag=True, help="Never ask the hub; use what is on this machine."),
)
_NAMES = ("as_json", "quiet", "verbose", "log_file", "no_color", "debug", "offline")


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
        typed = {name: value for name, value in values.items() if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
        with _somewhere(console, typed):
            return function(console=console, **values)

    return add_common_options(with_console)  # type: ignore[return-value]  # click keeps the callable's type


def add_common_options(function: Command) -> Command:
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


@contextmanager
def _somewhere(console: Console, typed: Mapping[str, Any]) -> Iterator[None]:
    """Run in a folder that exists: an empty one, where the one that marlinctl was started in has been removed.

    Absolute paths work from there as from anywhere; without it, libraries that ask where they are end the process (oneMKL). What is read
    by a relative path is not found, and what would be written by one is refused: UsageError E233.
    """
    try:
        Path.cwd()
    except FileNotFoundError:
        pass
    else:
        yield
        return
    values = [item for value in typed.values() for item in (value if isinstance(value, tuple) else (value,))]
    relative = [value for value in values if isinstance(value, Path) and not value.is_absolute()]
    what = "the folder in which marlinctl was started has been removed, so relative paths lead nowhere"
    if relative:
        raise UsageError("E233", what, where=str(relative[0]), fix="change into a folder that exists, or give absolute paths")
    console.warn(what)
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
