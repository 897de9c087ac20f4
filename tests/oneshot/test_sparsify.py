"""2:4 through the whole tool: pruned, quantized, found again, kept; and what is refused before any work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from marlinctl.checkpoint import mask
from marlinctl.checkpoint.formats.registry import detect, read_linear
from marlinctl.checkpoint.reader import open_checkpoint
from marlinctl.checkpoint.sparsity import of_source
from marlinctl.checkpoint.transformers_model import load_dense
from marlinctl.cli import main
from marlinctl.errors import BadInput, CheckFailed, UsageError
from marlinctl.evaluation.gate import Gate, figures
from marlinctl.models.families import architecture
from marlinctl.oneshot.open import Options
from marlinctl.oneshot.run import run_job
from marlinctl.sparsify.mask import two_of_four
from marlinctl.sparsify.types import SparseQuantizedLinear
from marlinctl.system.console import Console
from tests import zoo
from tests.oneshot.test_run import logits, recipe
from tests.runs import digests
from tests.tiny import make_tiny


def run(model: Path, out: Path, text: Path, **changes: Any) -> dict[str, Any]:
    return run_job(str(model), out, recipe(text, **changes), Options(dtype="float32"), Console.quiet())[0]


def sparsify(model: Path, out: Path, text: Path, **changes: Any) -> dict[str, Any]:
    return run(model, out, text, **{"sparsify__pattern": "2:4", "quantize__bits": 16} | changes)


def tiny(folder: Path) -> Path:
    make_tiny(folder)
    return folder


def test_a_pruned_model_is_2of4_beside_its_mask_and_loads_in_transformers(tmp_path: Path, text: Path) -> None:
    """If a linear kept three of four, or the mask were of another layer, no sparse kernel could ever run the model."""
    from transformers import AutoModelForCausalLM

    source = tiny(tmp_path / "tiny")
    report = sparsify(source, tmp_path / "out", text)
    assert report["kind"] == "sparsify" and report["sparse"] == 14
    with open_checkpoint(tmp_path / "out") as checkpoint, mask.open_masks(tmp_path / "out") as masks:
        assert masks is not None
        assert "quantization_config" not in checkpoint.config
        for name, spec in architecture(checkpoint.config).linears.items():
            keep = masks.keep(name, spec.out_features, spec.in_features)
            weight = checkpoint.read(f"{name}.weight")
            assert weight.dtype == torch.float16
            assert not weight[~keep].any()
            assert weight[keep].any()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "16-bit weights, pruned to 2:4" in card and "4-bit" not in card and "0 linears" not in card
    assert "14 linears pruned to 2:4" in (tmp_path / "out" / "marlinctl_report.md").read_text()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(logits(theirs), logits(load_dense(tmp_path / "out", dtype=torch.float32)))


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt", "iterative"])
def test_the_joint_solve_publishes_codes_and_mask(tmp_path: Path, text: Path, method: str) -> None:
    """If the mask did not travel with the codes, the packer would have to guess kept weights that round to zero."""
    source = tiny(tmp_path / "tiny")
    report = sparsify(source, tmp_path / "out", text, quantize__bits=4, sparsify__method=method)
    assert report["bits"] == 4 and report["sparse"] == 14
    with open_checkpoint(tmp_path / "out") as checkpoint, mask.open_masks(tmp_path / "out") as masks:
        assert masks is not None
        info = detect(checkpoint.config, checkpoint.tensors)
        for name in info.layers:
            linear = read_linear(checkpoint, info, name)
            assert not linear.codes[~masks.keep(name, *linear.codes.shape)].any()
    block = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert "sparsity_config" not in block  # vLLM >= 0.22 refuses a model that has one with targets


@pytest.mark.parametrize("with_mask", [True, False])
def test_quantize_finds_the_pattern_says_so_and_keeps_it(
    tmp_path: Path, text: Path, with_mask: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """If quantize gave codes to pruned weights, hours of distillation would be lost without a word."""
    source = tiny(tmp_path / "tiny")
    sparsify(source, tmp_path / "sparse", text)
    if not with_mask:  # as another tool would have saved it
        (tmp_path / "sparse" / mask.NAME).unlink()
    options = ["--group-size", "32", "--calibration", str(text), "--samples", "8", "--sequence-length", "64", "--dtype", "float32"]
    small = tmp_path / "small.yaml"
    small.write_text("calibration: {minimum_tokens: 256}\n")
    code = main(["quantize", str(tmp_path / "sparse"), str(tmp_path / "out"), "--recipe", str(small), *options])
    told = capfd.readouterr().err
    assert code == 0, told
    assert "14 of 14 linears are 2:4" in told
    assert ("its mask file" in told) == with_mask
    with (
        open_checkpoint(tmp_path / "sparse") as before,
        open_checkpoint(tmp_path / "out") as after,
        mask.open_masks(tmp_path / "out") as masks,
    ):
        assert masks is not None
        info = detect(after.config, after.tensors)
        for name in info.layers:
            weight = before.read(f"{name}.weight")
            keep = masks.keep(name, *weight.shape)
            linear = read_linear(after, info, name)
            assert not linear.codes[~keep].any()
            assert not weight[~keep].any()


def test_the_same_job_gives_the_same_bytes(tmp_path: Path, text: Path) -> None:
    """If the mask depended on the run, a resumed job could not continue where it stopped."""
    source = tiny(tmp_path / "tiny")
    for name in ("a", "b"):
        sparsify(source, tmp_path / name, text, quantize__bits=4)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_refined_beats_one_pass_on_every_layer_it_reports(tmp_path: Path, text: Path) -> None:
    """If the default were no better than the baseline, the tool would have no reason to exist."""
    source = tiny(tmp_path / "tiny")
    plain = sparsify(source, tmp_path / "plain", text, quantize__bits=4, sparsify__method="sparsegpt", quantize__refine=0)
    refined = sparsify(source, tmp_path / "refined", text, quantize__bits=4, quantize__refine=2)
    assert refined["error"]["mean"] < 0.6 * plain["error"]["mean"]


@pytest.mark.parametrize("family", ["mixtral", "gemma2", "qwen2"])
def test_other_architectures_are_pruned_too(tmp_path: Path, text: Path, family: str) -> None:
    """If experts or sandwich norms were left out, those models would come out dense or wrong."""
    zoo.build(family, tmp_path / "model")
    report = sparsify(tmp_path / "model", tmp_path / "out", text, quantize__bits=4)
    assert report["sparse"] == len(report["layers"]) > 0


# ---- refused before any work ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def sparse(tmp_path: Path, text: Path) -> Path:
    source = tiny(tmp_path / "tiny")
    sparsify(source, tmp_path / "sparse", text)
    return tmp_path / "sparse"


def untouched(out: Path) -> bool:
    return not out.exists() and not list(out.parent.glob(f"{out.name}.tmp-*"))


def test_a_mask_that_contradicts_a_weight_is_refused(sparse: Path, tmp_path: Path, text: Path) -> None:
    """If the mask won, a weight that somebody revived would vanish; if the weight won, the pattern would break."""
    tensors = load_file(sparse / mask.NAME)
    name = "model.layers.1.mlp.up_proj"
    with open_checkpoint(sparse) as checkpoint:
        weight = checkpoint.read(f"{name}.weight")
    keep = mask.unpack_bits(tensors[f"{name}.keep"], 128)
    row = int((weight != 0).any(1).nonzero()[3])
    keep[row] = ~keep[row]
    tensors[f"{name}.keep"] = mask.pack_bits(keep)
    save_file(tensors, sparse / mask.NAME)
    with pytest.raises(BadInput, match=rf"model\.layers\.1\.mlp\.up_proj: row {row}, column \d+ was pruned") as caught:
        run(sparse, tmp_path / "out", text)
    assert caught.value.error_id == "E356"
    assert untouched(tmp_path / "out")


def test_three_kept_in_a_four_and_a_mask_of_another_shape_are_both_named(sparse: Path, tmp_path: Path, text: Path) -> None:
    """Only the first of two wrong layers would cost another round."""
    tensors = load_file(sparse / mask.NAME)
    three = mask.unpack_bits(tensors["model.layers.0.self_attn.q_proj.keep"], 128)
    three[5, 8:12] = torch.tensor([True, True, True, False])
    tensors["model.layers.0.self_attn.q_proj.keep"] = mask.pack_bits(three)
    tensors["model.layers.1.mlp.down_proj.keep"] = tensors["model.layers.1.mlp.down_proj.keep"][:, :-1].contiguous()
    tensors["model.layers.7.mlp.up_proj.keep"] = tensors["model.layers.1.mlp.up_proj.keep"].clone()
    save_file(tensors, sparse / mask.NAME)
    with pytest.raises(BadInput) as caught:
        run(sparse, tmp_path / "out", text)
    said = " ".join(problem.what for problem in caught.value.problems)
    assert "q_proj is not 2:4" in said and "row 5, columns 8..11, keeps 3" in said
    assert "mask of model.layers.1.mlp.down_proj is U8" in said
    assert "there is a mask of model.layers.7.mlp.up_proj, and no such linear" in said
    assert untouched(tmp_path / "out")


def test_pruning_twice_is_refused(sparse: Path, tmp_path: Path, text: Path) -> None:
    with pytest.raises(UsageError, match="2:4 already") as caught:
        sparsify(sparse, tmp_path / "out", text)
    assert caught.value.error_id == "E273"
    assert untouched(tmp_path / "out")


def test_sixteen_bits_without_a_pattern_are_refused(tmp_path: Path, text: Path) -> None:
    with pytest.raises(UsageError, match="nothing would change") as caught:
        run(tiny(tmp_path / "tiny"), tmp_path / "out", text, quantize__bits=16)
    assert caught.value.error_id == "E273"


def test_a_model_that_is_2of4_in_part_says_which_part(sparse: Path, tmp_path: Path, text: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """If dense linears passed silently, packing to marlin_24 would be the first to complain, hours later."""
    (sparse / mask.NAME).unlink()
    for shard in sparse.glob("*.safetensors"):
        tensors = load_file(shard)
        for name in tensors:
            if name.endswith("layers.1.mlp.up_proj.weight"):
                tensors[name] = torch.randn(tensors[name].shape).half()
        save_file(tensors, shard, metadata={"format": "pt"})
    with open_checkpoint(sparse) as checkpoint:
        shapes = {n: (s.out_features, s.in_features) for n, s in architecture(checkpoint.config).linears.items()}
        found = of_source(checkpoint, shapes, Console.quiet())
    assert len(found.pattern.linears) == 13 and found.origin("model.layers.1.mlp.up_proj") is None


def test_the_zeros_of_a_dense_model_are_no_pattern(tmp_path: Path) -> None:
    source = tiny(tmp_path / "tiny")
    with open_checkpoint(source) as checkpoint:
        shapes = {n: (s.out_features, s.in_features) for n, s in architecture(checkpoint.config).linears.items()}
        assert not of_source(checkpoint, shapes, Console.quiet()).pattern.linears
        assert two_of_four(checkpoint.read("model.layers.0.self_attn.q_proj.weight")) is None


def test_sparse_tiles_of_a_dense_model_are_refused_before_any_work(tmp_path: Path, text: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Packing comes last: without this check the refusal would come after hours."""
    source, out = tiny(tmp_path / "tiny"), tmp_path / "out"
    code = main(["compress", str(source), str(out), "--calibration", str(text), "--format", "marlin_24"])
    told = capfd.readouterr().err
    assert code == 2 and "needs 2:4 linears, and 14 of 14 are not" in told and "explain E273" in told
    assert untouched(out)


