"""Write docs/models.md's table: every language model type of the installed transformers, alone or with parts for images around it, tiny
and random, quantized and loaded again.

    .venv/bin/python scripts/make_models.py                    # all of them
    .venv/bin/python scripts/make_models.py glm4 phi           # print single ones
    .venv/bin/python scripts/make_models.py --update glm4 phi  # and write their rows, and no others

A type counts as working when the pipeline's hidden states are those of transformers, when the result of `quantize` loads with
exactly its linears changed, and when transformers' logits are those of the dequantized weights. Two types run at a time, each in a process
of its own; one that takes longer than a minute is not tried.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.models.model_list import read_table, table  # noqa: E402 - the path first
from tests.models.sweep import listed_types, outcomes  # noqa: E402

BEGIN, END = "<!-- models: begin -->\n", "<!-- models: end -->\n"


def main() -> None:
    import torch  # noqa: F401 - for all processes
    import transformers  # noqa: F401

    arguments = sys.argv[1:]
    update = "--update" in arguments
    chosen = [name for name in arguments if name != "--update"]
    page = ROOT / "docs" / "models.md"
    head, _, rest = page.read_text().partition(BEGIN)
    found = read_table(rest.partition(END)[0]) if update else {}
    for one in outcomes(chosen or listed_types()):
        found[one.model_type] = one
        print(one.line, flush=True)
    if update or not chosen:
        page.write_text(head + BEGIN + table(found.values()) + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
