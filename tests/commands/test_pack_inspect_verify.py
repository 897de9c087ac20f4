"""The three verbs as a person runs them: stdout, stderr and exit code of marlinctl.cli."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from marlinctl.checkpoint.manifest import NAME
from marlinctl.cli import main
from tests.packed import ct_block, foreign_ct, make_foreign, make_packed, make_sparse_packed
from tests.tiny import make_tiny


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("verbs") / "source")


@pytest.fixture(scope="module")
def packed(source: Path) -> Path:
    make_packed(source, source.parent / "packed", group_size=64)
    return source.parent / "packed"


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def document(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def marlinctl(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: object) -> Result:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


def test_inspect(marlinctl: Any, packed: Path) -> None:
    """Result on stdout, as a table or as one JSON document."""
    text = marlinctl("inspect", packed)
    assert text.code == 0 and "64 (14 linears)" in text.out
    facts = marlinctl("inspect", packed, "--json").document
    assert facts["schema_version"] == 1 and facts["group_sizes"] == {"64": 14}


def test_inspect_of_nothing_is_exit_3(marlinctl: Any, tmp_path: Path) -> None:
    """Three lines, not a traceback."""
    result = marlinctl("inspect", tmp_path / "none")
    assert result.code == 3 and result.out == "" and "Traceback" not in result.err and "  fix:" in result.err


def test_pack_and_verify(marlinctl: Any, packed: Path, source: Path, tmp_path: Path) -> None:
    """The way of every user: pack, then verify both folders against the original."""
    done = marlinctl("pack", packed, tmp_path / "m", "--format", "marlin", "--also", "ct", "--json")
    assert done.code == 0, done.err
    assert [entry["format"] for entry in done.document["outputs"]] == ["marlin", "ct"]
    for name in ("m", "m-ct"):
        result = marlinctl("verify", tmp_path / name, "--source", source)
        assert result.code == 0 and f"{name}: ok" in result.out and "median" in result.out, result.err
    facts = marlinctl("verify", tmp_path / "m-ct", "--json").document
    assert facts["ok"] is True and facts["logit_error"] <= 1e-3 and facts["skipped"] == []


def test_a_sparse_model_goes_to_marlin_24_and_back(marlinctl: Any, source: Path, tmp_path: Path) -> None:
    """The way of a 2:4 model: small for our kernels, a copy for everybody else, and each step says where the mask comes from."""
    make_sparse_packed(source, tmp_path / "in", group_size=64)
    done = marlinctl("pack", tmp_path / "in", tmp_path / "m", "--format", "marlin_24", "--also", "ct", "--json")
    assert done.code == 0 and done.document["source"]["pattern"] == "mask file", done.err
    assert "the masks of 14 linears are those of" in done.err
    for name in ("m", "m-ct"):
        result = marlinctl("verify", tmp_path / name, "--source", source)
        assert result.code == 0 and f"{name}: ok" in result.out, result.err
    result = marlinctl("verify", tmp_path / "m")
    assert (
        result.out.count("2:4") == 1
        and "2:4" not in result.err
        and "2:4 in 14 linears by the metadata, what was pruned is zero" in result.out
    )
    assert "2:4 in 14 of 15 linears, by the metadata" in marlinctl("inspect", tmp_path / "m").out
    assert "kept weights are zero" in marlinctl("inspect", tmp_path / "m", "--weights").out
    assert marlinctl("pack", tmp_path / "m", tmp_path / "back").code == 0
    for name in ("in", "back"):
        assert (tmp_path / name / "marlinctl_mask.safetensors").read_bytes() == (tmp_path / "m-ct/marlinctl_mask.safetensors").read_bytes()


def test_a_dense_model_is_no_marlin_24(marlinctl: Any, packed: Path, tmp_path: Path) -> None:
    """Exit 3 before any work, with every linear that is in the way."""
    result = marlinctl("pack", packed, tmp_path / "out", "--format", "marlin_24", "--json")
    assert result.code == 3 and result.document["error"]["id"] == "E356" and not list(tmp_path.glob("out*"))
    problems = result.document["error"]["problems"]
    assert len(problems) == 14 and all("of four codes are not zero" in problem["what"] for problem in problems)
    assert marlinctl("pack", packed, "--check", "--format", "marlin_24").code == 0  # the shapes are fine, and marlinctl its only reader


def test_pack_needs_overwrite(marlinctl: Any, packed: Path, tmp_path: Path) -> None:
    """A folder that exists stays untouched unless the person says so."""
    assert marlinctl("pack", packed, tmp_path / "out").code == 0
    before = (tmp_path / "out" / NAME).read_bytes()
    again = marlinctl("pack", packed, tmp_path / "out", "--format", "gptq")
    assert again.code == 2 and "--overwrite" in again.err and (tmp_path / "out" / NAME).read_bytes() == before
    assert marlinctl("pack", packed, tmp_path / "out", "--format", "gptq", "--overwrite").code == 0
    assert (tmp_path / "out" / "quantize_config.json").is_file() and not list(tmp_path.glob("out.*"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{packed}"], "OUT is missing"),
        (["{packed}", "{tmp}/o", "--check"], "--check writes nothing"),
        (["{packed}", "{tmp}/o", "--tp", "2"], "--tp goes with --check"),
        (["{packed}", "{tmp}/o", "--format", "awq"], "no format 'awq'"),
        (["{packed}", "{packed}"], "the output is the input"),
        (["{packed}", "{packed}/sub"], "inside the input"),
        (["{packed}", "--check", "--tp", "0"], "0"),
    ],
)
def test_pack_usage_errors_are_exit_2(marlinctl: Any, packed: Path, tmp_path: Path, arguments: list[str], says: str) -> None:
    """Found before any work, with what to type instead."""
    result = marlinctl("pack", *(a.format(packed=packed, tmp=tmp_path) for a in arguments))
    assert result.code == 2 and says in result.err and "  fix:" in result.err


def test_check_writes_nothing_and_tells(marlinctl: Any, packed: Path) -> None:
    """The table is the result; exit 0 because vLLM takes the tiny model at this split."""
    before = sorted(packed.parent.iterdir())
    result = marlinctl("pack", packed, "--check", "--tp", "2")
    assert result.code == 0, result.err
    assert "tp=1  tp=2" in result.out and "vLLM Machete" in result.out and sorted(packed.parent.iterdir()) == before
    document = marlinctl("pack", packed, "--check", "--tp", "2", "--json").document
    assert document["ok"] and document["tensor_parallel"] == [1, 2] and "vLLM 0.24+ Marlin" in document["servers"]


def test_check_fails_where_no_server_would_load_it(marlinctl: Any, packed: Path) -> None:
    """Scripts ask before hours of upload: exit 1, and still one JSON document."""
    result = marlinctl("pack", packed, "--check", "--tp", "8", "--json")
    assert result.code == 1 and result.document["ok"] is False and result.document["servers"] == []
    assert marlinctl("pack", packed, "--check", "--tp", "8", "--format", "marlin").code == 1  # vLLM with marlinctl reads it, whole
    assert marlinctl("pack", packed, "--check", "--format", "marlin").code == 0


def test_check_warns_of_uneven_shards(marlinctl: Any, source: Path, tmp_path: Path) -> None:
    """vLLM refuses a model whose q, k and v differ; the person must hear it here."""
    make_packed(source, tmp_path / "uneven", overrides={"model.layers.0.self_attn.q_proj": 64})
    result = marlinctl("pack", tmp_path / "uneven", "--check")
    assert result.code == 1 and "warning: the ct folder will not load in vLLM, SGLang: model.layers.0.self_attn.qkv_proj" in result.err
    table = {line.rsplit(maxsplit=1)[0][:18].strip(): line.split()[-1] for line in result.out.splitlines()[1:9]}
    assert (table["vLLM 0.24+ Marlin"], table["SGLang 0.5 Marlin"], table["marlinctl"]) == ("no", "no", "yes")


def test_verify_failures_are_exit_1(marlinctl: Any, packed: Path, tmp_path: Path) -> None:
    """1 means `a check said no`: scripts tell it from wrong usage."""
    folder = shutil.copytree(packed, tmp_path / "copy")
    (folder / "extra.safetensors").write_bytes(b"x")
    result = marlinctl("verify", folder)
    assert result.code == 1 and "extra.safetensors" in result.err and "Traceback" not in result.err
    report = marlinctl("verify", folder, "--json")
    assert report.code == 1 and report.document["error"]["id"] == "E101" and "extra.safetensors" in report.out


def test_unreadable_input_is_exit_3(marlinctl: Any, tmp_path: Path) -> None:
    """3-bit input: the format is named, nothing is written."""
    make_foreign(make_tiny(tmp_path / "single"), tmp_path / "in", ct_block(num_bits=3), foreign_ct)
    result = marlinctl("pack", tmp_path / "in", tmp_path / "out")
    assert result.code == 3 and "3-bit" in result.err and not (tmp_path / "out").exists()
