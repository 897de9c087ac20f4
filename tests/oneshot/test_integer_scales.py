"""Integer group scales, all the way: solve, re-fit, tune, write, resume, distil, and what refuses them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from marlinctl.checkpoint.formats.registry import detect, read_parts
from marlinctl.checkpoint.reader import open_checkpoint
from marlinctl.cli import main
from marlinctl.errors import UsageError
from marlinctl.quantize.scheme import INT4
from marlinctl.verify.inspect import inspect, table
from tests import runs, zoo
from tests.distillation.runs import distill
from tests.distillation.runs import recipe as training
from tests.oneshot.stopping import SIZES, blocks_solved, quantize, stop_in
from tests.runs import TEXT
from tests.tiny import make_tiny

INTEGER: dict[str, Any] = {"quantize__group_scales": "integer"}


def scales_of(folder: Path) -> dict[str, Tensor]:
    """Of the symmetric 4-bit linears, [N, G]."""
    with open_checkpoint(folder) as checkpoint:
        info = detect(checkpoint.config, checkpoint.tensors)
        return {layer: read_parts(checkpoint, info, layer).scales for layer in info.layers if info.grid(layer) == INT4}


def are_integers_times_one_number(scales: Tensor) -> bool:
    """Whether each row has a number of which all of its scales are -15..16 times as much, in float64, without the project's own search."""
    s = scales.double()
    largest = s.abs().amax(1, keepdim=True)
    fits = torch.zeros(len(s), dtype=torch.bool)
    for most in range(1, 17):
        for sign in (1, -1):
            ratio = s * most * sign / largest
            fits |= ((ratio - ratio.round()).abs().amax(1) < 1e-9) & (ratio.round() != 0).all(1) & (ratio.amin(1) > -15.5)
    return bool(fits.all())


REFINED: dict[str, Any] = {"quantize__refine": 2, "quantize__drift_correction": 0.5, "quantize__tune_steps": 6, "calibration__samples": 48}


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({}, torch.bfloat16),
        pytest.param(REFINED, torch.float16, marks=pytest.mark.slow),
        (REFINED, torch.bfloat16),
        pytest.param({"sparsify__pattern": "2:4"}, torch.bfloat16, marks=pytest.mark.slow),
        ({"sparsify__pattern": "2:4", "sparsify__method": "sparsegpt"}, torch.float16),
        ({"quantize__scale_sign": "positive"}, torch.float16),
    ],
    ids=["int4", "refined and tuned, float16", "refined and tuned, bfloat16", "2:4", "sparsegpt", "positive"],
)
def test_every_linear_has_them(changes: dict[str, Any], dtype: torch.dtype, tmp_path: Path, text: Path) -> None:
    """If one step between the search and the file moved scales freely, a kernel for such scales would not run that linear."""
    source = zoo.build("llama", tmp_path / "model", dtype=dtype)
    report = runs.quantize(source, tmp_path / "ct", runs.recipe(text, **INTEGER | changes))
    found = scales_of(tmp_path / "ct")
    assert len(found) == len(report["layers"]) and all(layer["integer_scales"] is True for layer in report["layers"])
    for name, scales in found.items():
        assert scales.shape[1] > 1 and are_integers_times_one_number(scales), name
        assert dtype == torch.float16 or torch.equal(scales.bfloat16().float(), scales.float()), name
    if "quantize__scale_sign" in changes:
        assert all(bool((scales > 0).all()) for scales in found.values())
    assert main(["verify", str(tmp_path / "ct"), "--source", str(source), "-q"]) == 0


def test_linears_of_other_codes_are_as_before(tmp_path: Path, text: Path) -> None:
    """If an 8-bit linear or one scale for each row got channel scales of seven bits, it would lose accuracy for nothing."""
    source = zoo.build("llama", tmp_path / "model", dtype=torch.float16)
    rules: dict[str, Any] = {
        "quantize__overrides": {"down_proj": {"bits": 8}, "o_proj": {"group_size": -1}, "v_proj": {"bits": 8, "activations": "int8"}}
    }
    report = runs.quantize(source, tmp_path / "ct", runs.recipe(text, **INTEGER | rules))
    runs.quantize(source, tmp_path / "plain", runs.recipe(text, **rules))
    first = "model.layers.0.self_attn.v_proj"  # sees the same inputs in both runs
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("ct", "plain"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items() if name.startswith(first))
    said = {layer["name"].rpartition(".")[2]: layer["integer_scales"] for layer in report["layers"]}
    integer = dict.fromkeys(("q_proj", "k_proj", "gate_proj", "up_proj"), True)
    assert said == {**integer, "o_proj": None, "down_proj": False, "v_proj": False}


