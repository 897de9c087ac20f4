"""Powers of two that move from norms into the linears behind them: the model stays the same, and what is written says what moved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from marlinctl.checkpoint.model_files import ORDER_FILE
from marlinctl.checkpoint.reader import Checkpoint
from marlinctl.checkpoint.transformers_model import load_dense
from marlinctl.cli import main
from marlinctl.models.architectures import Block
from marlinctl.oneshot import equalization
from marlinctl.oneshot.reading import Reader
from marlinctl.oneshot.sequential import SequentialPipeline
from tests import zoo
from tests.oneshot.stopping import SIZES, blocks_solved, quantize, stop_in
from tests.oneshot.test_permutation import reordered, weights_of
from tests.oneshot.test_run import logits
from tests.oneshot.test_sparsify import run, sparsify
from tests.runs import TEXT, digests
from tests.tiny import make_tiny

NORM_FED = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "qkv_proj", "gate_up_proj", "query_key_value", "dense_h_to_4h", "fc1")


def uneven(folder: Path) -> Path:
    """The model with one of sixteen columns sixteen times as large as the others, in linears that norms feed: as in Qwen2.5."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if name.endswith(".weight") and name.split(".")[-2] in NORM_FED and tensor.ndim == 2:
                tensor[:, ::16] *= 16
        save_file(tensors, path, metadata={"format": "pt"})
    return folder


def changed(folder: Path, tail: str, change: Callable[[Tensor], object]) -> Path:
    """The model after a change of its weights whose names end so."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name in tensors:
            if name.endswith(tail):
                change(tensors[name])
        save_file(tensors, path, metadata={"format": "pt"})
    return folder


def model_of(model_type: str, folder: Path) -> Path:
    if model_type == "llama":
        make_tiny(folder)
        return uneven(folder)
    return uneven(zoo.build(model_type, folder))


def undone(tensors: dict[str, Tensor], folded: dict[str, Tensor]) -> dict[str, Tensor]:
    """The original's tensors with the exponents of a result, as the file is documented."""
    found = dict(tensors)
    for name, exponents in folded.items():
        linear, _, what = name.rpartition(".")
        factors = exponents.double().exp2()
        for suffix in ["weight", "bias"] if what == "row_exponents" else ["weight"]:
            tensor = found.get(f"{linear}.{suffix}")
            if tensor is not None:
                by = factors if what == "column_exponents" or tensor.ndim == 1 else factors.unsqueeze(-1)
                found[f"{linear}.{suffix}"] = (tensor.double() * by).to(tensor.dtype)
    return found


@pytest.mark.parametrize(
    ("model_type", "drift", "behind"),
    [
        ("llama", 0.0, {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}),
        pytest.param("qwen2", 0.5, {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}, marks=pytest.mark.slow),
        ("phi3", 0.5, {"qkv_proj", "gate_up_proj"}),
        pytest.param("gpt_neox", 0.0, {"query_key_value", "dense_h_to_4h"}, marks=pytest.mark.slow),
        ("phi", 0.5, {"q_proj", "k_proj", "v_proj", "fc1"}),  # one norm in front of both branches
        ("qwen3_moe", 0.0, {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}),  # of its dense block: a router reads the others
    ],
)
def test_the_original_with_the_written_exponents_is_the_same_bit_for_bit(
    tmp_path: Path, text: Path, model_type: str, drift: float, behind: set[str]
) -> None:
    """If a norm were divided and a linear behind it not multiplied, or another reader overlooked, the model would be another one, and a
    solve would hide it as quantization error."""
    source = model_of(model_type, tmp_path / "model")
    run(source, tmp_path / "out", text, quantize__drift_correction=drift)
    folded = load_file(tmp_path / "out" / ORDER_FILE)
    assert {name.split(".")[-2] for name in folded if name.endswith(".column_exponents")} == behind
    assert any(name.endswith(".row_exponents") for name in folded) and not any(".experts." in name for name in folded)
    assert all(bool(exponents.any()) for exponents in folded.values())
    model = load_dense(source, dtype=torch.float32)
    expected = logits(model)
    moved = undone(dict(model.state_dict()), folded)
    assert any(not torch.equal(moved[name], tensor) for name, tensor in model.state_dict().items())
    model.load_state_dict(moved)
    assert torch.equal(logits(model), expected)


