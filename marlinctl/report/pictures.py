"""The pictures of a page, as SVG by matplotlib: no window, no global state, the same bytes for the same figures.

Each is drawn twice, at the width of a desktop column and of a phone, because text that scales with a picture is unreadable on one of them.
Colours are written as unusual placeholder values and replaced by the page's CSS variables, so that a picture follows the reader's
light or dark mode. Labels come from checkpoints: matplotlib's own formula language is off, and its XML writer escapes.
"""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from marlinctl.report.page import Picture
from marlinctl.report.scores import finite
from marlinctl.system.log import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from marlinctl.report.scores import Estimate, Score

INK, MUTED, LINE = "#010201", "#010202", "#010203"
SERIES = tuple(f"#0103{number:02d}" for number in range(1, 9))
_VARIABLES = {INK: "--ink", MUTED: "--muted", LINE: "--line"} | {colour: f"--series-{i}" for i, colour in enumerate(SERIES, start=1)}
# Declarations of these variables; all pass WCAG AA on their paper.
LIGHT = (
    "--paper: #fff; --raised: #f4f6f8; --ink: #1b2026; --muted: #56616d; --line: #d5dbe1; "
    "--series-1: #0067a3; --series-2: #b84a00; --series-3: #00765a; --series-4: #a43b74; "
    "--series-5: #7a5f00; --series-6: #5145cd; --series-7: #66707a; --series-8: #a61e1e;"
)
DARK = (
    "--paper: #14181c; --raised: #1e242a; --ink: #e8ecf0; --muted: #a3aeb9; --line: #38414a; "
    "--series-1: #63b8f0; --series-2: #ff9f5c; --series-3: #35c99c; --series-4: #f29ac6; "
    "--series-5: #e3c547; --series-6: #aba5ff; --series-7: #b3bbc3; --series-8: #ff8080;"
)
_MARKERS = "os^Dv<>p"
_WIDTHS = {"wide": 9.2, "narrow": 4.0}  # inches of 72 points: the page's column, and a phone's
_LABEL = 28  # characters of a name; the whole of it stands in the table
_LINE, _LETTER = 0.19, 0.075  # inches: a line of text, a letter of DejaVu Sans at 9 points, wider than most


@dataclass(frozen=True, slots=True)
class Layer:
    """One linear, as the pictures need it. Only finite numbers are drawn."""

    block: int
    kind: str  # q_proj, experts.up_proj, ...
    error: float
    bits: float
    seconds: float


@lru_cache(maxsize=4)  # the formats of one run share it
def layers(items: tuple[Layer, ...], caption: str) -> Picture:
    """Error, bits per weight and time over the blocks; linears of one kind in one block (experts) are averaged, their times added."""
    kinds = list(dict.fromkeys(item.kind for item in items))

    def draw(figure: Figure, name: str) -> None:
        top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=(5, 2, 3), gridspec_kw={"hspace": 0.25})
        base: dict[int, float] = {}
        for number, kind in enumerate(kinds):
            mine = [item for item in items if item.kind == kind]
            blocks = sorted({item.block for item in mine})
            look: dict[str, Any] = {"color": SERIES[number % 8], "marker": _MARKERS[number % 8], "markersize": 4, "linewidth": 1.2}
            top.plot(blocks, [_mean(item.error for item in mine if item.block == block) for block in blocks], **look, label=_short(kind))
            middle.plot(blocks, [_mean(item.bits for item in mine if item.block == block) for block in blocks], **look)
            times = [sum(item.seconds for item in mine if item.block == block) for block in blocks]
            bottom.bar(blocks, times, bottom=[base.get(block, 0.0) for block in blocks], color=SERIES[number % 8], width=0.8)
            base |= {block: base.get(block, 0.0) + time for block, time in zip(blocks, times, strict=True)}
        if all(item.error > 0 for item in items):
            _logarithmic(top, "y")
        top.set_title("error, share of the output energy")
        middle.set_title("bits per weight")
        middle.set_ylim(0, 1.2 * max(item.bits for item in items))
        bottom.set_title("seconds")
        bottom.set_xlabel("block")
        bottom.xaxis.get_major_locator().set_params(integer=True)
        _fit(figure, _legend(figure, top, columns=8 if name == "wide" else 3))

    return _draw(draw, {"wide": 6.2, "narrow": 6.6}, caption)


