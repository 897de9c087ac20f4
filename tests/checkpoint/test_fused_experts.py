"""Experts in one tensor for each projection: named one by one, whatever the layout, and put together again for transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from marlinctl.checkpoint.contents import read_contents
from marlinctl.checkpoint.folder import open_folder
from marlinctl.checkpoint.fused_experts import with_single_experts
from marlinctl.checkpoint.reader import Checkpoint, open_checkpoint
from marlinctl.errors import BadInput
from marlinctl.models.lookup import any_architecture
from marlinctl.system.console import Console
from tests import zoo
from tests.runs import quantize, recipe, write_text


def _both(model_type: str, root: Path) -> tuple[Path, Path]:
    """One model with a tensor for each expert, and as transformers holds it."""
    from transformers import AutoModelForCausalLM

    single, fused = zoo.build(model_type, root / "single"), root / "fused"
    AutoModelForCausalLM.from_pretrained(single, dtype=torch.float32).save_pretrained(fused, save_original_format=False)
    for path in single.glob("token*"):
        (fused / path.name).write_bytes(path.read_bytes())
    return single, fused


def _seen(folder: Path) -> Checkpoint:
    checkpoint = open_checkpoint(folder)
    return with_single_experts(checkpoint, any_architecture(checkpoint.config))


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_each_expert_has_its_own_bytes(model_type: str, tmp_path: Path) -> None:
    """If an offset were wrong, an expert would be solved with the weights of another, or gate with those of up."""
    single, fused = _both(model_type, tmp_path)
    ours, theirs = _seen(fused), open_checkpoint(single)
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert len(ours.parts) > 6
    for name, info in theirs.tensors.items():
        assert ours.tensors[name].shape == info.shape and ours.tensors[name].nbytes == info.nbytes, name
        assert torch.equal(ours.read(name), theirs.read(name)), name
        assert ours.raw(name) == theirs.raw(name), name


def test_a_transposed_and_interleaved_layout_is_read_as_the_model_multiplies(tmp_path: Path) -> None:
    """If GPT-OSS's gate were read as the first half, or not transposed, 4-bit weights would be of another matrix."""
    folder = zoo.build("gpt_oss", tmp_path / "model")
    whole, ours = load_file(folder / "model.safetensors"), _seen(folder)
    experts = "model.layers.1.mlp.experts"
    for e in (0, 5):
        for name, expected in {
            "gate_proj": whole[f"{experts}.gate_up_proj"][e, :, 0::2].T,
            "up_proj": whole[f"{experts}.gate_up_proj"][e, :, 1::2].T,
            "down_proj": whole[f"{experts}.down_proj"][e].T,
        }.items():
            tensor = f"{experts}.{e}.{name}.weight"
            assert torch.equal(ours.read(tensor), expected), tensor
            assert bytes(ours.raw(tensor)) == expected.contiguous().numpy().tobytes(), tensor
    assert f"{experts}.gate_up_proj_bias" in ours.tensors and f"{experts}.gate_up_proj" not in ours.tensors


def test_both_layouts_give_the_same_folder(tmp_path: Path) -> None:
    """If the layout changed a code, who saved a model with a trainer would get another result."""
    folders = _both("qwen3_moe", tmp_path)
    chosen = recipe(write_text(tmp_path / "text.txt"), quantize__skip=["experts.3.up_proj"])
    for folder in folders:
        quantize(folder, tmp_path / f"out {folder.name}", chosen)
    with open_checkpoint(tmp_path / "out single") as single, open_checkpoint(tmp_path / "out fused") as fused:
        assert single.tensors.keys() == fused.tensors.keys()
        for name in single.tensors:
            assert single.raw(name) == fused.raw(name), name


def test_digests_are_those_of_the_files(tmp_path: Path) -> None:
    """If names of parts were read one by one, a file that two of them lie in would have another digest each time it is looked at."""
    folder = zoo.build("gpt_oss", tmp_path / "model", num_hidden_layers=1)
    with open_folder(folder, structure="needed") as examined, open_checkpoint(folder) as plain:
        quiet = Console(quiet=True)
        found = read_contents(examined.checkpoint, quiet, scan=examined.checkpoint.tensors)
        assert found.fingerprint == read_contents(plain, quiet, scan=plain.tensors).fingerprint


SIDE = 32