def test_the_norms_are_written_as_the_file_says(tmp_path: Path, text: Path) -> None:
    """Codes are of multiplied columns: with the norm of the original the model would be destroyed, and nothing else would show it."""
    source = model_of("qwen2", tmp_path / "model")
    run(source, tmp_path / "out", text)
    before, after = weights_of(source), weights_of(tmp_path / "out")
    wanted = undone(before, load_file(tmp_path / "out" / ORDER_FILE))
    others = [name for name in before if name in after]
    assert all(torch.equal(after[name], wanted[name]) for name in others)
    assert sum(not torch.equal(after[name], before[name]) for name in others) >= 2
    assert main(["verify", str(tmp_path / "out"), "--source", str(source), "-q"]) == 0


def test_the_error_of_linears_with_uneven_columns_falls(tmp_path: Path, text: Path) -> None:
    """With the exponents turned around the large columns would be larger still."""
    source = model_of("llama", tmp_path / "model")
    errors = {}
    for name in ("never", "auto"):
        report = run(source, tmp_path / name, text, quantize__equalize=name)
        errors[name] = sum(layer["error"] for layer in report["layers"] if layer["name"].endswith(NORM_FED))
    assert not (tmp_path / "never" / ORDER_FILE).exists()
    assert errors["auto"] < 0.8 * errors["never"]


def test_a_linear_with_small_weights_is_not_given_up_for_its_neighbours(tmp_path: Path, text: Path) -> None:
    """Exponents that follow the sum of all weights would be those of q and k, and v, whose error counts as much, would lose."""
    make_tiny(tmp_path / "model")
    changed(tmp_path / "model", "q_proj.weight", lambda weight: weight[:, ::16].mul_(16))
    changed(tmp_path / "model", "k_proj.weight", lambda weight: weight[:, ::16].mul_(16))
    changed(tmp_path / "model", "v_proj.weight", lambda weight: weight.mul_(2.0**-6)[:, 1::16].mul_(16))
    errors = {}
    for name in ("never", "auto"):
        report = run(tmp_path / "model", tmp_path / name, text, quantize__equalize=name)
        errors[name] = [layer["error"] for layer in report["layers"] if layer["name"].endswith("v_proj")]
    assert (tmp_path / "auto" / ORDER_FILE).exists()
    assert all(auto < 0.9 * never for auto, never in zip(errors["auto"], errors["never"], strict=True))


def test_even_columns_leave_everything_as_it_is(tmp_path: Path, text: Path) -> None:
    """Most models need no exponents: their norms stay those of the original, byte for byte, and no file says otherwise."""
    make_tiny(tmp_path / "model")
    run(tmp_path / "model", tmp_path / "out", text)
    assert not (tmp_path / "out" / ORDER_FILE).exists()


