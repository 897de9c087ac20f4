"""FP8 and AWQ checkpoints as dense ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from marlinctl.checkpoint.folder import open_folder
from marlinctl.checkpoint.sixteen_bit import awq_weight, fp8_weight
from marlinctl.checkpoint.transformers_model import load_dense
from marlinctl.errors import BadInput
from marlinctl.verify.inspect import inspect
from tests import runs
from tests.packed import edit_json, edit_tensors
from tests.tiny import make_tiny

FP8 = torch.float8_e4m3fn
UP = "model.layers.0.mlp.up_proj"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- FP8 -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scales", "sides"),
    [((3, 2), (16, 32)), ((40, 1), None), ((40,), None), ((1,), None), ((), None), ((40, 1), (16, 32))],
    ids=["blocks", "rows", "rows as a vector", "one", "a number", "rows beside a block size"],
)
def test_fp8_is_code_times_scale(scales: tuple[int, ...], sides: tuple[int, int] | None) -> None:
    """A scale that met another block or row would leave a model that computes garbage: against element by element, in float64."""
    codes, factors = normal(40, 48).to(FP8), normal(*scales, seed=1).abs()
    found = fp8_weight(codes, factors, sides)
    for row in (0, 15, 16, 39):
        for column in (0, 31, 32, 47):
            if scales == (3, 2):
                scale = factors[row // 16, column // 32]
            else:
                scale = factors.reshape(-1)[row if factors.numel() > 1 else 0]
            assert float(found[row, column]) == pytest.approx(float(codes[row, column].double() * scale.double()), rel=1e-6)


def test_fp8_of_all_experts_in_one_tensor() -> None:
    """The blocks of an expert end where the expert ends."""
    codes, scales = normal(2, 40, 48).to(FP8), normal(2, 3, 2, seed=1).abs()
    found = fp8_weight(codes, scales, (16, 32))
    assert all(torch.equal(found[e], fp8_weight(codes[e], scales[e], (16, 32))) for e in range(2))


def blockwise(folder: Path, suffix: str = "_scale_inv", sides: int = 64) -> None:
    """The linears of a folder as FP8 with scales for blocks, as DeepSeek and Qwen publish them."""

    def convert(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "_proj" in name]:
            weight = tensors[name].float()
            n, k = weight.shape
            blocks = weight.view(n // sides, sides, k // sides, sides).abs().amax((1, 3)) / 448
            spread = blocks.repeat_interleave(sides, 0).repeat_interleave(sides, 1)
            tensors[name], tensors[name + suffix] = (weight / spread).to(FP8), blocks
            tensors[name.replace(".weight", ".input_scale")] = torch.ones(1)

    edit_tensors(folder, convert)


FP8_BLOCKS: dict[str, dict[str, Any]] = {
    "_scale_inv": {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [64, 64]},
    "_scale": {
        "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed", "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"], "input_activations": {"num_bits": 8, "type": "float", "dynamic": True, "strategy": "token"},
                "weights": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [64, 64], "symmetric": True},
            }
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("suffix", FP8_BLOCKS)
def test_an_fp8_model_is_quantized_as_its_bfloat16_copy(tmp_path: Path, suffix: str) -> None:
    """If anything but the rounded product were read, or scales were taken for weights, codes would be others."""
    folder = make_tiny(tmp_path / "model", dtype=torch.bfloat16)
    blockwise(folder, suffix)
    stored = _tensors(folder)
    edit_json(folder / "config.json", lambda config: config.update(quantization_config=FP8_BLOCKS[suffix]))
    text = runs.recipe(runs.write_text(tmp_path / "text.txt"), quantize__skip=["q_proj"])
    report = runs.quantize(folder, tmp_path / "out", text)
    assert "14 weights are FP8 (blocks of 64 x 64)" in report["source"]["precision"]

    copy = make_tiny(tmp_path / "copy", dtype=torch.bfloat16)
    dense = {
        name: fp8_weight(tensor, stored[name + suffix], (64, 64)).bfloat16() if tensor.dtype == FP8 else tensor
        for name, tensor in stored.items()
        if not name.endswith(("_scale", "_scale_inv"))
    }
    save_file(dense, copy / "model.safetensors", metadata={"format": "pt"})
    runs.quantize(copy, tmp_path / "expected", text)
    found, expected = (_tensors(tmp_path / name) for name in ("out", "expected"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert "Its weights" in (tmp_path / "out" / "README.md").read_text()


def _tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_other_verbs_take_an_fp8_model(tmp_path: Path) -> None:
    """`inspect`, `verify --source`, `eval` and the API read it as `quantize` does."""
    folder = make_tiny(tmp_path / "model", dtype=torch.bfloat16)
    blockwise(folder)
    edit_json(folder / "config.json", lambda config: config.update(quantization_config=FP8_BLOCKS["_scale_inv"]))
    assert any("FP8" in warning for warning in inspect(folder)["warnings"])
    with open_folder(folder) as examined:
        weight = examined.checkpoint.read(f"{UP}.weight")
        assert (
            weight.dtype == torch.bfloat16 and bytes(examined.checkpoint.raw(f"{UP}.weight")) == weight.view(torch.uint8).numpy().tobytes()
        )
        assert torch.equal(examined.checkpoint.rows(f"{UP}.weight", [5, 3]), weight[[5, 3]])
    assert torch.equal(load_dense(folder, dtype=torch.bfloat16).get_parameter(f"{UP}.weight"), weight)


# ---- AWQ -----------------------------------------------------------------------------------------------------------------------------


def awq_packed(values: Tensor) -> Tensor:
    """[R, 8 C] -> int32 [R, C]: nibble i of a word holds column (0, 2, 4, 6, 1, 3, 5, 7)[i], as AutoAWQ's `gemm` has it."""
    words = torch.zeros(values.shape[0], values.shape[1] // 8, dtype=torch.int64)
    for i, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        words |= values[:, column::8].long() << 4 * i
    return words.to(torch.int32)


def awq_parts(n: int, k: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    codes, zeros = (torch.randint(16, (rows, n), generator=generator) for rows in (k, k // group))
    return codes, zeros, (normal(k // group, n).abs() / 100).half()


def test_awq_is_code_minus_zero_times_scale() -> None:
    """Its columns are interleaved in each word; taken in order, every weight would be that of a neighbour."""
    codes, zeros, scales = awq_parts(24, 64, 32)
    found = awq_weight(awq_packed(codes), awq_packed(zeros), scales)
    groups = torch.arange(64) // 32
    assert torch.equal(found.double(), ((codes - zeros[groups]).double() * scales.double()[groups]).T)


def awq(folder: Path) -> None:
    def convert(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "_proj" in name]:
            n, k = tensors.pop(name).shape
            codes, zeros, scales = awq_parts(n, k, 64)
            layer = name.removesuffix(".weight")
            tensors |= {f"{layer}.qweight": awq_packed(codes), f"{layer}.qzeros": awq_packed(zeros), f"{layer}.scales": scales}

    edit_tensors(folder, convert)
    block = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm", "modules_to_not_convert": None}
    edit_json(folder / "config.json", lambda config: config.update(quantization_config=block))


def test_an_awq_model_is_dequantized_with_a_warning(tmp_path: Path) -> None:
    """It is read, and the person knows that 4 bits of 4 bits are not what they would get from the original."""
    folder = make_tiny(tmp_path / "model")
    awq(folder)
    with open_folder(folder, structure="needed") as examined:
        assert any("loses accuracy" in note for note in examined.notes)
        codes, zeros, scales = awq_parts(256, 128, 64)
        expected = awq_weight(awq_packed(codes), awq_packed(zeros), scales).half()
        assert torch.equal(examined.checkpoint.read(f"{UP}.weight"), expected)


# ---- refusals ------------------------------------------------------------------------------------------------------------------------

Change = Callable[[dict[str, Tensor]], object]
DAMAGED: dict[str, tuple[Change, str]] = {
    "no scales": (lambda t: t.pop(f"{UP}.weight_scale_inv"), "it has no scales"),
    "scales of another model": (lambda t: t.update({f"{UP}.weight_scale_inv": torch.ones(3, 3)}), r"do not fit \[256, 128\]"),
    "scales of bytes": (lambda t: t.update({f"{UP}.weight_scale_inv": torch.ones(4, 2, dtype=torch.uint8)}), "U8, which is not read"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_scales_must_fit(tmp_path: Path, name: str) -> None:
    """Spread over the wrong blocks they would give a model of noise."""
    folder = make_tiny(tmp_path / "model", dtype=torch.bfloat16)
    blockwise(folder)
    edit_json(folder / "config.json", lambda config: config.update(quantization_config=FP8_BLOCKS["_scale_inv"]))
    edit_tensors(folder, DAMAGED[name][0])
    with pytest.raises(BadInput, match=DAMAGED[name][1]) as caught, open_folder(folder):
        pass
    assert caught.value.error_id == "E340"


@pytest.mark.parametrize(("method", "way"), [("bitsandbytes", ".dequantize()"), ("mxfp4", "Mxfp4Config")])
def test_what_is_not_read_names_the_way(tmp_path: Path, method: str, way: str) -> None:
    """ "Start from the original" does not help without another."""
    folder = make_tiny(tmp_path / "model")
    edit_json(folder / "config.json", lambda config: config.update(quantization_config={"quant_method": method}))
    text = runs.recipe(runs.write_text(tmp_path / "text.txt"))
    for refused in (lambda: runs.plan(folder, text), lambda: inspect(folder)):
        with pytest.raises(BadInput) as caught:
            refused()
        assert caught.value.error_id in ("E313", "E340") and way in caught.value.problems[0].fix
