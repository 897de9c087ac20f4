from __future__ import annotations

import json
import shutil
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from marlinctl.checkpoint import manifest, writer
from marlinctl.checkpoint.formats import registry
from marlinctl.checkpoint.formats.base import Format, LinearParts
from marlinctl.checkpoint.mask import open_masks, pack_bits
from marlinctl.checkpoint.reader import open_checkpoint
from marlinctl.checkpoint.transformers_model import load_dense
from marlinctl.convert import repack
from marlinctl.errors import BadInput, CheckFailed, MarlinctlError, ResourceProblem, UsageError
from marlinctl.system.console import Console
from tests import runs, zoo
from tests.packed import (
    ct_block,
    edit_json,
    edit_masks,
    edit_tensors,
    foreign_ct,
    foreign_gptq,
    gptq_block,
    keep_of,
    make_foreign,
    make_packed,
    make_sparse_packed,
    pruned,
    remake_manifest,
    tree,
)
from tests.tiny import make_tiny

LAYER = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("repack") / "source", shards=2)


@pytest.fixture(scope="module")
def packed(source: Path) -> dict[str, Path]:
    """One model in each packed format, with exceptions among its group sizes and a skipped linear."""
    folders = {}
    for fmt in ("ct", "gptq", "marlin"):
        folders[fmt] = source.parent / fmt
        options = {"overrides": {"model.layers.1.mlp.down_proj": 64, "model.layers.0.self_attn.o_proj": -1}}
        make_packed(source, folders[fmt], fmt, skip=["model.layers.1.self_attn.o_proj"], **options)  # type: ignore[arg-type]
    return folders


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {path: tensor for shard in folder.glob("*.safetensors") for path, tensor in load_file(shard).items()}


@pytest.mark.parametrize("target", ["ct", "gptq", "marlin"])
@pytest.mark.parametrize("origin", ["ct", "gptq", "marlin"])
def test_every_format_becomes_every_other_bit_for_bit(packed: dict[str, Path], tmp_path: Path, origin: str, target: str) -> None:
    """The codes are the model; converting there must give what quantizing into that format gave in the first place."""
    repack.repack(packed[origin], tmp_path / "out", format=target)
    made, want = weights(tmp_path / "out"), weights(packed[target])
    assert set(made) == set(want)
    assert all(torch.equal(made[name], want[name]) for name in want)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", packed[target])]
    for config in configs:
        config["quantization_config"].pop("marlinctl")
    assert configs[0] == configs[1]
    manifest.check(tmp_path / "out")


def test_repacking_twice_gives_equal_files(packed: dict[str, Path], tmp_path: Path) -> None:
    """Published files must not depend on the run."""
    for name in ("a", "b"):
        repack.repack(packed["ct"], tmp_path / name, format="marlin")
    one, two = tree(tmp_path / "a"), tree(tmp_path / "b")
    assert {name: data for name, data in one.items() if name != "README.md"} == {n: d for n, d in two.items() if n != "README.md"}


def test_dense_is_the_dequantized_model_rounded_to_fp16(packed: dict[str, Path], tmp_path: Path) -> None:
    """A dense copy with other weights than the packed model would be measured in its place."""
    repack.repack(packed["marlin"], tmp_path / "out", format="dense")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    dense, reference = load_dense(tmp_path / "out", dtype=torch.float32), load_dense(packed["ct"], dtype=torch.float32)
    for name, tensor in reference.state_dict().items():
        want = tensor.half().float() if name.endswith("proj.weight") else tensor
        assert torch.equal(dense.state_dict()[name], want), name


