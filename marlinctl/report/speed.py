"""What `marlinctl bench` measured (its bench.json), as a section: each linear against torch.matmul, and the roofline of that machine.

{"kind": "bench", "machine", "settings", "ceilings": {"read", "matmul"}, "accuracy", "cases": [{n, k, m, baseline, ideal, candidates}],
     "sets": [{name, layers, sums: [{m, name, family, us, speedup}]}]}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from marlinctl.report import pictures
from marlinctl.report.page import Block, Cell, Paragraph, Table

_FAMILIES = {"torch": "torch.matmul, 16 bits", "dense": "MARLIN", "sparse": "Sparse-MARLIN", "peer": "other libraries"}


def speed(bench: Mapping[str, Any] | None) -> list[Block]:
    """The fastest of each family for every linear and number of tokens."""
    if not bench or not bench["cases"]:
        return []
    machine, settings, ceilings = bench["machine"], bench["settings"], bench["ceilings"]
    rows: list[Sequence[Cell]] = []
    for case in bench["cases"]:
        for timed in _fastest(case["candidates"]):
            rows.append(
                (
                    f"{case['n']} x {case['k']}",
                    str(case["m"]),
                    timed["name"],
                    f"{timed['us']:,.1f}",
                    f"{timed['p20']:,.1f} to {timed['p80']:,.1f}",
                    f"{timed['speedup']:.2f}",
                    f"{timed['bytes_per_second'] / 1e12:.2f}",
                    f"{100 * timed['of_read']:.0f}",
                    f"{timed['flops_per_second'] / 1e12:,.1f}",
                    f"{100 * timed['of_matmul']:.0f}",
                )
            )
    said = f"{machine['gpu']} ({machine['architecture']}), torch {machine['torch']}, driver {machine['driver'] or 'unknown'}, "
    said += f"{machine['date']}; "
    said += f"{settings['dtype']}, median of {settings['replays']} replays, microseconds; speed-up over the faster layout of torch.matmul."
    header = ("N x K", "tokens", "kernel", "us", "p20 to p80", "speed-up", "TB/s", "% of read", "TFLOP/s", "% of matmul")
    blocks: list[Block] = [Paragraph(said)]
    if ceilings:
        blocks.append(_roofline(bench["cases"], ceilings))
    blocks += _sums(bench.get("sets", ()))
    return [*blocks, Table(header, rows, numbers=frozenset(range(3, 10)) | {1}, folded=f"Every time ({len(rows)})"), *_accuracy(bench)]


def _sums(sets: Sequence[Mapping[str, Any]]) -> list[Block]:
    """All linears of a model's block together: what its speed depends on, when the rest costs nothing."""
    rows: list[Sequence[Cell]] = []
    for one in sets:
        if len(one["layers"]) < 2:
            continue
        for m in sorted({row["m"] for row in one["sums"]}):
            for row in _fastest([row for row in one["sums"] if row["m"] == m]):
                rows.append((one["name"], str(m), row["name"], f"{row['us']:,.1f}", f"{row['speedup']:.2f}"))
    header = ("linears of a block of", "tokens", "kernel", "us", "speed-up")
    return [Table(header, rows, numbers=frozenset((1, 3, 4)), folded=f"Sums over whole blocks ({len(rows)})")] if rows else []


def _fastest(candidates: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    found: dict[str, Mapping[str, Any]] = {}
    for timed in candidates:
        if timed["family"] not in found or timed["us"] < found[timed["family"]]["us"]:
            found[timed["family"]] = timed
    return [found[family] for family in _FAMILIES if family in found]


def _roofline(cases: Sequence[Mapping[str, Any]], ceilings: Mapping[str, float]) -> Block:
    points: dict[str, list[tuple[float, float]]] = {}
    for case in cases:
        for timed in _fastest(case["candidates"]):
            intensity = timed["flops_per_second"] / timed["bytes_per_second"]
            points.setdefault(_FAMILIES[timed["family"]], []).append((intensity, timed["flops_per_second"] / 1e12))
    read, matmul = ceilings["read"] / 1e12, ceilings["matmul"] / 1e12
    caption = (
        f"Roofline of this machine as it was measured: reads at {read:.2f} TB/s, torch.matmul at {matmul:,.0f} TFLOP/s. "
        "Each point is a linear at one number of tokens; packed weights move fewer bytes, so their points lie further right. "
        "2:4 counts the products of the dense matrix, of which it computes half, and may lie above the roof."
    )
    return pictures.roofline(points, read, matmul, caption)


def _accuracy(bench: Mapping[str, Any]) -> list[Block]:
    rows: list[Sequence[Cell]] = [
        (worst["name"], worst["dtype"], f"{worst['relative']:.1e}", f"{worst['gate']:.0e}", str(worst["checks"]))
        for worst in bench["accuracy"]["worst"]
    ]
    header = ("kernel", "type", "relative error", "at most", "checks")
    return (
        [Paragraph("Error against float64, checked before anything was timed:"), Table(header, rows, numbers=frozenset((2, 3, 4)))]
        if rows
        else []
    )