def _in_fp8(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    """Stores the experts of a folder, and linears beside, in FP8; what they mean in bfloat16, by their names. kind: of the scales."""
    tensors = load_file(folder / "model.safetensors")
    meant: dict[str, torch.Tensor] = {}
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj", "o_proj.weight"))]:
        weight = tensors[name].float()
        *before, n, k = weight.shape
        if kind == "blocks" or not before:
            tiles = weight.reshape(*before, n // SIDE, SIDE, k // SIDE, SIDE).abs().amax((-3, -1)) / 448
            spread = tiles.repeat_interleave(SIDE, -2).repeat_interleave(SIDE, -1)
        else:
            tiles = spread = weight.abs().amax((-2, -1) if kind == "experts" else -1, keepdim=True) / 448
        codes = (weight / spread).to(torch.float8_e4m3fn)
        tensors[name], tensors[f"{name}_scale_inv"] = codes, tiles.contiguous()
        meant[name] = (codes.float() * spread).bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _damaged(folder, quantization_config={"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [SIDE, SIDE]})
    return meant


@pytest.mark.parametrize("kind", ["blocks", "rows", "experts"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_fp8_of_all_experts_is_read_expert_by_expert(model_type: str, kind: str, tmp_path: Path) -> None:
    """If a scale of another expert, block or row were taken, or gate for up, the experts would be noise; GPT-OSS has them transposed, and
    gate and up by turns."""
    folder = _both(model_type, tmp_path)[1] if model_type == "qwen3_moe" else zoo.build(model_type, tmp_path / "model")
    meant = _in_fp8(folder, kind)
    with open_folder(folder, structure="needed") as examined:
        checkpoint = examined.checkpoint
        experts = next(name for name in meant if name.endswith("experts.gate_up_proj")).removesuffix(".gate_up_proj")
        both, down = meant[f"{experts}.gate_up_proj"], meant[f"{experts}.down_proj"]
        half = both.shape[1] // 2
        for e in (0, 5):
            expected = (
                {"gate_proj": both[e, :, 0::2].T, "up_proj": both[e, :, 1::2].T, "down_proj": down[e].T}
                if model_type == "gpt_oss"
                else {"gate_proj": both[e, :half], "up_proj": both[e, half:], "down_proj": down[e]}
            )
            for name, weight in expected.items():
                tensor = f"{experts}.{e}.{name}.weight"
                assert torch.equal(checkpoint.read(tensor), weight), tensor
                assert checkpoint.tensors[tensor].shape == tuple(weight.shape)
                assert bytes(checkpoint.raw(tensor)) == weight.contiguous().view(torch.uint8).numpy().tobytes()


def test_fp8_of_all_experts_is_quantized_as_its_bfloat16_copy(tmp_path: Path) -> None:
    """If anything but the rounded product were read, codes would be others."""
    _, fused = _both("qwen3_moe", tmp_path)
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in fused.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    meant = _in_fp8(fused, "blocks")
    save_file({**load_file(copy / "model.safetensors"), **meant}, copy / "model.safetensors", metadata={"format": "pt"})
    chosen = recipe(write_text(tmp_path / "text.txt"))
    report = quantize(fused, tmp_path / "out", chosen)
    quantize(copy, tmp_path / "expected", chosen)
    assert f"{len(meant)} weights are FP8" in report["source"]["precision"]
    with open_checkpoint(tmp_path / "out") as found, open_checkpoint(tmp_path / "expected") as expected:
        assert found.tensors.keys() == expected.tensors.keys()
        for name in found.tensors:
            assert found.raw(name) == expected.raw(name), name


def _damaged(folder: Path, **config: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


def test_experts_of_another_shape_are_refused(tmp_path: Path) -> None:
    """If the number of experts were not compared, parts of two experts would be read as one."""
    _, fused = _both("qwen3_moe", tmp_path)
    _damaged(fused, num_experts=5, num_local_experts=5)
    with pytest.raises(BadInput, match=r"gate_up_proj has shape \[6, 64, 64\]") as caught, open_folder(fused, structure="needed"):
        pass
    assert caught.value.error_id == "E302"


def test_infinity_in_an_expert_is_found(tmp_path: Path) -> None:
    """If the tensors of all experts were not scanned, because no linear has their name, NaN would reach the solver."""
    from marlinctl.errors import NumericalProblem

    _, fused = _both("qwen3_moe", tmp_path)
    tensors = load_file(fused / "model.safetensors")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors[name][2, 3, 4] = torch.inf
    save_file(tensors, fused / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericalProblem, match=r"gate_up_proj\[2, 3, 4\] is inf"):
        quantize(fused, tmp_path / "out", recipe(write_text(tmp_path / "text.txt")))
