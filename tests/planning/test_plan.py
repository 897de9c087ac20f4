"""`marlinctl plan`: what it predicts is what a run then does."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from marlinctl.checkpoint.safetensors_header import read_header
from marlinctl.cli import main
from marlinctl.compress import run_compress
from marlinctl.errors import BadInput, MarlinctlError, ResourceProblem, UsageError
from marlinctl.models.families import architecture
from marlinctl.oneshot import open
from marlinctl.oneshot.open import Options
from marlinctl.oneshot.run import run_job
from marlinctl.planning import plan as planning
from marlinctl.planning.table import table
from marlinctl.system.console import Console
from marlinctl.system.devices import cpu_has_bf16, planned_dtype
from marlinctl.system.offload import Scratch
from tests import zoo
from tests.runs import plan, recipe
from tests.tiny import make_tiny


def tensor_bytes(folder: Path) -> int:
    """The tensors of every safetensors file, told from their sizes and the lengths of their headers."""
    total = 0
    for path in folder.rglob("*.safetensors"):
        data = path.read_bytes()
        total += len(data) - 8 - struct.unpack("<Q", data[:8])[0]
    return total


# ---- outputs -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("int4", {"pack__formats": ["ct", "gptq", "marlin"]}),
        ("int4", {"quantize__group_size": -1, "quantize__include": ["lm_head"], "pack__formats": ["marlin", "ct"]}),
        ("int4", {"quantize__skip": ["k_proj", "layers.0.*"], "quantize__overrides": {"down_proj": {"group_size": 64}}}),
        (
            "sparse-int4",
            {
                "pack__formats": ["ct", "marlin_24", "gptq"],
                "quantize__refine": 0,
                "quantize__drift_correction": 0.0,
                "quantize__tune_steps": 0,
                "sparsify__ls_iterations": 2,
                "sparsify__mask_sweeps": 1,
            },
        ),
    ],
    ids=["formats", "whole rows and head", "rules", "sparse"],
)
def test_outputs_have_the_predicted_bytes(tiny: Path, tmp_path: Path, text: Path, name: str, changes: dict[str, Any]) -> None:
    """People choose a format, and rent a disk, by these figures."""
    chosen = recipe(text, name, **changes)
    planned = plan(tiny, chosen)
    report = run_compress(str(tiny), tmp_path / "out", chosen, Options(dtype="float32"), Console.quiet(), evaluate_result=False)
    assert [o["format"] for o in planned["outputs"]] == [o["format"] for o in report["outputs"]]
    for predicted, written in zip(planned["outputs"], report["outputs"], strict=True):
        folder = Path(written["folder"])
        assert predicted["bytes"]["weights"] == tensor_bytes(folder), predicted["format"]
        assert predicted["bytes"]["mask"] == sum(info.nbytes for info in read_header(folder, "marlinctl_mask.safetensors")[0].values()) or 0
        on_disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        assert on_disk <= predicted["bytes"]["on_disk_about"] * 1.05
    compressed = {item["name"]: item for item in planned["linears"]["compressed"]}
    assert {record["name"] for record in report["layers"]} == set(compressed)
    assert {item["name"] for item in report["kept"]} <= {item["name"] for key in ("skipped", "kept") for item in planned["linears"][key]}
    for record in report["layers"]:
        item = compressed[record["name"]]
        assert (list(record["shape"]), record["pattern"]) == (item["shape"], item["pattern"])
        assert record["group_size"] == (item["shape"][1] if item["group_size"] == -1 else item["group_size"])


def test_a_pruned_16_bit_model_has_the_predicted_bytes(tiny: Path, tmp_path: Path, text: Path) -> None:
    """What sparsify writes is planned by the recipe with 16 bits; the mask is an eighth of a byte a weight and easily forgotten."""
    chosen = recipe(text, sparsify__pattern="2:4", quantize__bits=16)
    planned = plan(tiny, chosen)
    run_job(str(tiny), tmp_path / "out", chosen, Options(dtype="float32"), Console.quiet())
    (output,) = planned["outputs"]
    assert output["format"] == "dense" and output["bytes"]["weights"] == tensor_bytes(tmp_path / "out")


@pytest.mark.parametrize("model_type", ["gemma2", "phi3", "qwen3_moe", "mixtral"])
def test_every_family_is_planned_as_it_is_run(tmp_path: Path, text: Path, model_type: str) -> None:
    """Fused linears, experts and tied heads change which tensors there are; odd sizes change the padding of tiles."""
    source = zoo.build(model_type, tmp_path / "model")
    chosen = recipe(text, quantize__group_size=-1, quantize__refine=0)
    planned = plan(source, chosen)
    run_job(str(source), tmp_path / "out", chosen, Options(dtype="float32"), Console.quiet())
    assert planned["outputs"][0]["bytes"]["weights"] == tensor_bytes(tmp_path / "out")
    routers = [item["name"] for item in planned["linears"]["kept"] if "router" in item["reason"]]
    assert bool(routers) is ("moe" in model_type or model_type == "mixtral")


@pytest.mark.parametrize(("correction", "blocks", "weights"), [(0.0, 2, "uniform"), (0.5, 2, "uniform"), (0.0, 12, "gradient")])
def test_activations_on_disk_are_planned(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, correction: float, blocks: int, weights: str
) -> None:
    """Activations lie in unnamed files, which no listing shows: a plan that forgot them would let a run fail in its middle."""
    source = make_tiny(tmp_path / "model", num_hidden_layers=blocks)
    slots: dict[Scratch, dict[str, int]] = {}  # the files of one are gone before those of the next
    make = Scratch.tensor

    def noted(self: Scratch, slot: str, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
        own = slots.setdefault(self, {})
        own[slot] = max(own.get(slot, 0), prod(shape) * dtype.itemsize)
        return make(self, slot, shape, dtype)

    monkeypatch.setattr(Scratch, "tensor", noted)
    chosen = recipe(text, quantize__drift_correction=correction, quantize__token_weights=weights)
    run_job(str(source), tmp_path / "out", chosen, Options(dtype="float32", keep_job=True), Console.quiet())
    planned = plan(source, chosen)["disk"]
    fullest = [sum(own.values()) for own in slots.values()]
    assert max(fullest) == planned["scratch"] and len(fullest) == (2 if weights == "gradient" else 1)
    if weights == "gradient":
        kept = sum(data.nbytes for data in load_file(tmp_path / "out.job" / "token_weights.safetensors").values())
        uniform = plan(source, recipe(text))["disk"]
        assert fullest[0] == planned["scratch"] == 12 * 8 * 64 * 128 * 4, "what enters each block"
        assert planned["moments"]["blocks"] - uniform["moments"]["blocks"] >= kept == 12 * 4 * 8 * 64 * 4


def test_token_weights_are_planned(tiny: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Somebody would wait twice as long as the plan said, or run out of memory in the output head."""
    arguments = ["plan", str(tiny), "--group-size", "32", "--calibration", str(text), "--dtype", "float32"]
    assert main([*arguments, "--token-weights", "gradient"]) == 0
    told = capsys.readouterr().out
    assert "token weights" in next(line for line in told.splitlines() if line.startswith("time"))
    assert main(arguments) == 0
    assert "token weights" not in capsys.readouterr().out


