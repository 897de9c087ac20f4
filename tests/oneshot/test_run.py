"""The quantize job on tiny models of every architecture, all the way: quantize, pack, load with transformers, compare logits."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from marlinctl.checkpoint.formats.registry import detect, read_linear
from marlinctl.checkpoint.reader import open_checkpoint
from marlinctl.checkpoint.transformers_model import load_dense
from marlinctl.convert.repack import repack
from marlinctl.errors import BadInput, MarlinctlError, NumericalProblem, ResourceProblem, UsageError
from marlinctl.oneshot.open import Options
from marlinctl.oneshot.run import run_job
from marlinctl.planning.preflight import look
from marlinctl.recipes.schema import Recipe, resolve
from marlinctl.system.console import Console
from marlinctl.verify.run import verify
from tests import runs, zoo
from tests.runs import digests, quantize
from tests.tiny import make_tiny


def recipe(text: Path, **changes: Any) -> Recipe:
    return runs.recipe(text, **{"quantize__refine": 1} | changes)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.randint(3, zoo.VOCAB_SIZE, (2, 20), generator=torch.Generator().manual_seed(1))
    return model.eval()(ids).logits.double()


# Multipliers, norms behind branches, sandwich norms, two layouts of experts, fused linears, biases with a tied head. What rows of the table
# say is compared for all of them, with transformers' models and with their code: test_sequential.py and tests/models/test_derivation.py.
WHOLE = ("exaone4", "gemma3_text", "granite", "mixtral", "phi3", "qwen2", "qwen3_moe")


@pytest.mark.parametrize("model_type", [pytest.param(t, marks=() if t in WHOLE else pytest.mark.slow) for t in sorted(zoo.ZOO)])
def test_every_architecture_goes_all_the_way(model_type: str, tmp_path: Path, text: Path) -> None:
    """If any tensor were lost, misnamed or wrongly packed, transformers would compute other logits than the dequantized weights give."""
    from transformers import AutoModelForCausalLM

    source = zoo.build(model_type, tmp_path / "model", dtype=torch.bfloat16)
    report = quantize(source, tmp_path / "ct", recipe(text))
    assert len(report["layers"]) > 0 and not report["fallbacks"]
    repack(tmp_path / "ct", tmp_path / "marlin", format="marlin")
    original, dense = load_dense(source, dtype=torch.float32), load_dense(tmp_path / "ct", dtype=torch.float32)
    native = load_dense(tmp_path / "marlin", dtype=torch.float32)
    expected = logits(dense)
    assert torch.equal(logits(native), expected)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ct", dtype=torch.float32)
    assert (logits(loaded) - expected).norm() / expected.norm() < 1e-3
    drift = (expected - logits(original)).norm() / logits(original).norm()
    # The experts of a random model have nothing in common, so a token that a router sends elsewhere gets quite another answer.
    most = 0.7 if model_type in ("mixtral", "qwen3_moe", "olmoe") else 0.5
    assert 0.005 < drift < most, "4-bit weights move the logits a little, and not much"


@pytest.mark.parametrize(
    "changes",
    [
        {"quantize__bits": 8},
        {"quantize__overrides": {"down_proj": {"bits": 8, "group_size": -1}, "layers.0.*": {"bits": 8}}, "quantize__refine": 0},
        {"quantize__overrides": {"*.experts.*": {"bits": 8}}, "model_type": "qwen3_moe"},
        {"quantize__overrides": {"o_proj": {"bits": 8}}, "sparsify__pattern": "2:4"},
    ],
    ids=["all", "some", "experts", "2:4"],
)  # fmt: skip
def test_8_bits_go_all_the_way(changes: dict[str, Any], tmp_path: Path, text: Path) -> None:
    """If bits were lost on the way, words of four codes would be read as eight, by marlinctl or by compressed-tensors."""
    from transformers import AutoModelForCausalLM

    source = zoo.build(changes.pop("model_type", "llama"), tmp_path / "model", dtype=torch.bfloat16)
    report = quantize(source, tmp_path / "ct", recipe(text, **changes))
    with open_checkpoint(tmp_path / "ct") as found:
        info = detect(found.config, found.tensors)
    bits = {layer["name"]: layer["bits"] for layer in report["layers"]}
    assert {layer: info.grid(layer).bits for layer in info.layers} == bits and 8 in bits.values()
    assert all(
        report_layer["error"] < 1e-4 for report_layer in report["layers"] if report_layer["bits"] == 8 and not report_layer["pattern"]
    )
    expected = logits(load_dense(tmp_path / "ct", dtype=torch.float32))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ct", dtype=torch.float32)
    assert (logits(loaded) - expected).norm() / expected.norm() < 1e-3
    repack(tmp_path / "ct", tmp_path / "gptq", format="gptq")
    repack(tmp_path / "gptq", tmp_path / "back", format="ct")
    assert torch.equal(logits(load_dense(tmp_path / "gptq", dtype=torch.float32)), expected)
    with open_checkpoint(tmp_path / "back") as back, open_checkpoint(tmp_path / "ct") as first:
        assert all(back.raw(name) == first.raw(name) for name in first.tensors)
    assert verify(tmp_path / "ct", source=source, load=None, console=Console.quiet()).format == "ct"
    with pytest.raises(BadInput, match="has 8-bit codes, and marlin holds symmetric 4-bit ones alone") as refused:
        repack(tmp_path / "ct", tmp_path / "marlin", format="marlin")
    assert refused.value.error_id == "E349" and not (tmp_path / "marlin").exists()


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")  # transformers, of what it is asked for
def test_asymmetric_codes_go_all_the_way(tmp_path: Path, text: Path) -> None:
    """If a zero point were lost on the way, every weight of its group would be shifted, by marlinctl or by compressed-tensors."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    source = zoo.build("llama", tmp_path / "model", dtype=torch.bfloat16)
    symmetric = quantize(source, tmp_path / "int4", recipe(text))["error"]["mean"]
    report = quantize(source, tmp_path / "ct", recipe(text, quantize__symmetric=False))
    assert report["error"]["mean"] < symmetric and not any(layer["symmetric"] for layer in report["layers"])
    expected = logits(load_dense(tmp_path / "ct", dtype=torch.float32))
    whole = CompressedTensorsConfig(dequantize=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ct", dtype=torch.float32, quantization_config=whole)
    assert (logits(loaded) - expected).norm() / expected.norm() < 1e-3
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):  # what `loads` says of it; where it passes, say that it loads
        AutoModelForCausalLM.from_pretrained(tmp_path / "ct", dtype=torch.float32)
    checked = verify(tmp_path / "ct", source=source, load=None, console=Console.quiet())
    assert any("takes zero points with dequantize=True alone" in line for line in checked.skipped)
    repack(tmp_path / "ct", tmp_path / "gptq", format="gptq")
    assert json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]["checkpoint_format"] == "gptq_v2"
    assert torch.equal(logits(load_dense(tmp_path / "gptq", dtype=torch.float32)), expected)
    repack(tmp_path / "gptq", tmp_path / "back", format="ct")
    with open_checkpoint(tmp_path / "back") as back, open_checkpoint(tmp_path / "ct") as first:
        assert all(back.raw(name) == first.raw(name) for name in first.tensors)
    with pytest.raises(BadInput, match="has asymmetric 4-bit codes, and marlin holds symmetric 4-bit ones alone"):
        repack(tmp_path / "ct", tmp_path / "marlin", format="marlin")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"quantize__bits": 8}, "8-bit codes are symmetric"),
        ({"sparsify__pattern": "2:4"}, "a 2:4 model has symmetric codes"),
        ({"sparsify__pattern": "2:4", "quantize__bits": 16}, "no zero points"),
        (
            {"sparsify__pattern": "2:4", "quantize__bits": 16, "quantize__symmetric": True, "quantize__overrides": {"k_proj": {"bits": 8}}},
            "would be ignored",
        ),
    ],
)
def test_codes_that_no_format_holds_or_nothing_has_are_refused(changes: dict[str, Any], says: str, tmp_path: Path, text: Path) -> None:
    """Found out after hours of solving, or never, it would be a lost day."""
    source = make_tiny(tmp_path / "model")
    with pytest.raises(UsageError, match=says) as caught:
        quantize(source, tmp_path / "out", recipe(text, **{"quantize__symmetric": False, **changes}))
    assert caught.value.error_id == "E273" and not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(("most", "changes"), [(80_000, {}), (5 * 10**9, {"sparsify__pattern": "2:4", "quantize__bits": 16})])
