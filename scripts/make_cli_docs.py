"""Writes docs/cli.md from the help texts, so that the page cannot say anything else than the program.

python scripts/make_cli_docs.py            writes it
python scripts/make_cli_docs.py --check    exit 1 when it would change
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator

import click
import generated

from marlinctl import cli
from marlinctl.commands import help

PAGE = generated.DOCS / "cli.md"
WIDTH = 100  # fixed, so that the page does not depend on a terminal

HEAD = """\
# Command line

<!-- Written by scripts/make_cli_docs.py from the help texts; `make docs` rewrites it. -->

Results go to stdout, progress messages and errors to stderr. With `--json` the result, or the error, is one JSON document on stdout with
`schema_version` 1. `marlinctl VERB --help` shows the options that most people need, `marlinctl VERB --help-all` all of them, as this page
does. The options of every command, before it or after it, are listed [once](#marlinctl).

## Exit codes

```text
{codes}
```

Every error has three lines (what, where, fix) and an id that [troubleshooting](troubleshooting.md) explains.
"""


def page() -> str:
    codes = re.search(r"^     0  .*?(?=\n\n)", cli.__doc__ or "", re.MULTILINE | re.DOTALL)
    assert codes is not None, "the table of exit codes in marlinctl/cli.py"
    parts = [HEAD.format(codes=codes[0])]
    for title, text in helps(cli.marlinctl, ["marlinctl"], None):
        level = "##" if title.count(" ") < 2 else "###"
        parts.append(f"{level} {title}\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


def helps(command: click.Command, path: list[str], parent: click.Context | None) -> Iterator[tuple[str, str]]:
    """Title and help text of a command and of everything below it: all its options but those of every command."""
    context = click.Context(
        command, parent, info_name=path[-1], terminal_width=WIDTH, max_content_width=WIDTH, help_option_names=["-h", "--help"], color=False
    )
    help.show_all(context)
    text = "\n".join(line.rstrip() for line in command.get_help(context).splitlines())
    yield " ".join(path), text.partition(f"\n{help.COMMON}:\n")[0].rstrip()
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            yield from helps(child, [*path, name], context)


if __name__ == "__main__":
    sys.exit(generated.main(PAGE, page()))
