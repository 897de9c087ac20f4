"""`--calibration auto`: the data set of the hub, or the model's own text and why."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, NoReturn

import huggingface_hub
import huggingface_hub.constants
import pytest

import marlinctl.oneshot.run as oneshot_run
from marlinctl import cli, compress
from marlinctl.data import default_set
from marlinctl.data.default_set import DEFAULT_SET, settled
from marlinctl.errors import CheckFailed
from marlinctl.recipes.schema import Recipe, load_recipe, resolve
from marlinctl.system.console import Console
from tests.tiny import make_tiny


def settle(*, offline: bool = False) -> tuple[str, str]:
    told = io.StringIO()
    recipe = settled(load_recipe("int4"), Console(colour=False, stderr=told), offline=offline)
    return recipe.calibration.source, told.getvalue()


def test_the_data_set_of_the_hub_where_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default would stay the slower one, or the recipe that is recorded would not say which text it was."""
    asked: list[Any] = []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, timeout: asked.append((name, timeout)))
    source, said = settle()
    assert (source, asked) == (DEFAULT_SET, [("HuggingFaceH4/ultrachat_200k", 5)])
    assert f"calibration: {DEFAULT_SET} of the hub, the default" in said


def test_the_models_own_text_elsewhere_with_reason_and_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run would write text for minutes, or ask the hub in spite of --offline, and the person would not know why."""

    def fails(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fails)
    for offline, constant, reason in ((True, False, "--offline"), (False, True, "HF_HUB_OFFLINE"), (False, False, "(ConnectionError)")):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", constant)
        source, said = settle(offline=offline)
        assert source == "self" and reason in said
        assert "writes 128 x 512 tokens itself" in said and "2,044 forward passes" in said
    monkeypatch.setattr(default_set, "find_spec", lambda name: None)
    assert "needs the package datasets" in settle()[1]


def test_what_was_asked_for_stays() -> None:
    """A text that the person named would be exchanged for another one."""
    recipe, _ = resolve(load_recipe("int4"), {"calibration.source": "self"})
    told = io.StringIO()
    assert settled(recipe, Console(colour=False, stderr=told), offline=False) is recipe and not told.getvalue()


@pytest.mark.parametrize("verb", ["quantize", "sparsify", "compress"])
def test_a_command_without_a_text_begins(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first command of the README would be refused: `auto` is no file, and the check of files must not look for one."""
    make_tiny(tmp_path / "model")
    begun: list[str] = []

    def work(model: str, out: Path, recipe: Recipe, *_: Any, **__: Any) -> NoReturn:
        begun.append(recipe.calibration.source)
        raise CheckFailed("E101", "far enough", where="here", fix="none")

    monkeypatch.setattr(oneshot_run, "run_job", work)
    monkeypatch.setattr(compress, "run_compress", work)
    assert cli.main([verb, str(tmp_path / "model"), str(tmp_path / "out"), "--group-size", "64"]) == 1, capsys.readouterr().err
    assert begun == ["auto"]


def test_a_whole_run_without_a_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Checks, run and report each read the source; one that does not know the default would stop, or name `auto` as a text."""
    make_tiny(tmp_path / "model")
    (tmp_path / "mine.yaml").write_text("calibration: {minimum_tokens: 32}")
    small = ["--recipe", str(tmp_path / "mine.yaml"), "--group-size", "32", "--samples", "2", "--sequence-length", "32", "--no-eval"]
    out = tmp_path / "out"
    assert cli.main(["compress", str(tmp_path / "model"), str(out), *small, "--offline"]) == 0, capsys.readouterr().err
    assert load_recipe(out / "recipe.yaml").calibration.source == "self"
