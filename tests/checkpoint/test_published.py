"""Published and packed folders: what the manifest disproves, reports, and biases that no linear has a place for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from marlinctl.checkpoint import manifest
from marlinctl.checkpoint.transformers_model import load_dense
from marlinctl.cli import main
from marlinctl.report.files import JSON
from marlinctl.report.rewrite import rewrite
from marlinctl.verify.inspect import inspect
from tests.checkpoint.verbs import (
    PACKED,
    assert_says,
    check,
    copied,
    refusal,
)
from tests.packed import edit_json, edit_tensors, foreign_gptq, gptq_block, make_foreign, remake_manifest
from tests.tiny import make_tiny


def _nan(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors["model.norm.weight"].__setitem__(3, float("nan")))
    remake_manifest(folder)


@pytest.mark.parametrize(("verb", "error_id", "exit_code"), [("pack", "E620", 6), ("eval", "E620", 6), ("verify", "E106", 1)])
def test_nan_in_an_untouched_tensor_is_found(place: Path, verb: str, error_id: str, exit_code: int) -> None:
    """`pack` copied it and vouched for it, and the check without a load passed."""
    folder = copied(place, "packed")
    _nan(folder)
    error = refusal({**PACKED, "verify": check}[verb], folder)
    assert (error.error_id, error.exit_code) == (error_id, exit_code) and "model.norm.weight" in error.problems[0].what


@pytest.mark.parametrize("verb", ["pack", "eval"])
def test_weights_that_the_manifest_disproves_are_refused(place: Path, verb: str) -> None:
    """A flipped bit is a weight too."""
    folder = copied(place, "packed")
    shard = next(folder.glob("model*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(bytes(data))
    assert_says(refusal(PACKED[verb], folder), "E304", shard.name)


def test_a_report_of_tomorrow_is_refused(place: Path) -> None:
    """Its keys may mean something else; rewriting it would lose them."""
    folder = copied(place, "packed")
    (folder / JSON).write_text('{"kind": "quantize", "schema_version": 2, "versions": {"marlinctl": "9.9"}}')
    assert_says(refusal(rewrite, folder), "E374", "by marlinctl 9.9")


def test_a_listed_name_does_not_lead_out_of_the_folder(place: Path) -> None:
    """A manifest may be written by anybody."""
    (place / "secret.txt").write_text("x")
    listing = {"../secret.txt": {"bytes": 1, "sha256": "0" * 64}}
    folder = copied(place, "packed")
    edit_json(folder / manifest.NAME, lambda document: document["files"].update(listing))
    assert_says(refusal(inspect, folder), "E304", "may leave the checkpoint folder")


def _with_biases(folder: Path, value: float) -> Path:
    """As AutoGPTQ saves a Llama: a bias for every linear, which the model has no place for."""
    make_tiny(folder.parent / "source")
    codes = make_foreign(folder.parent / "source", folder, gptq_block(), foreign_gptq)
    tensors = load_file(folder / "model.safetensors")
    biases = {f"{name}.bias": torch.full((q.codes.shape[0],), value, dtype=torch.float16) for name, q in codes.items()}
    save_file({**tensors, **biases}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_idle_biases_are_left_out(tmp_path: Path) -> None:
    """`pack` would publish a folder that its own `verify` refuses, and `eval` would refuse a model that every runtime loads."""
    folder = _with_biases(tmp_path / "foreign", 0.0)
    assert main(["pack", str(folder), str(tmp_path / "out"), "--format", "ct", "-q"]) == 0
    assert main(["verify", str(tmp_path / "out"), "-q"]) == 0
    assert load_dense(folder, dtype=torch.float32) is not None


def test_biases_without_a_place_that_are_not_zero_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A part of the model would be lost without a word."""
    assert main(["pack", str(_with_biases(tmp_path / "foreign", 0.5)), str(tmp_path / "out"), "--format", "ct", "-q"]) == 3
    assert "biases are not zero" in capsys.readouterr().err
