"""int8 activations beside 4-bit weights, all the way: what calibration measures and marks, resume, pack, evaluation, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from marlinctl.checkpoint.formats.registry import detect
from marlinctl.checkpoint.reader import open_checkpoint
from marlinctl.checkpoint.transformers_model import load_dense
from marlinctl.cli import main
from marlinctl.convert.repack import repack
from marlinctl.errors import CheckFailed, MarlinctlError
from marlinctl.oneshot import input_rounding
from marlinctl.oneshot.input_rounding import KEPT_ROWS, InputFacts, Rows, measure, stays
from marlinctl.quantize.activations import RoundedAs, RoundingLinear
from marlinctl.recipes.schema import Recipe
from marlinctl.system.console import Console
from marlinctl.verify.inspect import inspect, table
from marlinctl.verify.run import verify
from tests import runs, zoo
from tests.oneshot.stopping import blocks_solved, lines_of, quantize, stop_in
from tests.packed import edit_json, remake_manifest
from tests.tiny import VOCAB_SIZE, make_tiny

SHARED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("o_proj",), ("down_proj",))


@pytest.mark.parametrize(("samples", "length"), [(3, 64), (64, 512), (128, 96), (40, 384)])
def test_the_rows_that_are_kept_lie_everywhere(samples: int, length: int) -> None:
    """If they were always the same places of a sample, the first token, which is like no other, would be half of them or none."""
    rows = Rows(samples * length, length)
    places = torch.arange(samples * length).float()
    for first in range(0, samples * length, 5 * length):
        x = places[first : first + 5 * length]
        rows.add(torch.stack((x, torch.ones_like(x)), 1), torch.ones(len(x), dtype=torch.bool))
    kept = rows.tensor()
    assert kept is not None and min(samples * length, KEPT_ROWS) <= len(kept) <= 1.4 * KEPT_ROWS
    assert torch.equal(kept[:, 0], places[:: rows.distance])
    inside = kept[:, 0].long() % length
    assert len(inside.unique()) >= min(length, len(kept)) / 2 and float((inside == 0).float().mean()) < 3 / length + 2 / len(kept)


def test_rows_that_do_not_count_are_zeros() -> None:
    """If padding or an overflow were kept, the error would be that of tokens that no linear was solved for, or NaN."""
    x = torch.ones(6, 3)
    x[4, 1] = torch.inf
    rows = Rows(6, 5)
    rows.add(x, torch.tensor([True, True, False, True, True, True]))
    kept = rows.tensor()
    assert kept is not None and kept.sum(1).tolist() == [3, 3, 0, 3, 0, 3]


def in_float64(x: Tensor, weight: Tensor, size: int) -> float:
    """The mean over tokens of what rounding changes, token by token."""
    shares = []
    for token in x.double():
        codes = [part / part.abs().max() * 127 for part in token.split(size)]
        near = torch.cat([code.round() * part.abs().max() / 127 for code, part in zip(codes, token.split(size), strict=True)])
        shares.append(float((weight.double() @ (near - token)).square().sum() / (weight.double() @ token).square().sum()))
    return sum(shares) / len(shares)


@pytest.mark.parametrize(("kind", "size"), [("int8", 200), ("int8-128", 128)])
def test_the_error_is_that_of_the_outputs(kind: RoundedAs, size: int) -> None:
    """If it were of the inputs, or of sums over tokens, one massive token or a channel that no weight reads would decide."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(40, 200, generator=generator), torch.randn(24, 200, generator=generator)
    x[:, 7] += 30
    x = x * torch.logspace(-3, 3, 40).unsqueeze(1)
    padded = torch.cat((x[:20], torch.zeros(3, 200), x[20:]))
    found = measure(padded, {"a": weight, "b": weight[:8]}, kind)
    assert found["a"].rounding_error == pytest.approx(in_float64(x, weight, size), rel=0.02)
    assert found["b"].rounding_error == pytest.approx(in_float64(x, weight[:8], size), rel=0.02)
    assert found["a"].spread == pytest.approx(float((x.abs().amax(1) / x.square().mean(1).sqrt()).mean()), rel=1e-4)
    assert found["a"].mean == pytest.approx(float(x.double().mean() / x.double().std()), rel=1e-2)
    assert measure(torch.zeros(5, 200), {"a": weight}, kind)["a"].rounding_error == 0


