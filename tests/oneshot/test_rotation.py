"""--rotate in a run: what is written is the rotated model, says so, and can be compared, trained and resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from marlinctl.checkpoint.model_files import ORDER_FILE
from marlinctl.checkpoint.transformers_model import load_dense
from marlinctl.cli import main
from marlinctl.errors import BadInput, UsageError
from marlinctl.verify.inspect import inspect
from tests import zoo
from tests.distillation.runs import distill
from tests.distillation.runs import recipe as distill_recipe
from tests.models.test_rotation import distance, opened
from tests.oneshot.stopping import SIZES, blocks_solved, quantize, stop_in
from tests.oneshot.test_permutation import weights_of
from tests.oneshot.test_run import logits
from tests.oneshot.test_sparsify import run
from tests.runs import TEXT, digests, plan, recipe
from tests.tiny import make_tiny

SIGNS = ("rotation.stream_signs", "rotation.value_signs")


def rotate(model: Path, out: Path, text: Path, mode: str = "auto", **changes: Any) -> dict[str, Any]:
    return run(model, out, text, quantize__rotate=mode, **changes)


def make(model_type: str, folder: Path) -> Path:
    """Of 16 bits, with one large channel."""
    source = zoo.build(model_type, folder)
    for path in source.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")):
                tensor[:, 5] *= 20
        save_file(tensors, path, metadata={"format": "pt"})
    return source


@pytest.mark.parametrize("drift", [0.0, 0.5])
def test_the_result_computes_what_the_original_does(tmp_path: Path, text: Path, drift: float) -> None:
    """Of a model with a large channel, rotated codes are closer; if any tensor were rotated otherwise, they would be far off."""
    source = make("qwen3", tmp_path / "model")
    away = {}
    for mode in ("never", "auto"):
        rotate(source, tmp_path / mode, text, mode, quantize__drift_correction=drift, quantize__equalize="never")
        away[mode] = distance(logits(load_dense(tmp_path / mode, dtype=torch.float32)), logits(load_dense(source, dtype=torch.float32)))
    assert away["auto"] < 0.8 * away["never"] < 0.8
    signs = load_file(tmp_path / "auto" / ORDER_FILE)
    assert {name: tuple(signs[name].shape) for name in SIGNS} == {SIGNS[0]: (64,), SIGNS[1]: (32,)}
    assert not (tmp_path / "never" / ORDER_FILE).exists()
    norms = [tensor for name, tensor in weights_of(tmp_path / "auto").items() if "layernorm" in name]
    assert norms and all(bool((norm == 1).all()) for norm in norms)
    assert "are rotated" in (tmp_path / "auto" / "README.md").read_text()
    assert "are rotated" not in (tmp_path / "never" / "README.md").read_text()
    assert inspect(tmp_path / "auto")["folded"] == ["rotation"] and inspect(tmp_path / "never")["folded"] == []


def test_a_tied_head_is_copied_on_request_alone(tmp_path: Path, text: Path) -> None:
    """A copy of the embedding may be a third of a small model, so it must be asked for."""
    source = make("qwen2", tmp_path / "model")
    rotate(source, tmp_path / "auto", text, quantize__equalize="never")
    assert not (tmp_path / "auto" / ORDER_FILE).exists()
    rotate(source, tmp_path / "always", text, "always")
    config = json.loads((tmp_path / "always" / "config.json").read_text())
    tensors = weights_of(tmp_path / "always")
    assert config["tie_word_embeddings"] is False and tensors["lm_head.weight"].shape == tensors["model.embed_tokens.weight"].shape
    ours, theirs = (logits(load_dense(folder, dtype=torch.float32)) for folder in (tmp_path / "always", source))
    assert distance(ours, theirs) < 0.5
    assert main(["verify", str(tmp_path / "always"), "--source", str(source), "-q"]) == 0


@pytest.mark.parametrize("model_type", ["llama", "phi3", "qwen3_moe"])
def test_verify_compares_with_the_original(tmp_path: Path, text: Path, model_type: str) -> None:
    """The person who checks a folder has the original, not the rotated model. Other signs must fail."""
    source = make(model_type, tmp_path / "model")
    rotate(source, tmp_path / "out", text)
    assert main(["verify", str(tmp_path / "out"), "--source", str(source), "-q"]) == 0
    assert main(["pack", str(tmp_path / "out"), str(tmp_path / "marlin"), "--format", "marlin", "-q"]) == 0
    assert main(["verify", str(tmp_path / "marlin"), "--source", str(source), "-q"]) == 0
    shutil.copytree(tmp_path / "out", tmp_path / "wrong")
    signs = load_file(tmp_path / "wrong" / ORDER_FILE)
    signs[SIGNS[0]][:8] *= -1
    save_file(signs, tmp_path / "wrong" / ORDER_FILE)
    (tmp_path / "wrong" / "marlinctl_manifest.json").unlink()
    assert main(["verify", str(tmp_path / "wrong"), "--source", str(source), "-q"]) != 0


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda signs: signs.pop(SIGNS[1]), "not two rows of signs"),
        (lambda signs: signs[SIGNS[0]].zero_(), "not all 1 or -1"),
        (lambda signs: signs.update({SIGNS[0]: signs[SIGNS[0]][:32].clone()}), "the rotation is of 32 channels"),
    ],
)
def test_damaged_signs_are_refused(tmp_path: Path, text: Path, damage: Any, says: str) -> None:
    """Weights would be compared with those of another model."""
    from marlinctl.checkpoint.rotated import rotated_as

    source = make("llama", tmp_path / "model")
    rotate(source, tmp_path / "out", text)
    signs = load_file(tmp_path / "out" / ORDER_FILE)
    damage(signs)
    save_file(signs, tmp_path / "out" / ORDER_FILE)
    checkpoint, known = opened(source)
    with pytest.raises(BadInput, match=says):
        rotated_as(tmp_path / "out", checkpoint, known)


@pytest.mark.parametrize(
    ("model_type", "changes", "says"),
    [
        ("gemma2", {}, "gemma2 is not known to stay the same"),
        ("llava", {}, "beside the llama that is known to stay the same it has other parts"),
        ("llama", {"sparsify__pattern": "2:4"}, "2:4 needs channels"),
        ("llama", {"quantize__bits": 16, "sparsify__pattern": "2:4"}, "2:4 needs channels"),
    ],
)
def test_what_cannot_be_rotated_is_refused_before_the_work(
    tmp_path: Path, text: Path, model_type: str, changes: dict[str, Any], says: str
) -> None:
    """And with `auto` it is compressed as it is."""
    source = make(model_type, tmp_path / "model")
    with pytest.raises(UsageError, match=says):
        rotate(source, tmp_path / "out", text, "always", **changes)
    assert not (tmp_path / "out").exists()
    rotate(source, tmp_path / "plain", text, **changes, sparsify__permute="never", quantize__equalize="never")
    assert not (tmp_path / "plain" / ORDER_FILE).exists()


def test_a_2of4_source_keeps_its_zeros(tmp_path: Path, text: Path) -> None:
    """A rotation would fill what is pruned. A plan that said otherwise would be found wrong after a download."""
    source = make("llama", tmp_path / "model")
    run(source, tmp_path / "pruned", text, sparsify__pattern="2:4", quantize__bits=16, sparsify__permute="never")
    report = rotate(tmp_path / "pruned", tmp_path / "out", text, quantize__equalize="never")
    assert report["sparse"] == len(report["layers"]) and not (tmp_path / "out" / ORDER_FILE).exists()
    with pytest.raises(UsageError, match="would fill what is pruned"):
        rotate(tmp_path / "pruned", tmp_path / "again", text, "always")
    with pytest.raises(UsageError, match="would fill what is pruned"):
        plan(tmp_path / "pruned", recipe(text, quantize__rotate="always"))
    notes = plan(tmp_path / "pruned", recipe(text, quantize__rotate="auto"))["notes"]
    assert not any("rotated" in note for note in notes)


def test_a_run_that_was_stopped_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the second half were rotated otherwise, both halves would be right and the model wrong."""
    make_tiny(tmp_path / "model", **SIZES)
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "mine.yaml").write_text("extends: int4\ncalibration: {minimum_tokens: 32}\nquantize: {rotate: auto}\n")
    for folder in ("whole", "parts"):
        (tmp_path / folder).mkdir()
    assert main(quantize(tmp_path, tmp_path / "whole" / "out")) == 0
    assert set(SIGNS) <= load_file(tmp_path / "whole" / "out" / ORDER_FILE).keys()
    assert stop_in(monkeypatch, 2, quantize(tmp_path, tmp_path / "parts" / "out")) == 130
    assert blocks_solved(monkeypatch, ["resume", str(tmp_path / "parts" / "out"), "-q"]) == (0, [2, 3])
    assert digests(tmp_path / "parts" / "out") == digests(tmp_path / "whole" / "out")