# ---- compress ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def narrow(tmp_path: Path) -> Path:
    """A model with widths that no group of 128 divides, as SmolLM2-135M has them."""
    make_tiny(tmp_path / "narrow", intermediate_size=160)
    return tmp_path / "narrow"


def test_pruning_alone_asks_for_no_group_size(narrow: Path, tmp_path: Path, text: Path) -> None:
    """If 16-bit pruning were refused for widths that a group of 128 does not divide, half of the small models could not be pruned."""
    report = sparsify(narrow, tmp_path / "out", text, quantize__group_size=128)
    assert report["sparse"] == 14


def test_stages_that_end_in_int4_ask_for_the_group_size_before_the_first(narrow: Path, tmp_path: Path, text: Path) -> None:
    """If the size were looked at by the last stage only, pruning and distillation would have been for nothing."""
    with pytest.raises(UsageError, match="not a multiple of group size 128") as caught:
        sparsify(narrow, tmp_path / "out", text, quantize__group_size=128, distill__tokens=256)
    assert caught.value.error_id == "E255"


@pytest.mark.parametrize("distil", [pytest.param(False, marks=pytest.mark.slow), True])
def test_compress_goes_all_the_way_to_sparse_tiles(tmp_path: Path, text: Path, distil: bool, capfd: pytest.CaptureFixture[str]) -> None:
    """If a stage lost the mask, the tiles would be refused or hold other kept weights than the interchange copy."""
    source, out = tiny(tmp_path / "tiny"), tmp_path / "out"
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "extends: sparse-int4\nquantize: {group_size: 32}\nevaluate: {tokens: 256, window: 128}\n"
        "calibration: {minimum_tokens: 256, samples: 8, sequence_length: 64}\nsparsify: {ls_iterations: 4, mask_sweeps: 1}\n"
        "distill: {sequence_length: 32, batch_tokens: 128, micro_batch: 2, learning_rate: 0.01}\n"
    )
    given = ["--recipe", str(mine), "--calibration", str(text), "--dtype", "float32", "--json"]
    if distil:
        given += ["--distill-tokens", "256", "--distill-data", str(text)]
    assert main(["compress", str(source), str(out), *given]) == 0, capfd.readouterr().err
    report = json.loads(capfd.readouterr().out)
    assert [item["format"] for item in report["outputs"]] == ["ct", "marlin_24"]
    assert ("stages" in report) == distil
    if distil:
        assert report["stages"]["distilled"]["training"]["tokens"] >= 256
        for folder in (out, tmp_path / "out-marlin_24"):  # back to the original, whatever lies between
            made = json.loads((folder / "marlinctl_manifest.json").read_text())["source"]["made_from"]
            assert (made["teacher"]["name"], made["source"]["name"], made["source"]["made_from"]["source"]["name"]) == (
                "tiny",
                "pruned",
                "tiny",
            )
    assert (report["recipe"]["quantize"]["bits"], report["recipe"]["sparsify"]["pattern"]) == (4, "2:4")
    kl = report["evaluation"]["document"]["comparison"]["kl"]["value"]
    assert 0.0 < kl < 10.0
    native = tmp_path / "out-marlin_24"
    with open_checkpoint(out) as ct, open_checkpoint(native, weight_files="auto") as tiles, mask.open_masks(out) as masks:
        assert masks is not None
        ct_info, tile_info = detect(ct.config, ct.tensors), detect(tiles.config, tiles.tensors)
        for name in ct_info.layers:
            plain, sparse = read_linear(ct, ct_info, name), read_linear(tiles, tile_info, name)
            assert isinstance(sparse, SparseQuantizedLinear)
            assert torch.equal(plain.codes, sparse.codes) and torch.equal(plain.scales, sparse.scales)
            assert torch.equal(masks.keep(name, *plain.codes.shape), sparse.keep)
        norm = "model.norm.weight"
        with open_checkpoint(source) as original:
            assert torch.equal(ct.read(norm), original.read(norm)) != distil  # trained norms must get through the check of the result
    assert not list(tmp_path.glob("out.work-*"))