def test_they_are_reported_and_found(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """If nothing said so, two folders with the same recipe name would differ in speed for an unknown reason."""
    source = zoo.build("llama", tmp_path / "model", dtype=torch.bfloat16)
    (tmp_path / "mine.yaml").write_text("extends: int4\ncalibration: {minimum_tokens: 256}\nquantize: {group_scales: integer}\n")
    size = ["--samples", "8", "--sequence-length", "64", "--group-size", "32", "--dtype", "float32"]
    asked = ["quantize", str(source), str(tmp_path / "ct"), "--recipe", str(tmp_path / "mine.yaml"), "--calibration", str(text), *size]
    assert main(asked) == 0
    count = len(scales_of(tmp_path / "ct"))
    assert f"integer group scales: {count} of {count} linears" in capsys.readouterr().err
    assert f"those of {count} linears are small integers times one number per row" in (tmp_path / "ct" / "README.md").read_text()
    assert f"integer group scales ({count} linears)" in (tmp_path / "ct" / "marlinctl_report.html").read_text()
    records = json.loads((tmp_path / "ct" / "marlinctl_manifest.json").read_text())["layers"]
    assert all(record["integer_scales"] for record in records)
    for fmt in ("gptq", "marlin"):
        assert main(["pack", str(tmp_path / "ct"), str(tmp_path / fmt), "--format", fmt, "-q"]) == 0
    for name in ("ct", "gptq", "marlin"):
        facts = inspect(tmp_path / name, weights=True)
        assert facts["integer_scales"] == count and f"F16, integer in {count} of {count} linears" in table(facts)
    assert inspect(tmp_path / "ct")["integer_scales"] is None


def test_a_run_that_stopped_writes_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a resumed run forgot the key, or its records could not be read again, half of a folder would have other scales."""
    make_tiny(tmp_path / "model", **SIZES)
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "mine.yaml").write_text("extends: int4\ncalibration: {minimum_tokens: 32}\n")
    for folder in ("whole", "stopped"):
        (tmp_path / folder).mkdir()
    more = ["--group-scales", "integer"]
    assert main(quantize(tmp_path, tmp_path / "whole" / "out", *more)) == 0
    assert stop_in(monkeypatch, 2, quantize(tmp_path, tmp_path / "stopped" / "out", *more)) == 130
    assert blocks_solved(monkeypatch, ["resume", str(tmp_path / "stopped" / "out"), "-q"]) == (0, [2, 3])
    assert runs.digests(tmp_path / "stopped" / "out") == runs.digests(tmp_path / "whole" / "out")


def test_distillation_keeps_them(tmp_path: Path, text: Path) -> None:
    """If each scale were trained alone, a distilled folder would lose the kernel that it was made for."""
    source = zoo.build("llama", tmp_path / "model", dtype=torch.bfloat16)
    runs.quantize(source, tmp_path / "ct", runs.recipe(text, **INTEGER))
    distill(tmp_path / "ct", tmp_path / "out", source, training(text, mode="scales", tokens=2 * 256, learning_rate=0.02))
    before, after = scales_of(tmp_path / "ct"), scales_of(tmp_path / "out")
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)
    for name, scales in after.items():
        assert are_integers_times_one_number(scales) and torch.equal(scales.bfloat16().float(), scales.float()), name


@pytest.mark.parametrize("changes", [{"quantize__bits": 8}, {"quantize__symmetric": False}], ids=str)
def test_other_codes_are_refused(changes: dict[str, Any], tmp_path: Path, text: Path) -> None:
    """If it ran, code times factor would not fit int8, and what was asked for would silently be left out."""
    source = zoo.build("llama", tmp_path / "model")
    with pytest.raises(UsageError, match="integer group scales go with symmetric 4-bit codes") as refused:
        runs.quantize(source, tmp_path / "ct", runs.recipe(text, **INTEGER | changes))
    assert refused.value.error_id == "E273" and refused.value.problems[0].where == "--group-scales integer"
    assert not (tmp_path / "ct").exists()