# ---- does it fit ---------------------------------------------------------------------------------------------------------------------


def test_memory_that_does_not_suffice_is_exit_1(tiny: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A script asks by the exit code; the run itself refuses with the same figure."""
    arguments = ["plan", str(tiny), "--group-size", "32", "--calibration", str(text), "--dtype", "float32"]
    assert main([*arguments, "--max-memory", "64GiB"]) == 0
    assert "fits          yes" in capsys.readouterr().out
    assert main([*arguments, "--max-memory", "100MiB"]) == 1
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_memory_of_a_gpu_that_is_not_here_is_unknown(tiny: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever plans for another machine would read that the model is too large for it."""
    arguments = ["plan", str(tiny), "--group-size", "32", "--calibration", str(text), "--device", "cuda"]
    assert main(arguments) == 1
    told = capsys.readouterr().out
    assert "give --device-memory): UNKNOWN" in told and "DOES NOT FIT" not in told


def test_the_run_refuses_what_the_plan_says_does_not_fit(tiny: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two opinions on whether a job fits are worse than none."""
    chosen = recipe(text)
    needed = plan(tiny, chosen)["memory"]["host"]["stages"]["quantize"]
    for allowed, starts in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr(open, "available_memory", lambda allowed=allowed: allowed)
        monkeypatch.setattr(planning, "available_memory", lambda allowed=allowed: allowed)
        assert plan(tiny, chosen)["fits"] is starts
        if starts:
            run_job(str(tiny), tmp_path / "out", chosen, Options(dtype="float32"), Console.quiet())
        else:
            with pytest.raises(ResourceProblem, match="are free") as refused:
                run_job(str(tiny), tmp_path / "other", chosen, Options(dtype="float32"), Console.quiet())
            assert refused.value.error_id == "E522"


def test_a_small_disk_does_not_fit(tiny: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full after hours of work is what a plan is made against."""
    chosen = recipe(text)
    needed = plan(tiny, chosen, out=tmp_path / "not" / "there" / "yet")["disk"]["during"]
    for free, fits in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        planned = plan(tiny, chosen, out=tmp_path / "not" / "there" / "yet")
        assert planned["fits"] is fits
        assert [check["fits"] for check in planned["checks"] if check["resource"] == "disk"] == [fits]


def test_gpu_memory_is_held_against_the_device(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU a plan for one must not say yes; with --device-memory it is for another machine."""
    monkeypatch.setattr(planning, "free_device_memory", lambda device: None)
    planned = plan(tiny, recipe("t.txt"), device="cuda")
    assert not planned["fits"] and planned["memory"]["device"]["peak"] > 0
    assert plan(tiny, recipe("t.txt"), device="cuda", device_memory=8 << 30)["fits"]
    assert not plan(tiny, recipe("t.txt"), device="cuda", device_memory=100 << 20)["fits"]
    monkeypatch.setattr(planning, "free_device_memory", lambda device: ("NVIDIA Test", 8 << 30))
    assert plan(tiny, recipe("t.txt"), device="cuda")["fits"]


def test_text_of_the_models_own_needs_the_whole_model(tiny: Path) -> None:
    """The default calibration loads everything at once; for a large model that decides, and a file of text saves it."""
    from marlinctl.planning.memory import Work, predicted_peak

    known = architecture(_large_config())
    sizes = dict.fromkeys(known.linears, 128)
    needed = {
        source: predicted_peak(
            known, sizes, Work.of(recipe(source, quantize__group_size=128), element=2, corrects_drift=False, on_device=False)
        )
        for source in ("self", "t.txt")
    }
    assert needed["self"] > 141e9 > 30e9 > needed["t.txt"]


def test_the_stages_of_a_distilled_recipe_are_planned(tiny: Path) -> None:
    """Training needs 17 bytes a weight: a plan of the walk alone would be wrong by an order of magnitude."""
    planned = plan(tiny, recipe("t.txt", "sparse-int4", distill__tokens=100_000))
    assert set(planned["memory"]["host"]["stages"]) == {"prune", "distil", "quantize", "pack"}
    weights = sum(prod(item["shape"]) for item in planned["linears"]["compressed"])
    assert planned["memory"]["host"]["stages"]["distil"] > 17 * weights
    assert planned["disk"]["moments"]["distil"] > 24 * weights
    assert planned["time"]["parts"]["distil"] > 0


# ---- what a run would refuse ---------------------------------------------------------------------------------------------------------


def _without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("changes", "spoil", "error_id", "what"),
    [
        ({"quantize__skip": ["no_such"]}, None, "E255", "no_such"),
        (
            {"quantize__group_size": 128, "quantize__overrides": {"k_proj": {"group_size": 64}}},
            "odd",
            "E255",
            "not a multiple of group size",
        ),
        ({"quantize__bits": 16}, None, "E273", "16 bits and no pattern"),
        ({"pack__formats": ["marlin_24"]}, None, "E273", "needs 2:4 linears"),
        ({}, _without("tokenizer.json"), "E314", "tokenizer is missing"),
        ({}, _without("model.safetensors"), "E301", "there are no weights"),
        ({}, "quantized", "E313", "already quantized"),
    ],
)
def test_plan_refuses_what_the_run_refuses(
    tmp_path: Path, text: Path, changes: dict[str, Any], spoil: Callable[[Path], None] | str | None, error_id: str, what: str
) -> None:
    """A plan that says yes to what the run then refuses is worse than no plan."""
    sizes: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 160} if spoil == "odd" else {}
    folder = make_tiny(tmp_path / "model", **sizes)
    if callable(spoil):
        spoil(folder)
    elif spoil == "quantized":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    chosen = recipe(text, **changes)
    errors: list[MarlinctlError] = []
    for attempt in (
        lambda: plan(folder, chosen),
        lambda: run_job(str(folder), tmp_path / "out", chosen, Options(dtype="float32"), Console.quiet()),
    ):
        with pytest.raises((UsageError, BadInput)) as refused:
            attempt()
        errors.append(refused.value)
    assert [error.error_id for error in errors] == [error_id, error_id] and what in str(errors[0])
    assert errors[0].problems == errors[1].problems


@pytest.mark.parametrize("stated", [True, False], ids=["mask file", "zeros"])
def test_a_pattern_that_is_there_is_seen(tiny: Path, tmp_path: Path, text: Path, stated: bool) -> None:
    """marlin_24 of a pruned model must not be refused, with its mask file or, as other tools write it, without."""
    run_job(
        str(tiny), tmp_path / "pruned", recipe(text, sparsify__pattern="2:4", quantize__bits=16), Options(dtype="float32"), Console.quiet()
    )
    if not stated:
        (tmp_path / "pruned" / "marlinctl_mask.safetensors").unlink()
    planned = plan(tmp_path / "pruned", recipe(text, pack__formats=["marlin_24"]))
    assert {item["pattern"] for item in planned["linears"]["compressed"]} == {"2:4"}
    assert any("first row" in note for note in planned["notes"]) is not stated
    with pytest.raises(UsageError, match="2:4 already"):
        plan(tmp_path / "pruned", recipe(text, "sparse-int4"))


# ---- the document, and how soon it comes ---------------------------------------------------------------------------------------------


def test_json_has_a_schema_version_and_all_parts(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Machines read it: a key that goes away breaks them without a word."""
    assert main(["plan", str(tiny), "--group-size", "32", "--json", "--also", "marlin"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema_version"] == 1
    keys = {"model", "recipe", "settings", "linears", "outputs", "memory", "disk", "time", "probe", "checks", "fits", "warnings", "notes"}
    assert set(document) == keys | {"schema_version"}
    assert set(document["linears"]) == {"compressed", "skipped", "kept"}
    assert [o["format"] for o in document["outputs"]] == ["ct", "marlin"]
    assert document["outputs"][1]["loads_in"] == ["vLLM (with marlinctl)", "marlinctl"]
    assert document["time"]["seconds"] > 0 and "rates measured on" in document["time"]["basis"]
    assert "14 linears" in table(document)


def _large_config() -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
        "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
        "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip


def _large_model(folder: Path) -> Path:
    """A Llama of 70 billion parameters whose 30 shards are headers and holes."""
    folder.mkdir()
    config = _large_config()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {f"t{i}": i for i in range(128_000)}}}))
    expected = list(architecture(config).expected.items())
    weight_map: dict[str, str] = {}
    for shard in range(30):
        header, offset = {}, 0
        name = f"model-{shard + 1:05d}-of-00030.safetensors"
        for tensor, shape in expected[len(expected) * shard // 30 : len(expected) * (shard + 1) // 30]:
            size = 2 * prod(shape)
            header[tensor] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
            weight_map[tensor] = name
        raw = json.dumps(header).encode()
        with (folder / name).open("wb") as file:
            file.write(struct.pack("<Q", len(raw)) + raw)
            file.truncate(8 + len(raw) + offset)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_a_70b_folder_is_planned_in_two_seconds_without_torch(tmp_path: Path, text: Path) -> None:
    """People ask before they wait: an import of torch alone takes longer than the answer may."""
    folder = _large_model(tmp_path / "large")
    program = "import sys; from marlinctl.cli import main; code = main(sys.argv[1:]); assert 'torch' not in sys.modules; sys.exit(code)"
    command = [sys.executable, "-c", program, "plan", str(folder), "--json", "--calibration", str(text), "--max-memory", "1TiB"]
    before = os.times()
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    after = os.times()
    assert done.returncode in (0, 1), done.stderr[-2000:]
    document = json.loads(done.stdout)
    assert len(document["linears"]["compressed"]) == 560 and document["model"]["parameters"] == 70_553_706_496
    assert 39e9 < document["outputs"][0]["bytes"]["weights"] < 40e9
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    assert spent < 2.0  # of the processor, which others may use too


def test_the_forward_dtype_is_told_without_torch() -> None:
    """The element size scales hidden states, scratch and blocks: half or double of it is a wrong plan."""
    assert planned_dtype("cpu", "auto") == ("bfloat16" if cpu_has_bf16() else "float32")
    assert planned_dtype("cpu", "float32") == "float32" and planned_dtype("cuda:1", "auto") == "bfloat16"
    assert (
        torch.empty(0, dtype=getattr(torch, planned_dtype("cpu", "auto"))).element_size() == planning._ELEMENT[planned_dtype("cpu", "auto")]
    )


def test_a_skipped_shard_is_told_before_the_run(tiny: Path) -> None:
    """vLLM and SGLang load q, k and v as one linear: a plan that lists them although k stays 16-bit sends people into a wall."""
    (output,) = plan(tiny, recipe("t.txt", quantize__skip=["k_proj"]))["outputs"]
    assert not {"vLLM", "SGLang"} & set(output["loads_in"]) and len(output["refused_by"]["vLLM 0.24+ Marlin"]) == 2
    (line,) = output["warnings"]
    assert line.startswith("the ct folder will not load in vLLM, SGLang: model.layers.0.self_attn.qkv_proj: q_proj, k_proj, v_proj are not")
    text = table(plan(tiny, recipe("t.txt", quantize__skip=["k_proj"])))
    assert "vLLM 0.24+ Marlin refuses 2 linears: model.layers.0.self_attn.qkv_proj: q_proj, k_proj, v_proj are not quantized alike" in text
    assert {item["reason"] for item in plan(tiny, recipe("t.txt", quantize__skip=["k_proj"]))["linears"]["skipped"]} == {"--skip k_proj"}
