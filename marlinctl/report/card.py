"""README.md of a published folder: the model card that people and the hub read.

    front matter    huggingface_hub's: the hub links the original, filters by licence, and shows the scores of whole tasks (`model-index`)
    title           the name of the folder
    Use it          what is copied: a server, transformers (usage.py)
    Scores          beside the original's
    What it is      format, licence, data, seeds, versions, digests
    How ...         the command, and how to check the folder

It lies outside the manifest, so scores can be added later without touching the model. What it says of a run comes from the run's JSON; what
`pack` knows of a foreign folder is less, and every line that nothing is known for stays out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import TYPE_CHECKING, Any

from marlinctl import __version__
from marlinctl.checkpoint.formats.base import Format
from marlinctl.checkpoint.licence import KEYS, spoken
from marlinctl.checkpoint.mask import NAME as MASK_FILE
from marlinctl.checkpoint.model_files import ORDER_FILE
from marlinctl.checkpoint.runtimes import Loads
from marlinctl.errors import number_of
from marlinctl.quantize.scheme import ACTIVATION_GROUP, INT4, Grid, Rounding
from marlinctl.report.markdown import code, listing, table, text
from marlinctl.report.page import Cell, Name, Table
from marlinctl.report.scores import RECOVERY, Score, figure, finite, flips_figure, percent, recovery, scores
from marlinctl.report.usage import usage
from marlinctl.system.log import redact

if TYPE_CHECKING:
    from marlinctl.report.provenance import Folder

_TASK, _WITH_IMAGES = "text-generation", "image-text-to-text"
_PRUNED = "16-bit weights, pruned to 2:4"
Row = tuple[str, Cell]


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What the card says."""

    name: str  # of the folder
    fmt: Format
    layers: Mapping[str, int]  # quantized linears -> group size, -1 for whole rows
    ignore: Sequence[str]  # linears left 16-bit
    command: str  # the exact command line, with output paths as the person gave them
    loads: Loads
    base_model: str | None = None  # a hub id; local paths are private
    license: Mapping[str, str] | None = None  # of the original: license, license_name, license_link
    made_from: Sequence[Row] = field(default=())  # data, seeds, versions, digests
    size: tuple[int, int] | None = None  # bytes of the original's weights and of these
    scores: Sequence[Score] = field(default=())
    measured: Sequence[str] = field(default=())  # on which text, and what must not be overlooked
    two_of_four: bool = False  # pruned to 2:4
    folded: tuple[str, ...] = ()  # into its weights (checkpoint/orders.py)
    grids: Mapping[str, Grid] = field(default_factory=dict)  # of the quantized linears whose codes are not INT4
    rounding: Mapping[str, Rounding] = field(default_factory=dict)  # of the linears whose inputs programs may round
    integer_scales: int = 0  # linears whose scales have this form (quantize/integer_scales.py)

    def grid_counts(self) -> list[tuple[Grid, int]]:
        return sorted(Counter(self.grids.get(layer, INT4) for layer in self.layers).items())

    @property
    def used_grids(self) -> list[Grid]:
        return [grid for grid, _ in self.grid_counts()]


def of_compression(report: Mapping[str, Any], folder: Folder, layers: Mapping[str, int]) -> str:
    """The card of what compress, quantize, sparsify or pack published."""
    from marlinctl.report.provenance import base_model, card_rows, grids_of

    source, packed = report["source"], report.get("packed")
    found, measured = _measured(report)
    facts = CardFacts(
        name=folder.name,
        fmt=folder.fmt,
        layers=layers,
        ignore=[item["name"] for item in report["kept"]],
        command=report["command"] + (f"\n{packed['command']}" if packed else ""),
        loads=folder.loads,
        base_model=base_model(source, folder),
        license=source.get("license"),
        made_from=card_rows(report, folder),
        size=(report["bytes"]["source"], report["bytes"]["result"]),
        scores=found,
        measured=measured,
        two_of_four=report["sparse"] > 0,
        folded=folder.folded,
        grids=grids_of(report),
        rounding={record["name"]: record["rounding"] for record in report["layers"] if record.get("rounding", "none") != "none"},
        integer_scales=sum(bool(record.get("integer_scales")) for record in report["layers"]),
    )
    return render(facts)


