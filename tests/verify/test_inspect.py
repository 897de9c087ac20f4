from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from marlinctl.errors import BadInput, CheckFailed
from marlinctl.verify.inspect import inspect, table
from tests.packed import edit_json, make_packed, make_sparse_packed, remake_manifest
from tests.tiny import make_tiny

QUANTIZED = 2 * (128 * 128 * 2 + 64 * 128 * 2 + 128 * 256 * 3)
OTHERS = 2 * 288 * 128 + 5 * 128


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("inspect") / "source")


def test_dense_models_are_described(source: Path) -> None:
    """The first thing a person does with a folder is to ask what it is."""
    facts = inspect(source)
    assert (facts["format"], facts["bits"], facts["blocks"], facts["architecture"]) == ("dense", 16, 2, "LlamaForCausalLM")
    assert facts["other_parameters"] == QUANTIZED + OTHERS and facts["quantized_parameters"] == 0
    assert facts["bytes"]["total"] == facts["dense_16bit_bytes"] == 2 * (QUANTIZED + OTHERS) and facts["ratio_to_16bit"] == 1.0
    assert "times as much" not in table(facts) and " in 1 shard: " in table(facts), "it is compared with itself"
    assert facts["manifest"] is None and "vLLM" in facts["loads_in"]


@pytest.mark.parametrize(("fmt", "extra"), [("ct", 16 * 14), ("gptq", None), ("marlin", 16 * 14)])
def test_packed_models_are_described(source: Path, tmp_path: Path, fmt: str, extra: int | None) -> None:
    """Sizes and ratios are what people choose by: they must be those of the disk."""
    make_packed(source, tmp_path / "out", fmt, overrides={"model.layers.0.mlp.down_proj": 64})
    facts = inspect(tmp_path / "out")
    assert (facts["format"], facts["bits"], facts["scale_dtypes"]) == (fmt, 4, ["F16"])
    assert facts["group_sizes"] == {"32": 13, "64": 1}
    assert (facts["quantized_linears"], facts["quantized_parameters"], facts["other_parameters"]) == (14, QUANTIZED, OTHERS)
    assert facts["bytes"]["codes"] == QUANTIZED // 2
    assert facts["bytes"]["scales"] == 2 * (QUANTIZED // 32 - 128 * 4)
    assert extra is None or facts["bytes"]["zeros and indices"] == extra
    shards = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert 0 < shards - facts["bytes"]["total"] < 12_000  # headers only
    assert facts["manifest"]["files"] == len(list((tmp_path / "out").iterdir())) - 2
    assert bool(facts["warnings"]) is (fmt == "marlin")
    text = table(facts)
    assert "32 (13 linears), 64 (1 linear)" in text and facts["loads_in"][0] in text
    json.dumps(facts)


@pytest.mark.parametrize(
    ("fmt", "origin"), [("ct", "mask file"), ("gptq", "mask file"), ("marlin", "mask file"), ("marlin_24", "metadata")]
)
def test_the_pattern_is_told_with_its_origin(source: Path, tmp_path: Path, fmt: str, origin: str) -> None:
    """Whether a 4-bit model can become marlin_24, and by whose word, is what decides the next step."""
    codes = make_sparse_packed(source, tmp_path / "out", fmt)
    facts = inspect(tmp_path / "out")
    stated = {
        "kind": "2:4",
        "origin": origin,
        "linears": 14,
        "of_linears": 15,
        "density": round(1 - QUANTIZED / 2 / (QUANTIZED + 288 * 128), 4),
    }
    assert facts["pattern"] == {**stated, "zero_kept": None, "zero_kept_share": None}
    assert f"2:4 in 14 of 15 linears, by the {origin}" in table(facts)
    zero = sum(int((q.codes[q.keep] == 0).sum()) for q in codes.values())
    looked = inspect(tmp_path / "out", weights=True)
    assert looked["pattern"] == {**stated, "zero_kept": zero, "zero_kept_share": round(zero / (QUANTIZED / 2), 6)} and zero > 100
    assert f"{zero:,} kept weights are zero" in table(looked)
    json.dumps(looked)


def test_a_pattern_that_nobody_states_needs_the_weights(source: Path, tmp_path: Path) -> None:
    """Headers know nothing of zeros: saying `none` without looking would be wrong."""
    make_sparse_packed(source, tmp_path / "sparse", "ct", stated=False)
    assert inspect(tmp_path / "sparse")["pattern"]["kind"] is None and "none stated" in table(inspect(tmp_path / "sparse"))
    looked = inspect(tmp_path / "sparse", weights=True)
    assert (looked["pattern"]["kind"], looked["pattern"]["origin"], looked["pattern"]["linears"]) == ("2:4", "zeros", 14)
    assert "by the zeros of the weights alone" in table(looked)
    looked = inspect(source, weights=True)
    assert (looked["pattern"]["kind"], looked["pattern"]["linears"], looked["pattern"]["density"]) == ("none", 0, 1.0)
    assert "no linear has two zeros" in table(looked)


def test_marlin_24_is_described(source: Path, tmp_path: Path) -> None:
    """3 bits and the scales: codes of the kept weights are 2, their places 1."""
    make_sparse_packed(source, tmp_path / "out", "marlin_24", group_size=64)
    facts = inspect(tmp_path / "out")
    assert (facts["format"], facts["bits"], facts["scale_dtypes"], facts["loads_in"]) == (
        "marlin_24",
        4,
        ["F16"],
        ["vLLM (with marlinctl)", "marlinctl"],
    )
    assert (facts["bytes"]["codes"], facts["bytes"]["metadata"]) == (QUANTIZED // 4, QUANTIZED // 8)
    assert facts["bits_per_quantized_weight"] == round(3 + 16 / 64 + 8 * 16 * 14 / QUANTIZED, 3)
    assert facts["warnings"]


def test_inspect_imports_nothing_heavy_and_is_quick(source: Path, tmp_path: Path) -> None:
    """Seconds of imports for a look at a header would make people write their own."""
    make_sparse_packed(source, tmp_path / "out", "ct")
    program = (
        "import sys, time\nstart = time.process_time()\nfrom pathlib import Path\nfrom marlinctl.verify.inspect import inspect, table\n"
        f"table(inspect(Path({str(tmp_path / 'out')!r})))\nspent = time.process_time() - start\n"
        "print(spent, [m for m in ('torch', 'transformers', 'numpy', 'pydantic') if m in sys.modules])"
    )
    runs = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split(" ", 1) for _ in range(3)
    ]
    assert all(run[1].strip() == "[]" for run in runs)
    assert min(float(run[0]) for run in runs) < 0.3


def test_large_models_stay_quick(tmp_path: Path) -> None:
    """A mixture of experts has tens of thousands of tensors; telling formats apart must not take minutes."""
    from marlinctl.checkpoint.formats.registry import INTERCHANGE, detect, quantization_config

    names = [f"model.layers.{i}.mlp.experts.{e}.{p}_proj" for i in range(48) for e in range(128) for p in ("gate", "up", "down")]
    start = time.perf_counter()
    block = quantization_config(INTERCHANGE, {name: 64 if "down" in name else 128 for name in names}, ["lm_head"])
    info = detect({"quantization_config": block}, [f"{name}.weight_packed" for name in names])
    assert time.perf_counter() - start < 5
    assert info.layers["model.layers.47.mlp.experts.127.down_proj"] == 64 and len(json.dumps(block)) < 2000


def test_unreadable_folders_are_errors(source: Path, tmp_path: Path) -> None:
    """A wrong answer is worse than none."""
    make_packed(source, tmp_path / "out", "marlin")
    edit_json(tmp_path / "out" / "config.json", lambda config: config["quantization_config"].update(format_version=9))
    remake_manifest(tmp_path / "out")
    with pytest.raises(BadInput, match="format_version 9"):
        inspect(tmp_path / "out")
    make_packed(source, tmp_path / "torn", "ct")
    (tmp_path / "torn" / "marlinctl_manifest.json").write_text("{")
    with pytest.raises(CheckFailed):
        inspect(tmp_path / "torn")
