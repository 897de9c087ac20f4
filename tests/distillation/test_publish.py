"""What is checked before a distilled checkpoint gets its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from marlinctl.checkpoint import writer
from marlinctl.distillation.masks import Masks
from marlinctl.distillation.student import Student
from marlinctl.errors import CheckFailed, MarlinctlError, NumericalProblem
from tests.distillation.runs import distill, recipe, write_text
from tests.pruned import prune, prune_and_quantize
from tests.tiny import make_tiny

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("publish")
    make_tiny(root / "teacher")
    prune(root / "teacher", root / "student")
    prune_and_quantize(root / "teacher", root / "packed")
    write_text(root / "text.txt")
    return root


def failing(place: Path, out: Path, student: str = "student", **changes: Any) -> MarlinctlError:
    with pytest.raises(MarlinctlError) as caught:
        distill(place / student, out, place / "teacher", recipe(place / "text.txt", tokens=512, **changes))
    assert not out.exists() and not list(out.parent.glob("out.tmp*"))
    assert (out.parent / "out.job" / "state.json").exists(), "the training is kept"
    return caught.value


def spoil(monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Damage a shard on its way to the disk."""
    write = writer.StagedCheckpoint.write_shard

    def spoiled(self: writer.StagedCheckpoint, tensors: dict[str, Tensor]) -> str:
        copies = {name: tensor.clone() for name, tensor in tensors.items()}
        change(copies)
        return write(self, copies)

    monkeypatch.setattr(writer.StagedCheckpoint, "write_shard", spoiled)


def test_a_result_that_is_not_2_4_is_not_published(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a step forgot the mask, the packer would drop the third weight of a four: the check from disk must see it."""

    def forget(self: Masks) -> None:
        with torch.no_grad():
            for masked in self.masked:
                masked.parameter.add_(0.01)

    monkeypatch.setattr(Masks, "prune", forget)
    error = failing(place, tmp_path / "out")
    assert isinstance(error, CheckFailed) and error.error_id == "E103"
    assert any(UP in problem.what and "not 2:4 any more" in problem.what for problem in error.problems)


def test_a_tensor_that_changes_on_its_way_to_the_disk_is_found(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One flipped weight on disk would never be found later: nobody has the trained weights any more."""

    def flip(tensors: dict[str, Tensor]) -> None:
        tensors["model.norm.weight"][7] += 1

    spoil(monkeypatch, flip)
    error = failing(place, tmp_path / "out")
    assert error.error_id == "E103" and [problem.what for problem in error.problems] == [
        "model.norm.weight on disk differs from what was trained"
    ]


def test_codes_that_change_are_found(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mode scales promises the student's codes, bit for bit."""
    raw = writer.StagedCheckpoint.copy_tensors

    def without_codes(self: writer.StagedCheckpoint, checkpoint: Any, names: list[str]) -> None:
        raw(self, checkpoint, [name for name in names if name != f"{UP}.weight_packed"])
        self.write_shard({f"{UP}.weight_packed": checkpoint.read(f"{UP}.weight_packed") ^ 1})

    monkeypatch.setattr(writer.StagedCheckpoint, "copy_tensors", without_codes)
    error = failing(place, tmp_path / "out", "packed", mode="scales")
    assert error.error_id == "E103" and error.problems[0].what == f"{UP}.weight_packed is not the student's"


def test_weights_beyond_float16_are_not_published(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An infinity in a checkpoint is a model that answers NaN."""
    values = Student.values

    def grown(self: Student) -> Any:
        for name, tensor in values(self):
            yield name, tensor * 1e6 if name == f"{UP}.weight" else tensor

    monkeypatch.setattr(Student, "values", grown)
    error = failing(place, tmp_path / "out")
    assert isinstance(error, NumericalProblem) and error.error_id == "E604" and UP in error.problems[0].what