def comparison(figures: Sequence[Score], caption: str) -> Picture:
    """The model beside its original, with one standard error to each side: task scores, then perplexity on an axis of its own."""
    panels = [[s for s in figures if s.kind == kind and s.ours] for kind in ("task", "perplexity")]
    panels = [panel for panel in panels if panel]
    longest = {"wide": 40, "narrow": 22}

    def draw(figure: Figure, name: str) -> None:
        heights = [len(panel) + 0.5 for panel in panels]
        between = {"hspace": 0.45 / (0.45 * sum(heights) / len(panels))}  # inches over the mean height
        axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights, gridspec_kw=between)[:, 0]
        for panel, axis in zip(panels, axes, strict=True):
            for row, score in enumerate(panel):
                for estimate, offset, number, label in ((score.ours, -0.14, 0, "compressed"), (score.baseline, 0.14, 6, "original")):
                    _dot(axis, estimate, row + offset, number, label if row == 0 and axis is axes[0] else "")
            axis.set_yticks(range(len(panel)), [_short(f"{s.name}, {s.metric}", longest[name]) for s in panel])
            axis.set_ylim(len(panel) - 0.5, -0.5)
            axis.grid(axis="y", visible=False)
        written = max(min(len(f"{s.name}, {s.metric}"), longest[name]) for panel in panels for s in panel)
        _fit(figure, _legend(figure, axes[0], columns=2), left=0.15 + _LETTER * written)

    height = 0.85 + 0.45 * (len(panels) - 1) + 0.45 * sum(len(panel) + 0.5 for panel in panels)
    return _draw(draw, {"wide": height, "narrow": height}, caption)


def curves(values: Mapping[str, Sequence[tuple[float, float]]], horizontal: str, caption: str) -> Picture:
    """Lines over one axis: the losses of a training."""

    def draw(figure: Figure, name: str) -> None:
        axis = figure.subplots()
        for number, (label, points) in enumerate(values.items()):
            axis.plot([x for x, _ in points], [y for _, y in points], color=SERIES[number % 8], linewidth=1.4, label=_short(label))
        axis.set_xlabel(horizontal)
        axis.set_ylim(bottom=0)
        _fit(figure, _legend(figure, axis, columns=5 if name == "wide" else 3))

    return _draw(draw, {"wide": 3.4, "narrow": 3.2}, caption)


@dataclass(frozen=True, slots=True)
class Point:
    """One output: its size in MB, and a figure of its quality."""

    name: str
    x: float
    y: float


@dataclass(frozen=True, slots=True)
class Panel:
    title: str
    points: tuple[Point, ...]


