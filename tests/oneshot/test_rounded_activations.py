"""8-bit activations for single linears, all the way: quantize, load in transformers, verify, resume, and what refuses them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import marlinctl.quantize.activations as dynamic
from marlinctl.checkpoint.formats.registry import detect
from marlinctl.checkpoint.reader import open_checkpoint
from marlinctl.checkpoint.transformers_model import load_dense
from marlinctl.cli import main
from marlinctl.convert.repack import repack
from marlinctl.errors import BadInput, CheckFailed, MarlinctlError, UsageError
from marlinctl.quantize.activations import RoundingLinear
from marlinctl.recipes.schema import Recipe
from marlinctl.system.console import Console
from marlinctl.verify.inspect import inspect
from marlinctl.verify.run import verify
from tests import runs, zoo
from tests.oneshot.stopping import blocks_solved, quantize, stop_in
from tests.packed import edit_json

INT8 = {"down_proj": {"bits": 8, "activations": "int8"}}
FP8 = {"down_proj": {"bits": 8, "activations": "fp8"}}
KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "int8": INT8,
    "fp8": FP8,
    "both": {**FP8, "o_proj": {"bits": 8, "activations": "int8"}, "gate_proj": {"bits": 8}, "up_proj": {"bits": 8}},
    "all int8": {"*": {"bits": 8, "activations": "int8"}},
    "all fp8": {"*": {"bits": 8, "activations": "fp8"}},
}
IDS = torch.randint(3, zoo.VOCAB_SIZE, (2, 20), generator=torch.Generator().manual_seed(1))


def recipe(text: Path, overrides: dict[str, Any], **changes: Any) -> Recipe:
    given: dict[str, Any] = {"quantize__refine": 1, "quantize__overrides": overrides}
    return runs.recipe(text, **given | changes)


@torch.no_grad()
def outputs(model: torch.nn.Module) -> tuple[torch.Tensor, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """The logits, and by path what enters and leaves each linear of the blocks."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    handles = [
        module.register_forward_hook(lambda _, args, out, path=path: seen.__setitem__(path, (args[0].detach(), out.detach())))
        for path, module in model.named_modules()
        if path.endswith("_proj")
    ]
    logits = model.eval()(IDS).logits.double()
    for handle in handles:
        handle.remove()
    return logits, seen


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_computes_what_we_evaluate(kind: str, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If weights, formats or the rounding of activations were not what compressed-tensors expects, the folder would hold noise, or a KL
    that was measured here would be that of another model.

    Linear by linear and with the client's own inputs: a last bit moves a code that lies on a tie, and after some blocks logits differ by
    percents. compressed-tensors divides the largest magnitude of a token by 127.5, vLLM by 127.
    """
    from transformers import AutoModelForCausalLM

    source = zoo.build("llama", tmp_path / "model", dtype=torch.bfloat16)
    report = runs.quantize(source, tmp_path / "ct", recipe(text, KINDS[kind]))
    client = AutoModelForCausalLM.from_pretrained(tmp_path / "ct", dtype=torch.float32)
    theirs, seen = outputs(client)
    ours = load_dense(tmp_path / "ct", dtype=torch.float32)
    logits, _ = outputs(ours)
    assert apart(logits, theirs) < 0.1
    monkeypatch.setattr(dynamic, "INT8_STEPS", 127.5)
    rounding = {layer["name"]: layer["activations"] for layer in report["layers"]}
    assert {*rounding.values()} > {"16-bit"} or "all" in kind
    for path, (x, out) in seen.items():
        module = ours.get_submodule(path)
        assert isinstance(module, RoundingLinear) == (rounding[path] != "16-bit")
        with torch.no_grad():
            assert apart(module(x), out) < 1e-5, path
            if rounding[path] != "16-bit":
                exact = torch.nn.functional.linear(x, module.weight, module.bias)
                assert apart(exact, out) > 1e-3, "the client rounds, so that this test can fail"


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=() if kind in ("both", "all int8") else pytest.mark.slow) for kind in KINDS])
def test_every_reader_knows_such_a_folder(kind: str, tmp_path: Path, text: Path) -> None:
    """If inspect, verify or pack took int8 weights for 16-bit ones or packed words, they would say something false of a good folder."""
    source = zoo.build("llama", tmp_path / "model", dtype=torch.bfloat16)
    report = runs.quantize(source, tmp_path / "ct", recipe(text, KINDS[kind]))
    facts = inspect(tmp_path / "ct")
    counts: dict[str, int] = {}
    for layer in report["layers"]:
        counts[layer["activations"]] = counts.get(layer["activations"], 0) + 1
    assert facts["linears_by_activations"] == counts and facts["quantized_linears"] == len(report["layers"])
    assert "vLLM" in facts["loads_in"] and "SGLang" not in facts["loads_in"]
    checked = verify(tmp_path / "ct", source=source, load=True, console=Console.quiet())
    assert checked.linears == len(report["layers"]) and checked.logit_error is not None
    repack(tmp_path / "ct", tmp_path / "again", format="ct")
    with open_checkpoint(tmp_path / "again") as again, open_checkpoint(tmp_path / "ct") as first:
        assert detect(again.config, again.tensors).grids == detect(first.config, first.tensors).grids
        assert all(again.raw(name) == first.raw(name) for name in first.tensors)
    repack(tmp_path / "ct", tmp_path / "dense", format="dense")
    exact = load_dense(tmp_path / "dense", dtype=torch.float32)
    assert not any(isinstance(module, RoundingLinear) for module in exact.modules())
    for fmt in ("gptq", "marlin"):
        with pytest.raises(BadInput) as refused:
            repack(tmp_path / "ct", tmp_path / fmt, format=fmt)
        assert any(f"{fmt} holds weights for 16-bit activations alone" in problem.what for problem in refused.value.problems)
        assert not (tmp_path / fmt).exists()


def test_a_client_that_rounds_otherwise_is_found(tmp_path: Path, text: Path) -> None:
    """If verify looked at weights alone, a folder whose group lost its input_activations would pass, and be served with other numbers."""
    source = zoo.build("llama", tmp_path / "model", dtype=torch.bfloat16)
    runs.quantize(source, tmp_path / "ct", recipe(text, INT8))
    from marlinctl.verify import activations

    found = activations.turn_off

    def forgetful(client: torch.nn.Module) -> dict[str, str]:
        return dict.fromkeys(list(found(client))[1:], "fp8")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(activations, "turn_off", forgetful)
        with pytest.raises(CheckFailed) as refused:
            verify(tmp_path / "ct", source=None, load=True, console=Console.quiet())
    assert refused.value.error_id == "E108"
    said = [problem.what for problem in refused.value.problems]
    assert len(said) == 2 and "16-bit activations, the folder int8" in said[0] and "fp8 activations, the folder int8" in said[1]


def test_the_largest_weight_of_a_row_is_the_largest_code(tmp_path: Path, text: Path) -> None:
    """If scales were those of other codes, half of the range, and a bit of accuracy, would be lost."""
    source = zoo.build("llama", tmp_path / "model", dtype=torch.bfloat16)
    for kind, most in (("int8", 127), ("fp8", 448)):
        runs.quantize(source, tmp_path / kind, recipe(text, KINDS[kind], quantize__refine=0))
        with open_checkpoint(tmp_path / kind) as found, open_checkpoint(source) as original:
            name = "model.layers.0.mlp.down_proj.weight"
            codes, scales, weight = found.read(name).float(), found.read(f"{name}_scale").float(), original.read(name).float()
        assert codes.abs().amax() == pytest.approx(most, abs=most / 100) and bool((scales > 0).all())
        assert apart(codes * scales, weight) < (0.02 if kind == "int8" else 0.05)


def test_scales_are_tuned_with_the_values_of_the_codes(tmp_path: Path, text: Path) -> None:
    """If tuning took the bits of FP8 codes for integers, it would aim at another block, and make this one worse or leave it as it is."""
    source = zoo.build("llama", tmp_path / "model", dtype=torch.bfloat16)
    size = {"calibration__samples": 48, "calibration__sequence_length": 128}
    tuning = {"quantize__drift_correction": 0.5, "quantize__tune_steps": 24, "quantize__tune_learning_rate": 0.01}
    report = runs.quantize(source, tmp_path / "ct", recipe(text, FP8, **size, **tuning))
    assert report["tuning"] and all(block["after"] < block["before"] < 0.2 for block in report["tuning"])
    with open_checkpoint(tmp_path / "ct") as found:
        name = "model.layers.0.mlp.down_proj.weight"
        assert bool((found.read(f"{name}_scale") > 0).all()) and found.tensors[name].dtype == "F8_E4M3"


def test_a_run_that_stopped_writes_the_same_bytes(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a finished block were read back with other codes, the blocks after it would see another model than the one that is published."""
    more = ["--override", "down_proj=bits:8,activations:fp8", "--override", "o_proj=bits:8,activations:int8"]
    assert main(quantize(place, tmp_path / "whole" / "out", *more)) == 0
    (tmp_path / "stopped").mkdir()
    out = tmp_path / "stopped" / "out"
    assert stop_in(monkeypatch, 2, quantize(place, out, *more)) == 130
    assert blocks_solved(monkeypatch, ["resume", str(out), "-q"]) == (0, [2, 3])
    assert runs.digests(out) == runs.digests(tmp_path / "whole" / "out")


@pytest.mark.parametrize(
    ("overrides", "changes", "says"),
    [
        (INT8, {"sparsify__pattern": "2:4"}, "a 2:4 model has 16-bit activations"),
        (FP8, {"quantize__symmetric": False}, "no zero points"),
        (INT8, {"quantize__bits": 16, "sparsify__pattern": "2:4"}, "stay at 16 bits"),
        ({**INT8, "layers.0.*": {"group_size": 64}}, {}, "one scale per row, and a rule gives it group size 64"),
        (INT8, {"pack__formats": ["gptq"]}, "gptq holds weights for 16-bit activations alone"),
        (FP8, {"pack__formats": ["ct", "marlin"]}, "marlin holds weights for 16-bit activations alone"),
    ],
)
def test_where_they_have_no_meaning(overrides: dict[str, Any], changes: dict[str, Any], says: str, tmp_path: Path, text: Path) -> None:
    """If one of these ran, it would end hours later, or publish a folder that no program computes as it was measured."""
    source = zoo.build("llama", tmp_path / "model", dtype=torch.bfloat16)
    chosen = recipe(text, overrides, **changes)
    for ask in (lambda: runs.quantize(source, tmp_path / "out", chosen), lambda: runs.plan(source, chosen)):
        with pytest.raises((UsageError, BadInput), match=says):
            ask()
    assert not (tmp_path / "out").exists()


def test_experts_keep_16_bit_activations(tmp_path: Path, text: Path) -> None:
    """transformers fuses experts: an evaluation could not round what enters them."""
    source = zoo.build("qwen3_moe", tmp_path / "model", dtype=torch.bfloat16)
    with pytest.raises(UsageError, match="is an expert, and its activations stay 16-bit") as refused:
        runs.quantize(source, tmp_path / "out", recipe(text, {"down_proj": {"bits": 8, "activations": "int8"}}))
    assert refused.value.error_id == "E255"
    report = runs.quantize(source, tmp_path / "out", recipe(text, {"o_proj": {"bits": 8, "activations": "int8"}}))
    assert {layer["activations"] for layer in report["layers"]} == {"16-bit", "int8"}


def test_a_source_that_is_2_to_4_keeps_16_bit_activations(tmp_path: Path, text: Path) -> None:
    """The codes of a 2:4 linear lie beside a mask, for which no program has a product with 8-bit activations."""
    source = zoo.build("llama", tmp_path / "model", dtype=torch.bfloat16)
    runs.quantize(source, tmp_path / "pruned", recipe(text, {}, sparsify__pattern="2:4", quantize__bits=16))
    with pytest.raises(MarlinctlError, match="2:4 linears have 16-bit activations"):
        runs.quantize(tmp_path / "pruned", tmp_path / "out", recipe(text, INT8))


def test_a_quantized_folder_is_no_source(tmp_path: Path, text: Path) -> None:
    """FP8 folders of others are read as 16-bit ones; our own would lose what its codes were solved for, and its activations' rounding."""
    source = zoo.build("llama", tmp_path / "model", dtype=torch.bfloat16)
    runs.quantize(source, tmp_path / "fp8", recipe(text, KINDS["all fp8"]))
    with pytest.raises(BadInput, match="quantized"):
        runs.quantize(tmp_path / "fp8", tmp_path / "out", recipe(text, {}))


def test_a_folder_of_others_is_evaluated_with_its_rounding(tmp_path: Path, text: Path) -> None:
    """If only marlinctl's own folders rounded, a comparison with a W8A8 folder of another tool would flatter that one."""
    source = zoo.build("llama", tmp_path / "model", dtype=torch.bfloat16)
    runs.quantize(source, tmp_path / "ct", recipe(text, KINDS["all int8"]))
    edit_json(tmp_path / "ct" / "config.json", lambda config: config["quantization_config"].pop("marlinctl"))
    model = load_dense(tmp_path / "ct", dtype=torch.float32)
    assert sum(isinstance(module, RoundingLinear) for module in model.modules()) == len(
        json.loads((tmp_path / "ct" / "marlinctl_report.json").read_text())["layers"]
    )