def test_compress_keeps_a_rejected_result_with_all_its_formats(tmp_path: Path, text: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source, out = tiny(tmp_path / "tiny"), tmp_path / "out"
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "quantize: {group_size: 32}\nevaluate: {tokens: 512, window: 128}\n"
        "calibration: {minimum_tokens: 256, samples: 8, sequence_length: 64}\n"
    )
    given = ["--recipe", str(mine), "--calibration", str(text), "--dtype", "float32", "--also", "marlin", "--max-kl", "1e-12"]
    assert main(["compress", str(source), str(out), *given]) == 1
    assert "--max-kl allows 1e-12" in capfd.readouterr().err
    assert not out.exists() and not (tmp_path / "out-marlin").exists()
    assert (tmp_path / "out.rejected" / "ct" / "config.json").is_file()
    assert (tmp_path / "out.rejected" / "marlin" / "config.json").is_file()


# ---- the gate ------------------------------------------------------------------------------------------------------------------------


def arguments(source: Path, out: Path, text: Path, *more: str) -> list[str]:
    small = out.parent / "small.yaml"
    small.write_text("calibration: {minimum_tokens: 256}\nevaluate: {tokens: 512, window: 128}\n")
    given = ["--recipe", str(small), "--calibration", str(text), "--samples", "8", "--sequence-length", "64", "--dtype", "float32"]
    return ["sparsify", str(source), str(out), *given, *more]