def test_blocks_are_merged_into_few_files(
    most: int, changes: dict[str, Any], tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of thirty files is not what people publish, and blocks that wait until the end cost a GPU its time."""
    from marlinctl.checkpoint.shards import Published

    source = make_tiny(tmp_path / "model")
    late: list[str] = []
    fill = Published.fill
    monkeypatch.setattr(
        Published,
        "fill",
        lambda self, entries: (late.extend(e.name for e in entries if e.name not in self._filled), fill(self, entries))[1],
    )
    quantize(source, tmp_path / "out", recipe(text, **changes), max_shard_bytes=most)
    monkeypatch.undo()
    untouched = {name for name in open_checkpoint(source).tensors if "proj" not in name}
    with_blocks = {name for name in untouched if ".layers." in name and "quantize__bits" not in changes}  # norms that may be divided
    assert {*late} == untouched - with_blocks, "what was solved is in its place before the run ends"
    published = open_checkpoint(tmp_path / "out")
    sizes = [sum(info.nbytes for info in published.tensors.values() if info.file == path) for path in published.files]
    assert max(sizes) <= most and (len(sizes) == 1 or len(sizes) < sum(sizes) / most * 2)
    assert all(published.raw(name) == open_checkpoint(source).raw(name) for name in untouched)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() == (len(sizes) > 1)


def test_two_runs_publish_the_same_bytes(tmp_path: Path, text: Path) -> None:
    """If anything depended on time, place or chance, a result could not be reproduced or checked."""
    source = make_tiny(tmp_path / "model")
    for name in ("first", "second"):
        quantize(source, tmp_path / name, recipe(text))
    assert digests(tmp_path / "first") == digests(tmp_path / "second")
    manifest = (tmp_path / "first" / "marlinctl_manifest.json").read_text()
    assert str(tmp_path) not in manifest and '"seconds"' not in manifest


def test_self_calibration_is_drawn_with_a_seed_of_its_own(tmp_path: Path, text: Path) -> None:
    """If sampling used the global generator, --seed would not decide the calibration text."""
    source = make_tiny(tmp_path / "model")
    chosen = recipe(text, calibration__source="self")
    runs: list[str] = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(runs))
        report = quantize(source, tmp_path / f"out{len(runs)}", resolve(chosen, {"calibration.seed": seed})[0])
        runs.append(report["calibration"]["sha256"])
    assert runs[0] == runs[1] != runs[2]


def test_rules_decide_layer_by_layer(tmp_path: Path, text: Path) -> None:
    """If --skip or --override reached the wrong linears, users would ship a model they did not ask for."""
    source = make_tiny(tmp_path / "model")
    chosen = recipe(
        text,
        quantize__skip=["k_proj"],
        quantize__overrides={"down_proj": {"group_size": 64}, "layers.1.self_attn.q_proj": {"group_size": -1}},
    )
    report = quantize(source, tmp_path / "out", chosen)
    with open_checkpoint(tmp_path / "out") as written, open_checkpoint(source) as original:
        info = detect(written.config, written.tensors)
        assert not [name for name in info.layers if "k_proj" in name]
        assert written.raw("model.layers.0.self_attn.k_proj.weight") == original.raw("model.layers.0.self_attn.k_proj.weight")
        assert info.layers["model.layers.0.mlp.down_proj"] == 64
        assert info.layers["model.layers.1.self_attn.q_proj"] == -1
        assert info.layers["model.layers.0.self_attn.q_proj"] == 32
        assert read_linear(written, info, "model.layers.0.mlp.down_proj").group_size == 64
    assert {item["name"] for item in report["kept"]} >= {"model.layers.0.self_attn.k_proj", "lm_head"}


def test_the_head_is_quantized_when_asked(tmp_path: Path, text: Path) -> None:
    """If --include lm_head were ignored, the largest matrix of a small model would stay 16-bit unnoticed."""
    from transformers import AutoModelForCausalLM

    source = make_tiny(tmp_path / "model")
    quantize(source, tmp_path / "out", recipe(text, quantize__include=["lm_head"]))
    with open_checkpoint(tmp_path / "out") as written:
        assert "lm_head.weight_packed" in written.tensors and "lm_head.weight" not in written.tensors
    expected = logits(load_dense(tmp_path / "out", dtype=torch.float32))
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32))
    assert (found - expected).norm() / expected.norm() < 1e-3


def test_biases_travel(tmp_path: Path, text: Path) -> None:
    """If a bias were left behind, q, k and v of every Qwen model would be wrong."""
    source = zoo.build("qwen2", tmp_path / "model")
    quantize(source, tmp_path / "out", recipe(text))
    with open_checkpoint(tmp_path / "out") as written, open_checkpoint(source) as original:
        name = "model.layers.1.self_attn.v_proj.bias"
        assert written.raw(name) == original.raw(name)


def test_experts_that_saw_few_tokens_are_reported(tmp_path: Path, text: Path) -> None:
    """If a starved expert were solved from a handful of tokens in silence, one topic of the model would break unnoticed."""
    source = zoo.build("qwen3_moe", tmp_path / "model")
    chosen = recipe(text, calibration__samples=1, calibration__sequence_length=12, calibration__minimum_tokens=8)
    report = quantize(source, tmp_path / "out", chosen)
    starved = {item["name"]: item for item in report["underfed"]}
    assert starved and all("expert" in name for name in starved)
    assert all("blended" in item["remark"] or item["tokens"] == 0 for item in starved.values())


def test_scales_of_a_bfloat16_model_are_exact_in_bfloat16(tmp_path: Path, text: Path) -> None:
    """If scales lost digits when a runtime loads the model in its own bfloat16, it would not compute what was solved."""
    source = zoo.build("llama", tmp_path / "model", dtype=torch.bfloat16)
    quantize(source, tmp_path / "out", recipe(text))
    with open_checkpoint(tmp_path / "out") as written:
        scales = written.read("model.layers.0.mlp.up_proj.weight_scale")
        assert scales.dtype == torch.float16
        assert torch.equal(scales.to(torch.bfloat16).to(torch.float16), scales)


@pytest.mark.parametrize(
    ("changes", "options", "kind", "words"),
    [
        ({"quantize__group_size": 128}, {}, UsageError, "not a multiple of group size 128"),
        ({"quantize__skip": ["q_porj"]}, {}, UsageError, "matches no linear"),
        ({"quantize__overrides": {"mlp.dwon_proj": {"group_size": 32}}}, {}, UsageError, "matches no linear"),
        ({"quantize__skip": ["*"]}, {}, UsageError, "nothing would be quantized"),
        ({"calibration__samples": 10_000}, {}, BadInput, "10000 were asked for"),
        ({"calibration__minimum_tokens": 100_000}, {}, BadInput, "count for calibration"),
        ({"calibration__sequence_length": 4096}, {}, UsageError, "longer than the model can read"),
        ({}, {"max_memory": 1 << 20}, ResourceProblem, "needs about"),
        ({}, {"device": "tpu"}, MarlinctlError, "unknown device"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(
    changes: dict[str, Any], options: dict[str, Any], kind: type[MarlinctlError], words: str, tmp_path: Path, text: Path
) -> None:
    """If these were found late, hours would be lost; if something were written, it would look like a model."""
    source = zoo.build("phi3", tmp_path / "model")
    with pytest.raises(kind, match=words) as caught:
        quantize(source, tmp_path / "out", recipe(text, **changes), **options)
    assert all(p.what and p.where and p.fix for p in caught.value.problems)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("out.tmp-*"))


def test_nearest_names_help_with_a_misspelled_pattern(tmp_path: Path, text: Path) -> None:
    """If the error did not name what is there, users would have to read the code to find a layer's name."""
    with pytest.raises(UsageError) as caught:
        quantize(make_tiny(tmp_path / "model"), tmp_path / "out", recipe(text, quantize__skip=["dwon_proj"]))
    assert "down_proj" in caught.value.problems[0].fix


def test_nan_in_a_weight_is_named(tmp_path: Path, text: Path) -> None:
    """If a NaN went unnoticed, a whole layer would become NaN after hours."""
    from safetensors.torch import load_file, save_file

    source = make_tiny(tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(NumericalProblem) as caught:
        quantize(source, tmp_path / "out", recipe(text))
    told = caught.value.problems[0]
    assert "model.layers.1.mlp.up_proj.weight" in told.what + told.where and "3, 5" in told.what + told.where


def test_more_weights_than_the_config_describes_are_refused(tmp_path: Path, text: Path) -> None:
    """If a config with fewer layers were accepted, half the model would be dropped in silence."""
    source = make_tiny(tmp_path / "model")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(BadInput, match="no place in the model"):
        quantize(source, tmp_path / "out", recipe(text))


def test_strict_stops_where_a_fallback_would_be_needed(tmp_path: Path, text: Path) -> None:
    """If --strict let a fallback pass, CI jobs that rely on it would publish rounded layers."""
    from safetensors.torch import load_file, save_file

    source = make_tiny(tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"].zero_()  # q, k and v of block 0 see zeros only
    save_file(tensors, source / "model.safetensors")
    report = quantize(source, tmp_path / "out", recipe(text))
    assert [item["name"].rpartition(".")[2] for item in report["fallbacks"]][:3] == ["q_proj", "k_proj", "v_proj"]
    with pytest.raises(NumericalProblem, match="--strict"):
        quantize(source, tmp_path / "strict", recipe(text), strict=True)
    assert not (tmp_path / "strict").exists()


def test_a_failure_leaves_the_old_output_untouched(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If --overwrite removed the old model before the new one is checked, a failed run would cost both."""
    source = make_tiny(tmp_path / "model")
    quantize(source, tmp_path / "out", recipe(text))
    before = digests(tmp_path / "out")
    with pytest.raises(UsageError, match="not empty"):
        quantize(source, tmp_path / "out", recipe(text))
    monkeypatch.setattr("marlinctl.oneshot.written._digest_on_disk", lambda *_: str(torch.rand(1)))
    with pytest.raises(MarlinctlError, match="differ from those that were solved"):
        quantize(source, tmp_path / "out", recipe(text, quantize__refine=0), overwrite=True)
    assert digests(tmp_path / "out") == before
    assert {p.name for p in tmp_path.iterdir()} == {"model", "out", "out.job", "out.log", "text.txt"}


@pytest.mark.gpu
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "qwen3_moe"])
def test_cuda_does_the_same_job(model_type: str, tmp_path: Path, text: Path) -> None:
    """If the CUDA path took other tokens, order or precision, its model would differ from the CPU's by more than rounding."""
    source = zoo.build(model_type, tmp_path / "model", dtype=torch.bfloat16)
    on_cpu = quantize(source, tmp_path / "cpu", recipe(text))
    on_cuda = quantize(source, tmp_path / "cuda", recipe(text), device="cuda")
    assert on_cuda["error"]["mean"] == pytest.approx(on_cpu["error"]["mean"], rel=0.02)
    assert 0 < on_cuda["peak_device_memory_bytes"] <= on_cuda["peak_device_reserved_bytes"]
    expected, found = (logits(load_dense(tmp_path / name, dtype=torch.float32)) for name in ("cpu", "cuda"))
    assert (found - expected).norm() / expected.norm() < 0.1


@pytest.mark.gpu
def test_deterministic_runs_on_cuda_publish_the_same_bytes(tmp_path: Path, text: Path) -> None:
    """If --deterministic did not hold on CUDA, a resumed or repeated job there could not be checked."""
    source = make_tiny(tmp_path / "model")
    for name in ("first", "second"):
        quantize(source, tmp_path / name, recipe(text), device="cuda", dtype="bfloat16", deterministic=True)
    assert digests(tmp_path / "first") == digests(tmp_path / "second")


def test_skip_of_a_head_that_stays_16_bit_is_accepted(tmp_path: Path, text: Path) -> None:
    """Recipes of other tools skip lm_head; the error would say that there is no such linear."""
    for tied in (False, True):
        source = make_tiny(tmp_path / f"model{tied}", tie_word_embeddings=tied)
        told = io.StringIO()
        console = Console(colour=False, stderr=told)
        with open_checkpoint(source) as checkpoint:
            looked = look(checkpoint, recipe(text, quantize__skip=["lm_head", "k_proj"]), None, console)
        console.close()
        assert told.getvalue() == "--skip lm_head changes nothing: the output head stays 16-bit anyway\n"
        assert "lm_head" not in looked.shapes and len(looked.plan.group_sizes) == 12


def test_the_chosen_device_is_said_once(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A person would not see that hours are computed on a CPU because torch has no CUDA."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device, lines in (("auto", 1), ("cpu", 0)):
        told = io.StringIO()
        console = Console(colour=False, stderr=told)
        run_job(
            str(make_tiny(tmp_path / f"m{device}")), tmp_path / f"o{device}", recipe(text), Options(device=device, dtype="float32"), console
        )
        console.close()
        assert told.getvalue().count("computing on the CPU: ") == lines
