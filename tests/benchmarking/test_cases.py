"""Shapes, sets and tokens: what is measured, and what is refused before a GPU is touched."""

from __future__ import annotations

from pathlib import Path

import pytest

from marlinctl.benchmarking import cases
from marlinctl.commands.bench import SET_NAMES
from marlinctl.errors import UsageError
from marlinctl.system.console import Console
from tests.packed import edit_json, make_packed, remake_manifest
from tests.tiny import make_tiny


def test_every_set_can_be_asked_for_and_multiplied() -> None:
    """If this failed, --layers would offer a set that does not exist, or one that no kernel takes."""
    assert tuple(cases.SETS) == SET_NAMES
    for name in cases.SETS:
        assert all(shape.n % 64 == 0 and shape.k % 128 == 0 for shape in cases.named_set(name, 128).shapes)


@pytest.mark.parametrize(
    ("name", "hidden", "parameters"),
    [("llama3-8b", 4096, 218_103_808), ("llama3-70b", 8192, 855_638_016), ("falcon-180b", 14848, 2_219_835_392)],
)
def test_a_set_has_the_weights_of_a_block(name: str, hidden: int, parameters: int) -> None:
    """If this failed, a typo in a size would flatter or damn a whole model. Llama-3-8B: 6144 + 4096 + 28672 + 14336 rows of 4096."""
    one = cases.named_set(name, 128)
    assert sum(layer.shape.n * layer.shape.k for layer in one.layers) == parameters
    assert all(hidden in (layer.shape.n, layer.shape.k) for layer in one.layers)


def test_a_shape_that_two_sets_share_is_measured_once() -> None:
    """If this failed, a run would take longer than it needs."""
    sets = (cases.named_set("llama3-8b", 128), cases.shapes_set(["4096x4096", "64x64"], -1), cases.named_set("llama3-8b", 128))
    assert len(cases.distinct(sets)) == 4 + 2
    assert cases.distinct(sets)[0] == cases.Shape(6144, 4096, 128)


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 128), ("4096x", 128), ("x64", 128), ("-64x64", 128), ("65x64", 128), ("64x64", 128), ("64x64", 48), ("0x64", -1)],
)
def test_a_shape_that_no_kernel_takes_is_refused(text: str, size: int) -> None:
    """If this failed, it would end in a traceback after the GPU was set up."""
    with pytest.raises(UsageError) as caught:
        cases.shapes_set([text], size)
    assert caught.value.error_id == "E202" and caught.value.problems[0].where in ("--shape", "--group-size")


@pytest.mark.parametrize("text", ["", "1,", "0", "-1", "a", "1;2", "1e3"])
def test_tokens_that_are_no_numbers_are_refused(text: str) -> None:
    """If this failed, --tokens 1,,2 would measure something else than was meant."""
    with pytest.raises(UsageError) as caught:
        cases.parse_tokens(text)
    assert caught.value.error_id == "E202" and caught.value.problems[0].where == "--tokens"


def test_tokens_are_sorted_and_each_is_measured_once() -> None:
    assert cases.parse_tokens("16, 1,16") == (1, 16)


@pytest.mark.parametrize(("fmt", "kind"), [("marlin", "dense"), ("ct", None)])
def test_the_linears_of_a_folder(tmp_path: Path, fmt: str, kind: str | None) -> None:
    """If this failed, `bench FOLDER` would measure other shapes than the model has, or the wrong kernel."""
    make_tiny(tmp_path / "model")
    codes = make_packed(tmp_path / "model", tmp_path / "packed", fmt, group_size=32)
    found = cases.checkpoint_set(tmp_path / "packed", Console.quiet())
    one = found.linears
    assert (found.kind, found.rounding, found.rounded) == (kind, "none", frozenset())
    assert sum(layer.count for layer in one.layers) == len(codes)
    weights = {(layer.name, layer.shape.n, layer.shape.k) for layer in one.layers}
    expected = {(name.rpartition(".")[2], -(-q.codes.shape[0] // 64) * 64, -(-q.codes.shape[1] // 64) * 64) for name, q in codes.items()}
    assert weights == expected


@pytest.mark.parametrize("group", [128, -1])
def test_the_rounding_of_a_folder(tmp_path: Path, group: int) -> None:
    """If this failed, `bench FOLDER` would time 8-bit activations that no program may use, or none where they are allowed."""
    make_tiny(tmp_path / "model")
    exact = [name for name in make_packed(tmp_path / "model", tmp_path / "packed", "marlin", group_size=32) if "down_proj" in name]
    said = {"format_version": 2, "activations": "int8", "activation_group": group, "sixteen_bit_activations": exact}
    edit_json(tmp_path / "packed" / "config.json", lambda config: config["quantization_config"].update(said))
    remake_manifest(tmp_path / "packed")
    found = cases.checkpoint_set(tmp_path / "packed", Console.quiet())
    assert found.rounding == ("int8" if group == -1 else "int8-128")
    assert found.rounded == {layer.shape for layer in found.linears.layers if layer.name != "down_proj"}


def test_a_folder_without_a_packed_linear_is_refused(tmp_path: Path) -> None:
    """If this failed, a 16-bit model would be measured as an empty table."""
    make_tiny(tmp_path / "model")
    with pytest.raises(UsageError, match="no packed linear") as caught:
        cases.checkpoint_set(tmp_path / "model", Console.quiet())
    assert caught.value.error_id == "E202"