def of_training(report: Mapping[str, Any], folder: Folder) -> str:
    """The card of what distill published."""
    from marlinctl.report.provenance import base_model, training_rows
    from marlinctl.report.training import held_out, trained

    title = folder.fmt.title_of(folder.grids) if folder.fmt.quantized else "16-bit weights"
    title += ", 2:4 sparse" if report["sparse_linears"] else ""
    teacher = report["teacher"]
    original = base_model(teacher, folder)
    tags = ["distillation", *folder.fmt.tags_of(folder.grids), *(["sparse"] if report["sparse_linears"] else [])]
    rows: list[Row] = [
        ("Format", title.replace("`", "")),
        ("Trained", f"{trained(report)}, toward the original"),
        ("Original", Name(original) if original else ""),
        ("Licence of the original", spoken(teacher.get("license"))),
        *training_rows(report, folder),
        *folder.loads.rows(),
    ]
    losses = held_out(report["held_out"])
    assert isinstance(losses, Table)
    found, measured = _measured(report)
    lead = f"{title}, distilled from {code(original) if original else 'the original'}."
    lines = [
        _front_matter(folder.name, original, teacher.get("license"), tags, relation="finetune", wraps=folder.loads.wraps, measured=found),
        "",
        *_head(folder.name, lead, folder.loads),
        *_scores(found, measured),
        *("## Held-out loss", "", table(losses.header, losses.rows), ""),
        *("## What it is", "", table(("", ""), [row for row in rows if row[1]]), ""),
    ]
    return "\n".join([*lines, *_how(report["command"])])


def render(facts: CardFacts) -> str:
    """The card as Markdown with YAML front matter."""
    tags = [*facts.fmt.tags_of(facts.used_grids), *(["sparse"] if facts.two_of_four else [])]
    front = _front_matter(
        facts.name, facts.base_model, facts.license, tags, relation="quantized", wraps=facts.loads.wraps, measured=facts.scores
    )
    head = _head(facts.name, _lead(facts), facts.loads)
    return "\n".join([front, "", *head, *_scores(facts.scores, facts.measured), *_what(facts), *_how(facts.command)])


def _measured(report: Mapping[str, Any]) -> tuple[list[Score], list[str]]:
    """Scores and what they were measured on."""
    from marlinctl.report.provenance import public_notes

    document = report.get("evaluation", {}).get("document")
    return (scores(document), public_notes(document)) if document else ([], [])


def _front_matter(
    name: str,
    base_model: str | None,
    licence: Mapping[str, str] | None,
    tags: Sequence[str],
    *,
    relation: str,
    wraps: bool,
    measured: Sequence[Score] = (),
) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type=_TASK,
            dataset_type=s.name,
            dataset_name=s.name,
            dataset_split=s.split if s.kind == "task" else None,
            metric_type=s.metric,
            metric_value=s.ours["value"],
        )
        for s in measured
        if s.kind != "distance" and s.whole and s.ours is not None and finite(s.ours["value"])
    ]
    known: dict[str, Any] = {key: licence[key] for key in KEYS if licence and key in licence}
    if results:
        known |= {"model_name": name, "eval_results": results}
    if base_model:
        known |= {"base_model": base_model, "base_model_relation": relation}
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=_WITH_IMAGES if wraps else _TASK,
        tags=["marlinctl", *tags],
        **known,
    )
    return f"---\n{data.to_yaml()}\n---"


def _head(name: str, lead: str, loads: Loads) -> list[str]:
    return [f"# {text(name)}", "", lead, "", *usage(name, loads.accepted, wraps=loads.wraps)]


def _title(facts: CardFacts) -> str:
    return facts.fmt.title_of(facts.used_grids) if facts.layers else _PRUNED  # nothing quantized: `sparsify` without --bits 4


def _lead(facts: CardFacts) -> str:
    """What it is, of what, and how much smaller."""
    line = f"{code(facts.base_model)} as {_title(facts)}" if facts.base_model else _title(facts)
    if facts.two_of_four and facts.layers:
        line += ", pruned to 2:4"
    if facts.size is None or not all(facts.size):
        return f"{line}."
    before, after = facts.size
    return f"{line}: {after / 1e6:,.1f} MB instead of {before / 1e6:,.1f} MB of weights."