def test_companions_provenance_and_origin_travel(packed: dict[str, Path], tmp_path: Path) -> None:
    """Without the tokenizer the folder does not run; without the source's digest nobody can tell what it was made from."""
    repack.repack(packed["ct"], tmp_path / "out", format="gptq")
    out = tmp_path / "out"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (packed["ct"] / name).read_bytes()
    document = manifest.read(out)
    assert document["packed_from"] == {"format": "ct", "variant": "", "manifest_sha256": manifest.digest(packed["ct"])}
    assert document["recipe"] == {"sha256": "0" * 64}  # what the quantization noted is kept
    block = json.loads((out / "config.json").read_text())["quantization_config"]
    assert block["marlinctl"]["version"] != "test" and json.loads((out / "quantize_config.json").read_text()) == block
    card = (out / "README.md").read_text()
    assert "marlinctl pack ct out --format gptq" in card and "model.layers.1.self_attn.o_proj" in card
    assert "base_model: org/Tiny" in card and "0" * 64 in card


# ---- 2:4 -----------------------------------------------------------------------------------------------------------------------------

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
    repack.repack(tmp_path / "in", tmp_path / "plain", format="ct")  # nobody asked for a pattern, so none is made up
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
    """A linear that was pruned and not quantized stays pruned; without its mask nobody could fine-tune the model again."""
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


# ---- several folders at once ---------------------------------------------------------------------------------------------------------


def test_also_publishes_a_second_folder(packed: dict[str, Path], tmp_path: Path) -> None:
    """A native folder alone is useless to servers; one pass must give both."""
    done = repack.repack(packed["gptq"], tmp_path / "m", format="marlin", also=("ct", "dense"))
    assert [entry["format"] for entry in done["outputs"]] == ["marlin", "ct", "dense"]
    for name, fmt in (("m", "marlin"), ("m-ct", "ct"), ("m-dense", "dense")):
        checkpoint = open_checkpoint(tmp_path / name, weight_files="auto")
        assert registry.detect(checkpoint.config, checkpoint.tensors).name == fmt
        size = next(entry["weight_bytes"] for entry in done["outputs"] if entry["format"] == fmt)
        assert size == sum(info.end - info.begin for info in checkpoint.tensors.values())  # what the disk was asked for


