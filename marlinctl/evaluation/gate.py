"""Quality against the original: measured before anything is published, and held against what the person allows.

A gate that says no ends the run with exit code 1; the finished folder is kept as OUT.rejected and nothing is published.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marlinctl.errors import CheckFailed, GateRefused, Problem
from marlinctl.system.console import gibibytes
from marlinctl.system.host import available_memory

if TYPE_CHECKING:
    from marlinctl.checkpoint.source import Source
    from marlinctl.evaluation.settings import EvalSettings
    from marlinctl.system.console import Console


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
            raise _no_measurement(GateRefused, evaluation["table"])
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


@dataclass(frozen=True, slots=True)
class Measurement:
    """How a result is measured against its original: perplexity, KL, top-1 agreement and tasks; then the gate.

    Called with the finished folder and the original, it returns what the report says; GateRefused where the result is too bad. What can
    be refused without a result is refused by the two checks, which come before the work.
    """

    settings: EvalSettings
    gate: Gate
    console: Console

    def check_arguments(self) -> None:
        """The text, the tasks and their data. Needs no model."""
        from marlinctl.evaluation.early import check_arguments

        check_arguments(self.settings, self.console, with_text=True)

    def check_model(self, folder: Path, config: Mapping[str, Any]) -> None:
        """The window and the text, and for a gate whether there is memory to measure with. `folder`: the original's."""
        from marlinctl.evaluation.early import check_model

        check_model(self.settings, folder, config)
        if self.gate.asked and (reason := _too_large(folder)):
            raise _no_measurement(CheckFailed, reason)

    def __call__(self, folder: Path, source: Source) -> Mapping[str, Any]:
        evaluation = self._against_original(folder, source)
        return {**evaluation, "gate": self.gate.check(evaluation, self.console)} if self.gate.asked else evaluation

    def _against_original(self, folder: Path, source: Source) -> dict[str, Any]:
        """{"table", "document"}; or {"table"} with the reason why it could not be measured."""
        from marlinctl.evaluation.run import evaluate, render_table

        if reason := _too_large(source.folder):
            self.console.warn(f"{reason}; run `marlinctl eval` on a larger machine")
            return {"table": reason}
        names = ("compressed", Path(source.name).name)
        document = evaluate(folder, self.settings, self.console, baseline=source.folder, names=names)
        return {"table": render_table(document), "document": document}


def _too_large(original: Path) -> str:
    """Why two models of this size cannot be measured here; "" where they can."""
    from marlinctl.checkpoint.reader import open_checkpoint

    with open_checkpoint(original) as checkpoint:
        elements = sum(info.nbytes // 2 for info in checkpoint.tensors.values())
    needed, available = 2 * 2 * elements, available_memory()
    if needed <= available:
        return ""
    return f"not evaluated: both models need {gibibytes(needed, 1)}, {gibibytes(available, 1)} are free"


def _no_measurement(kind: type[CheckFailed], reason: str) -> CheckFailed:
    return kind(
        "E115",
        f"the quality gate needs a measurement, and there is none ({reason})",
        where="--max-kl / --max-ppl-ratio",
        fix="run on a machine with more memory, or leave the gate away",
    )