def _what(facts: CardFacts) -> list[str]:
    sizes = Counter(facts.layers.values())
    groups = ", ".join(f"{'whole rows' if size == -1 else size} ({number_of(count, 'linear')})" for size, count in sizes.most_common())
    rows: list[Row] = [
        ("Format", _title(facts).replace("`", "")),
        *(("Quantized" if i == 0 else "", line) for i, line in enumerate(_codes(facts))),
        ("Activations", _rounding(facts)),
        ("Group size", groups),
        ("Scales", _scales(facts)),
        ("Pruned", f"2:4, two of each four neighbours along K are zero; {_storage(facts.fmt)}" if facts.two_of_four else ""),
        ("Folded into the weights", _folded(facts.folded)),
        ("Original", Name(facts.base_model) if facts.base_model else ""),
        ("Licence of the original", spoken(facts.license)),
        *facts.made_from,
        ("Written by", f"marlinctl {__version__}"),
        *facts.loads.rows(),
    ]
    lines = [table(("", ""), [row for row in rows if row[1]])]
    if facts.ignore:
        lines += ["", f"Left at 16 bits: {_shorten(facts.ignore)}."]
    note = facts.fmt.note if facts.layers else ""
    return ["## What it is", "", *lines, "", *([note] if note else [])]


_FOLDED = {
    "orders": "channels lie in another order than in the original",
    "exponents": "columns are multiplied by powers of two that the norm before them makes up for",
    "rotation": "the residual stream and the value heads are rotated, so hidden states are not the original's",
}


def _folded(kinds: Sequence[str]) -> str:
    if not kinds:
        return ""
    trained = "A LoRA adapter or a draft head" if "rotation" in kinds else "A LoRA adapter"
    return f"{'; '.join(_FOLDED[kind] for kind in kinds)} ({ORDER_FILE} has the numbers). {trained} of the original does not fit"


def _codes(facts: CardFacts) -> list[str]:
    return [f"{number_of(count, 'linear')}, {_of_grid(grid)}" for grid, count in facts.grid_counts()]


def _of_grid(grid: Grid) -> str:
    if grid.rounds_activations:
        codes = "FP8 (e4m3)" if grid.floating else f"int8 symmetric, codes {grid.lowest}..{grid.highest},"
        kind = "FP8" if grid.floating else grid.activations
        return f"{codes} times one scale per row; inputs are rounded to {kind} when the model runs, with one scale per token"
    if grid.symmetric:
        return f"int{grid.bits} symmetric, codes {grid.lowest}..{grid.highest} times one scale per group"
    return f"int{grid.bits} asymmetric, codes less one zero point per group times one scale per group"


def _rounding(facts: CardFacts) -> str:
    """Of 4-bit linears whose inputs may be rounded."""
    if not facts.rounding or not facts.fmt.rounds:
        return ""
    scales = "one scale per token" if "int8" in facts.rounding.values() else f"one scale per token and {ACTIVATION_GROUP} inputs"
    count = number_of(len(facts.rounding), "linear")
    return f"what enters {count} is rounded to int8 where that is faster, with {scales}"


def _scales(facts: CardFacts) -> str:
    if not facts.integer_scales:
        return ""
    return f"those of {number_of(facts.integer_scales, 'linear')} are small integers times one number per row, as float16"


def _storage(fmt: Format) -> str:
    return "the metadata says which" if fmt.needs_mask else f"{MASK_FILE} says which"


def _scores(found: Sequence[Score], measured: Sequence[str]) -> list[str]:
    if not found:
        return []
    rows = [
        (
            s.name,
            s.metric,
            figure(s.ours, digits=s.digits),
            "" if s.kind == "distance" else figure(s.baseline, digits=s.digits),
            percent(recovery(s)),
            flips_figure(s.flips),
        )
        for s in found
    ]
    recovered = any(recovery(s) is not None for s in found)
    filled = [True] * 4 + [recovered, any(s.flips for s in found)]
    columns = ("Measured on", "Metric", "This model", "Original", "Recovery", "Flips")
    shown = table(tuple(compress(columns, filled)), [tuple(compress(row, filled)) for row in rows])
    said = [RECOVERY] if recovered else []
    return ["## Scores", "", shown, "", *(f"{text(line)}\n" for line in (*said, *measured))]


def _how(command: str) -> list[str]:
    return [
        "## How it was made",
        "",
        listing(redact(command)),
        "",
        "`marlinctl_report.html` beside this card shows every layer, `recipe.yaml` holds every setting.",
        "",
        "## How to check it",
        "",
        "`marlinctl verify FOLDER` compares every file with `marlinctl_manifest.json`, checks every tensor, and loads the model;",
        "`marlinctl verify FOLDER --source ORIGINAL` compares it with the original, layer by layer.",
        "",
    ]


def _shorten(names: Sequence[str]) -> str:
    shown = ", ".join(code(name) for name in names[:6])
    return shown + (f" and {len(names) - 6} more" if len(names) > 6 else "")