def quality(panels: Sequence[Panel], caption: str, alt: str) -> Picture:
    """Quality over size: a panel for each kind of figure, a mark for each output. Names stand in the legend, where none overlap."""
    longest = max(len(_middle(point.name)) for panel in panels for point in panel.points)
    columns = {name: max(1, int(width / (0.45 + _LETTER * longest))) for name, width in _WIDTHS.items()}
    count = len({point.name for panel in panels for point in panel.points})

    def draw(figure: Figure, name: str) -> None:
        shape = (1, len(panels)) if name == "wide" else (len(panels), 1)
        axes = figure.subplots(*shape, squeeze=False, gridspec_kw={"wspace": 0.28, "hspace": 0.45}).ravel()
        for panel, axis in zip(panels, axes, strict=True):
            for number, point in enumerate(panel.points):
                original = point.name == "original"
                look: dict[str, Any] = {"color": INK, "marker": "*"} if original else _mark(number)
                axis.plot([point.x], [point.y], **look, markersize=9 if original else 7, linestyle="none", label=_middle(point.name))
            axis.set_title("\n".join(wrap(panel.title, 38)), pad=8)
            axis.margins(0.12)
            axis.set_xlim(left=0)
        for axis in axes if name == "wide" else axes[-1:]:
            axis.set_xlabel("weights, MB")
        _fit(figure, 1 + _legend(figure, max(axes, key=lambda axis: len(axis.lines)), columns=columns[name]))

    lines = {name: -(-count // columns[name]) for name in _WIDTHS}
    heights = {"wide": 3.1 + _LINE * lines["wide"], "narrow": 0.9 + _LINE * lines["narrow"] + 2.3 * len(panels)}
    return _draw(draw, heights, caption, alt)


def standalone(picture: Picture) -> str:
    """The wide drawing as a file of its own, with its colours and a background: a page around it may be of the other mode."""
    style = f":root {{ {LIGHT} }} @media (prefers-color-scheme: dark) {{ :root {{ {DARK} }} }}"
    style += " svg { background: var(--paper); font-family: system-ui, sans-serif; } text { font-family: inherit !important; }"
    head, close, rest = picture.wide.partition(">")
    return f'<?xml version="1.0" encoding="utf-8"?>\n{head}{close}<style>{style}</style>{rest}\n'


def roofline(points: Mapping[str, Sequence[tuple[float, float]]], bandwidth: float, peak: float, caption: str) -> Picture:
    """TFLOP/s over operations per byte, under the two roofs that were measured: bandwidth in TB/s and peak in TFLOP/s."""

    def draw(figure: Figure, name: str) -> None:
        axis = figure.subplots()
        every = [x for series in points.values() for x, _ in series]
        low, high = min([*every, peak / bandwidth]) / 2, max([*every, peak / bandwidth]) * 2
        axis.plot([low, peak / bandwidth, high], [low * bandwidth, peak, peak], color=INK, linewidth=1.2, label="measured roof")
        for number, (label, series) in enumerate(points.items()):
            look: dict[str, Any] = {"marker": _MARKERS[number % 8], "markersize": 5, "linestyle": "none", "color": SERIES[number % 8]}
            axis.plot([x for x, _ in series], [y for _, y in series], **look, label=_short(label))
        axis.set_xlabel("operations per byte moved")
        axis.set_title("TFLOP/s")
        _logarithmic(axis, "xy")
        _fit(figure, _legend(figure, axis, columns=5 if name == "wide" else 2))

    return _draw(draw, {"wide": 4.2, "narrow": 4.0}, caption)


# ---- drawing -------------------------------------------------------------------------------------------------------------------------


def _draw(draw: Callable[[Figure, str], None], heights: Mapping[str, float], caption: str, alt: str = "") -> Picture:
    svgs = {}
    for name, width in _WIDTHS.items():
        with _settings():
            from matplotlib.figure import Figure

            figure = Figure(figsize=(width, heights[name]))
            draw(figure, name)
            out = io.StringIO()
            figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}, transparent=True)
        svgs[name] = _inline(out.getvalue(), alt or caption)
    return Picture(svgs["wide"], svgs["narrow"], caption, alt or caption)