def test_what_does_not_pay_is_left_alone(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where large columns carry most of the output, dividing them costs more than the others gain: the first block of SmolLM2 lost a third.
    Here more is asked for than the estimate promises."""
    source = model_of("llama", tmp_path / "model")
    monkeypatch.setattr(equalization, "WORTH", 0.05)
    run(source, tmp_path / "out", text)
    assert not (tmp_path / "out" / ORDER_FILE).exists()


def test_norms_before_even_columns_are_not_tried(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each trial runs the block on a chunk of text. Qwen2.5 has uneven columns in q, k and v alone, and most models nowhere."""
    make_tiny(tmp_path / "model")
    tried: list[int] = []
    first_inputs = SequentialPipeline.first_inputs

    def noting(self: SequentialPipeline, block: Block, *more: Any) -> Any:
        tried.append(block.index)
        return first_inputs(self, block, *more)

    monkeypatch.setattr(SequentialPipeline, "first_inputs", noting)
    run(tmp_path / "model", tmp_path / "even", text)
    assert not tried
    changed(tmp_path / "model", "layers.1.self_attn.q_proj.weight", lambda weight: weight[:, ::16].mul_(16))
    run(tmp_path / "model", tmp_path / "out", text)
    assert tried == [1, 1, 1]  # as it is, with the pattern in one norm, and changed
    assert (tmp_path / "out" / ORDER_FILE).exists()


def test_a_norm_that_adds_one_to_its_weight_is_left_alone(tmp_path: Path, text: Path) -> None:
    """Gemma multiplies by 1 + weight: half the weight is not half the norm."""
    source = uneven(zoo.build("gemma2", tmp_path / "model"))
    run(source, tmp_path / "out", text)
    assert not (tmp_path / "out" / ORDER_FILE).exists()


def test_a_linear_that_stays_at_16_bits_keeps_its_norm(tmp_path: Path, text: Path) -> None:
    """It is copied as it is, so that its columns cannot make up for the norm."""
    source = model_of("llama", tmp_path / "model")
    run(source, tmp_path / "out", text, quantize__skip=["v_proj"])
    folded = load_file(tmp_path / "out" / ORDER_FILE)
    assert {name.split(".")[-2] for name in folded if name.endswith(".column_exponents")} == {"gate_proj", "up_proj"}


def test_a_reader_that_a_large_residual_hides_is_found(tmp_path: Path, text: Path) -> None:
    """Some tokens have very large hidden states from block to block. Beside these all that a block adds is small, and a linear that is not
    multiplied, here fc1, would not show in what the block leaves."""
    source = model_of("phi", tmp_path / "model")
    changed(source, "embed_tokens.weight", lambda weight: weight[::2].mul_(1e6))
    run(source, tmp_path / "out", text, quantize__skip=["fc1"])
    assert not (tmp_path / "out" / ORDER_FILE).exists()


def test_a_reader_that_changes_nothing_in_short_texts_is_found(tmp_path: Path, text: Path) -> None:
    """DeepSeek V3.2 chooses which tokens attention sees, by a linear that reads the input norm and is not part of a block's stages. While
    there are no more tokens than it may choose nothing depends on it; in longer texts it would choose other ones."""
    source = uneven(zoo.build("deepseek_v32", tmp_path / "model", index_topk=4096))
    for tail in ("q_a_proj.weight", "kv_a_proj_with_mqa.weight", "indexer.wk.weight", "q_b_proj.weight"):
        changed(source, tail, lambda weight: weight[:, ::16].mul_(16))
    run(source, tmp_path / "out", text)
    norms = {name.split(".")[-2] for name in load_file(tmp_path / "out" / ORDER_FILE) if name.endswith(".row_exponents")}
    assert "q_a_layernorm" in norms and "input_layernorm" not in norms


def test_nothing_that_was_read_ahead_is_kept(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is expected more often than it is read stays in the GPU's memory: all experts of all blocks."""
    readers = []

    class Ahead(Reader):
        def __init__(self, checkpoint: Checkpoint, device: torch.device, *, ahead: bool) -> None:
            super().__init__(checkpoint, device, ahead=True)
            readers.append(self)

    monkeypatch.setattr("marlinctl.oneshot.run.Reader", Ahead)
    for model_type, drift in (("qwen3_moe", 0.5), ("qwen2", 0.0)):
        source = model_of(model_type, tmp_path / model_type)
        run(source, tmp_path / f"{model_type}-out", text, quantize__drift_correction=drift, quantize__skip=["v_proj"])
    assert len(readers) == 2
    assert [sorted(reader._expected) for reader in readers] == [[], []]


def test_rounded_activations_keep_their_norm(tmp_path: Path, text: Path) -> None:
    """What columns lose in spread, activations gain: with one scale a token they would be coarser."""
    source = model_of("llama", tmp_path / "model")
    overrides = {"re:.*(gate|up)_proj": {"bits": 8, "activations": "int8"}}
    run(source, tmp_path / "out", text, quantize__overrides=overrides)
    folded = load_file(tmp_path / "out" / ORDER_FILE)
    assert {name.split(".")[-2] for name in folded if name.endswith(".column_exponents")} == {"q_proj", "k_proj", "v_proj"}


def test_exponents_that_float16_cannot_hold_are_left_out(tmp_path: Path, text: Path) -> None:
    """A column of the smallest numbers, divided, would lose bits, and the model would not be the same."""
    make_tiny(tmp_path / "model")
    path = next((tmp_path / "model").glob("*.safetensors"))
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("layers.0.self_attn.q_proj.weight"))
    for linear in ("q_proj", "k_proj", "v_proj"):
        tensors[name.replace("q_proj", linear)][:, 5] *= 16
    tensors[name][3, 5] = 2.0**-24  # the smallest of float16
    save_file(tensors, path, metadata={"format": "pt"})
    run(tmp_path / "model", tmp_path / "out", text)
    assert not (tmp_path / "out" / ORDER_FILE).exists()


def test_a_pruned_and_reordered_model_keeps_its_orders_beside_the_exponents(tmp_path: Path, text: Path) -> None:
    """If the file were written over, `verify --source` would take every reordered linear for another one."""
    source = model_of("llama", tmp_path / "model")
    sparsify(source, tmp_path / "pruned", text)
    run(tmp_path / "pruned", tmp_path / "out", text)
    pruned, both = load_file(tmp_path / "pruned" / ORDER_FILE), load_file(tmp_path / "out" / ORDER_FILE)
    assert not any(name.endswith("exponents") for name in pruned)
    assert all(torch.equal(both[name], pruned[name]) for name in pruned)
    assert any(name.endswith("column_exponents") for name in both)
    for original in (source, tmp_path / "pruned"):
        assert main(["verify", str(tmp_path / "out"), "--source", str(original), "-q"]) == 0
    model = load_dense(source, dtype=torch.float64)
    expected = logits(model)
    orders = {name: order for name, order in both.items() if not name.endswith("exponents")}
    exponents = {name: order for name, order in both.items() if name.endswith("exponents")}
    model.load_state_dict(undone(reordered(dict(model.state_dict()), orders), exponents))
    assert torch.allclose(logits(model), expected, rtol=0, atol=1e-9)


def test_both_at_once_and_tuned(tmp_path: Path, text: Path) -> None:
    """Orders, exponents and tuned norms meet in the same tensors."""
    source = model_of("qwen2", tmp_path / "model")
    changes: dict[str, Any] = {"sparsify__pattern": "2:4", "quantize__drift_correction": 0.05, "quantize__tune_steps": 4}
    report = run(source, tmp_path / "out", text, **changes)
    folded = load_file(tmp_path / "out" / ORDER_FILE)
    assert {name.rpartition(".")[2] for name in folded} == {"rows", "columns", "row_exponents", "column_exponents"}
    assert main(["verify", str(tmp_path / "out"), "--source", str(source), "-q"]) == 0
    assert all(layer["error"] < 0.8 for layer in report["layers"])


def test_a_run_that_was_stopped_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If exponents of finished blocks were chosen again or lost, norms and codes would not belong together."""
    uneven(make_tiny(tmp_path / "model", **SIZES))
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "mine.yaml").write_text("extends: int4\ncalibration: {minimum_tokens: 32}\nquantize: {drift_correction: 0.5}\n")
    for folder in ("whole", "parts"):
        (tmp_path / folder).mkdir()
    assert main(quantize(tmp_path, tmp_path / "whole" / "out")) == 0
    assert stop_in(monkeypatch, 2, quantize(tmp_path, tmp_path / "parts" / "out")) == 130
    assert blocks_solved(monkeypatch, ["resume", str(tmp_path / "parts" / "out"), "-q"]) == (0, [2, 3])
    ours, theirs = (digests(tmp_path / folder / "out") for folder in ("parts", "whole"))
    weights = {name for name in theirs if name.endswith(".safetensors")}
    assert ORDER_FILE in weights and {name: ours[name] for name in weights} == {name: theirs[name] for name in weights}
