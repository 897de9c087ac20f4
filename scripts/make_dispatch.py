"""From measurements to marlinctl/kernels/dispatch.json, the table by which the operators pick a kernel.

    marlinctl bench --tune --out figures
    python scripts/make_dispatch.py figures/bench.json

Each file's dense rows replace the dense table of its architecture, its 2:4 rows the other one; what a file does not hold stays.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from marlinctl.benchmarking.documents import read_document
from marlinctl.benchmarking.tuning import merged
from marlinctl.kernels import dispatch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", type=Path, nargs="+", help="what `marlinctl bench --tune --out DIR` wrote")
    parser.add_argument("--out", type=Path, default=dispatch.PACKAGED, help="default: the table of the package")
    arguments = parser.parse_args()
    document = {"schema_version": dispatch.SCHEMA_VERSION, "architectures": {}}
    if arguments.out.is_file():
        document = json.loads(arguments.out.read_text("utf-8"))
    for path in arguments.figures:
        document = merged(document, read_document(path))
    arguments.out.write_text(dispatch.text_of(document), "utf-8")
    dispatch.read(arguments.out)


if __name__ == "__main__":
    main()
