"""Orders of channels in a run: the function stays the same, everything moves together, and a resumed run agrees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from marlinctl.checkpoint.model_files import ORDER_FILE
from marlinctl.checkpoint.orders import read_orders
from marlinctl.checkpoint.transformers_model import load_dense
from marlinctl.cli import main
from marlinctl.errors import BadInput, UsageError
from tests import zoo
from tests.oneshot.stopping import SIZES, blocks_solved, quantize, stop_in
from tests.oneshot.test_run import logits, recipe
from tests.oneshot.test_sparsify import run, sparsify
from tests.runs import TEXT, digests
from tests.tiny import make_tiny


def model_of(model_type: str, folder: Path) -> Path:
    if model_type == "llama":
        make_tiny(folder)
        return folder
    return zoo.build(model_type, folder)


def weights_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("model*.safetensors") for name, tensor in load_file(path).items()}


def reordered(tensors: dict[str, Tensor], orders: dict[str, Tensor]) -> dict[str, Tensor]:
    """The original's tensors in the orders of a result, as the file is documented."""
    found = dict(tensors)
    for name, order in orders.items():
        linear, _, what = name.rpartition(".")
        for suffix in ["weight", "bias"] if what == "rows" else ["weight"]:
            tensor = found.get(f"{linear}.{suffix}")
            if tensor is not None:
                found[f"{linear}.{suffix}"] = tensor.index_select(int(what == "columns"), order.long())
    return found


@pytest.mark.parametrize(("model_type", "drift"), [("llama", 0.0), ("llama", 0.5), ("qwen2", 0.5), ("phi3", 0.0), ("qwen3", 0.5)])
def test_the_original_in_the_written_order_computes_the_same(tmp_path: Path, text: Path, model_type: str, drift: float) -> None:
    """If rows, biases or query heads moved otherwise than the columns that read them, the model would be another one, and a solve would
    hide it as quantization error."""
    source = model_of(model_type, tmp_path / "model")
    sparsify(source, tmp_path / "out", text, quantize__drift_correction=drift)
    orders = load_file(tmp_path / "out" / ORDER_FILE)
    consumers = [name for name in orders if name.endswith(".columns")]
    assert {name.split(".")[-2] for name in consumers} == {"o_proj", "down_proj"}
    assert all(not torch.equal(order, torch.arange(len(order))) for order in orders.values())
    model = load_dense(source, dtype=torch.float64)
    expected = logits(model)
    moved = reordered(dict(model.state_dict()), orders)
    assert any(not torch.equal(moved[name], tensor) for name, tensor in model.state_dict().items())
    model.load_state_dict(moved)
    assert torch.allclose(logits(model), expected, rtol=0, atol=1e-9)


def test_values_that_later_blocks_read_keep_their_order(tmp_path: Path, text: Path) -> None:
    """Gemma 4's last blocks read keys and values of earlier ones: their o would find each channel in the place of another."""
    source = zoo.build("gemma4_text", tmp_path / "model")
    sparsify(source, tmp_path / "out", text)
    orders = load_file(tmp_path / "out" / ORDER_FILE)
    assert {name.split(".")[-2] for name in orders if name.endswith(".columns")} == {"down_proj"}
    model = load_dense(source, dtype=torch.float64)
    expected = logits(model)
    model.load_state_dict(reordered(dict(model.state_dict()), orders))
    assert torch.allclose(logits(model), expected, rtol=0, atol=1e-5), "its norms compute in float32"