def test_it_is_trained_toward_the_rotated_original(tmp_path: Path, text: Path) -> None:
    """Hidden states of a rotated model are not the original's: with those of the plain teacher the loss is ten times as large, and training
    would pull the model away from what it computes."""
    source = make("llama", tmp_path / "model")
    rotate(source, tmp_path / "out", text)
    report = distill(tmp_path / "out", tmp_path / "trained", source, distill_recipe(text, mode="scales", squarehead=1.0, tokens=8 * 256))
    before, after = (report["held_out"][when] for when in ("before", "after"))
    assert before["squarehead"] < 0.3 and after["loss"] < before["loss"]
    assert load_file(tmp_path / "trained" / ORDER_FILE).keys() == load_file(tmp_path / "out" / ORDER_FILE).keys()


def test_a_rotated_folder_is_compressed_again(tmp_path: Path, text: Path) -> None:
    """It is rotated once: twice, or with its signs lost, nothing could be compared with the original any more."""
    source = make("llama", tmp_path / "model")
    rotate(source, tmp_path / "out", text)
    assert main(["pack", str(tmp_path / "out"), str(tmp_path / "dense"), "--format", "dense", "-q"]) == 0
    with pytest.raises(UsageError, match="an earlier run folded something"):
        rotate(tmp_path / "dense", tmp_path / "twice", text, "always")
    run(tmp_path / "dense", tmp_path / "pruned", text, sparsify__pattern="2:4", quantize__bits=16)
    assert load_file(tmp_path / "pruned" / ORDER_FILE).keys() > set(SIGNS)
    rotate(tmp_path / "dense", tmp_path / "again", text)
    for original in (source, tmp_path / "dense"):
        assert main(["verify", str(tmp_path / "again"), "--source", str(original), "-q"]) == 0
    rotate(source, tmp_path / "plain", text, "never")
    assert main(["verify", str(tmp_path / "plain"), "--source", str(tmp_path / "dense"), "-q"]) == 3
