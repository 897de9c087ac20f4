"""Who loads the result: plan, run, card, report, inspect, pack and verify say the same of one model, and the examples of the documentation
make models that servers load."""

from __future__ import annotations

import json
import re
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from marlinctl.checkpoint.formats.registry import FORMATS
from marlinctl.checkpoint.runtimes import Packed, loads
from marlinctl.cli import main
from marlinctl.models.families import architecture
from marlinctl.planning.layer_rules import plan
from tests import zoo
from tests.runs import TEXT
from tests.test_architecture import ROOT
from tests.tiny import make_tiny, tiny_config

FLAGS = ["--group-size", "32", "--samples", "8", "--sequence-length", "64", "--dtype", "float32"]
REASON = "model.layers.0.self_attn.qkv_proj: q_proj, k_proj, v_proj are not quantized alike (16-bit, group 32)"


def flags(folder: Path, *further: str) -> list[str]:
    (folder / "text.txt").write_text(TEXT)
    recipe = folder / "recipe.yaml"
    recipe.write_text("calibration:\n  minimum_tokens: 256\n")
    return [*FLAGS, "--recipe", str(recipe), "--calibration", str(folder / "text.txt"), *further]


def answer(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> Any:
    capsys.readouterr()
    assert main([*(str(argument) for argument in arguments), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_everybody_says_the_same_of_a_model_that_servers_refuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The plan said that vLLM refuses, and the run said nothing and wrote a card that lists vLLM."""
    make_tiny(tmp_path / "tiny")
    out, chosen = tmp_path / "out", flags(tmp_path, "--skip", "q_proj")
    (planned,) = answer(capsys, "plan", tmp_path / "tiny", *chosen)["outputs"]
    assert main(["quantize", str(tmp_path / "tiny"), str(out), *chosen]) == 0
    told = capsys.readouterr().err
    (line,) = planned["warnings"]
    assert line.startswith(f"the ct folder will not load in vLLM, SGLang: {REASON}") and f"warning: {line}" in told
    assert told.index(line) < told.index("calibration: ")
    facts = answer(capsys, "inspect", out)
    assert facts["loads_in"] == planned["loads_in"] == ["transformers (with compressed-tensors)", "marlinctl"]
    assert facts["refused_by"]["vLLM"] == planned["refused_by"]["vLLM 0.24+ Marlin"] and len(facts["refused_by"]["vLLM"]) == 2
    assert answer(capsys, "pack", out, "--check", code=1)["warnings"] == [line]
    for name in ("README.md", "marlinctl_report.md", "marlinctl_report.html"):
        page = (out / name).read_text("utf-8").replace("\\", "")
        assert f"vLLM, SGLang: {REASON}" in page and "vLLM, SGLang, transformers" not in page, name
    assert main(["inspect", str(out)]) == 0
    assert re.search(
        r"^loads in +transformers \(with compressed-tensors\), marlinctl\nrefused by +vLLM, SGLang: ", capsys.readouterr().out, re.M
    )
    before = (out / "README.md").read_bytes()
    assert main(["report", str(out), "-q"]) == 0 and (out / "README.md").read_bytes() == before
    assert main(["pack", str(out), str(tmp_path / "gptq"), "--format", "gptq"]) == 0
    assert "warning: the gptq folder will not load in vLLM, SGLang: " in capsys.readouterr().err
    assert "Refused by | vLLM, SGLang: " in (tmp_path / "gptq" / "README.md").read_text("utf-8")


def test_compress_publishes_what_transformers_is_known_to_refuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Said before the work, and then refused at its end by our own load check: a day of work for nothing."""
    zoo.build("olmoe", tmp_path / "model")
    skipped = flags(tmp_path, "--skip", "experts.*", "--no-eval", "--also", "marlin")
    assert main(["compress", str(tmp_path / "model"), str(tmp_path / "out"), *skipped]) == 0
    told = capsys.readouterr().err
    assert (
        "warning: the ct folder will not load in transformers (with compressed-tensors): model.layers.0.mlp.experts.0.down_proj: it" in told
    )
    assert "not loaded with transformers, which refuses it: model.layers.0.mlp.experts.0.down_proj" in told
    assert "\nnot loaded with transformers, which does not read marlin by itself\n" in told, "that is as it should be: no warning"
    assert "marlin folder" not in told
    assert "|  | transformers (with compressed-tensors): model.layers.0.mlp.experts" in (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "Refused by" not in (tmp_path / "out-marlin" / "README.md").read_text("utf-8")


def examples() -> list[str]:
    """Every command of the pages (docs/cli.md has those of the helps) that treats some linears otherwise."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    lines = {line.strip() for page in pages for line in re.sub(r" \\\n +", " ", page.read_text("utf-8")).splitlines()}
    return sorted(line for line in lines if line.startswith("marlinctl ") and re.search(r"--(skip|override|include)\b", line))


def test_the_examples_make_models_that_servers_load() -> None:
    """The first example of `quantize --help` left k_proj alone, and whoever copied it got a folder that no server loads."""
    assert len(examples()) >= 2
    known = architecture(tiny_config(hidden_size=1024, intermediate_size=2048, num_attention_heads=8, num_key_value_heads=2))
    shapes = {name: (spec.out_features, spec.in_features) for name, spec in known.linears.items()}
    for line in examples():
        words = shlex.split(line, comments=True)
        given: dict[str, list[str]] = {"--skip": [], "--override": [], "--include": [], "--group-size": ["128"]}
        for flag, value in pairwise(words):
            given.get(flag, []).append(value)
        sized = [text.partition("=") for text in given["--override"] if "bits:" not in text]
        overrides = {pattern: int(size.removeprefix("group_size:")) for pattern, _, size in sized}
        rules = plan(
            known, group_size=int(given["--group-size"][-1]), skip=given["--skip"], overrides=overrides, include=given["--include"]
        )
        chosen = {name: shapes[name] for name in rules.group_sizes if name in shapes}
        found = loads(Packed(FORMATS["ct"], chosen, {name: rules.group_sizes[name] for name in chosen}, list(rules.kept), tiny_config()))
        assert not found.refused, (line, found.refused)
