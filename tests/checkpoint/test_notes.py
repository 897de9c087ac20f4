"""What the person should know of a folder is in the documents too, and not on stderr alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from marlinctl.convert.repack import repack
from tests import runs
from tests.packed import edit_tensors
from tests.pruned import prune
from tests.tiny import make_tiny

SCALE = "model.layers.0.self_attn.k_scale"
CARRIED, LEFT_OUT = "carried along unchanged", "left out"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a scale of a KV cache, which the model has no place for."""
    made = make_tiny(tmp_path / "model", num_hidden_layers=1)
    edit_tensors(made, lambda tensors: tensors.update({SCALE: torch.ones(1)}))
    return made


@pytest.mark.parametrize(("options", "words"), [({}, CARRIED), ({"drop_unexpected": True}, LEFT_OUT)])
def test_what_is_carried_along_or_left_out_is_in_the_report(folder: Path, tmp_path: Path, options: dict[str, Any], words: str) -> None:
    """Who reads `--json` or the report never saw that tensors were left out."""
    report = runs.quantize(folder, tmp_path / "out", runs.recipe(runs.write_text(tmp_path / "text.txt")), **options)
    (line,) = [line for line in report["warnings"] if SCALE in line]
    assert words in line and "KV cache" in line
    page = (tmp_path / "out" / "marlinctl_report.html").read_text()
    assert words in page and SCALE in page


def test_plan_and_pack_have_it_in_their_documents(folder: Path, tmp_path: Path) -> None:
    """`plan --json` and `pack --json` are read by programs, which have no stderr."""
    chosen = runs.recipe(runs.write_text(tmp_path / "text.txt"))
    assert any(SCALE in line and CARRIED in line for line in runs.plan(folder, chosen)["warnings"])
    runs.quantize(folder, tmp_path / "out", chosen)
    written = repack(tmp_path / "out", tmp_path / "gptq", format="gptq")
    assert any(SCALE in line and CARRIED in line for line in written["warnings"])


def test_distillation_has_it_in_its_report(folder: Path, tmp_path: Path) -> None:
    """Both models are read, and each line says of which it is."""
    from tests.distillation.runs import distill, recipe, write_text

    prune(folder, tmp_path / "pruned")
    report = distill(tmp_path / "pruned", tmp_path / "out", folder, recipe(write_text(tmp_path / "text.txt"), tokens=512))
    assert any(line.startswith("student: ") and SCALE in line for line in report["warnings"])
    assert any(line.startswith("teacher: ") and SCALE in line for line in report["warnings"])
