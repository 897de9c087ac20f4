"""Writes docs/cli.md from the help texts, so that the page cannot say anything else than the program.

python scripts/make_cli_docs.py            writes it
python scripts/make_cli_docs.py --check    exit 1 when it would change
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import click
import generated

from marlinctl import cli
from marlinctl.commands import common, evaluation_flags, recipe_flags

PAGE = generated.DOCS / "cli.md"
WIDTH = 100  # fixed, so that the page does not depend on a terminal

HEAD = """\
# Command line

<!-- Written by scripts/make_cli_docs.py from the help texts; `make docs` rewrites it. -->

Results go to stdout, progress messages and errors to stderr. With `--json` the result, or the error, is one JSON document on stdout with
`schema_version` 1. Options that several verbs share are listed once, [below](#shared-options); `marlinctl VERB --help` shows all.

## Exit codes

```text
{codes}
```

Every error has three lines (what, where, fix) and an id that [troubleshooting](troubleshooting.md) explains.
"""


def _recorded(*decorators: Callable[..., Any]) -> dict[str, str]:
    """Flag -> help of the options that these decorators add."""

    @click.command()
    def probe() -> None: ...

    for decorator in decorators:
        probe = decorator(probe)
    records = (option.get_help_record(click.Context(probe)) for option in reversed(probe.params) if not getattr(option, "hidden", False))
    return dict(record for record in records if record is not None)


# Options that several verbs have, under a title of their own, in the order in which the page lists them.
GROUPS = {
    "recipe options": _recorded(recipe_flags.recipe_flags),
    "evaluation options": _recorded(evaluation_flags.evaluation_flags),
    "run options": _recorded(recipe_flags.run_flags),
    "common options": _recorded(common.add_common_options),
}
INTRODUCTIONS = {
    "recipe options": "Each overrides a key of the [recipe](recipes.md).",
    "evaluation options": "How the result is measured and what it must reach.",
    "run options": "How the job runs.",
    "common options": "Of every verb, before or after it.",
}


def page() -> str:
    codes = re.search(r"^     0  .*?(?=\n\n)", cli.__doc__ or "", re.MULTILINE | re.DOTALL)
    assert codes is not None, "the table of exit codes in marlinctl/cli.py"
    parts = [HEAD.format(codes=codes[0])]
    for title, text in helps(cli.marlinctl, ["marlinctl"], None):
        level = "##" if title.count(" ") < 2 else "###"
        parts.append(f"{level} {title}\n\n```text\n{text}\n```\n")
    parts.append("## Shared options\n")
    for name, options in GROUPS.items():
        parts.append(f"### {name.capitalize()}\n\n{INTRODUCTIONS[name]}\n\n```text\n{_table(options.items())}\n```\n")
    return "\n".join(parts)


def _table(options: Iterable[tuple[str, str]]) -> str:
    formatter = click.HelpFormatter(width=WIDTH)
    with formatter.indentation():
        formatter.write_dl(list(options))
    return "\n".join(line.rstrip() for line in formatter.getvalue().splitlines())


class _Short(click.Context):
    """Writes help in which a whole group of shared options is one line."""

    def make_formatter(self) -> click.HelpFormatter:
        return _ShortFormatter(width=WIDTH)


class _ShortFormatter(click.HelpFormatter):
    def write_dl(self, rows: Sequence[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        given = dict(rows)
        whole = [name for name, options in GROUPS.items() if options.items() <= given.items()]
        apart = {flag for name in whole for flag in GROUPS[name]} | ({"-h, --help"} if whole else set())
        own = [(flag, text) for flag, text in rows if flag not in apart]
        if own:
            super().write_dl(own, col_max, col_spacing)
        if whole:
            self.write(f"{'':{self.current_indent}}and the {', '.join(whole)}\n")


def helps(command: click.Command, path: list[str], parent: click.Context | None) -> Iterator[tuple[str, str]]:
    """Title and help text of a command and of everything below it."""
    context = _Short(
        command, parent, info_name=path[-1], terminal_width=WIDTH, max_content_width=WIDTH, help_option_names=["-h", "--help"], color=False
    )
    text = "\n".join(line.rstrip() for line in command.get_help(context).splitlines())
    yield " ".join(path), text
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            yield from helps(child, [*path, name], context)


if __name__ == "__main__":
    sys.exit(generated.main(PAGE, page()))
