"""Several outputs of one model on one page: what was lost against the size, as model cards show it.

    comparison.html    tables and picture; works offline
    comparison.svg     the picture alone, for a card; it has a background of its own, light or dark as the reader's
    comparison.md      tables and picture for a card

All figures come from the reports of the folders. They can be compared where the original is the same, and text and questions are: what is
not the same is refused, or, of tasks, left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marlinctl.checkpoint.folder import open_folder
from marlinctl.errors import Problem, UsageError
from marlinctl.report import html, markdown, pictures
from marlinctl.report.page import Block, Page, Paragraph, Picture, Section, Table
from marlinctl.report.provenance import public_notes
from marlinctl.report.rewrite import read_report, reading
from marlinctl.report.scores import RECOVERY, Score, figure, finite, percent, recovery, scores
from marlinctl.system.files import require_parent
from marlinctl.system.log import redacted

_PREFERRED = ("acc_norm", "acc", "exact_match,strict-match", "exact_match")  # of a task with several metrics, the one in the mean

_OF_TEXT = {"perplexity": "perplexity, less is better", "KL, nats": "KL divergence from the original in nats, less is better"}


@dataclass(frozen=True, slots=True)
class Output:
    """A published folder, its size and its measurement."""

    name: str
    format: str
    bytes: int  # of its weights
    source_bytes: int | None  # of the original's
    original: str
    scores: Mapping[tuple[str, str], Score]  # task or text, and metric
    measured_on: tuple[object, ...]  # identity of the original, and the text
    notes: tuple[str, ...]  # what must not be overlooked of the measurement
    questions: Mapping[str, tuple[str | None, ...]]  # task -> digests of its prompts

    @property
    def recoveries(self) -> dict[str, float]:
        """Of each task, that of its preferred metric."""
        found: dict[str, dict[str, float]] = {}
        for (name, metric), score in self.scores.items():
            if (share := recovery(score)) is not None:
                found.setdefault(name, {})[metric] = share
        return {name: next((by[metric] for metric in _PREFERRED if metric in by), next(iter(by.values()))) for name, by in found.items()}

    def text_score(self, metric: str) -> Score | None:
        return next((score for (_, known), score in self.scores.items() if known == metric and score.kind != "task"), None)


def read_outputs(folders: Sequence[Path]) -> list[Output]:
    """UsageError E261 where they cannot be compared, with everything that is in the way. E101, E374 for a report that cannot be read."""
    names = [folder.resolve().name for folder in folders]
    shown = names if len(set(names)) == len(names) else [str(folder) for folder in folders]
    outputs, problems = [], []
    for folder, name in zip(folders, shown, strict=True):
        report = redacted(read_report(folder))
        document = report.get("evaluation", {}).get("document") if isinstance(report.get("evaluation"), dict) else None
        if not document or not document.get("baseline"):
            fix = f"marlinctl eval {folder} --against ORIGINAL --out scores.json, then marlinctl report {folder} --scores scores.json"
            problems.append(Problem("its report has no measurement against the original", str(folder), fix))
            continue
        with reading(folder):
            outputs.append(_output(folder, name, report, document))
    for output in outputs[1:]:
        if output.measured_on != outputs[0].measured_on:
            what = f"{output.name} was measured against another original, or on another text, than {outputs[0].name}"
            fix = "measure all of them with the same --against, --text, --tokens and --window"
            problems.append(Problem(what, output.name, fix))
    if problems:
        raise UsageError.from_problems("E261", problems)
    return outputs


def _output(folder: Path, name: str, report: Mapping[str, Any], document: Mapping[str, Any]) -> Output:
    with open_folder(folder) as examined:
        info = examined.info
        size = sum(tensor.nbytes for tensor in examined.checkpoint.tensors.values())
    text = document.get("text")
    read = None if text is None else (text["sha256"], text["windows"], text["window"])
    source = report["teacher" if report["kind"] == "distill" else "source"]
    tasks = document["model"].get("tasks", {})
    leaves = {task: document["model"].get("groups", {}).get(task, {}).get("tasks", [task]) for task in document.get("names", ())}
    return Output(
        name,
        info.format.label + (", 2:4" if report.get("sparse") or report.get("sparse_linears") else ""),
        size,
        report.get("bytes", {}).get("source"),
        str(source.get("base_model") or source["name"]),
        {(score.name, score.metric): score for score in scores(document)},
        (document["baseline"].get("identity"), read),
        tuple(public_notes(document)),
        {task: tuple(tasks[leaf].get("prompts_sha256") for leaf in of_task) for task, of_task in leaves.items()},
    )


def write(outputs: Sequence[Output], target: Path) -> list[Path]:
    """The page, the picture and the Markdown. `target` ends with .html."""
    from marlinctl.system.atomic import write_bytes

    made, drawn = page(outputs), picture(outputs)
    beside = [target.with_suffix(".svg"), target.with_suffix(".md")]
    shown = f"![{markdown.text(drawn.alt)}]({beside[0].name})\n\n"
    head, tables = markdown.render(made).split("## ", 1)
    contents = {target: html.render(made), beside[0]: pictures.standalone(drawn), beside[1]: f"{head}{shown}## {tables}"}
    target.parent.mkdir(parents=True, exist_ok=True)
    for path, content in contents.items():
        write_bytes(path, content.encode())
    return list(contents)


def page(outputs: Sequence[Output]) -> Page:
    tasks = _common_tasks(outputs)
    figures: list[tuple[str, ...]] = [
        (
            output.name,
            output.format,
            f"{output.bytes / 1e6:,.1f}",
            percent(_mean(output, tasks)),
            *(_cells(output.text_score(metric)) for metric in ("perplexity", "KL, nats", "top-1 agreement")),
        )
        for output in outputs
    ]
    header = ("output", "format", "MB", "recovery", "perplexity", "KL, nats", "top-1")
    noted = [Paragraph(line) for line in dict.fromkeys(line for output in outputs for line in output.notes)]
    blocks: list[Block] = [picture(outputs), Table(header, figures, numbers=frozenset(range(2, 7))), *noted]
    sections = [Section("Quality and size", blocks)]
    if tasks:
        said = RECOVERY + (" The mean counts each task once." if len(tasks) > 1 else "")
        by_task = [[output.name, *(percent(output.recoveries[task]) for task in tasks)] for output in outputs]
        table = Table(("output", *tasks), by_task, numbers=frozenset(range(1, len(tasks) + 1)))
        sections.append(Section("Recovery by task", [table, Paragraph(said)]))
    original = outputs[0].original
    lead = f"{len(outputs)} outputs of one model, each measured against it on the same text and questions."
    return Page(f"{original}, compressed", lead, [], sections, "Written by marlinctl from the reports of the folders.")


def picture(outputs: Sequence[Output]) -> Picture:
    """A panel for each kind of measurement that all outputs have."""
    tasks = _common_tasks(outputs)
    sizes = [output.source_bytes for output in outputs if output.source_bytes]
    source = sizes[0] if sizes else None
    panels = []
    if tasks:
        title = "recovery, % of the original's score" + (f", mean of {len(tasks)} tasks" if len(tasks) > 1 else f", {tasks[0]}")
        panels.append(_panel(title, [100 * _share(output, tasks) for output in outputs], 100.0, outputs, source))
    for metric, title in (
        ("perplexity", "perplexity, less is better"),
        ("KL, nats", "KL divergence from the original in nats, less is better"),
    ):
        found = [output.text_score(metric) for output in outputs]
        values = [_value(score) for score in found]
        if all(value is not None for value in values):
            baseline = found[0].baseline if found[0] is not None else None
            original = 0.0 if metric.startswith("KL") else _finite_of(baseline)
            panels.append(_panel(title, [value for value in values if value is not None], original, outputs, source))
    said = "; ".join(f"{panel.title}: {', '.join(f'{point.name} {point.y:.4g}' for point in panel.points)}" for panel in panels)
    largest = ", ".join(f"{output.name} {output.bytes / 1e6:,.0f} MB" for output in outputs)
    caption = "Quality against the size of the weights: the upper left is best for recovery, the lower left for the others."
    return pictures.quality(panels, caption, f"Quality against the size of the weights. {largest}. {said[:1].upper()}{said[1:]}.")


def _panel(title: str, values: Sequence[float], original: float | None, outputs: Sequence[Output], source: int | None) -> pictures.Panel:
    points = [pictures.Point(output.name, output.bytes / 1e6, value) for output, value in zip(outputs, values, strict=True)]
    if original is not None and source:
        points.append(pictures.Point("original", source / 1e6, original))
    return pictures.Panel(title, tuple(points))


def _common_tasks(outputs: Sequence[Output]) -> list[str]:
    """Tasks that every output has a recovery of, over the same questions."""

    def everywhere(task: str) -> bool:
        return all(task in output.recoveries and output.questions.get(task) == outputs[0].questions.get(task) for output in outputs)

    return [task for task in outputs[0].recoveries if everywhere(task)]


def _share(output: Output, tasks: Sequence[str]) -> float:
    return math.fsum(output.recoveries[task] for task in tasks) / len(tasks)


def _mean(output: Output, tasks: Sequence[str]) -> float | None:
    return _share(output, tasks) if tasks else None


def _cells(score: Score | None) -> str:
    return "-" if score is None or score.ours is None else figure({"value": score.ours["value"]}, digits=score.digits)


def _value(score: Score | None) -> float | None:
    return None if score is None else _finite_of(score.ours)


def _finite_of(estimate: Mapping[str, Any] | None) -> float | None:
    return float(estimate["value"]) if estimate is not None and finite(estimate["value"]) else None


def document(output: Output) -> dict[str, Any]:
    """For machines."""
    perplexity, kl = (_value(output.text_score(metric)) for metric in ("perplexity", "KL, nats"))
    return {
        "name": output.name,
        "format": output.format,
        "weight_bytes": output.bytes,
        "recovery": output.recoveries,
        "perplexity": perplexity,
        "kl": kl,
    }


def check_target(target: Path, folders: Sequence[Path]) -> None:
    """UsageError E244, E288 for a place where the page cannot lie, before anything is read."""
    if target.suffix != ".html":
        raise UsageError("E288", "the comparison is an HTML page", where="--out", fix=f"--out {target.with_suffix('.html')}")
    if len({folder.resolve() for folder in folders}) != len(folders):
        raise UsageError("E288", "one folder twice", where="the arguments OUT", fix="name each folder once")
    require_parent(target, "--out")
    taken: Iterator[Path] = (path for path in (target, target.with_suffix(".svg"), target.with_suffix(".md")) if path.exists())
    if (found := next(taken, None)) is not None:
        raise UsageError("E244", f"{found} exists already", where="--out", fix="remove it, or name another file")
