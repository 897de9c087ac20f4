"""A small distillation, for the tests that need a whole one: models, text, settings that finish in a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from marlinctl.distillation import loop as loops
from marlinctl.distillation.run import run_distill
from marlinctl.oneshot.open import Options
from marlinctl.recipes.schema import Recipe, load_recipe, resolve
from marlinctl.system.console import Console

WORDS = ("the", "a", "garden", "table", "river", "stone", "under", "over", "quickly", "slowly", "red", "blue", "number", "house")


def write_text(path: Path, words: int = 6000) -> Path:
    """Prose enough for some hundred rows of 32 tokens; the same text every time."""
    lines = [" ".join(WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(12)) for i in range(words // 12)]
    path.write_text("\n\n".join(lines))
    return path


def recipe(text: Path | str, **changes: Any) -> Recipe:
    given = {
        "data": str(text), "tokens": 12 * 256, "sequence_length": 32, "batch_tokens": 256, "micro_batch": 4,
        "learning_rate": 1e-3, "save_every": 5,
    } | changes  # fmt: skip
    return resolve(load_recipe("int4"), {f"distill.{key}": value for key, value in given.items()})[0]


def distill(student: Path, out: Path, teacher: Path, chosen: Recipe, *, resume: bool = False, **options: Any) -> dict[str, Any]:
    settings = Options(**{"device": "cpu", "dtype": "float32", "command": "marlinctl distill", "resume": resume, **options})
    return run_distill(str(student), out, str(teacher), chosen, settings, Console.quiet())


class Crash(Exception):
    """What `crash_after` raises."""


def crash_after(monkeypatch: pytest.MonkeyPatch, steps: int, owner: Any = loops.Loop) -> None:
    """Let so many steps pass, then fail, as a machine does."""
    step = owner.step
    done: list[int] = []

    def counted(*args: Any) -> Any:
        if len(done) == steps:
            raise Crash
        done.append(1)
        return step(*args)

    monkeypatch.setattr(owner, "step", counted)
