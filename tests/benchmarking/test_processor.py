"""`bench --device cpu`: what is checked, what is timed, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from marlinctl.benchmarking import processor
from marlinctl.benchmarking.cases import KINDS, Shape
from marlinctl.cli import main
from marlinctl.errors import CheckFailed
from marlinctl.quantize.scheme import Rounding
from marlinctl.system.console import Console
from tests.packed import edit_json, make_packed, remake_manifest
from tests.tiny import make_tiny

SHAPES = (Shape(128, 192, 64), Shape(64, 128, -1))


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "ROTATED_BYTES", 2**15)
    monkeypatch.setattr(processor, "TURNS", 2)


def test_every_case_is_checked_and_timed() -> None:
    """If a case were lost, or the baseline were not the weight that is checked, a speed-up would mean nothing."""
    document = processor.run(SHAPES, (1, 70), KINDS, Console.quiet(), only_check=False)
    assert [(case["n"], case["k"], case["m"]) for case in document["cases"]] == [(128, 192, 1), (128, 192, 70), (64, 128, 1), (64, 128, 70)]
    for case in document["cases"]:
        assert [one["name"] for one in case["timed"]] == ["torch bfloat16", "torch int4", "int4", "int4 2:4"]
        assert all(0 < one["ms"] <= one["median_ms"] for one in case["timed"])
        assert set(case["errors"]) == {"int4", "int4 2:4"} and all(0 < error < processor.GATE for error in case["errors"].values())
    text = processor.table(document)
    assert "128 x 192" in text and torch.backends.cpu.get_cpu_capability() in text and "load" in text
    assert json.loads(json.dumps(document)) == document


@pytest.mark.parametrize("rounding", ["int8", "int8-128"])
def test_rounded_activations_stand_beside_16_bit_ones(rounding: Rounding) -> None:
    """If this failed, a CPU would be said to compute what it does not, or rounding would be taken for an error of the module."""
    document = processor.run(SHAPES, (3,), KINDS, Console.quiet(), only_check=False, rounding=rounding, rounded=frozenset(SHAPES[:1]))
    with_it, without = ([one["name"] for one in case["timed"]] for case in document["cases"])
    assert with_it == ["torch bfloat16", "torch int4", "int4", f"int4, {rounding}", "int4 2:4"]
    assert without == ["torch bfloat16", "torch int4", "int4", "int4 2:4"]
    assert 0 < document["cases"][0]["errors"][f"int4, {rounding}"] < processor.GATE


def test_a_folder_is_measured_as_its_config_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """If this failed, `bench FOLDER` would not know the rounding that config.json allows."""
    make_tiny(tmp_path / "model")
    make_packed(tmp_path / "model", tmp_path / "packed", "marlin", group_size=32)
    arguments = ["bench", str(tmp_path / "packed"), "--device", "cpu", "--tokens", "2", "--check", "--json"]

    def measured() -> set[str]:
        assert main(arguments) == 0
        return {name for case in json.loads(capsys.readouterr().out)["cases"] for name in case["errors"]}

    assert measured() == {"int4"}
    more = {"format_version": 2, "activations": "int8", "activation_group": 128}
    edit_json(tmp_path / "packed" / "config.json", lambda config: config["quantization_config"].update(more))
    remake_manifest(tmp_path / "packed")
    assert measured() == {"int4", "int4, int8-128"}


def test_a_wrong_product_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, the speed of a wrong answer would be reported."""
    real = processor.packed_module

    def broken(p: object, rounding: Rounding) -> object:
        module = real(p, rounding=rounding)  # type: ignore[arg-type]
        module.prepare()
        assert module.cpu_weight is not None
        module.cpu_weight ^= 0xFF  # a byte of it is within the tolerance in some processors' layouts
        return module

    monkeypatch.setattr(processor, "packed_module", broken)
    with pytest.raises(CheckFailed, match="int4 is off by") as caught:
        processor.run(SHAPES[:1], (1,), ("dense",), Console.quiet(), only_check=False)
    assert caught.value.error_id == "E113"


def test_each_call_takes_another_copy() -> None:
    """If this failed, small weights would come from a cache."""
    seen: list[int] = []
    call = processor._rotated([lambda x, i=i: seen.append(i) or x for i in range(3)])  # type: ignore[misc]
    for _ in range(4):
        call(torch.zeros(1))
    assert seen == [0, 1, 2, 0]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """If this failed, `bench --device cpu` would ask for a GPU, or forget its results."""
    arguments = ["bench", "--device", "cpu", "--shape", "128x192", "--group-size", "64", "--tokens", "1", "--sparse"]
    assert main([*arguments, "--out", str(tmp_path / "out"), "--json"]) == 0
    written = json.loads((tmp_path / "out" / "cpu.json").read_text())
    assert {"schema_version": 1, **written} == json.loads(capsys.readouterr().out)
    assert [one["name"] for one in written["cases"][0]["timed"]] == ["torch bfloat16", "int4 2:4"]
    assert main([*arguments, "--check"]) == 0
    assert "checked, not timed" in capsys.readouterr().out
    assert main([*arguments, "--tune"]) == 2
    assert "--tune measures kernels on a GPU" in capsys.readouterr().err
