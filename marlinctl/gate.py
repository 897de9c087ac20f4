"""Quality against the original: measured before anything is published, and held against what the person allows.

A gate that says no ends the run with exit code 1; the finished folder is kept as OUT.rejected and nothing is published.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marlinctl.errors import CheckFailed, Problem
from marlinctl.memory import available_memory

if TYPE_CHECKING:
    from marlinctl.checkpoint.source import Source
    from marlinctl.console import Console
    from marlinctl.job import Measure
    from marlinctl.recipe import Recipe


class GateRefused(CheckFailed):
    """The result is not what was asked for; it is finished and kept, but not published."""


@dataclass(frozen=True, slots=True)
class Gate:
    """None: not asked for."""

    max_kl: float | None = None  # nats
    max_ppl_ratio: float | None = None  # perplexity over the original's
    publish_anyway: bool = False

    @property
    def asked(self) -> bool:
        return self.max_kl is not None or self.max_ppl_ratio is not None

    def document(self) -> dict[str, Any]:
        """For the job's folder; Gate(**document) is the inverse."""
        return asdict(self)

    def check(self, evaluation: Mapping[str, Any], console: Console) -> dict[str, Any]:
        """Passes, or GateRefused E115 with everything that is too bad. Returns what the report says of the gate."""
        document = evaluation.get("document")
        if document is None:
            raise GateRefused(
                "E116",
                f"the quality gate needs a measurement, and there is none ({evaluation['table']})",
                where="--max-kl / --max-ppl-ratio",
                fix="run on a machine with more memory, or leave the gate away",
            )
        kl, ratio = figures(document)
        problems = []
        if self.max_kl is not None and not kl <= self.max_kl:
            problems.append(_problem(f"KL divergence to the original is {kl:.4f} nats, --max-kl allows {self.max_kl:g}"))
        if self.max_ppl_ratio is not None and not ratio <= self.max_ppl_ratio:
            what = f"perplexity is {ratio:.3f} times the original's, --max-ppl-ratio allows {self.max_ppl_ratio:g}"
            problems.append(_problem(what))
        verdict = {"max_kl": self.max_kl, "max_ppl_ratio": self.max_ppl_ratio, "kl": kl, "ppl_ratio": ratio, "passed": not problems}
        if problems and not self.publish_anyway:
            raise GateRefused.from_problems("E115", problems)
        for problem in problems:
            console.warn(f"{problem.what}; published all the same (--publish-anyway)")
        return verdict


def figures(document: Mapping[str, Any]) -> tuple[float, float]:
    """KL divergence to the original in nats, and perplexity over the original's."""
    ours, theirs = document["model"]["perplexity"]["value"], document["baseline"]["perplexity"]["value"]
    return float(document["comparison"]["kl"]["value"]), float(ours) / float(theirs)


def _problem(what: str) -> Problem:
    return Problem(
        what,
        "the result, which is kept as OUT.rejected and not published",
        "distil it, prune or quantize less, or pass --publish-anyway",
    )


def measure(recipe: Recipe, gate: Gate, console: Console, task_data: Path | None = None) -> Measure:
    """For run_job: perplexity, KL and the recipe's tasks against the original, then the gate."""

    def look(folder: Path, source: Source) -> Mapping[str, Any]:
        evaluation = against_original(folder, source, recipe, task_data, console)
        return {**evaluation, "gate": gate.check(evaluation, console)} if gate.asked else evaluation

    return look


def against_original(folder: Path, source: Source, recipe: Recipe, task_data: Path | None, console: Console) -> dict[str, Any]:
    """Perplexity, KL and top-1 agreement against the original, and the recipe's tasks; or why they could not be measured."""
    from marlinctl.checkpoint.reader import open_checkpoint
    from marlinctl.evaluate import EvalSettings, evaluate, render_table

    with open_checkpoint(source.folder) as checkpoint:
        elements = sum(info.nbytes // 2 for info in checkpoint.tensors.values())
    needed, available = 2 * 2 * elements, available_memory()
    if needed > available:
        reason = f"not evaluated: both models need {needed / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are free"
        console.warn(f"{reason}; run `marlinctl eval` on a larger machine")
        return {"table": reason}
    asked = recipe.evaluate
    settings = EvalSettings(
        tasks=tuple(asked.tasks), task_data=task_data, limit=asked.limit, text=asked.text, tokens=asked.tokens, window=asked.window
    )
    document = evaluate(folder, settings, console, baseline=source.folder, names=("compressed", Path(source.name).name))
    return {"table": render_table(document), "document": document}
