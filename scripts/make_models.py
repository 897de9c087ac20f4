"""Write docs/models.md's table: every language model type of the installed transformers, tiny and random, quantized and loaded again.

    .venv/bin/python scripts/make_models.py           # all of them, 20 minutes on two cores
    .venv/bin/python scripts/make_models.py glm4 phi  # print single ones

A type counts as working when the pipeline's hidden states are those of transformers, and when the result of `quantize` loads with
exactly its linears changed. A type that takes longer
than a minute is not tried.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.models.sweep import Outcome, outcome  # noqa: E402 - the path first

BEGIN, END = "<!-- models: begin -->\n", "<!-- models: end -->\n"


def main() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    chosen = sys.argv[1:]
    outcomes: list[Outcome] = []
    for model_type in chosen or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        outcomes.append(outcome(model_type))
        print(outcomes[-1].line, flush=True)
    if not chosen:
        page = ROOT / "docs" / "models.md"
        head, _, rest = page.read_text().partition(BEGIN)
        page.write_text(head + BEGIN + _table(outcomes) + END + rest.partition(END)[2])


def _table(outcomes: Sequence[Outcome]) -> str:
    """Types that work, and reasons for the others; a reason that many share stands once."""
    refused = {one.model_type: one.reason.partition(" cannot be compressed: ")[2] or one.reason for one in outcomes if one.how == "refused"}
    kinds = {
        "Encoders, and decoders whose layers are not one list of blocks": "one list of blocks",
        "Not tried, because the script cannot make a tiny model of them in time": "not tried",
    }
    groups = {title: [name for name, reason in refused.items() if words in reason] for title, words in kinds.items()}
    single = {name: reason for name, reason in refused.items() if not any(name in group for group in groups.values())}
    return "\n".join(
        [
            f"In the table, so that a plan needs no torch: {_listed(one.model_type for one in outcomes if one.how == 'table')}.\n",
            f"Derived from transformers' own code: {_listed(one.model_type for one in outcomes if one.how == 'derived')}.\n",
            "Refused:\n",
            *(f"- {title}: {_listed(group)}." for title, group in groups.items()),
            "\n| model_type | reason |\n|---|---|",
            *(f"| `{name}` | {reason} |" for name, reason in single.items()),
            "",
        ]
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    main()
