"""A bench document for people: one table of the linears, one of the sums, then what the figures stand on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from marlinctl.benchmarking.cases import SIDE_BY_SIDE
from marlinctl.benchmarking.documents import Case, Document, Set, Timed
from marlinctl.errors import number_of

if TYPE_CHECKING:
    from rich.table import Table

WIDE = 400  # columns that rich may use: nothing is wrapped, a pager or a wide terminal shows it


def render(document: Document) -> str:
    """Everything, tables first."""
    parts = []
    if document.cases:
        parts.append(as_text(_cases_table(document.cases)))
        parts += [as_text(_set_table(one)) for one in document.sets if one.sums and len(one.layers) > 1 and one.name not in SIDE_BY_SIDE]
    return "\n\n".join([*parts, "\n".join(_notes(document))])


def _cases_table(cases: Sequence[Case]) -> Table:
    table = text_table(
        "N x K", "M", "kernel", ">us", ">p20", ">p80", ">speed-up", ">TB/s", ">% of read", ">TFLOP/s", ">% of matmul", ">ideal us"
    )
    for case in cases:
        first = True
        for timed in _shown(case):
            ideal = case.ideal.get(timed.family)
            name = f"{timed.name} (baseline)" if timed.name == case.baseline else timed.name
            table.add_row(
                f"{case.n} x {case.k}" if first else "",
                str(case.m) if first else "",
                name,
                _time(timed.us),
                _time(timed.p20),
                _time(timed.p80),
                f"{timed.speedup:.2f}x",
                f"{timed.bytes_per_second / 1e12:.2f}",
                f"{100 * timed.of_read:.0f}",
                f"{timed.flops_per_second / 1e12:.1f}",
                f"{100 * timed.of_matmul:.0f}",
                "" if ideal is None else _time(ideal),
            )
            first = False
        table.add_section()
    return table


def _shown(case: Case) -> Iterator[Timed]:
    """All but configurations that another one of their kind beats: the JSON has them."""
    configurations = [timed for timed in case.candidates if "/" in timed.name]
    best = {timed.family: timed for timed in sorted(configurations, key=lambda timed: -timed.us)}
    yield from (timed for timed in case.candidates if "/" not in timed.name or timed is best[timed.family])


def _set_table(one: Set) -> Table:
    names = list(dict.fromkeys(row.name for row in one.sums if "/" not in row.name))  # of a configuration no model makes all its products
    tokens = sorted({row.m for row in one.sums})
    by_place = {(row.name, row.m): row for row in one.sums}
    table = text_table(f"{one.name}, sum of {sum(layer.count for layer in one.layers)} linears, us", *(f">M={m}" for m in tokens))
    for name in names:
        cells = []
        for m in tokens:
            row = by_place.get((name, m))
            cells.append("" if row is None else _time(row.us) if row.family == "torch" else f"{_time(row.us)} {row.speedup:.2f}x")
        table.add_row(name, *cells)
    for kind in dict.fromkeys(point.kind for point in one.ideal):
        speedups = {point.m: f"{point.speedup:.2f}x" for point in one.ideal if point.kind == kind}
        table.add_row(f"ideal, {kind}", *(speedups.get(m, "") for m in tokens))
    return table


def _notes(document: Document) -> Iterator[str]:
    machine, settings = document.machine, document.settings
    versions = f"torch {machine.torch}, CUDA {machine.cuda}, driver {machine.driver or 'unknown'}"
    yield f"{machine.gpu}, {machine.architecture}, {versions}, {machine.date}"
    group = "channel-wise" if settings.group_size == -1 else f"group size {settings.group_size}"
    how = f"time of a call in a CUDA graph, weights from memory, median of {settings.replays}"
    yield f"{settings.dtype}, {group}, random words and scales; {how}"
    if document.ceilings is not None:
        rates = f"reads {document.ceilings.read / 1e12:.2f} TB/s, torch.matmul reaches {document.ceilings.matmul / 1e12:.0f} TFLOP/s"
        yield f"measured in this run: {rates}"
    for worst in document.accuracy.worst:
        errors = f"relative {worst.relative:.1e} (at most {worst.gate:.0e}), mean ratio {worst.mean_ratio:.1e}"
        yield f"error against float64, {worst.name}: {errors}, {number_of(worst.checks, 'check')}"
    shown = [cost for cost in document.fixed_costs if "/" not in cost.name]  # single configurations would hide the rest
    if shown:
        costs = ", ".join(f"{cost.name} {cost.us:.1f} us + {cost.bytes_per_second / 1e12:.2f} TB/s" for cost in shown)
        yield f"a line through the linears at M={shown[0].m}: {costs}"
    if document.drift is not None:
        moved = ", ".join(f"{name} {100 * (ratio - 1):+.1f} %" for name, ratio in document.drift.ratios.items())
        yield f"drift, {document.drift.n} x {document.drift.k} at M={document.drift.m} measured again at the end: {moved}"
    absent = [peer.name for peer in document.peers if peer.status == "absent"]
    if absent:
        yield f"not installed, so not measured: {', '.join(absent)}"
    for peer in document.peers:
        if peer.status in ("differs", "failed"):
            yield f"not measured: {peer.name} {peer.version}: {peer.why}"


def text_table(*columns: str) -> Table:
    """Columns whose name begins with > are numbers, to the right."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        table.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left", no_wrap=True)
    return table


def as_text(table: Table) -> str:
    import io

    from rich.console import Console

    file = io.StringIO()
    Console(file=file, width=WIDE, color_system=None, markup=False, highlight=False, emoji=False).print(table)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()).strip("\n")


def _time(us: float) -> str:
    """Three or four digits."""
    return f"{us:.1f}" if us < 1000 else f"{us:.0f}"