def test_both_folders_or_neither(packed: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two would be taken for a finished run."""
    real = repack.check_written

    def second_fails(source: repack.Source, fmt: Format, folder: Path, console: Console) -> None:
        if fmt.name == "ct":
            raise CheckFailed("E103", "damaged", where="", fix="")
        real(source, fmt, folder, console)

    monkeypatch.setattr(repack, "check_written", second_fails)
    with pytest.raises(CheckFailed):
        repack.repack(packed["gptq"], tmp_path / "m", format="marlin", also=("ct",))
    assert [path.name for path in tmp_path.iterdir() if path.name != "marlinctl-cache"] == []


@pytest.mark.parametrize(("fmt", "also"), [("ct", ("ct",)), ("awq", ()), ("ct", ("marlin", "marlin")), ("marlin", ("gguf",))])
def test_impossible_formats_are_refused(packed: dict[str, Path], tmp_path: Path, fmt: str, also: tuple[str, ...]) -> None:
    """A mistyped format must not cost a pass over the model."""
    with pytest.raises(UsageError):
        repack.repack(packed["ct"], tmp_path / "out", format=fmt, also=also)


def test_output_rules_hold_for_every_folder(packed: dict[str, Path], tmp_path: Path) -> None:
    """OUT-ct may exist although OUT does not: it must not be replaced."""
    (tmp_path / "out-ct").mkdir()
    (tmp_path / "out-ct" / "config.json").write_text("{}")
    with pytest.raises(UsageError) as caught:
        repack.repack(packed["ct"], tmp_path / "out", format="marlin", also=("ct",))
    assert caught.value.error_id == "E222" and not (tmp_path / "out").exists()


# ---- foreign input -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("v2", "block"), [(False, {}), (True, {"checkpoint_format": "gptq_v2"}), (False, {"desc_act": True})])
def test_foreign_gptq_becomes_ct(source: Path, tmp_path: Path, v2: bool, block: dict[str, object]) -> None:
    """Most published 4-bit models are GPTQ files of other programs."""
    single = make_tiny(tmp_path / "single")
    codes = make_foreign(single, tmp_path / "in", gptq_block(**block), lambda q: foreign_gptq(q, v2=v2))
    repack.repack(tmp_path / "in", tmp_path / "out", format="ct")
    checkpoint = open_checkpoint(tmp_path / "out")
    info = registry.detect(checkpoint.config, checkpoint.tensors)
    assert all(torch.equal(registry.read_linear(checkpoint, info, layer).codes, q.codes) for layer, q in codes.items())
    assert "fingerprint" in manifest.read(tmp_path / "out")["packed_from"]


def test_version_2_under_the_label_of_version_1_is_read_on_demand(packed: dict[str, Path], tmp_path: Path) -> None:
    """Several published folders are labelled so. If the flag were followed without looking, a right label would give other weights."""
    single = make_tiny(tmp_path / "single")
    codes = make_foreign(single, tmp_path / "in", gptq_block(), lambda q: foreign_gptq(q, v2=True))
    with pytest.raises(BadInput, match="marlinctl pack --gptq-v2"):
        repack.repack(tmp_path / "in", tmp_path / "out", format="gptq")
    repack.repack(tmp_path / "in", tmp_path / "out", format="gptq", gptq_v2=True)
    checkpoint = open_checkpoint(tmp_path / "out")
    info = registry.detect(checkpoint.config, checkpoint.tensors)
    assert all(torch.equal(registry.read_linear(checkpoint, info, layer).codes, q.codes) for layer, q in codes.items())
    assert checkpoint.config["quantization_config"]["checkpoint_format"] == "gptq"
    with pytest.raises(BadInput, match="symmetric in gptq and not in gptq_v2"):
        repack.repack(tmp_path / "out", tmp_path / "again", format="ct", gptq_v2=True)
    with pytest.raises(UsageError, match="this is not one"):
        repack.repack(packed["ct"], tmp_path / "again", format="gptq", gptq_v2=True)


def test_act_order_is_explained(tmp_path: Path) -> None:
    """Old GPTQ files have activation order at run time; converting them without their order gives noise."""
    make_foreign(
        make_tiny(tmp_path / "single"),
        tmp_path / "in",
        gptq_block(desc_act=True),
        lambda q: {**foreign_gptq(q), "g_idx": foreign_gptq(q)["g_idx"].flip(0)},
    )
    with pytest.raises(BadInput) as caught:
        repack.repack(tmp_path / "in", tmp_path / "out", format="ct")
    problem = caught.value.problems[0]
    assert "model.layers.0" in problem.what and "static order" in problem.fix and not (tmp_path / "out").exists()


def test_scales_that_fp16_cannot_hold_go_to_ct_only(tmp_path: Path) -> None:
    """bf16 scales of foreign files reach 1e38; rounding them quietly would change the model."""
    make_foreign(
        make_tiny(tmp_path / "single"),
        tmp_path / "in",
        ct_block(actorder="static"),
        lambda q: {**foreign_ct(q), "weight_scale": q.scales.float() * 1.001},
    )
    repack.repack(tmp_path / "in", tmp_path / "ct", format="ct")
    assert open_checkpoint(tmp_path / "ct").tensors[f"{LAYER}.weight_scale"].dtype == "F32"
    for fmt in ("marlin", "gptq"):
        with pytest.raises(BadInput) as caught:
            repack.repack(tmp_path / "in", tmp_path / fmt, format=fmt)
        assert caught.value.error_id == "E349" and "model.layers." in caught.value.problems[0].what
    repack.repack(tmp_path / "in", tmp_path / "dense", format="dense")
    want = {name: tensor.half() for name, tensor in load_dense(tmp_path / "in", dtype=torch.float32).state_dict().items()}
    assert torch.equal(weights(tmp_path / "dense")[f"{LAYER}.weight"], want[f"{LAYER}.weight"])


def test_dense_refuses_what_float16_cannot_hold(tmp_path: Path) -> None:
    """Infinity in a weight makes every output NaN."""
    make_foreign(
        make_tiny(tmp_path / "single"),
        tmp_path / "in",
        ct_block(),
        lambda q: {**foreign_ct(q), "weight_scale": torch.full_like(q.scales, 6e4).bfloat16()},
    )
    with pytest.raises(MarlinctlError) as caught:
        repack.repack(tmp_path / "in", tmp_path / "out", format="dense")
    assert (caught.value.error_id, caught.value.exit_code) == ("E604", 6)


@pytest.mark.parametrize(
    ("prepare", "error_id", "what"),
    [
        (lambda single, out: single.rename(out), "E313", "is not quantized"),
        (lambda single, out: make_foreign(single, out, ct_block(num_bits=8), foreign_ct), "E349", "8-bit"),
        (lambda single, out: make_foreign(single, out, gptq_block(bits=8), foreign_gptq), "E302", "config.json asks for"),
        (lambda single, out: make_foreign(single, out, ct_block(num_bits=3), foreign_ct), "E340", "3-bit"),
        (lambda single, out: make_foreign(single, out, gptq_block(bits=3), foreign_gptq), "E340", "3-bit"),
        (lambda single, out: make_foreign(single, out, gptq_block(), foreign_ct), "E302", "config.json says gptq"),
        (lambda single, out: make_foreign(single, out, ct_block(group_size=96), foreign_ct), "E349", "96"),
        (lambda single, out: make_foreign(single, out, ct_block(group_size=64), foreign_ct), "E346", "config.json says group_size 64"),
    ],
)
def test_unfit_input_is_refused_and_nothing_is_written(tmp_path: Path, prepare: object, error_id: str, what: str) -> None:
    """Exit 3 with the reason, instead of a folder of noise."""
    prepare(make_tiny(tmp_path / "single"), tmp_path / "in")  # type: ignore[operator]
    with pytest.raises(BadInput) as caught:
        repack.repack(tmp_path / "in", tmp_path / "out", format="marlin")
    assert caught.value.error_id == error_id and what in str(caught.value) and not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("out*"))


def test_gptq_needs_multiples_of_eight_and_says_so_first(tmp_path: Path) -> None:
    """Eight codes share a word: an odd shape would fail in the middle of the pass."""
    folder = make_tiny(tmp_path / "single", hidden_size=48, num_attention_heads=4, num_key_value_heads=1, head_dim=12, intermediate_size=36)
    make_packed(folder, tmp_path / "in", "ct", group_size=-1)
    with pytest.raises(BadInput) as caught:
        repack.repack(tmp_path / "in", tmp_path / "out", format="gptq")
    assert caught.value.error_id == "E349" and len(caught.value.problems) == 10  # k, v, gate, up and down of two blocks
    repack.repack(tmp_path / "in", tmp_path / "out", format="marlin")  # which pads


# ---- faults --------------------------------------------------------------------------------------------------------------------------


def test_a_wrong_byte_on_the_way_to_disk_is_noticed(packed: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check reads what was written, from disk: a packer or a disk that corrupts codes must not get past it."""
    real = registry.linear_tensors

    def corrupt(fmt: Format, layer: str, q: LinearParts) -> dict[str, torch.Tensor]:
        tensors = real(fmt, layer, q)
        if layer == LAYER:
            tensors[f"{layer}.B"] = tensors[f"{layer}.B"].clone()
            tensors[f"{layer}.B"][0, 0] ^= 1 << 9
        return tensors

    monkeypatch.setattr(registry, "linear_tensors", corrupt)
    with pytest.raises(CheckFailed) as caught:
        repack.repack(packed["ct"], tmp_path / "out", format="marlin")
    assert caught.value.error_id == "E103" and LAYER in caught.value.problems[0].what
    assert not list(tmp_path.glob("out*"))


def test_a_lost_tensor_is_noticed(packed: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients fill a missing norm with ones and continue."""
    real = writer.StagedCheckpoint.copy_tensors
    monkeypatch.setattr(
        writer.StagedCheckpoint, "copy_tensors", lambda self, c, names: real(self, c, [n for n in names if n != "model.norm.weight"])
    )
    with pytest.raises(CheckFailed, match=r"model\.norm\.weight"):
        repack.repack(packed["ct"], tmp_path / "out", format="gptq")


def test_a_full_disk_is_said_before_the_pass(packed: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sizes are known from the headers, so the pass need not be tried."""
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(ResourceProblem) as caught:
        repack.repack(packed["ct"], tmp_path / "out", format="marlin", also=("ct",))
    assert "10 are free" in caught.value.problems[0].what


def test_shards_stay_small_in_memory(packed: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished tensors are written as soon as a shard's worth is there: the whole model is never in memory."""
    monkeypatch.setattr(repack, "SHARD_BYTES", 20_000)
    pieces: list[int] = []
    write_shard = writer.StagedCheckpoint.write_shard

    def noted(self: writer.StagedCheckpoint, tensors: dict[str, torch.Tensor]) -> str:
        pieces.append(sum(tensor.nbytes for tensor in tensors.values()))
        return write_shard(self, tensors)

    monkeypatch.setattr(writer.StagedCheckpoint, "write_shard", noted)
    repack.repack(packed["ct"], tmp_path / "out", format="marlin")
    assert len(pieces) > 3 and max(pieces) < 50_000
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["marlin.safetensors"]
    manifest.check(tmp_path / "out")


def test_a_damaged_source_config_is_no_model(packed: dict[str, Path], tmp_path: Path) -> None:
    """A source whose codes belong to another group size must be refused by the layer's name."""
    shutil.copytree(packed["marlin"], tmp_path / "in")
    edit_json(tmp_path / "in" / "config.json", lambda c: c["quantization_config"].update(group_size=16))
    remake_manifest(tmp_path / "in")
    with pytest.raises(BadInput) as caught:
        repack.repack(tmp_path / "in", tmp_path / "out")
    assert caught.value.error_id == "E346" and "s has shape" in caught.value.problems[0].what


def test_extra_tensors_of_the_source_are_kept(tmp_path: Path) -> None:
    """A bias or a buffer that no linear owns must not get lost."""
    make_foreign(make_tiny(tmp_path / "single"), tmp_path / "in", ct_block(), foreign_ct)
    edit_json(tmp_path / "in" / "config.json", lambda config: config.update(mlp_bias=True))
    tensors = load_file(tmp_path / "in" / "model.safetensors")
    rows = {"gate_proj": 256, "up_proj": 256, "down_proj": 128}
    biases = {f"model.layers.{i}.mlp.{name}.bias": torch.ones(n) for i in range(2) for name, n in rows.items()}
    save_file({**tensors, **biases}, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    repack.repack(tmp_path / "in", tmp_path / "out", format="marlin")
    assert torch.equal(weights(tmp_path / "out")[f"{LAYER}.bias"], torch.ones(256))


@pytest.mark.slow
def test_modules_that_no_tensor_is_called_after_stay_in_ignore(tmp_path: Path) -> None:
    """If the renamed router of PhiMoE were lost on the way back to ct, transformers would take it for a packed linear."""
    source = zoo.build("phimoe", tmp_path / "model")
    asked = runs.recipe(runs.write_text(tmp_path / "text.txt"), calibration__sequence_length=32)
    runs.quantize(source, tmp_path / "ct", asked)
    repack.repack(tmp_path / "ct", tmp_path / "gptq", format="gptq")
    repack.repack(tmp_path / "gptq", tmp_path / "back", format="ct")
    first, back = (json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]["ignore"] for name in ("ct", "back"))
    assert back == first and "model.layers.0.mlp.router" in back