def test_what_a_token_may_lack() -> None:
    """If one zero left a token out, or a token without output made the error NaN, inputs behind a ReLU would be measured wrongly."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(40, 200, generator=generator).relu(), torch.randn(24, 200, generator=generator)
    assert measure(x, {"a": weight}, "int8")["a"].rounding_error == pytest.approx(in_float64(x, weight, 200), rel=0.02)
    weight[:, 100:] = 0
    unseen = torch.cat((torch.zeros(1, 100), x[:1, 100:] + 1), 1)
    assert measure(torch.cat((unseen, x)), {"a": weight}, "int8")["a"].rounding_error == pytest.approx(in_float64(x, weight, 200), rel=0.02)
    constant = measure(torch.ones(3, 200), {"a": weight}, "int8")["a"]
    assert (constant.mean, constant.spread) == (0, 1) and constant.rounding_error < 1e-9


def test_the_worst_decides_for_all_that_share_an_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """If q kept 16 bits and k did not, a server that joins them would have to round or not round both."""
    x, weight = torch.randn(40, 200, generator=torch.Generator().manual_seed(0)), torch.eye(200)
    facts = measure(x, {"a": weight, "b": 2 * weight}, "int8")
    assert not stays(facts) and stays({**facts, "c": InputFacts(0.0, 1.0, 1.01 * input_rounding.LIMIT)}), "one is enough"
    monkeypatch.setattr(input_rounding, "LIMIT", 0.99 * facts["a"].rounding_error)
    assert stays(facts) and stays({"a": InputFacts(0.0, 1.0, float("nan"))}), "what is not a number stays too"


def outliers(folder: Path) -> Path:
    """A Llama in whose first block one channel of what enters q, k and v is far larger than the others, and weighs nothing in them."""
    source = make_tiny(folder)
    file = source / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.input_layernorm.weight"][5] = 500
    for name in SHARED[0]:
        tensors[f"model.layers.0.self_attn.{name}.weight"][:, 5] /= 5000
    save_file(tensors, file, {"format": "pt"})
    return source


def logits(model: torch.nn.Module) -> Tensor:
    ids = torch.randint(3, VOCAB_SIZE, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found: Tensor = model.eval()(ids).logits.double()
    return found


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def a8(text: Path, **changes: Any) -> Recipe:
    """Not rotated, and with a scale for each 128 inputs: what these tests look at is rounding."""
    settings = {"quantize__equalize": "never", "quantize__rotate": "never", "quantize__activation_group": 128} | changes
    return runs.recipe(text, "int4-a8", **settings)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """model, text, ct and marlin of the recipe int4-a8, and the report."""
    root = tmp_path_factory.mktemp("a8")
    runs.write_text(root / "text.txt")
    report = runs.quantize(outliers(root / "model"), root / "ct", a8(root / "text.txt"))
    repack(root / "ct", root / "marlin", format="marlin")
    return root, report


def test_calibration_marks_what_rounding_would_spoil(published: tuple[Path, dict[str, Any]]) -> None:
    """If a channel 500 times as large as the others were rounded with them, the codes of the others would all be zero."""
    root, report = published
    layers = {layer["name"]: layer for layer in report["layers"]}
    marked = {f"model.layers.0.self_attn.{name}" for name in SHARED[0]}
    assert {name for name, layer in layers.items() if layer["rounding"] == "none"} == marked
    assert {layer["rounding"] for name, layer in layers.items() if name not in marked} == {"int8-128"}
    errors = {name: layer["rounding_error"] for name, layer in layers.items()}
    assert max(errors[name] for name in marked) > 0.1 > 100 * max(errors[name] for name in errors.keys() - marked)
    assert all(
        layers[name]["input_spread"] > 7 > layer["input_spread"]
        for name in marked
        for layer in layers.values()
        if layer["rounding"] != "none"
    )
    block = json.loads((root / "marlin" / "config.json").read_text())["quantization_config"]
    assert block["sixteen_bit_activations"] == sorted(marked) and block["activation_group"] == 128
    manifest = json.loads((root / "marlin" / "marlinctl_manifest.json").read_text())
    assert manifest["format"] == "marlin"
    facts = inspect(root / "marlin")
    assert facts["linears_by_activations"] == {"int8-128": len(layers) - 3, "16-bit": 3} and "int8-128 (11 linears)" in table(facts)
    assert inspect(root / "ct")["linears_by_activations"] == {"16-bit": len(layers)}
    card = (root / "marlin" / "README.md").read_text()
    assert "what enters 11 linears is rounded to int8" in card and "is rounded" not in (root / "ct" / "README.md").read_text()
    page = (root / "marlin" / "marlinctl_report.md").read_text()
    assert "int8-128 activations (11 linears)" in page and "error of rounding" in page


def test_the_weights_are_those_of_int4(published: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """If asking for 8-bit activations changed codes, W4A8 and W4A16 could not be compared in one folder."""
    root, report = published
    same = runs.recipe(root / "text.txt", quantize__equalize="never")
    plain = runs.quantize(root / "model", tmp_path / "ct", same)
    assert [layer["digest"] for layer in plain["layers"]] == [layer["digest"] for layer in report["layers"]]
    assert {(layer["rounding"], layer["rounding_error"]) for layer in plain["layers"]} == {("none", None)}
    config, other = (json.loads((folder / "ct" / "config.json").read_text())["quantization_config"] for folder in (root, tmp_path))
    assert {key: value for key, value in config.items() if key != "marlinctl"} == {k: v for k, v in other.items() if k != "marlinctl"}


def test_an_evaluation_rounds_what_the_folder_says(published: tuple[Path, dict[str, Any]]) -> None:
    """If it did not, the KL of a W4A8 folder would be that of W4A16, and the cost of 8 bits would not be seen."""
    root, report = published
    ours = load_dense(root / "marlin", dtype=torch.float32)
    rounded = {path: module.activations for path, module in ours.named_modules() if isinstance(module, RoundingLinear)}
    assert rounded == {layer["name"]: layer["rounding"] for layer in report["layers"] if layer["rounding"] != "none"}
    plain = logits(load_dense(root / "ct", dtype=torch.float32))
    assert 1e-4 < apart(logits(ours), plain) < 0.1
    asked = {kind: load_dense(root / "marlin", dtype=torch.float32, activations=kind) for kind in ("16-bit", "int8", "int8-128")}
    assert torch.equal(logits(asked["16-bit"]), plain)
    for kind in ("int8", "int8-128"):
        kinds = [module.activations for module in asked[kind].modules() if isinstance(module, RoundingLinear)]
        assert kinds == [kind] * len(report["layers"]), "those that calibration keeps out as well"
        assert apart(logits(asked[kind]), plain) > 5 * apart(logits(ours), plain), "which spoils it"
    assert torch.equal(logits(load_dense(root / "ct", dtype=torch.float32, activations="int8")), logits(asked["int8"]))


def test_a_packed_model_rounds_what_the_folder_says(published: tuple[Path, dict[str, Any]]) -> None:
    """If transformers' modules did not, a model would answer otherwise in `generate` than it was measured; fused linears must agree."""
    from transformers import AutoModelForCausalLM

    from marlinctl.kernels.linear import MarlinLinear
    from marlinctl.serve.fusing import fuse_linears

    root, report = published
    model = AutoModelForCausalLM.from_pretrained(root / "marlin", dtype=torch.bfloat16)
    rounding = {path: module.rounding for path, module in model.named_modules() if isinstance(module, MarlinLinear)}
    assert rounding == {layer["name"]: layer["rounding"] for layer in report["layers"]}
    before = logits(model)
    assert fuse_linears(model) == 4
    assert {module.rounding for module in model.modules() if isinstance(module, MarlinLinear)} == {"none", "int8-128"}
    assert torch.equal(logits(model), before)