@contextmanager
def _settings() -> Iterator[None]:
    """Without the user's matplotlibrc, and without matplotlib's warnings about a home folder that is not writable."""
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with _own_parameters(), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of numpy, over figures that no axis holds
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _own_parameters() -> Iterator[None]:
    import matplotlib as mpl

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(
            {
                "svg.fonttype": "none",  # text stays text: it can be searched, and takes the page's face
                "svg.hashsalt": "marlinctl",
                "text.parse_math": False,
                "font.size": 9,
                "axes.titlesize": 9,
                "axes.titlelocation": "left",
                "axes.titlecolor": MUTED,
                "axes.labelcolor": MUTED,
                "axes.edgecolor": LINE,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.grid": True,
                "axes.axisbelow": True,
                "grid.color": LINE,
                "grid.linewidth": 0.6,
                "text.color": INK,
                "xtick.color": LINE,
                "ytick.color": LINE,
                "xtick.labelcolor": MUTED,
                "ytick.labelcolor": INK,
                "legend.frameon": False,
                "legend.fontsize": 9,
            }
        )
        yield


def _inline(svg: str, title: str) -> str:
    """The <svg> element alone: our colours, a name for those who cannot see it, and ids that no other picture of the page has."""
    from xml.sax.saxutils import quoteattr

    body = svg[svg.index("<svg") :].strip()
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", body, count=1)
    body = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", body, count=1)
    body = body.replace("<svg", f'<svg role="img" aria-label={quoteattr(printable(title, one_line=True))}', 1)
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, f"var({variable})")
    prefix = f"p{_digest(body)}-"
    body = re.sub(r'(<[^<>]*?\s)id="', rf'\1id="{prefix}', body)
    return body.replace('xlink:href="#', f'xlink:href="#{prefix}').replace("url(#", f"url(#{prefix}")


def _digest(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _legend(figure: Figure, axis: Axes, *, columns: int) -> int:
    """Above everything; returns how many lines it takes."""
    handles, labels = axis.get_legend_handles_labels()
    if len(labels) < 2:
        return 0
    look: dict[str, Any] = {"handlelength": 1.4, "columnspacing": 1.2, "borderpad": 0, "labelspacing": 0.3}
    figure.legend(handles, labels, loc="upper left", ncols=min(columns, len(labels)), **look)
    return -(-len(labels) // columns)


def _fit(figure: Figure, legend: int, *, left: float = 0.65) -> None:
    """Margins in inches. matplotlib can find them itself, by drawing everything twice."""
    width, height = figure.get_size_inches()
    top = 0.1 + _LINE * (legend + 1)
    figure.subplots_adjust(left=left / width, right=1 - 0.1 / width, top=1 - top / height, bottom=0.45 / height)


def _logarithmic(axis: Axes, which: str) -> None:
    """Plain numbers at the powers of ten: matplotlib's own labels are formulas, which are off."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for name in which:
        getattr(axis, f"set_{name}scale")("log", nonpositive="mask")
        ticks = getattr(axis, f"{name}axis")
        low, high = ticks.get_data_interval()
        if high < 30 * low:  # one power of ten, or none, would be all the labels
            ticks.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ticks.set_minor_formatter(NullFormatter())


def _dot(axis: Axes, estimate: Estimate | None, height: float, number: int, label: str) -> None:
    if estimate is None or not finite(estimate["value"]):
        return
    error = estimate.get("stderr")
    axis.errorbar(
        [estimate["value"]], [height], xerr=max(error, 0.0) if error is not None and finite(error) else 0.0,
        fmt=_MARKERS[number], color=SERIES[number], markersize=5, capsize=3, linewidth=1.4, label=label,
    )  # fmt: skip


def _mark(number: int) -> dict[str, Any]:
    """Sixty-four outputs have looks of their own: a marker and a colour, which do not turn at the same pace."""
    return {"color": SERIES[number % 8], "marker": _MARKERS[(number + number // 8) % 8]}


def _mean(values: Iterator[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _short(name: str, length: int = _LABEL) -> str:
    shown = printable(name, one_line=True)
    return shown if len(shown) <= length else f"{shown[: length - 3]}..."


def _middle(name: str) -> str:
    """Short, with both ends: folders of one model differ at the end."""
    shown = printable(name, one_line=True)
    return shown if len(shown) <= _LABEL else f"{shown[:10]}...{shown[13 - _LABEL :]}"
