"""A page as one HTML file: style and pictures inside, no script, nothing fetched from anywhere.

Everything but our own SVG passes through jinja2's autoescape, in its sandbox; a Content-Security-Policy forbids scripts and requests in
case something slips through all the same. Characters that steer a terminal or the direction of writing are made visible first.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

from marlinctl.report.page import Block, Cell, Figure, Listing, Name, Page, Paragraph, Picture, Points, Section, Table
from marlinctl.report.pictures import DARK, LIGHT
from marlinctl.system.log import printable

if TYPE_CHECKING:
    import jinja2

TEMPLATE = "page.html.jinja"


def render(page: Page) -> str:
    from markupsafe import Markup

    shown = Page(
        _line(page.title),
        _line(page.lead),
        [Figure(_line(figure.label), _line(figure.value), _line(figure.note)) for figure in page.figures],
        [Section(_line(section.title), [_visible(block) for block in section.blocks]) for section in page.sections],
        _line(page.written_by),
    )
    return _template().render(page=shown, svg=Markup, is_name=lambda cell: isinstance(cell, Name), light=LIGHT, dark=DARK)


@cache
def _template() -> jinja2.Template:
    """Compiled once: a run writes several pages."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment

    environment = SandboxedEnvironment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(files("marlinctl.report").joinpath(TEMPLATE).read_text("utf-8"))


def _visible(block: Block) -> Block:
    if isinstance(block, Table):
        rows = [[_cell(cell) for cell in row] for row in block.rows]
        return replace(block, header=[_line(cell) for cell in block.header], rows=rows, folded=_line(block.folded))
    if isinstance(block, Points):
        return Points([[_cell(cell) for cell in item] for item in block.items])
    if isinstance(block, Listing):
        return replace(block, text=printable(block.text), folded=_line(block.folded))
    if isinstance(block, Paragraph):
        return Paragraph(_line(block.text))
    assert isinstance(block, Picture)
    return replace(block, caption=_line(block.caption), alt=_line(block.alt))


def _cell(cell: Cell) -> Cell:
    return Name(_line(cell.text)) if isinstance(cell, Name) else _line(cell)


def _line(text: str) -> str:
    return printable(text, one_line=True)