def test_a_result_that_is_too_bad_is_kept_back(tmp_path: Path, text: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """If the gate published all the same, a ruined model could replace a good one over night."""
    source, out = tiny(tmp_path / "tiny"), tmp_path / "out"
    shutil.copytree(source, out)
    before = digests(out)
    assert main(arguments(source, out, text, "--overwrite", "--max-kl", "1e-9", "--max-ppl-ratio", "1e-9")) == 1
    told = capfd.readouterr().err
    assert "--max-kl allows 1e-09" in told and "--max-ppl-ratio allows 1e-09" in told
    assert "Traceback" not in told
    assert digests(out) == before
    with mask.open_masks(tmp_path / "out.rejected") as masks:
        assert masks is not None and len(masks.layers) == 14
    assert not list(tmp_path.glob("out.tmp-*"))


def test_publish_anyway_publishes_and_says_what_is_bad(tmp_path: Path, text: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source, out = tiny(tmp_path / "tiny"), tmp_path / "out"
    assert main([*arguments(source, out, text, "--max-kl", "1e-9", "--publish-anyway"), "--json"]) == 0
    captured = capfd.readouterr()
    assert "published all the same" in captured.err
    gate = json.loads(captured.out)["evaluation"]["gate"]
    assert gate["passed"] is False and gate["kl"] > 1e-9
    assert json.loads((out / "marlinctl_report.json").read_text())["evaluation"]["gate"] == gate


def test_a_good_enough_result_passes(tmp_path: Path, text: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source, out = tiny(tmp_path / "tiny"), tmp_path / "out"
    assert main(arguments(source, out, text, "--max-kl", "1e9", "--max-ppl-ratio", "1e9")) == 0
    assert "KL, nats" in capfd.readouterr().out
    assert (out / "config.json").is_file()


def test_the_gate_compares_what_was_measured() -> None:
    """If the ratio were upside down, better models would be refused."""
    document = {"model": {"perplexity": {"value": 30.0}}, "baseline": {"perplexity": {"value": 20.0}}, "comparison": {"kl": {"value": 0.4}}}
    assert figures(document) == (0.4, 1.5)
    assert Gate(max_kl=0.4, max_ppl_ratio=1.5).check({"document": document}, Console.quiet())["passed"]
    with pytest.raises(CheckFailed, match=r"1\.500 times") as caught:
        Gate(max_ppl_ratio=1.49).check({"document": document}, Console.quiet())
    assert len(caught.value.problems) == 1
    not_a_number = {**document, "comparison": {"kl": {"value": float("nan")}}}
    with pytest.raises(CheckFailed):
        Gate(max_kl=100.0).check({"document": not_a_number}, Console.quiet())


def test_a_gate_without_a_measurement_does_not_pass() -> None:
    with pytest.raises(CheckFailed, match="needs a measurement") as caught:
        Gate(max_kl=1.0).check({"table": "not evaluated: both models need 3.0 GiB, 1.0 GiB are free"}, Console.quiet())
    assert caught.value.error_id == "E115"
