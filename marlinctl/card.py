"""README.md of a published folder: the model card that people and the hub read.

It lies outside the manifest, so scores can be added later without touching the model.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from marlinctl import __version__
from marlinctl.checkpoint.formats import LOADERS
from marlinctl.checkpoint.mask import NAME as MASK_FILE

_TITLES = {
    "ct": "4-bit weights, compressed-tensors `pack-quantized`",
    "gptq": "4-bit weights, GPTQ v1",
    "marlin": "4-bit weights, native MARLIN tiles of marlinctl",
    "marlin_24": "4-bit weights, 2:4, native Sparse-MARLIN tiles of marlinctl",
    "dense": "16-bit copy of a 4-bit model",
}
_NATIVE_NOTE = "Plain transformers finds no model file in this folder, on purpose: it would fill the packed layers with random numbers.\n"
_NOTES = {
    "marlin": _NATIVE_NOTE,
    "marlin_24": _NATIVE_NOTE,
    "dense": "Every linear holds float16(code * scale). The product is rounded to 11 significant bits, so logits are close to those of the "
    "packed model and not equal to them.\n",
}


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What the card says. `scores`: rows of (task, metric, value, value of the original or '')."""

    fmt: str
    layers: Mapping[str, int]  # quantized linears -> group size, -1 for whole rows
    ignore: Sequence[str]  # linears left 16-bit
    command: str  # the exact command line, with output paths as the person gave them
    base_model: str | None = None  # a hub id; a local path is nobody's business
    license: str | None = None
    calibration: str | None = None
    recipe_hash: str | None = None
    scores: Sequence[tuple[str, str, str, str]] = field(default=())
    two_of_four: bool = False  # pruned to 2:4


def render(facts: CardFacts) -> str:
    """The card as Markdown with YAML front matter."""
    return "\n".join([*_front_matter(facts), "", *_what(facts), *_scores(facts), *_how(facts)])


def _front_matter(facts: CardFacts) -> list[str]:
    """JSON strings are YAML strings, so nothing in a name can break out of the block."""
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if facts.base_model:
        lines += [f"base_model: {json.dumps(facts.base_model)}", "base_model_relation: quantized"]
    if facts.license:
        lines.append(f"license: {json.dumps(facts.license)}")
    of_format = {
        "ct": ["compressed-tensors", "int4"],
        "gptq": ["gptq", "int4"],
        "marlin": ["marlin", "int4"],
        "marlin_24": ["marlin", "int4"],
    }
    tags = ["marlinctl", *of_format.get(facts.fmt, []), *(["sparse"] if facts.two_of_four else [])]
    return [*lines, "tags:", *(f"- {tag}" for tag in tags), "---"]


def _what(facts: CardFacts) -> list[str]:
    sizes = Counter(facts.layers.values())
    groups = ", ".join(f"{'whole rows' if size == -1 else size} ({count} linears)" for size, count in sizes.most_common())
    title = _TITLES[facts.fmt] if facts.layers else "16-bit weights, pruned to 2:4"  # nothing quantized: `sparsify` without --bits 4
    rows = [
        ("Format", title),
        ("Quantized", f"{len(facts.layers)} linears, int4 symmetric, codes -8..7 times one scale per group" if facts.layers else ""),
        ("Group size", groups),
        ("Pruned", f"2:4, two of each four neighbours along K are zero; {_survivors(facts.fmt)}" if facts.two_of_four else ""),
        ("Left 16-bit", _shorten(facts.ignore)),
        ("Original", f"`{facts.base_model}`" if facts.base_model else ""),
        ("Calibration", facts.calibration or ""),
        ("Recipe", f"SHA-256 `{facts.recipe_hash}`" if facts.recipe_hash else ""),
        ("Written by", f"marlinctl {__version__}"),
        ("Loads in", ", ".join(LOADERS[facts.fmt])),
    ]
    name = facts.base_model.rpartition("/")[2] if facts.base_model else "This model"
    table = ["| | |", "|---|---|", *(f"| {key} | {_cell(value)} |" for key, value in rows if value)]
    note = _NOTES.get(facts.fmt) if facts.layers else None
    return [f"# {name}: {title}", "", *table, "", *([note] if note else [])]


def _survivors(fmt: str) -> str:
    return "the metadata says which" if fmt == "marlin_24" else f"`{MASK_FILE}` says which"


def _scores(facts: CardFacts) -> list[str]:
    if not facts.scores:
        return []
    head = ["## Scores", "", "| Task | Metric | This model | Original |", "|---|---|---|---|"]
    return [*head, *("| " + " | ".join(_cell(cell) for cell in row) + " |" for row in facts.scores), ""]


def _how(facts: CardFacts) -> list[str]:
    return [
        "## How it was made",
        "",
        "```",
        facts.command.replace("```", "'''"),
        "```",
        "",
        "## How to check it",
        "",
        "`marlinctl verify FOLDER` compares every file with `marlinctl_manifest.json`, checks every tensor, and loads the model;",
        "`marlinctl verify FOLDER --source ORIGINAL` compares it with the original, layer by layer.",
        "",
    ]


def _shorten(names: Sequence[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:6])
    return shown + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
