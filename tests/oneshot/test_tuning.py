"""Tuning of scales and norms in a run: codes stay, the block comes closer to the original's, and a resumed run agrees."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from marlinctl.checkpoint import manifest
from marlinctl.checkpoint.reader import open_checkpoint
from marlinctl.cli import main
from marlinctl.errors import UsageError
from marlinctl.models.lookup import architecture_of
from marlinctl.oneshot.open import Options
from marlinctl.oneshot.run import run_job
from marlinctl.oneshot.tuning import tunable
from marlinctl.system.console import Console
from tests import zoo
from tests.oneshot.stopping import SIZES, blocks_solved, quantize, stop_in
from tests.oneshot.test_run import logits, recipe
from tests.runs import TEXT, digests
from tests.tiny import make_tiny

TUNED: dict[str, Any] = {"quantize__drift_correction": 0.5, "quantize__tune_steps": 24, "quantize__tune_learning_rate": 0.01}


def run(model: Path, out: Path, text: Path, **changes: Any) -> dict[str, Any]:
    size = {"calibration__samples": 48, "calibration__sequence_length": 128}
    return run_job(str(model), out, recipe(text, **size | changes), Options(dtype="float32"), Console.quiet())[0]


def weights_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("model*.safetensors") for name, tensor in load_file(path).items()}


def distance(folder: Path, original: Path) -> float:
    """Mean square of the difference of the logits, relative to theirs."""
    from marlinctl.evaluation.loading import load_model, open_subject

    ours, theirs = (logits(load_model(open_subject(path), dtype="float32", device="cpu")).double() for path in (folder, original))
    return float((ours - theirs).square().mean() / theirs.square().mean())


@pytest.mark.parametrize("pattern", ["none", pytest.param("2:4", marks=pytest.mark.slow)])
def test_codes_stay_and_the_model_comes_closer(tmp_path: Path, text: Path, pattern: str) -> None:
    """If the scales that were tuned were not those that are written, or belonged to other codes, the model would be further away."""
    source = zoo.build("qwen2", tmp_path / "model")
    plain, tuned = ({**TUNED, "quantize__tune_steps": steps, "sparsify__pattern": pattern} for steps in (0, 24))
    run(source, tmp_path / "plain", text, **plain)
    report = run(source, tmp_path / "tuned", text, **tuned)
    before, after = weights_of(tmp_path / "plain"), weights_of(tmp_path / "tuned")
    assert before.keys() == after.keys()
    first = [name for name in before if name.startswith("model.layers.0.")]
    packed = [name for name in first if name.endswith("weight_packed")]
    assert packed and all(torch.equal(before[name], after[name]) for name in packed)
    changed = [name for name in first if not torch.equal(before[name], after[name])]
    assert {name.rpartition(".")[2] for name in changed} == {"weight_scale", "weight", "bias"}, "norms and biases are tuned as well"
    assert all("norm" in name or "bias" in name or "scale" in name for name in changed)
    assert report["tuning"] and all(block["after"] < block["before"] for block in report["tuning"])
    assert distance(tmp_path / "tuned", source) < distance(tmp_path / "plain", source)


def test_what_is_written_is_what_the_next_block_was_given(tmp_path: Path, text: Path) -> None:
    """Norms and scales are rounded when they are stored; a run that went on with finer ones would solve the next block for other inputs."""
    source = zoo.build("qwen2", tmp_path / "model", dtype=torch.bfloat16)
    run(source, tmp_path / "out", text, **TUNED)
    found = weights_of(tmp_path / "out")
    for name, tensor in found.items():
        if name.endswith("weight_scale"):
            assert torch.equal(tensor.bfloat16().float(), tensor.float()), "a runtime in bfloat16 would round them again"
        elif "norm" in name:
            assert tensor.dtype == torch.bfloat16
    assert main(["verify", str(tmp_path / "out"), "-q"]) == 0


@pytest.mark.parametrize("pattern", [pytest.param("none", marks=pytest.mark.slow), "2:4"])
def test_verify_knows_what_was_tuned(tmp_path: Path, text: Path, pattern: str) -> None:
    """It would take a norm that was tuned for one of another model: of compress with sparse-int4, and of every packed form. What another
    tool has changed must be found all the same."""
    source = zoo.build("qwen2", tmp_path / "model", dtype=torch.bfloat16)
    assert run(source, tmp_path / "out", text, **TUNED, sparsify__pattern=pattern)["tuning"]
    native = "marlin_24" if pattern == "2:4" else "marlin"
    assert main(["pack", str(tmp_path / "out"), str(tmp_path / "native"), "--format", native, "-q"]) == 0
    for name in ("out", "native"):
        assert main(["verify", str(tmp_path / name), "--source", str(source), "-q"]) == 0
        said = manifest.read(tmp_path / name)
        assert all("norm" in tensor or "bias" in tensor for tensor in said["tuned"])
        (tmp_path / name / manifest.NAME).write_text(json.dumps(said | {"tuned": said["tuned"][1:]}))
        assert main(["verify", str(tmp_path / name), "--source", str(source), "-q"]) == 1


def test_exponents_of_a_recurrence_stay(tmp_path: Path) -> None:
    """A_log and dt_bias decide how long a state lasts, over more tokens than a calibration sample has: not what a few steps may move."""
    with open_checkpoint(zoo.build("qwen3_5_text", tmp_path / "model")) as checkpoint:
        known = architecture_of(checkpoint.config, set(checkpoint.tensors))
    names = [name for block in known.blocks for name in tunable(block)]
    assert any(name.endswith("linear_attn.norm.weight") for name in names)
    assert not [name for name in names if name.endswith(("A_log", "dt_bias"))]


@pytest.mark.parametrize("replayed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_run_that_was_stopped_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replayed: bool) -> None:
    """If the original's norms were used for a finished block, or the tuned ones for the original model, all later codes would differ."""
    make_tiny(tmp_path / "model", **SIZES)
    (tmp_path / "text.txt").write_text(TEXT)
    settings = "quantize: {drift_correction: 0.5, tune_steps: 4, tune_learning_rate: 0.01}"
    (tmp_path / "mine.yaml").write_text(f"extends: int4\ncalibration: {{minimum_tokens: 32}}\nsparsify: {{pattern: '2:4'}}\n{settings}\n")
    monkeypatch.setattr("marlinctl.oneshot.run.CHUNK_TOKENS", 32)
    for folder in ("whole", "parts"):
        (tmp_path / folder).mkdir()
    assert main(quantize(tmp_path, tmp_path / "whole" / "out")) == 0
    assert stop_in(monkeypatch, 2, quantize(tmp_path, tmp_path / "parts" / "out")) == 130
    if replayed:
        shutil.rmtree(tmp_path / "parts" / "out.job" / "states")
    assert blocks_solved(monkeypatch, ["resume", str(tmp_path / "parts" / "out"), "-q"]) == (0, [2, 3])
    ours, theirs = (digests(tmp_path / folder / "out") for folder in ("parts", "whole"))
    weights = {name for name in theirs if name.endswith(".safetensors")}
    assert weights and {name: ours[name] for name in weights} == {name: theirs[name] for name in weights}


