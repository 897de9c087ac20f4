"""Planned against measured seconds of runs on a GPU, phase by phase, and the rates that would fit them.

    python benchmarks/compress_speed.py FOLDER TEXT.jsonl --blocks 2 --blocks 32 --keep RUNS -- quantize --recipe int4
    python benchmarks/plan_rates.py RUNS/*

Each argument is a folder with marlinctl_report.json and config.json: what `compress_speed.py --keep` leaves, or a published folder. Where
seconds.json says how long the whole process took, what lies in no phase is compared too.

A rate is fitted by least squares over all phases of all runs that count it. Errors of a phase are taken as five percent of it and a tenth
of a second, and a rate that the runs do not decide stays near what it was (a factor of two is one standard error). Phases that wait for a
thread are no sums of terms and are left out: the rates of what it does show where it is waited for only. What comes out goes into RATES of
marlinctl/planning/gpu_time.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marlinctl.models.families import architecture
from marlinctl.planning.gpu_time import BESIDE, H200, RATES, Counts, Gpu, counts, seconds_of_phases
from marlinctl.planning.memory import Work
from marlinctl.recipes.schema import recipe_of_document

_SHARE, _LEAST = 0.05, 0.1  # error of a phase: of its seconds, and seconds
_SWEEPS = 20_000


@dataclass(frozen=True, slots=True)
class Run:
    name: str
    counted: Counts
    measured: Mapping[str, float]  # phase -> seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    chosen = parser.parse_args()
    runs = [read(folder) for folder in chosen.folders]
    fitted = Gpu("fitted", fit(runs))
    print("\n".join(table(runs, fitted)))
    print("\n".join(rates(runs, fitted.seconds)))
    return 0


def read(folder: Path) -> Run:
    """One run, from what it has published."""
    report = json.loads((folder / "marlinctl_report.json").read_text())
    whole = folder / "seconds.json"
    seconds = float(json.loads(whole.read_text())["seconds"]) if whole.exists() else None
    return run_of(folder.name, report, json.loads((folder / "config.json").read_text()), seconds)


def run_of(name: str, report: Mapping[str, Any], config: Mapping[str, Any], seconds: float | None) -> Run:
    """report: marlinctl_report.json. config: config.json of source or result. seconds: of the whole process."""
    known = architecture(config)
    recipe = recipe_of_document({key: value for key, value in report["recipe"].items() if key != "sha256"})
    corrects_drift = recipe.quantize.drift_correction > 0
    element = {"bfloat16": 2, "float32": 4}[report["dtype"]]
    work = Work.of(recipe, element=element, corrects_drift=corrects_drift, on_device=True, ranks=report.get("processes", 1))
    compressed = {layer["name"]: layer["group_size"] or -1 for layer in report["layers"]}
    counted = counts(known, compressed, work, recipe, report["bytes"]["source"], report.get("device_memory_bytes"))
    measured = dict(report["phases"])
    if seconds is not None:
        measured["the rest"] = seconds - sum(measured.values())
    return Run(name, counted, measured)


def fit(runs: Sequence[Run]) -> dict[str, float]:
    """Seconds of each term's unit, none negative: min Σ ((planned - measured) / error)² + Σ (rate / former rate - 1)²."""
    terms = list(RATES)
    rows: list[list[float]] = []  # one for each phase of a run, in multiples of the former rates
    wanted: list[float] = []
    for run in runs:
        for phase, seconds in run.measured.items():
            if phase in run.counted and phase not in BESIDE and run.counted[phase]:
                error = _SHARE * seconds + _LEAST
                rows.append([run.counted[phase].get(term, 0.0) * RATES[term] / error for term in terms])
                wanted.append(seconds / error)
    size = range(len(terms))
    normal = [[sum(row[i] * row[j] for row in rows) + (i == j) for j in size] for i in size]
    right = [sum(row[i] * value for row, value in zip(rows, wanted, strict=True)) + 1.0 for i in size]
    factors = [1.0] * len(terms)
    for _ in range(_SWEEPS):  # coordinate descent; the matrix is positive definite
        before = list(factors)
        for i in size:
            rest = sum(normal[i][j] * factors[j] for j in size if j != i)
            factors[i] = max(0.0, (right[i] - rest) / normal[i][i])
        if max(abs(new - old) for new, old in zip(factors, before, strict=True)) < 1e-9:
            break
    return {term: factor * RATES[term] for term, factor in zip(terms, factors, strict=True)}


def table(runs: Iterable[Run], fitted: Gpu) -> list[str]:
    """Markdown: seconds of each phase as planned, measured and planned with the rates that fit."""
    lines = ["| run | phase | planned, s | measured, s | apart | fitted, s | apart |", "|---|---|---:|---:|---:|---:|---:|"]
    for run in runs:
        planned, again = seconds_of_phases(run.counted, H200), seconds_of_phases(run.counted, fitted)
        phases = [phase for phase in run.counted if phase in run.measured]
        lines += [_row(run.name, phase, planned.get(phase, 0.0), run.measured[phase], again.get(phase, 0.0)) for phase in phases]
        sums = (sum(found.get(phase, 0.0) for phase in phases) for found in (planned, run.measured, again))
        lines.append(_row(run.name, "together", *sums))
        lines += [
            f"| {run.name} | {phase} | not planned | {run.measured[phase]:.2f} | | | |" for phase in run.measured if phase not in phases
        ]
    return lines


def _row(name: str, phase: str, planned: float, measured: float, fitted: float) -> str:
    return (
        f"| {name} | {phase} | {planned:.2f} | {measured:.2f} | {_apart(planned, measured)} | {fitted:.2f} | {_apart(fitted, measured)} |"
    )


def _apart(planned: float, measured: float) -> str:
    return f"{100 * (planned / measured - 1):+.0f} %" if measured > 0 else ""


def rates(runs: Sequence[Run], fitted: Mapping[str, float]) -> list[str]:
    """Rates that some run has counted, as units a second or, below one unit a second, as seconds."""
    counted = {
        term for run in runs for phase, terms in run.counted.items() if phase not in BESIDE for term, units in terms.items() if units
    }
    lines = ["", "| term | was | fits |", "|---|---:|---:|"]
    return lines + [f'| "{term}" | {_rate(RATES[term])} | {_rate(fitted[term])} |' for term in RATES if term in counted]


def _rate(seconds: float) -> str:
    return "0" if seconds == 0 else f"{seconds:.3g}" if seconds > 1e-6 else f"1 / {1 / seconds:.3g}"


if __name__ == "__main__":
    sys.exit(main())
