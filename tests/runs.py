"""Small whole runs: a text, a recipe that finishes in a second, and what came of it."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from marlinctl.oneshot.open import Options
from marlinctl.oneshot.run import run_job
from marlinctl.planning.plan import Settings, make_plan
from marlinctl.recipes.schema import Recipe, load_recipe, resolve
from marlinctl.system.console import Console

TEXT = " ".join(
    f"The {a} {b} of number {i} is on the table in the garden."
    for i, (a, b) in enumerate(zip("abcdefgh" * 40, "klmnopqrst" * 32, strict=True))
)


def write_text(path: Path) -> Path:
    path.write_text(TEXT)
    return path


def recipe(text: Path | str, name: str = "int4", **changes: Any) -> Recipe:
    """changes: keys of the recipe, with __ for the dot. Masks are refined little: of a tiny model it is most of a run."""
    given = {
        "quantize.group_size": 32, "calibration.source": str(text), "calibration.samples": 8,
        "calibration.sequence_length": 64, "calibration.minimum_tokens": 256,
    }  # fmt: skip
    sparse = name == "sparse-int4" or changes.get("sparsify__pattern") == "2:4"
    if sparse and changes.get("sparsify__method", "iterative") == "iterative":
        given |= {"sparsify.ls_iterations": 4, "sparsify.mask_sweeps": 1}
    return resolve(load_recipe(name), given | {key.replace("__", "."): value for key, value in changes.items()})[0]


def plan(model: Path | str, chosen: Recipe, **settings: Any) -> dict[str, Any]:
    return make_plan(str(model), chosen, Settings(**{"out": Path(), "dtype": "float32", **settings}), Console.quiet())


def quantize(model: Path, out: Path, chosen: Recipe, **options: Any) -> dict[str, Any]:
    return run_job(str(model), out, chosen, replace(Options(dtype="float32"), **options), Console.quiet())[0]


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of everything but what may differ between two equal runs."""
    apart = {"README.md", "marlinctl_report.json", "marlinctl_report.md", "marlinctl_report.html", "run.log"}
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in apart)
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
