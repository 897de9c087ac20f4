"""The pictures of the MARLIN paper, from a bench document. Each is as wide as a column of print.

    speedup-<set or shape>.png   speed-up over torch.matmul against the batch, with the ideal as a dashed line
    shares-<set>.png             where the time of a set goes: its linears stacked, torch beside ours
    roofline.png                 operations per second against operations per byte, below the measured roofs

matplotlib is imported only here, and only when a picture is drawn; no display is needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marlinctl.benchmarking.cases import OPERATORS, SIDE_BY_SIDE
from marlinctl.benchmarking.documents import BITS, Case, Ceilings, Document, Family, Set, moved_bytes
from marlinctl.system.atomic import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 3.4, 2.5  # inches: a column
DPI = 220
STYLE: dict[str, Any] = {
    "font.size": 7.5,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 6.5,
    "lines.linewidth": 1.4,
    "lines.markersize": 3.5,
    "savefig.facecolor": "white",
}
COLOURS: dict[str, str] = {"torch": "#4d4d4d", "dense": "#0b6fb8", "sparse": "#c8501e"}  # legible in grey and to the colour-blind
PEER_COLOURS = ("#6a3d9a", "#1b9e77", "#b8860b")
LAYER_COLOURS = ("#264653", "#2a9d8f", "#e9c46a", "#e76f51", "#9b5de5", "#8d99ae", "#bc6c25", "#457b9d")
LABEL_WIDTH = 0.08  # of the axis
MARKERS = ("o", "s", "^", "D", "v", "P")
SIZES_COLOUR_MAP = "viridis"


def draw(document: Document, folder: Path) -> list[Path]:
    """Every picture that the document has figures for, in `folder`, which must exist. Returns the files."""
    import matplotlib

    written = []
    with matplotlib.rc_context(STYLE):
        for name, figure in _figures(document):
            path = folder / f"{name}.png"
            drawn = BytesIO()
            figure.savefig(drawn, format="png", dpi=DPI, bbox_inches="tight", metadata={"Software": None})
            write_bytes(path, drawn.getvalue())
            written.append(path)
    return written


def _figures(document: Document) -> Iterator[tuple[str, Figure]]:
    under = f"{document.machine.gpu}, {document.settings.dtype}, {_group(document.settings.group_size)}"
    operators = _operators(document)
    for one in document.sets:
        if one.name not in SIDE_BY_SIDE:
            yield f"speedup-{one.name}", _speedup_of_set(one, operators, under)
            yield f"shares-{one.name}", _shares(one, operators, under)
    drawn = set()
    for one in document.sets:
        if one.name in ("shapes", "ideal"):
            for layer in one.layers:
                cases = [c for c in document.cases if (c.n, c.k, c.group_size) == (layer.n, layer.k, layer.group_size)]
                if len(cases) > 1 and (layer.n, layer.k) not in drawn:
                    drawn.add((layer.n, layer.k))
                    yield f"speedup-{layer.n}x{layer.k}", _speedup_of_shape(cases, operators, under)
    if document.ceilings is not None and any(one.name == "roofline" for one in document.sets):
        yield "roofline", _roofline(document.cases, document.ceilings, operators, under)


def _operators(document: Document) -> list[tuple[str, Family]]:
    """What is drawn: the operators and the peers; single configurations would hide them."""
    found: dict[str, Family] = {}
    for case in document.cases:
        for timed in case.candidates:
            if timed.family == "peer" or timed.name in OPERATORS.values():
                found.setdefault(timed.name, timed.family)
    return list(found.items())


def _speedup_of_set(one: Set, operators: Sequence[tuple[str, Family]], under: str) -> Figure:
    lines = {name: [(row.m, row.speedup) for row in one.sums if row.name == name] for name, _ in operators}
    kinds = dict.fromkeys(point.kind for point in one.ideal)
    ideals = {kind: [(point.m, point.speedup) for point in one.ideal if point.kind == kind] for kind in kinds}
    return _speedup(lines, dict(operators), ideals, f"{one.name}: sum of its linears", under)


def _speedup_of_shape(cases: Sequence[Case], operators: Sequence[tuple[str, Family]], under: str) -> Figure:
    ordered = sorted(cases, key=lambda case: case.m)
    lines = {name: [(case.m, timed.speedup) for case in ordered if (timed := case.named(name)) is not None] for name, _ in operators}
    ideals = {}
    for kind in ordered[0].ideal:
        ideals[kind] = [(case.m, timed.us / case.ideal[kind]) for case in ordered if (timed := case.named(case.baseline)) is not None]
    return _speedup(lines, dict(operators), ideals, f"N={ordered[0].n}, K={ordered[0].k}", under)


def _speedup(
    lines: dict[str, list[tuple[int, float]]],
    families: dict[str, Family],
    ideals: dict[str, list[tuple[int, float]]],
    title: str,
    under: str,
) -> Figure:
    figure, axes = _axes(title, under)
    axes.axhline(1, color=COLOURS["torch"], linewidth=0.8)
    for kind, points in ideals.items():
        axes.plot(*_columns(points), linestyle=(0, (4, 2)), linewidth=1, color=COLOURS[kind], label=f"ideal, {_kind(kind)}")
    peers = iter(PEER_COLOURS * 2)
    for i, (name, points) in enumerate(lines.items()):
        colour = COLOURS.get(families[name]) or next(peers)
        axes.plot(*_columns(points), marker=MARKERS[i % len(MARKERS)], color=colour, label=name, zorder=3)
    axes.set_xscale("log", base=2)
    batches = sorted({m for points in [*lines.values(), *ideals.values()] for m, _ in points})
    _plain_ticks(axes, batches)
    axes.set_xlabel("batch (tokens)")
    axes.set_ylabel("speed-up over torch.matmul")
    axes.set_ylim(bottom=0)
    _legend(axes)
    return figure


def _shares(one: Set, operators: Sequence[tuple[str, Family]], under: str) -> Figure:
    """Bars of microseconds for each batch: torch, then ours; the colours are the set's linears."""
    names = ["torch", *(name for name, family in operators if family in ("dense", "sparse"))]
    tokens = sorted({row.m for row in one.sums})
    rows = {(row.name, row.m): row for row in one.sums}
    figure, axes = _axes(f"{one.name}: share of each linear", under)
    thick = 0.8 / len(names)
    for j, name in enumerate(names):
        there = [(i, rows[name, m]) for i, m in enumerate(tokens) if (name, m) in rows]
        places = [i + (j - (len(names) - 1) / 2) * thick for i, _ in there]
        bottoms = [0.0] * len(there)
        for index, layer in enumerate(one.layers):
            heights = [row.us * row.shares[index] for _, row in there]
            label = f"{layer.name}{f' x {layer.count}' if layer.count > 1 else ''}" if j == 0 else None
            colour = LAYER_COLOURS[index % len(LAYER_COLOURS)]
            axes.bar(places, heights, thick * 0.92, bottom=bottoms, color=colour, label=label, linewidth=0)
            bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
        for place, bottom in zip(places, bottoms, strict=True):
            axes.annotate(
                name, (place, bottom), xytext=(0, 2), textcoords="offset points", rotation=90, ha="center", va="bottom", fontsize=5.5
            )
    axes.set_xticks(range(len(tokens)), [str(m) for m in tokens])
    axes.grid(visible=False, axis="x")
    axes.set_xlabel("batch (tokens)")
    axes.set_ylabel("microseconds")
    axes.margins(y=0.12)
    _legend(axes)
    return figure


