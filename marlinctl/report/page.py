"""What a page is made of, before anybody knows whether it becomes Markdown or HTML.

    Page
    ├── title, lead        what this is
    ├── figures            the few numbers that most readers came for
    └── sections           each with blocks: Table, Picture, Points, Listing, Paragraph

Text is plain text. Names of models, tensors and files are written by strangers: a `Name` is shown in a fixed-width face, and both renderers
escape everything (markdown.py, html.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Name:
    """Text to be shown character by character: a linear, a digest, a file."""

    text: str


Cell = str | Name


@dataclass(frozen=True, slots=True)
class Table:
    header: Sequence[str]  # empty: facts, a name and its value in each row
    rows: Sequence[Sequence[Cell]]
    numbers: frozenset[int] = frozenset()  # columns that are aligned at the right
    folded: str = ""  # what a reader sees of a long table until it is opened
    kind: str = "table"


@dataclass(frozen=True, slots=True)
class Picture:
    """SVG drawn twice, as text on a phone would be too small otherwise. Made by pictures.py alone: it is not escaped."""

    wide: str
    narrow: str
    caption: str
    alt: str  # for those who cannot see it: the caption, or more
    kind: str = "picture"


@dataclass(frozen=True, slots=True)
class Points:
    items: Sequence[Sequence[Cell]]
    kind: str = "points"


@dataclass(frozen=True, slots=True)
class Listing:
    text: str
    folded: str = ""
    kind: str = "listing"


@dataclass(frozen=True, slots=True)
class Paragraph:
    text: str
    kind: str = "paragraph"


Block = Table | Picture | Points | Listing | Paragraph


@dataclass(frozen=True, slots=True)
class Figure:
    """One number at the top of the page."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Section:
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True, slots=True)
class Page:
    title: str
    lead: str
    figures: Sequence[Figure]
    sections: Sequence[Section]
    written_by: str
