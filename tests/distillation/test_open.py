"""Every student and teacher that cannot be distilled is refused before any work, with the linear named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from marlinctl.checkpoint.mask import NAME
from marlinctl.cli import main
from marlinctl.errors import BadInput, MarlinctlError, NumericalProblem, UsageError
from tests import runs
from tests.distillation.runs import distill, recipe, write_text
from tests.packed import make_packed, remake_manifest
from tests.pruned import edit_tensor, prune, prune_and_quantize, write_masks
from tests.tiny import make_tiny

UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("opening")
    make_tiny(root / "teacher")
    prune(root / "teacher", root / "student")
    prune_and_quantize(root / "teacher", root / "packed")
    write_text(root / "text.txt")
    return root


def refused(kind: type[MarlinctlError], student: Path, out: Path, teacher: Path, text: Path | str, **changes: Any) -> MarlinctlError:
    """The error, after nothing was left behind."""
    before = {path.name for path in out.parent.iterdir()}
    with pytest.raises(kind) as caught:
        distill(student, out, teacher, recipe(text, **changes))
    assert all(problem.what and problem.where and problem.fix for problem in caught.value.problems)
    assert {path.name for path in out.parent.iterdir()} - before <= {f"{out.name}.log"}
    return caught.value


@pytest.fixture
def student(place: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(place / "student", tmp_path / "student")


def masks_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / NAME)


def test_a_student_that_is_not_pruned(place: Path, tmp_path: Path) -> None:
    """A dense model would be trained dense, and nobody would notice before packing."""
    error = refused(BadInput, place / "teacher", tmp_path / "out", make_tiny(tmp_path / "other", seed=1), place / "text.txt")
    assert error.error_id == "E356" and "none of its 14 linears" in error.problems[0].what and "sparsify" in error.problems[0].fix


def test_three_kept_in_a_four_without_a_mask_file(place: Path, student: Path, tmp_path: Path) -> None:
    """One quad with three weights is not 2:4: training on would prune one of them at random or keep all three."""
    (student / NAME).unlink()
    edit_tensor(student, f"{UP}.weight", lambda w: w.index_put((torch.tensor(3), torch.arange(8, 11)), torch.tensor(0.5, dtype=w.dtype)))
    error = refused(BadInput, student, tmp_path / "out", place / "teacher", place / "text.txt")
    assert error.error_id == "E356" and [problem.what.split(":")[0] for problem in error.problems] == [f"{UP} is not 2"]


def test_three_kept_in_a_four_by_the_mask(place: Path, student: Path, tmp_path: Path) -> None:
    """A mask that keeps three is no 2:4 mask, whatever the weights are."""
    masks = masks_of(student)
    masks[f"{UP}.keep"][3, 0] |= 0b0111
    save_file(masks, student / NAME)
    error = refused(BadInput, student, tmp_path / "out", place / "teacher", place / "text.txt")
    assert error.error_id == "E356" and f"{UP} is not 2:4" in error.problems[0].what


def test_a_mask_of_another_shape(place: Path, student: Path, tmp_path: Path) -> None:
    """A mask of another model would prune the wrong weights."""
    masks = masks_of(student)
    masks[f"{UP}.keep"] = masks[f"{UP}.keep"][:, :-1].contiguous()
    save_file(masks, student / NAME)
    error = refused(BadInput, student, tmp_path / "out", place / "teacher", place / "text.txt")
    assert error.error_id == "E356" and f"{UP} is U8" in error.problems[0].what


def test_a_mask_for_a_linear_that_is_not_there(place: Path, student: Path, tmp_path: Path) -> None:
    """Masks of a deeper model must not be taken for those of this one."""
    masks = masks_of(student)
    masks["model.layers.7.mlp.up_proj.keep"] = masks[f"{UP}.keep"].clone()
    save_file(masks, student / NAME)
    error = refused(BadInput, student, tmp_path / "out", place / "teacher", place / "text.txt")
    assert error.error_id == "E356" and "model.layers.7.mlp.up_proj" in error.problems[0].what


@pytest.mark.parametrize("form", ["dense", "ct"])
def test_weights_that_the_mask_prunes(place: Path, tmp_path: Path, form: str) -> None:
    """A mask that contradicts the weights would silently delete them at the first step. All such linears are told at once."""
    names = [UP, "model.layers.0.self_attn.q_proj"]
    shutil.copytree(place / ("student" if form == "dense" else "packed"), tmp_path / "student")
    from marlinctl.checkpoint.mask import pack_bits, unpack_bits

    masks = masks_of(tmp_path / "student")
    for name in names:
        keep = unpack_bits(masks[f"{name}.keep"], 128).reshape(-1, 32, 4)
        masks[f"{name}.keep"] = pack_bits(keep.flip(-1).reshape(-1, 128))
    save_file(masks, tmp_path / "student" / NAME)
    remake_manifest(tmp_path / "student")
    mode = "full" if form == "dense" else "scales"
    error = refused(BadInput, tmp_path / "student", tmp_path / "out", place / "teacher", place / "text.txt", mode=mode)
    assert error.error_id == "E356" and all("the mask prunes them" in problem.what for problem in error.problems)
    assert sorted(problem.what.split(":")[0] for problem in error.problems) == sorted(names)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 3}, "blocks: the student has 2, the teacher 3"),
        ({"vocab_size": 320}, "vocabulary: the student has 288, the teacher 320"),
        ({"hidden_size": 64}, "hidden size: the student has 128, the teacher 64"),
    ],
)
def test_a_teacher_of_another_size(place: Path, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    """Hidden states and predictions could not be compared, or would be cut to fit."""
    teacher = make_tiny(tmp_path / "teacher", **changes)
    error = refused(BadInput, place / "student", tmp_path / "out", teacher, place / "text.txt")
    assert error.error_id == "E371" and words in [problem.what for problem in error.problems]


def test_a_teacher_with_another_tokenizer(place: Path, tmp_path: Path) -> None:
    """Two tokens that changed places would teach the student to say one for the other."""
    teacher = shutil.copytree(place / "teacher", tmp_path / "teacher")
    document = json.loads((teacher / "tokenizer.json").read_text())
    vocab = document["model"]["vocab"]
    vocab["Ġt"], vocab["he"] = vocab["he"], vocab["Ġt"]
    (teacher / "tokenizer.json").write_text(json.dumps(document))
    error = refused(BadInput, place / "student", tmp_path / "out", teacher, place / "text.txt")
    assert error.error_id == "E371" and "2 tokens have other ids" in error.problems[0].what


@pytest.mark.parametrize("fmt", ["ct", "marlin"])
def test_a_quantized_teacher(place: Path, tmp_path: Path, fmt: str) -> None:
    """A student would learn the rounding of its own relative instead of the original."""
    make_packed(place / "teacher", tmp_path / fmt, fmt)
    error = refused(BadInput, place / "student", tmp_path / "out", tmp_path / fmt, place / "text.txt")
    assert error.error_id == "E313" and "already quantized" in error.problems[0].what


def test_a_student_that_rounds_activations(place: Path, tmp_path: Path) -> None:
    """Rounding has no gradient: training would go through products that the published model does not compute."""
    overrides = {"down_proj": {"bits": 8, "activations": "int8"}}
    runs.quantize(place / "teacher", tmp_path / "int8", runs.recipe(place / "text.txt", quantize__overrides=overrides))
    error = refused(BadInput, tmp_path / "int8", tmp_path / "out", place / "teacher", place / "text.txt", mode="scales")
    assert error.error_id == "E313" and "int8 activations" in error.problems[0].what


@pytest.mark.parametrize("broken", ["student", "teacher"])
def test_nan_in_either_model(place: Path, tmp_path: Path, broken: str) -> None:
    """A NaN in one weight would be in every loss after hours of loading."""
    folders = {name: shutil.copytree(place / name, tmp_path / name) for name in ("student", "teacher")}
    edit_tensor(folders[broken], "model.norm.weight", lambda w: w.index_fill(0, torch.tensor([5]), torch.nan))
    error = refused(NumericalProblem, folders["student"], tmp_path / "out", folders["teacher"], place / "text.txt")
    assert error.error_id == "E620" and "model.norm.weight[5]" in error.problems[0].what


def test_tensors_that_are_missing(place: Path, student: Path, tmp_path: Path) -> None:
    """transformers would fill them with random numbers and train those."""
    tensors = load_file(student / "model.safetensors")
    del tensors[f"{UP}.weight"]
    save_file(tensors, student / "model.safetensors", metadata={"format": "pt"})
    error = refused(BadInput, student, tmp_path / "out", place / "teacher", place / "text.txt")
    assert error.error_id == "E302" and UP in error.problems[0].what


@pytest.mark.parametrize("fmt", ["gptq", "marlin"])
def test_a_student_in_a_format_of_servers(place: Path, tmp_path: Path, fmt: str, capsys: pytest.CaptureFixture[str]) -> None:
    """gptq and marlin folders hold the same codes, but are not what this writes; the command line looks at a student before a run does."""
    make_packed(place / "teacher", tmp_path / fmt, fmt)
    error = refused(BadInput, tmp_path / fmt, tmp_path / "out", place / "teacher", place / "text.txt", mode="scales")
    assert error.error_id == "E313" and "--format ct" in error.problems[0].fix
    asked = ["distill", str(tmp_path / fmt), str(tmp_path / "out"), "--teacher", str(place / "teacher"), "--mode", "scales"]
    assert main([*asked, "--tokens", "512", "--data", str(place / "text.txt"), "-q"]) == 3
    assert "marlinctl pack STUDENT OUT --format ct" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("student", "changes", "error_id", "words"),
    [
        ("student", {"tokens": 0}, "E202", "for how long"),
        ("student", {"mode": "scales"}, "E288", "no scales to train"),
        ("packed", {}, "E288", "would change its codes"),
        ("packed", {"mode": "blockwise"}, "E288", "would change its codes"),
        ("student", {"kl": 0.0, "squarehead": 0.0}, "E288", "nothing to train on"),
        ("student", {"cache_logits": 8}, "E288", "hidden states, and a cache holds its predictions only"),
        ("student", {"cache_logits": 8, "mode": "blockwise"}, "E288", "not from logits"),
        ("student", {"sequence_length": 1024}, "E246", "longer than the model can read"),
        ("student", {"batch_tokens": 16}, "E288", "shorter than one row"),
    ],
)
def test_settings_that_contradict_each_other(
    place: Path, tmp_path: Path, student: str, changes: dict[str, Any], error_id: str, words: str
) -> None:
    """A setting that is ignored in silence is a run of hours for something else than was asked for."""
    error = refused(UsageError, place / student, tmp_path / "out", place / "teacher", place / "text.txt", **changes)
    assert error.error_id == error_id and words in error.problems[0].what


@pytest.mark.parametrize(
    ("text", "kind", "error_id", "what"),
    [
        ("", BadInput, "E393", "empty"),
        ("too short for one row", BadInput, "E393", "at least one to train on"),
        (None, UsageError, "E240", "no such text"),
    ],
)
def test_text_that_is_not_enough(
    place: Path, tmp_path: Path, text: str | None, kind: type[MarlinctlError], error_id: str, what: str
) -> None:
    """Without a row to train on and one to measure on, the figures would be those of nothing."""
    source = tmp_path / "text.txt"
    if text is not None:
        source.write_text(text)
    error = refused(kind, place / "student", tmp_path / "out", place / "teacher", source)
    assert error.error_id == error_id and what in str(error)


def test_an_output_that_is_in_the_way(place: Path, student: Path, tmp_path: Path) -> None:
    """The student must never be overwritten by its own result."""
    error = refused(UsageError, student, student, place / "teacher", place / "text.txt")
    assert error.error_id == "E225" and "(input: " in error.problems[0].where


def test_all_problems_of_one_kind_are_told_together(place: Path, student: Path, tmp_path: Path) -> None:
    """Mending one linear after the other, with a run for each, is no way to find them all."""
    (student / NAME).unlink()
    ones: Callable[[Tensor], Tensor] = torch.ones_like
    for name in (f"{UP}.weight", "model.layers.0.mlp.down_proj.weight"):
        edit_tensor(student, name, ones)
    error = refused(BadInput, student, tmp_path / "out", place / "teacher", place / "text.txt")
    assert [problem.what.split()[0] for problem in error.problems] == ["model.layers.0.mlp.down_proj", UP]


def test_a_mask_file_may_leave_linears_dense(place: Path, tmp_path: Path) -> None:
    """Skipped linears have no mask; they are trained without one."""
    keeps = prune(place / "teacher", tmp_path / "student")
    edit_tensor(tmp_path / "student", f"{UP}.weight", torch.ones_like)
    (tmp_path / "student" / NAME).unlink()
    write_masks(tmp_path / "student", {name: keep for name, keep in keeps.items() if name != UP})
    report = distill(tmp_path / "student", tmp_path / "out", place / "teacher", recipe(place / "text.txt", tokens=512))
    assert report["sparse_linears"] == len(keeps) - 1