def test_the_note_comes_back_from_every_format(published: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """If a folder that went through another format forgot the marks, all of its linears would round, or none."""
    root, _ = published
    repack(root / "marlin", tmp_path / "gptq", format="gptq")
    repack(tmp_path / "gptq", tmp_path / "marlin", format="marlin")
    with open_checkpoint(root / "marlin", weight_files="auto") as first, open_checkpoint(tmp_path / "marlin", weight_files="auto") as again:
        assert detect(first.config, first.tensors).rounding == detect(again.config, again.tensors).rounding
        assert first.config == again.config


def test_verify_finds_a_mark_that_marks_nothing(published: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """If a name in config.json were misspelt, its linear would be rounded, and every check would pass."""
    root, _ = published
    shutil.copytree(root / "marlin", tmp_path / "marlin")
    assert verify(tmp_path / "marlin", source=root / "model", load=None, console=Console.quiet()).linears == 14
    marks = ["model.layers.0.self_attn.q_porj"]
    edit_json(tmp_path / "marlin" / "config.json", lambda config: config["quantization_config"].update(sixteen_bit_activations=marks))
    remake_manifest(tmp_path / "marlin")
    with pytest.raises(CheckFailed, match="q_porj keeps 16-bit activations, and no packed linear is called so") as refused:
        verify(tmp_path / "marlin", source=None, load=None, console=Console.quiet())
    assert refused.value.error_id == "E105"


def test_a_run_that_stopped_writes_the_same_bytes(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If marks were measured again, or lost with the first run, a resumed folder would round other linears."""
    monkeypatch.setattr(input_rounding, "LIMIT", 3.5e-5)
    more = ["--activations", "int8", "--activation-group", "-1"]
    assert main(quantize(place, tmp_path / "whole" / "out", *more)) == 0
    (tmp_path / "stopped").mkdir()
    out = tmp_path / "stopped" / "out"
    assert stop_in(monkeypatch, 2, quantize(place, out, *more)) == 130
    kept = [record for line in lines_of(out) for record in line.get("records", [])]
    assert {record["rounding"] for record in kept} == {"none", "int8"} and all(record["rounding_error"] > 0 for record in kept)
    assert blocks_solved(monkeypatch, ["resume", str(out), "-q"]) == (0, [2, 3])
    assert runs.digests(out) == runs.digests(tmp_path / "whole" / "out")
    block = json.loads((out / "config.json").read_text())["quantization_config"]["marlinctl"]
    exact = set(block["sixteen_bit_activations"])
    for group in SHARED:
        for index in range(4):
            names = {f"model.layers.{index}.{'mlp' if name in SHARED[1] + SHARED[3] else 'self_attn'}.{name}" for name in group}
            assert names <= exact or names.isdisjoint(exact), "those that share an input go together"


def test_the_output_head_is_measured_too(tmp_path: Path, text: Path) -> None:
    """If a packed head were not, the largest linear of the model would be rounded whatever it costs, or never."""
    report = runs.quantize(make_tiny(tmp_path / "model"), tmp_path / "ct", a8(text, quantize__include=("lm_head",)))
    (head,) = [layer for layer in report["layers"] if layer["name"] == "lm_head"]
    assert head["rounding"] == "int8-128" and 0 < head["rounding_error"] < 1e-3


def test_experts_keep_16_bits(tmp_path: Path, text: Path) -> None:
    """transformers fuses experts: an evaluation could not round what enters them, and a server multiplies them all at once."""
    source = zoo.build("qwen3_moe", tmp_path / "model", dtype=torch.bfloat16)
    report = runs.quantize(source, tmp_path / "ct", a8(text))
    by_kind = {(".experts." in layer["name"], layer["rounding"]) for layer in report["layers"]}
    assert by_kind == {(True, "none"), (False, "int8-128")}
    note = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]["marlinctl"]
    assert "sixteen_bit_activations" not in note, "experts need not be named"


def test_compress_measures_what_it_publishes(tmp_path: Path, text: Path) -> None:
    """If the interchange form were measured, the report of a W4A8 folder would show the KL of W4A16."""
    source = zoo.build("llama", tmp_path / "model", dtype=torch.bfloat16)
    size = ["--samples", "8", "--sequence-length", "64", "--group-size", "32", "--tokens", "512", "--window", "64", "--dtype", "float32"]
    (tmp_path / "mine.yaml").write_text("extends: int4-a8\ncalibration: {minimum_tokens: 256}\nquantize: {activation_group: -1}\n")
    asked = ["compress", str(source), str(tmp_path / "out"), "--recipe", str(tmp_path / "mine.yaml"), "--calibration", str(text), *size]
    assert main([*asked, "--text", str(text), "-q"]) == 0
    report = json.loads((tmp_path / "out" / "marlinctl_report.json").read_text())
    assert [item["format"] for item in report["outputs"]] == ["marlin"]
    kl = report["evaluation"]["document"]["comparison"]["kl"]["value"]
    found = {}
    for kind in ("int8", "16-bit"):
        again = ["eval", str(tmp_path / "out"), "--against", str(source), "--activations", kind, "--out", str(tmp_path / f"{kind}.json")]
        assert main([*again, "--text", str(text), "--tokens", "512", "--window", "64", "-q"]) == 0
        document = json.loads((tmp_path / f"{kind}.json").read_text())
        assert document["settings"]["activations"] == kind
        found[kind] = document["comparison"]["kl"]["value"]
    assert kl == pytest.approx(found["int8"], rel=1e-6) and abs(found["16-bit"] / kl - 1) > 1e-4


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sparsify__pattern": "2:4"}, "a 2:4 model has 16-bit activations"),
        ({"quantize__bits": 8}, "it goes with 4-bit weights, and these have 8 bits"),
        ({"quantize__symmetric": False}, "holds symmetric codes"),
        ({"quantize__overrides": {"down_proj": {"bits": 8}}}, "holds 4-bit codes alone"),
        ({"quantize__overrides": {"down_proj": {"bits": 8, "activations": "int8"}}}, "holds 4-bit codes alone"),
        ({"pack__formats": ["ct"]}, "ct folders have 16-bit activations"),
        ({"pack__formats": ["marlin", "gptq"]}, "gptq folders have 16-bit activations"),
    ],
)
def test_where_they_have_no_meaning(changes: dict[str, Any], says: str, tmp_path: Path, text: Path) -> None:
    """If one of these ran, it would end hours later, or publish a folder that no program computes as it was measured."""
    source = zoo.build("llama", tmp_path / "model", dtype=torch.bfloat16)
    with pytest.raises(MarlinctlError, match=says) as refused:
        runs.plan(source, a8(text, **changes))
    assert refused.value.error_id == "E273"
    if "pack__formats" not in changes:  # quantize writes none of them
        with pytest.raises(MarlinctlError, match=says):
            runs.quantize(source, tmp_path / "out", a8(text, **changes))


def test_a_source_that_is_2_to_4_keeps_16_bit_activations(tmp_path: Path, text: Path) -> None:
    """No kernel multiplies 2:4 weights with 8-bit activations, and marlin_24 has no place for the choice."""
    source = zoo.build("llama", tmp_path / "model", dtype=torch.bfloat16)
    runs.quantize(source, tmp_path / "pruned", runs.recipe(text, sparsify__pattern="2:4", quantize__bits=16))
    with pytest.raises(MarlinctlError, match="2:4 linears have 16-bit activations"):
        runs.quantize(tmp_path / "pruned", tmp_path / "out", a8(text))


def test_a_plan_says_it(tmp_path: Path, text: Path) -> None:
    """If the plan were that of int4, it would hide that large batches will be computed with 8-bit activations."""
    source = zoo.build("llama", tmp_path / "model", dtype=torch.bfloat16)
    linears = runs.plan(source, a8(text))["linears"]["compressed"]
    assert {item["activations"] for item in linears} == {"int8-128"}
    assert {item["activations"] for item in runs.plan(source, runs.recipe(text))["linears"]["compressed"]} == {"16-bit"}


def test_eval_refuses_what_it_cannot_round(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """If a 16-bit model were measured with --activations int8, its figures would be taken for those of 8 bits."""
    source = zoo.build("llama", tmp_path / "model", dtype=torch.bfloat16)
    assert main(["eval", str(source), "--activations", "int8", "--text", str(text), "-q"]) == 3
    assert "has no quantized linear" in capsys.readouterr().err
    assert main(["eval", str(source), "--activations", "int8", "--backend", "vllm", "--tasks", "arc", "-q"]) == 2
    assert "vllm rounds activations as the folder says" in capsys.readouterr().err
