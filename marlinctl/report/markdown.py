"""A page as Markdown (GitHub's, which the hub reads too). Pictures stay out: they are in the HTML page.

Text is escaped so that no name becomes a link, a tag or a new row.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from marlinctl.report.page import Block, Cell, Listing, Name, Page, Paragraph, Picture, Points, Table
from marlinctl.system.log import printable

_SPECIAL = re.compile(r"([\\`*\[\]<>|~])")


def render(page: Page) -> str:
    lines = [f"# {text(page.title)}", "", text(page.lead), ""]
    if page.figures:
        rows = [(figure.label, f"{figure.value} ({figure.note})" if figure.note else figure.value) for figure in page.figures]
        lines += [*_table(Table((), rows)), ""]
    for section in page.sections:
        lines += [f"## {text(section.title)}", ""]
        for block in section.blocks:
            if not isinstance(block, Picture):
                lines += [*_block(block), ""]
    return "\n".join([*lines, text(page.written_by)]) + "\n"


def text(plain: str) -> str:
    return _SPECIAL.sub(r"\\\1", printable(plain, one_line=True))


def table(header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A table alone, for a model card."""
    return "\n".join(_table(Table(header, rows)))


def code(name: str) -> str:
    """A code span around any text: its fence is longer than every run of backticks inside."""
    shown = printable(name, one_line=True) or " "
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    space = " " if "`" in shown else ""
    return f"{fence}{space}{shown}{space}{fence}".replace("|", "\\|")


def listing(body: str, language: str = "text") -> str:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", body)), default=0))
    return f"{fence}{language}\n{printable(body)}\n{fence}"


def _block(block: Block) -> Iterator[str]:
    if isinstance(block, Table):
        if block.folded:
            yield f"{text(block.folded)}:"
            yield ""
        yield from _table(block)
    elif isinstance(block, Points):
        yield from (f"- {' '.join(_cell(cell) for cell in item)}" for item in block.items)
    elif isinstance(block, Listing):
        yield listing(block.text)
    elif isinstance(block, Paragraph):
        yield text(block.text)


def _table(block: Table) -> Iterator[str]:
    width = len(block.header) or max((len(row) for row in block.rows), default=2)
    yield _row([text(cell) for cell in block.header] or [""] * width)
    yield _row(["---:" if column in block.numbers else "---" for column in range(width)])
    yield from (_row([_cell(cell) for cell in row]) for row in block.rows)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(cell: Cell) -> str:
    return code(cell.text) if isinstance(cell, Name) else text(cell)
