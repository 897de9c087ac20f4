"""From measurements to marlinctl/kernels/dispatch.json, the table by which the operators pick a kernel.

    python benchmarks/check_marlin.py --json figures.json
    python scripts/make_dispatch.py figures.json

Each file's dense rows replace the dense table of its architecture, its 2:4 rows the other one; what a file does not hold stays.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from marlinctl.kernels import dispatch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", type=Path, nargs="+", help="what benchmarks/check_marlin.py --json wrote")
    parser.add_argument("--out", type=Path, default=dispatch.PACKAGED, help="default: the table of the package")
    arguments = parser.parse_args()
    document = {"schema_version": dispatch.SCHEMA_VERSION, "architectures": {}}
    if arguments.out.is_file():
        document = json.loads(arguments.out.read_text("utf-8"))
    for path in arguments.figures:
        figures = json.loads(path.read_text("utf-8"))
        measured = {name: figures[name] for name in ("gpu", "torch", "date", "dtype")}
        tables = document["architectures"].setdefault(figures["architecture"], {})
        for sparse, kind in enumerate(dispatch.KINDS):
            rows = [row for row in figures["timing"] if row["sparse"] == bool(sparse)]
            if rows:
                sizes = {"group_size": rows[0]["group_size"]}
                tables[kind] = dispatch.table_of(figures["architecture"], measured | sizes, rows)
    arguments.out.write_text(dispatch.text_of(document), "utf-8")
    dispatch.read(arguments.out)


if __name__ == "__main__":
    main()