def _roofline(cases: Sequence[Case], ceilings: Ceilings, operators: Sequence[tuple[str, Family]], under: str) -> Figure:
    """One line for each square matrix and operator, dense filled and 2:4 hollow; operations per byte that the operator must move."""
    import matplotlib

    figure, axes = _axes("roofline", under)
    sizes = sorted({case.n for case in cases if case.n == case.k})
    colours = matplotlib.colormaps[SIZES_COLOUR_MAP]
    lowest, highest = math.inf, 0.0
    for name, family in operators:
        if family not in BITS:
            continue
        for i, size in enumerate(sizes):
            mine = sorted((c for c in cases if c.n == c.k == size), key=lambda c: c.m)
            points = [
                (2 * c.m * c.n * c.k / moved_bytes(c.shape, c.m, BITS[family]), timed.flops_per_second / 1e12)
                for c in mine
                if (timed := c.named(name)) is not None
            ]
            if not points:
                continue
            lowest, highest = min(lowest, points[0][0]), max(highest, *(x for x, _ in points))
            colour = colours(0.85 * i / max(len(sizes) - 1, 1))
            axes.plot(
                *_columns(points),
                marker=MARKERS[i % len(MARKERS)],
                color=colour,
                linewidth=0.9,
                linestyle="-" if family == "dense" else ":",
                markerfacecolor=colour if family == "dense" else "white",
                markersize=3,
                label=f"{name}, {size // 1024}k",
            )
    reach = [lowest / 1.5, highest * 1.5]
    for kind, faster in (("dense", 1), ("sparse", 2)):
        if any(family == kind for _, family in operators):
            ridge = faster * ceilings.matmul / ceilings.read
            roof = [(x, min(x * ceilings.read, faster * ceilings.matmul) / 1e12) for x in sorted({*reach, ridge})]
            axes.plot(*_columns(roof), color=COLOURS[kind], linestyle=(0, (4, 2)), linewidth=1, label=f"roof, {_kind(kind)}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations per byte")
    axes.set_ylabel("TFLOP/s")
    _legend(axes)
    return figure


def _axes(title: str, under: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT))  # no pyplot: no display, no state
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontweight="bold", pad=12)
    axes.text(0, 1.02, under, transform=axes.transAxes, fontsize=5.5, color="#666666", va="bottom")
    return figure, axes


def _legend(axes: Axes) -> None:
    """Below, where no line runs through it."""
    columns = 4 if len(axes.get_legend_handles_labels()[0]) == 4 else 3
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.19), ncols=columns, handlelength=1.8, columnspacing=1.2)


def _plain_ticks(axes: Axes, values: Sequence[int]) -> None:
    """A line at each of the values, which are sorted; its label where it fits on a logarithmic axis."""
    labels, widest, last = [], values[-1] / values[0], 0.0
    for value in values:
        fits = not last or math.log(value / last) > LABEL_WIDTH * math.log(widest)
        labels.append((str(value) if value < 10_000 else f"{value // 1024}k") if fits else "")
        last = value if fits else last
    axes.set_xticks(values, labels)
    axes.minorticks_off()


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _kind(kind: str) -> str:
    return {"dense": "4 bits", "sparse": "4 bits, 2:4"}[kind]


def _group(group_size: int) -> str:
    return "channel-wise" if group_size == -1 else f"group size {group_size}"
