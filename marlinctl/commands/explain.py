"""`marlinctl explain`: what an error id means and what helps, from the catalog that docs/troubleshooting.md is written from."""

from __future__ import annotations

import inspect
import re
import shutil
import textwrap
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import click

from marlinctl.commands.common import common_options
from marlinctl.commands.help import Command
from marlinctl.errors import UsageError, exit_code
from marlinctl.system.console import Console

if TYPE_CHECKING:
    from marlinctl.system.troubleshooting import Entry


@click.command("explain", cls=Command)
@click.argument("error_id", metavar="[ID]", required=False)
@common_options
def command(console: Console, error_id: str | None) -> None:
    """Explain an error: its cause, and how to fix it.

    \b
    Example:
      marlinctl explain E255
      marlinctl explain

    Every error ends with its id. Without ID, lists all ids with their titles.
    """
    from marlinctl.system.troubleshooting import CATALOG

    if error_id is None:
        lines = [f"{entry.error_id}  {entry.title}" for entry in CATALOG]
        console.result("\n".join(lines), {"errors": [_document(entry) for entry in CATALOG]})
        return
    asked = error_id.upper()
    entry = next((entry for entry in CATALOG if asked in (entry.error_id, *entry.former)), None)
    if entry is None:
        known = [entry.error_id for entry in CATALOG]
        near = " or ".join(get_close_matches(asked, known, n=2, cutoff=0.5) or known[:1])
        raise UsageError(
            "E202", f"there is no error {error_id!r}", where="marlinctl explain", fix=f"nearest: {near}; marlinctl explain lists all"
        )
    console.result(_page(entry, asked), _document(entry))


def _document(entry: Entry) -> dict[str, Any]:
    return {
        "id": entry.error_id,
        "title": entry.title,
        "exit_code": exit_code(entry.error_id),
        "text": inspect.cleandoc(entry.text),
        "former": list(entry.former),
    }


def _page(entry: Entry, asked: str) -> str:
    """For a terminal: wrapped at its width, links as the names of the pages."""
    former = f"{asked} of an earlier version is {entry.error_id} now.\n\n" if asked != entry.error_id else ""
    text = re.sub(r"\[([^]]*)\]\(([^)#]*)[^)]*\)", r"\1 (docs/\2)", inspect.cleandoc(entry.text))
    width = min(shutil.get_terminal_size().columns, 100)
    head = textwrap.fill(f"{entry.error_id} (exit code {exit_code(entry.error_id)}): {entry.title}", width)
    return f"{former}{head}\n\n" + "\n\n".join(_wrapped(part, width) for part in text.split("\n\n"))


def _wrapped(part: str, width: int) -> str:
    """A paragraph or a list. A line of code stays as it is."""
    if re.match(r"\s*```|    ", part) or "```" in part or "\n    " in part:
        return part
    items = re.split(r"\n(?=- )", part)
    return "\n".join(
        textwrap.fill(
            " ".join(item.split()), width, subsequent_indent="  " * item.startswith("- "), break_long_words=False, break_on_hyphens=False
        )
        for item in items
    )
