"""`pack` of 2:4 models: masks, zeros and metadata say the same, in every format."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from marlinctl.checkpoint import manifest, writer
from marlinctl.checkpoint.formats import registry
from marlinctl.checkpoint.formats.base import Format, LinearParts
from marlinctl.checkpoint.mask import open_masks, pack_bits
from marlinctl.checkpoint.reader import open_checkpoint
from marlinctl.checkpoint.transformers_model import load_dense
from marlinctl.convert import repack
from marlinctl.errors import BadInput, CheckFailed
from marlinctl.system.console import Console
from tests.convert.folders import LAYER, weights
from tests.packed import (
    edit_masks,
    edit_tensors,
    keep_of,
    make_packed,
    make_sparse_packed,
    pruned,
    remake_manifest,
)
from tests.tiny import make_tiny

SPARSE = ("ct", "gptq", "marlin", "marlin_24")
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def sparse(source: Path) -> dict[str, Path]:
    """One 2:4 model in each packed format; many of its kept weights are zero."""
    folders = {fmt: source.parent / f"sparse-{fmt}" for fmt in SPARSE}
    for fmt, folder in folders.items():
        make_sparse_packed(source, folder, fmt, overrides={DOWN: 64}, skip=["model.layers.1.self_attn.o_proj"])
    return folders


@pytest.mark.parametrize("target", SPARSE)
@pytest.mark.parametrize("origin", SPARSE)
def test_every_sparse_format_becomes_every_other_bit_for_bit(sparse: dict[str, Path], tmp_path: Path, origin: str, target: str) -> None:
    """The mask is part of the model: kept weights that are zero must stay kept weights, whatever the way."""
    repack.repack(sparse[origin], tmp_path / "out", format=target)
    made, want = weights(tmp_path / "out"), weights(sparse[target])  # the mask file is among them
    assert set(made) == set(want)
    assert all(torch.equal(made[name], want[name]) for name in want)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "sparsity_config" not in config["quantization_config"]  # servers refuse a model that has one
    document = manifest.check(tmp_path / "out")
    assert document["pattern"] == "2:4" and ("marlinctl_mask.safetensors" in document["files"]) is (target != "marlin_24")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| Pruned | 2:4" in card and ("the metadata says which" in card) is (target == "marlin_24")


def test_marlin_24_is_as_small_as_it_promises(sparse: dict[str, Path], tmp_path: Path) -> None:
    """3.125 bits at group size 128 are why people take it; and it loads to the same model."""
    done = repack.repack(sparse["ct"], tmp_path / "out", format="marlin_24", also=("ct", "dense"))
    assert [entry["format"] for entry in done["outputs"]] == ["marlin_24", "ct", "dense"] and done["source"]["pattern"] == "mask file"
    for entry in done["outputs"]:
        checkpoint = open_checkpoint(Path(entry["folder"]), weight_files="auto")
        assert entry["weight_bytes"] == sum(info.end - info.begin for info in checkpoint.tensors.values())
    tensors = weights(tmp_path / "out")
    linear = [tensors[f"{LAYER}.{suffix}"] for suffix in ("B_24", "B_meta", "s")]
    assert 8 * sum(t.numel() * t.element_size() for t in linear) == (3 + 16 / 32) * 256 * 128
    one, other = load_dense(tmp_path / "out", dtype=torch.float32), load_dense(sparse["ct"], dtype=torch.float32)
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())
    masks = [load_file(tmp_path / name / "marlinctl_mask.safetensors") for name in ("out-ct", "out-dense")]
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0]) and len(masks[0]) == 13


def test_a_pattern_that_nobody_states_is_found_and_said(source: Path, tmp_path: Path) -> None:
    """Most 2:4 models of other tools have no mask file. Survivors that are zero are a guess then, so it is said."""
    codes = make_sparse_packed(source, tmp_path / "in", "gptq", stated=False)
    story = StringIO()
    done = repack.repack(tmp_path / "in", tmp_path / "out", format="marlin_24", also=("ct",), console=Console(stderr=story))
    assert done["source"]["pattern"] == "zeros" and "derived from codes that are zero" in story.getvalue()
    checkpoint = open_checkpoint(tmp_path / "out", weight_files="auto")
    info = registry.detect(checkpoint.config, checkpoint.tensors)
    with open_masks(tmp_path / "out-ct") as masks:
        assert masks is not None
        for layer, q in codes.items():
            parts = registry.read_parts(checkpoint, info, layer)
            assert parts.keep is not None and torch.equal(parts.codes, q.codes)
            assert torch.equal(masks.keep(layer, *q.codes.shape), parts.keep)  # the copy says the same
    repack.repack(tmp_path / "in", tmp_path / "plain", format="ct")  # without a pattern asked for, none is made up
    assert not (tmp_path / "plain" / "marlinctl_mask.safetensors").exists()


def refused(folder: Path, out: Path, fmt: str = "marlin_24") -> BadInput:
    with pytest.raises(BadInput) as caught:
        repack.repack(folder, out, format=fmt)
    assert not list(out.parent.glob(f"{out.name}*")), "something was written"
    return caught.value


def test_linears_that_are_not_two_of_four_are_listed(source: Path, tmp_path: Path) -> None:
    """Dropping the third weight of a quad without a word is what other packers do."""
    make_sparse_packed(source, tmp_path / "in", "ct", stated=False)

    def crowd(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{LAYER}.weight_packed"][7, 3] = 0x1111_1111
        tensors[f"{DOWN}.weight_packed"][0, 0] = 0x7777_8888

    edit_tensors(tmp_path / "in", crowd)
    remake_manifest(tmp_path / "in")
    problem = refused(tmp_path / "in", tmp_path / "out")
    assert problem.error_id == "E356" and [p.what.split(":")[0] for p in problem.problems] == [LAYER, DOWN]
    assert "row 7, columns 24..27: 4 of four codes" in problem.problems[0].what
    make_packed(source, tmp_path / "dense")
    assert len(refused(tmp_path / "dense", tmp_path / "out").problems) == 14


def test_masks_and_codes_that_contradict_each_other_are_refused(sparse: dict[str, Path], tmp_path: Path) -> None:
    """A mask of another run fits in shape: packed by it, the model would lose weights, whatever the target."""
    shutil.copytree(sparse["ct"], tmp_path / "in")

    def shift(masks: dict[str, torch.Tensor]) -> None:
        for name in (f"{LAYER}.keep", f"{DOWN}.keep"):
            masks[name] = masks[name].flip(1)

    edit_masks(tmp_path / "in", shift)
    remake_manifest(tmp_path / "in")
    for fmt in ("marlin_24", "marlin", "dense"):
        problem = refused(tmp_path / "in", tmp_path / "out", fmt)
        assert problem.error_id == "E356" and [p.what.split(":")[0] for p in problem.problems] == [LAYER, DOWN]
        assert "row 0, column " in problem.problems[0].what


def test_damaged_masks_are_all_listed(sparse: dict[str, Path], tmp_path: Path) -> None:
    """One problem at a time would cost a pass over the model for each."""
    shutil.copytree(sparse["ct"], tmp_path / "in")
    edit_masks(
        tmp_path / "in",
        lambda masks: masks.update(
            {f"{LAYER}.keep": masks[f"{LAYER}.keep"] | 1, f"{DOWN}.keep": masks[f"{DOWN}.keep"][:, :-1].contiguous()}
        ),
    )
    remake_manifest(tmp_path / "in")
    problem = refused(tmp_path / "in", tmp_path / "out")
    said = " ".join(p.what for p in problem.problems)
    assert "is not 2:4" in said and "its weight" in said
    assert {p.what.split(" ")[3] for p in problem.problems} == {LAYER, DOWN} and problem.error_id == "E356"


def test_a_linear_without_a_mask_is_dense(sparse: dict[str, Path], tmp_path: Path) -> None:
    """In a folder with a mask file, what it does not name was not pruned, even if its codes look so; only marlin_24 minds."""
    shutil.copytree(sparse["ct"], tmp_path / "in")
    edit_masks(tmp_path / "in", lambda masks: masks.pop(f"{LAYER}.keep"))
    remake_manifest(tmp_path / "in")
    problem = refused(tmp_path / "in", tmp_path / "out")
    assert problem.error_id == "E356" and [p.what.split(", ")[0] for p in problem.problems] == [f"{LAYER} has no mask"]
    repack.repack(tmp_path / "in", tmp_path / "out", format="gptq")
    assert len(load_file(tmp_path / "out" / "marlinctl_mask.safetensors")) == 12


def test_a_mask_of_nothing_is_refused(sparse: dict[str, Path], tmp_path: Path) -> None:
    """It belongs to another model, and who knows what else does."""
    shutil.copytree(sparse["ct"], tmp_path / "in")
    edit_masks(tmp_path / "in", lambda masks: masks.update({"model.layers.7.mlp.up_proj.keep": masks[f"{LAYER}.keep"].clone()}))
    problem = refused(tmp_path / "in", tmp_path / "out", "ct")
    assert problem.error_id == "E356" and "no such linear" in str(problem)


def test_masks_of_16_bit_linears_travel_along(source: Path, tmp_path: Path) -> None:
    """A linear that was pruned and not quantized stays pruned; without its mask the model could not be fine-tuned again."""
    name = "model.layers.1.self_attn.o_proj"
    pruned_source = make_tiny(tmp_path / "source")
    keep = keep_of(name, 128, 128)
    edit_tensors(pruned_source, lambda tensors: tensors[f"{name}.weight"].mul_(keep))
    masks = {
        layer: keep_of(layer, *q.codes.shape) for layer, q in make_sparse_packed(pruned_source, tmp_path / "x", "ct", skip=[name]).items()
    }
    make_packed(pruned_source, tmp_path / "in", "ct", skip=[name], prune=pruned, masks={**masks, name: keep})
    for fmt in ("marlin_24", "ct", "dense"):
        repack.repack(tmp_path / "in", tmp_path / fmt, format=fmt)
        found = load_file(tmp_path / fmt / "marlinctl_mask.safetensors")
        assert torch.equal(found[f"{name}.keep"], pack_bits(keep)) and len(found) == (1 if fmt == "marlin_24" else 14)
    repack.repack(tmp_path / "marlin_24", tmp_path / "back", format="ct")
    assert weights(tmp_path / "back").keys() == weights(tmp_path / "in").keys()
    edit_tensors(tmp_path / "in", lambda tensors: tensors[f"{name}.weight"].fill_(1))
    remake_manifest(tmp_path / "in")
    problem = refused(tmp_path / "in", tmp_path / "out", "ct")
    assert problem.error_id == "E356" and str(problem).startswith(f"{name}: row ")


@pytest.mark.parametrize("target", ["ct", "dense", "marlin_24"])
def test_a_wrong_mask_on_the_way_to_disk_is_noticed(
    sparse: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    """Survivors that are zero could move without changing a single weight: only comparing masks notices."""
    keep = keep_of(LAYER, 256, 128)
    moved = keep.clone()
    codes = registry.read_parts(*(lambda c: (c, registry.detect(c.config, c.tensors)))(open_checkpoint(sparse["ct"])), LAYER).codes
    row, quad = ((codes != 0).reshape(256, -1, 4).sum(-1) == 0).nonzero()[0].tolist()  # a quad whose kept weights are both zero
    moved[row, 4 * quad : 4 * quad + 4] = ~keep[row, 4 * quad : 4 * quad + 4]
    write, pack = writer.StagedCheckpoint.write_mask, registry.linear_tensors

    def write_moved(stage: writer.StagedCheckpoint, layer: str, kept: torch.Tensor) -> None:
        write(stage, layer, moved if layer == LAYER else kept)

    def pack_moved(fmt: Format, layer: str, parts: LinearParts) -> dict[str, torch.Tensor]:
        return pack(fmt, layer, replace(parts, keep=moved) if layer == LAYER else parts)

    monkeypatch.setattr(writer.StagedCheckpoint, "write_mask", write_moved)
    monkeypatch.setattr(registry, "linear_tensors", pack_moved)
    with pytest.raises(CheckFailed, match="kept weights read back differ") as caught:
        repack.repack(sparse["ct"], tmp_path / "out", format=target)
    assert caught.value.error_id == "E103" and LAYER in caught.value.problems[0].what and not list(tmp_path.glob("out*"))


def test_a_lost_mask_is_noticed(sparse: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the linear would count as dense from now on."""
    write = writer.StagedCheckpoint.write_mask
    monkeypatch.setattr(writer.StagedCheckpoint, "write_mask", lambda stage, layer, keep: layer == LAYER or write(stage, layer, keep))
    with pytest.raises(CheckFailed, match=LAYER):
        repack.repack(sparse["marlin_24"], tmp_path / "out", format="ct")
