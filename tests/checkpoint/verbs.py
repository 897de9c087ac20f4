"""The verbs that take a model folder, and how each refuses it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from marlinctl import api
from marlinctl.benchmarking.cases import checkpoint_set
from marlinctl.benchmarking.generation import load_packed
from marlinctl.compress import run_compress
from marlinctl.convert.repack import repack
from marlinctl.errors import MarlinctlError
from marlinctl.evaluation.run import EvalSettings, evaluate
from marlinctl.oneshot.open import Options, open_model
from marlinctl.planning.plan import Settings, make_plan
from marlinctl.recipes.schema import Recipe, load_recipe, resolve
from marlinctl.report.rewrite import rewrite
from marlinctl.system.console import Console
from marlinctl.verify import run as verify
from marlinctl.verify.inspect import inspect
from tests.packed import edit_json

QUIET = Console.quiet()
TEXT = "A sentence of some words, and another one. " * 60


def recipe(**changes: Any) -> Recipe:
    """The recipe int4, small; `quantize_bits=16` is quantize.bits."""
    small = {"quantize.group_size": 32, "quantize.refine": 0}
    small |= {"calibration.samples": 2, "calibration.sequence_length": 32, "calibration.minimum_tokens": 16}
    return resolve(load_recipe("int4"), {**small, **{key.replace("_", ".", 1): value for key, value in changes.items()}})[0]


def _distill(student: Path, teacher: Path) -> None:
    from contextlib import ExitStack

    from marlinctl.distillation.open import open_models

    packed = "quantization_config" in json.loads((student / "config.json").read_text()) if (student / "config.json").is_file() else False
    asked = recipe(distill_tokens=1000, distill_mode="scales" if packed else "full").distill
    with ExitStack() as stack:
        open_models(str(student), str(teacher), asked, Options(), QUIET, stack)


def measure(folder: Path, baseline: Path | None = None) -> None:
    settings = EvalSettings(text=str(folder.parent / "text.txt"), tokens=64, window=32, dtype="float32", device="cpu")
    evaluate(folder, settings, QUIET, baseline=baseline)


def check(folder: Path) -> None:
    verify.verify(folder, source=None, load=False, console=QUIET)


# Each gets the damaged folder; beside it lies a good model, `dense`.
FROM_DENSE: dict[str, Callable[[Path], object]] = {
    "quantize": lambda f: open_model(str(f), f.with_name("out"), recipe(), Options(), QUIET),
    "sparsify": lambda f: open_model(str(f), f.with_name("out"), recipe(sparsify_pattern="2:4"), Options(), QUIET),
    "compress": lambda f: run_compress(str(f), f.with_name("out"), recipe(), Options(), QUIET, evaluate_result=False),
    "plan": lambda f: make_plan(str(f), recipe(), Settings(f.with_name("out")), QUIET),
    "distill, as teacher": lambda f: _distill(f.with_name("pruned"), f),
    "verify --source": lambda f: verify.verify(f.with_name("packed"), source=f, load=False, console=QUIET),
    "eval --against": lambda f: measure(f.with_name("dense"), f),
}
FROM_PACKED: dict[str, Callable[[Path], object]] = {
    "pack": lambda f: repack(f, f.with_name("out"), format="marlin"),
    "distill, as student": lambda f: _distill(f, f.with_name("dense")),
    "report": rewrite,
    "bench": lambda f: checkpoint_set(f, QUIET),
    "bench --model": lambda f: load_packed(f, torch.device("cpu"), torch.float16),
}
FROM_ANY: dict[str, Callable[[Path], object]] = {"eval": measure, "inspect": inspect, "api.load": api.load}
DENSE, PACKED = FROM_DENSE | FROM_ANY, FROM_PACKED | FROM_ANY
NEED_A_TOKENIZER = {*FROM_DENSE, "eval", "distill, as student"} - {"verify --source"}


def edit_config(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", lambda config: config.update(values))


def refusal(run: Callable[[Path], object], folder: Path) -> MarlinctlError:
    with pytest.raises(MarlinctlError) as caught:
        run(folder)
    assert not folder.with_name("out").exists() and not (folder / "canary").exists()
    return caught.value


def assert_says(error: MarlinctlError, ids: str, text: str) -> None:
    told = " ".join(part for problem in error.problems for part in (problem.what, problem.where, problem.fix))
    assert error.error_id in ids.split() and text in told, f"{error.error_id}: {told}"


def copied(place: Path, name: str) -> Path:
    return Path(shutil.copytree(place / name, place / "damaged"))
