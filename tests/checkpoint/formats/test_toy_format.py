"""A new format is one file: this one. Broken, if pack, inspect, verify, plan, card or report spelled the names of the formats they know."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from marlinctl.checkpoint import runtimes
from marlinctl.checkpoint.formats.base import (
    CODES,
    INDICES,
    MARLINCTL,
    SCALES,
    VLLM,
    Chosen,
    Format,
    FormatInfo,
    LinearParts,
    Packed,
    Shapes,
    group_size_of,
    true_group_size,
)
from marlinctl.checkpoint.formats.registry import FORMATS
from marlinctl.checkpoint.reader import open_checkpoint
from marlinctl.cli import main
from marlinctl.convert.repack import repack
from marlinctl.planning.plan import Settings, make_plan
from marlinctl.quantize.scheme import INT4, Grid
from marlinctl.recipes.schema import load_recipe
from marlinctl.report.rewrite import rewrite
from marlinctl.system.console import Console
from marlinctl.verify.inspect import inspect
from marlinctl.verify.run import verify
from tests.tiny import make_tiny


def _detect(block: Mapping[str, Any], names: Sequence[str]) -> FormatInfo:
    return FormatInfo(TOY, {layer: group_size_of(block["sizes"][layer]) for layer in TOY.layer_names(names)})


def _config_block(chosen: Chosen) -> dict[str, Any]:
    return {"quant_method": "toy", "sizes": dict(chosen.layers)}


def _shapes(n: int, k: int, group_size: int, grid: Grid = INT4) -> Shapes:
    groups = 1 if group_size == -1 else k // group_size
    return {"bytes": (("I8",), (k, n)), "steps": (("F32",), (n, groups)), "weight_shape": (("I64",), (2,))}


def _pack(layer: str, parts: LinearParts) -> dict[str, Tensor]:
    shape = torch.tensor(parts.codes.shape, dtype=torch.int64)
    return {"bytes": parts.codes.T.contiguous(), "steps": parts.scales.float(), "weight_shape": shape}


def _unpack(tensors: Mapping[str, Tensor], group_size: int, variant: str, grid: Grid) -> LinearParts:
    codes, scales = tensors["bytes"].T.contiguous(), tensors["steps"]
    return LinearParts(codes, scales, true_group_size(group_size, codes.shape[1], scales.shape[1]))


def _second_reading(tensors: Mapping[str, Tensor], n: int, k: int, group_size: int, grid: Grid) -> Tensor:
    steps = tensors["steps"].repeat_interleave(k // tensors["steps"].shape[1], dim=1)
    return tensors["bytes"].T.float() * steps


TOY = Format(
    name="toy",
    label="Toy bytes",
    title="4-bit weights, a byte each",
    tensors={"bytes": CODES, "steps": SCALES, "weight_shape": INDICES},
    shapes=_shapes,
    loaders=(VLLM, MARLINCTL),
    kernels=(MARLINCTL,),
    methods=("toy",),
    detect=_detect,
    config_block=_config_block,
    pack=_pack,
    unpack=_unpack,
    second_reading=_second_reading,
    tags=("toy",),
    note="A toy.\n",
    misfit=lambda n, k: f"toys have fewer than 1000 rows, not {n}" if n >= 1000 else None,
    untested=lambda packed: {VLLM: "toys"},
)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Format:
    monkeypatch.setitem(FORMATS, TOY.name, TOY)
    return TOY


def test_a_format_goes_everywhere(toy: Format, tmp_path: Path) -> None:
    """Packed from a published folder and back, it loses no code, and every verb that looks at it says what the description says."""
    make_tiny(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"the tenth train in {i}" for i in range(2000)))
    asked = ["--calibration", str(text), "--samples", "80", "--sequence-length", "64", "--group-size", "64", "--quiet"]
    assert main(["quantize", str(tmp_path / "model"), str(tmp_path / "int4"), *asked]) == 0
    out, back = tmp_path / "toy", tmp_path / "back"
    assert main(["pack", str(tmp_path / "int4"), str(out), "--format", "toy", "--quiet"]) == 0
    repack(out, back, format="ct")
    with open_checkpoint(tmp_path / "int4") as first, open_checkpoint(back) as last:
        for name in first.tensors:
            assert torch.equal(first.read(name).float(), last.read(name).float()), name

    found = inspect(out)
    assert (found["format"], found["bits"], found["scale_dtypes"]) == ("toy", 4, ["F32"])
    assert found["loads_in"] == [MARLINCTL] and found["untested"] == {VLLM: "toys"}
    assert set(found["bytes"]) == {"total", "codes", "scales", "zeros and indices", "not quantized"}
    verified = verify(out, source=tmp_path / "model", load=None, console=Console.quiet())
    assert verified.format == "toy" and any("which does not read toy by itself" in line for line in verified.skipped)

    card = (out / "README.md").read_text()
    assert TOY.title in card and "- toy\n" in card and "A toy." in card
    assert json.loads((out / "marlinctl_report.json").read_text())["packed"]["format"] == "toy"
    assert TOY.label in (out / "marlinctl_report.html").read_text()
    rewrite(out)
    assert TOY.title in (out / "README.md").read_text()


def test_a_plan_knows_it(toy: Format, tmp_path: Path) -> None:
    """Bytes, readers and misfits of a plan come from the description."""
    make_tiny(tmp_path / "model")
    recipe = load_recipe("int4")
    recipe = recipe.model_copy(update={"pack": recipe.pack.model_copy(update={"formats": ("toy",)})})
    settings = Settings(tmp_path / "out", dtype="float32")
    (output,) = make_plan(str(tmp_path / "model"), recipe, settings, Console.quiet())["outputs"]
    assert output["format"] == "toy" and output["loads_in"] == [MARLINCTL]
    assert output["bits_per_weight"] > 8
    assert runtimes.loads(Packed(TOY, {}, {}, [], {})).untested == {VLLM: "toys"}
    make_tiny(tmp_path / "wide", intermediate_size=1024)
    with pytest.raises(Exception, match="toys have fewer than 1000 rows, not 1024"):
        make_plan(str(tmp_path / "wide"), recipe, settings, Console.quiet())


def test_a_damaged_one_is_found(toy: Format, tmp_path: Path) -> None:
    """Broken: verify would not compare a new format's tensors with what its description asks for."""
    from tests.packed import edit_tensors, make_packed, remake_manifest

    make_packed(make_tiny(tmp_path / "model"), tmp_path / "toy", "toy")
    assert main(["verify", str(tmp_path / "toy"), "--quiet"]) == 0
    edit_tensors(tmp_path / "toy", lambda t: t.update({n: v.half() for n, v in t.items() if n.endswith("q_proj.steps")}))
    remake_manifest(tmp_path / "toy")
    assert main(["verify", str(tmp_path / "toy"), "--quiet"]) == 1
