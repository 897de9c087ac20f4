"""`marlinctl report`: card and report of a published folder, rewritten."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from marlinctl.commands.card_flags import card_flags, chosen_card
from marlinctl.commands.common import common_options
from marlinctl.commands.help import Command
from marlinctl.errors import UsageError
from marlinctl.system.console import Console


@click.command("report", cls=Command)
@click.argument("outs", type=click.Path(path_type=Path), metavar="OUT...", nargs=-1, required=True)
@click.option(
    "--scores", type=click.Path(path_type=Path), metavar="FILE.json", help="Add what `marlinctl eval OUT --out FILE.json` measured."
)
@click.option("--bench", type=click.Path(path_type=Path), metavar="FILE.json", help="Add what `marlinctl bench` measured: its bench.json.")
@click.option(
    "--out", "page", type=click.Path(path_type=Path), metavar="FILE.html", help="With several OUT: where the comparison is written."
)
@card_flags
@common_options
def command(console: Console, outs: tuple[Path, ...], scores: Path | None, bench: Path | None, page: Path | None, **said: Any) -> None:
    """Rewrite the report and the model card of a published folder, or compare several.

    \b
    Example:
        marlinctl report ./smollm2-int4
        marlinctl report ./smollm2-int4 --scores scores.json
        marlinctl report ./smollm2-int4 --bench bench/bench.json
        marlinctl report ./smollm2-int4 ./smollm2-int4-g32 --out comparison.html

    OUT is a published folder. Its marlinctl_report.json is rendered as marlinctl_report.html (one page that works offline),
    marlinctl_report.md and README.md, the model card. Given scores and speeds are added to the JSON. Weights are not touched: all four
    files lie outside the manifest.

    Several folders that were made from one model become one page, FILE.html, with quality against size; FILE.svg and FILE.md beside it are
    for a model card. Their reports must have measurements against the same original, on the same text. The folders stay as they are.
    """
    from marlinctl.report.files import CARD, HTML, JSON, MARKDOWN
    from marlinctl.report.rewrite import read_bench, rewrite

    card = chosen_card(said)
    if len(outs) > 1:
        given = {"--scores": scores, "--bench": bench, "--base-model": card.base_model, "--license": card.license}
        _compare(console, outs, page, [flag for flag, value in given.items() if value is not None])
        return
    if page is not None:
        raise UsageError("E288", "--out is for a comparison of several folders", where="--out", fix="leave it out, or name more folders")
    (out,) = outs
    evaluation = None if scores is None else _evaluation_of(scores, out, console)
    document = rewrite(out, evaluation=evaluation, bench=None if bench is None else read_bench(bench), said=card)
    files = [str(out / name) for name in (HTML, MARKDOWN, CARD, JSON)]
    console.result("\n".join(files), {"out": str(out), "files": files, "report": document})


def _compare(console: Console, outs: tuple[Path, ...], page: Path | None, given: list[str]) -> None:
    from marlinctl.report import comparison

    if given:
        what = f"{given[0]} belongs to one folder"
        raise UsageError("E288", what, where=given[0], fix="report each folder with its own first, then compare them")
    if page is None:
        raise UsageError("E288", "--out is missing: where the comparison is written", where="--out", fix="--out comparison.html")
    comparison.check_target(page, outs)
    found = comparison.read_outputs(outs)
    files = [str(path) for path in comparison.write(found, page)]
    console.result("\n".join(files), {"files": files, "outputs": [comparison.document(output) for output in found]})


def _evaluation_of(scores: Path, out: Path, console: Console) -> dict[str, object]:
    """The results file, if it is of this very folder and complete."""
    from marlinctl.evaluation.loading import open_subject, read_weights
    from marlinctl.evaluation.results import read

    document = read(scores)
    if document["model"].get("identity") != read_weights(open_subject(out), console).identity:
        fix = f"marlinctl eval {out} --out FILE.json, then name that file"
        raise UsageError("E261", "the scores are of another model, or of an earlier state of this one", where=str(scores), fix=fix)
    if not document.get("finished"):
        raise UsageError("E261", "the evaluation is not finished", where=str(scores), fix="marlinctl eval ... --out FILE.json --resume")
    return document