def test_biases_and_kept_weights_are_written_in_the_new_order(tmp_path: Path, text: Path) -> None:
    """A bias in the old order belongs to another channel; nothing else would show it."""
    source = zoo.build("qwen2", tmp_path / "model")
    sparsify(source, tmp_path / "out", text, sparsify__method="magnitude")
    orders, before, after = load_file(tmp_path / "out" / ORDER_FILE), weights_of(source), weights_of(tmp_path / "out")
    wanted = reordered(before, orders)
    biases = [name for name in before if name.endswith("v_proj.bias")]
    assert biases and before.keys() == after.keys()
    for name in biases:
        assert torch.equal(after[name], wanted[name]) and not torch.equal(after[name], before[name])
    for name in before:
        if name.endswith("_proj.weight"):  # magnitude keeps the values of what it keeps
            kept = after[name] != 0
            assert torch.equal(after[name][kept], wanted[name][kept]), name
            assert torch.equal(kept.reshape(len(kept), -1, 4).sum(-1), torch.full((len(kept), kept.shape[1] // 4), 2)), name
        elif name not in biases:
            assert torch.equal(after[name], before[name]), name


def test_the_error_of_the_linears_that_are_reordered_falls(tmp_path: Path, text: Path) -> None:
    """If the order were chosen by the wrong scores, or turned around, it would be as good as none."""
    source = model_of("llama", tmp_path / "model")
    errors = {}
    for name in ("never", "auto"):
        report = sparsify(source, tmp_path / name, text, sparsify__permute=name)
        errors[name] = sum(layer["error"] for layer in report["layers"] if layer["name"].endswith(("down_proj", "o_proj")))
    assert not (tmp_path / "never" / ORDER_FILE).exists()
    assert errors["auto"] < 0.97 * errors["never"]


def test_a_run_that_was_stopped_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the orders of finished blocks were chosen again or lost, the blocks behind them would see other activations."""
    make_tiny(tmp_path / "model", **SIZES)
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "mine.yaml").write_text("extends: int4\ncalibration: {minimum_tokens: 32}\nsparsify: {pattern: '2:4'}\n")
    for folder in ("whole", "parts"):
        (tmp_path / folder).mkdir()
    assert main(quantize(tmp_path, tmp_path / "whole" / "out")) == 0
    arguments = quantize(tmp_path, tmp_path / "parts" / "out")
    assert stop_in(monkeypatch, 2, arguments) == 130
    assert blocks_solved(monkeypatch, ["resume", str(tmp_path / "parts" / "out"), "-q"]) == (0, [2, 3])
    assert not (tmp_path / "parts" / "out.job").exists(), "all that lies in a job's folder is the job's"
    ours, theirs = (digests(tmp_path / folder / "out") for folder in ("parts", "whole"))
    weights = {name for name in theirs if name.endswith(".safetensors")}
    assert ORDER_FILE in weights and {name: ours[name] for name in weights} == {name: theirs[name] for name in weights}


def test_a_damaged_order_of_the_job_is_chosen_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read as it is, it would put the biases of a finished block in another order than its weights."""
    make_tiny(tmp_path / "model", **SIZES)
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "mine.yaml").write_text("extends: int4\ncalibration: {minimum_tokens: 32}\nsparsify: {pattern: '2:4'}\n")
    arguments = quantize(tmp_path, tmp_path / "out")
    assert stop_in(monkeypatch, 2, arguments) == 130
    (tmp_path / "out.job" / "orders" / "00001.safetensors").write_bytes(b"\0" * 64)
    assert blocks_solved(monkeypatch, ["resume", str(tmp_path / "out"), "-q"]) == (0, [1, 2, 3])


def test_both_published_forms_hold_the_same_weights(tmp_path: Path, text: Path) -> None:
    """The packer must take the order as it is: it has nothing to derive it from."""
    source = model_of("llama", tmp_path / "model")
    sparsify(source, tmp_path / "pruned", text)
    run(tmp_path / "pruned", tmp_path / "out", text)
    assert main(["pack", str(tmp_path / "out"), str(tmp_path / "native"), "--format", "marlin_24", "--also", "ct", "-q"]) == 0
    assert main(["pack", str(tmp_path / "native"), str(tmp_path / "back"), "--format", "ct", "-q"]) == 0
    first, again, back = (weights_of(tmp_path / name) for name in ("out", "native-ct", "back"))
    assert first.keys() == again.keys() == back.keys()
    assert all(torch.equal(first[name], again[name]) and torch.equal(first[name], back[name]) for name in first)
    for name in ("native", "native-ct", "back"):
        assert (tmp_path / name / ORDER_FILE).read_bytes() == (tmp_path / "out" / ORDER_FILE).read_bytes()
        assert main(["verify", str(tmp_path / name), "--source", str(source), "-q"]) == 0
        assert main(["verify", str(tmp_path / name), "--source", str(tmp_path / "pruned"), "-q"]) == 0, "of the same order"
        assert ORDER_FILE in (tmp_path / name / "README.md").read_text(), "the card says that adapters do not fit"
    assert "/" in ORDER_FILE, "SGLang loads every safetensors file that lies beside the weights of a native folder"


def test_verify_compares_with_the_original_in_the_order_that_is_written(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the file every reordered weight and bias looks like that of another model; a damaged one must not pass for none."""
    source = zoo.build("qwen2", tmp_path / "model")
    run(source, tmp_path / "out", text, sparsify__pattern="2:4")
    verify = ["verify", str(tmp_path / "out"), "--source", str(source), "-q"]
    assert main(verify) == 0
    path = tmp_path / "out" / ORDER_FILE
    orders = load_file(path)
    name = next(name for name in orders if name.endswith("down_proj.columns"))
    save_file(orders | {name: torch.zeros_like(orders[name])}, path)
    assert main(verify) == 1
    assert ORDER_FILE in capsys.readouterr().err, "the manifest has its digest"
    with pytest.raises(BadInput, match=r"down_proj\.columns is not a permutation"):
        read_orders(tmp_path / "out")
    path.unlink()
    assert main(verify) == 1


def test_a_block_without_such_channels_is_refused_where_an_order_is_required(tmp_path: Path, text: Path) -> None:
    """Who asks for it must not find out from the size of the error that nothing was reordered."""
    source = model_of("llama", tmp_path / "model")
    changes: dict[str, Any] = {"sparsify__permute": "always", "quantize__skip": ["v_proj", "up_proj"]}
    with pytest.raises(UsageError, match="no linear of this block reads channels whose order can be undone"):
        sparsify(source, tmp_path / "out", text, **changes)
    sparsify(source, tmp_path / "out", text, **changes | {"sparsify__permute": "auto"})
    assert not (tmp_path / "out" / ORDER_FILE).exists()


def test_a_model_that_is_2of4_already_keeps_its_order(tmp_path: Path, text: Path) -> None:
    """Its mask was chosen for the order that it has; and the file of that order must stay with the weights."""
    source = model_of("llama", tmp_path / "model")
    sparsify(source, tmp_path / "pruned", text)
    run(tmp_path / "pruned", tmp_path / "out", text)
    ours, theirs = (load_file(tmp_path / name / ORDER_FILE) for name in ("pruned", "out"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert recipe(text).sparsify.permute == "auto"