def test_a_mixture_of_experts_is_left_as_it_is_solved(tmp_path: Path, text: Path) -> None:
    """Its experts are never in memory together; the other blocks of such a model are tuned."""
    source = zoo.build("qwen3_moe", tmp_path / "model", mlp_only_layers=[0], num_hidden_layers=2)
    report = run(source, tmp_path / "out", text, **TUNED)
    assert [block["block"] for block in report["tuning"]] in ([0], [])
    assert main(["verify", str(tmp_path / "out"), "-q"]) == 0


def test_too_few_samples_to_hold_some_out_are_said(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Who asked for tuning would take an untuned model for a tuned one."""
    source = zoo.build("qwen2", tmp_path / "model")
    few = recipe(text, **TUNED, calibration__samples=4, calibration__sequence_length=64)
    report, _ = run_job(str(source), tmp_path / "out", few, Options(dtype="float32"), Console())
    assert not report["tuning"]
    assert capsys.readouterr().err.count("blocks are not tuned: all samples are taken at once") == 1


def test_tuning_needs_the_original_beside_it(tmp_path: Path, text: Path) -> None:
    """Without the reference model a block has nothing to be tuned toward; that shows before the model is read."""
    with pytest.raises(UsageError, match="tuned toward the original"):
        run(tmp_path / "no model", tmp_path / "out", text, quantize__tune_steps=8)
