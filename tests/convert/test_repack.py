"""`pack`: every format becomes every other bit for bit, in one folder or several, and what goes wrong on the way is noticed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from marlinctl.checkpoint import manifest, writer
from marlinctl.checkpoint.formats import registry
from marlinctl.checkpoint.formats.base import Format, LinearParts
from marlinctl.checkpoint.reader import open_checkpoint
from marlinctl.checkpoint.transformers_model import load_dense
from marlinctl.convert import repack
from marlinctl.errors import BadInput, CheckFailed, ResourceProblem, UsageError
from marlinctl.system.console import Console
from tests import runs, zoo
from tests.convert.folders import LAYER, weights
from tests.packed import (
    ct_block,
    edit_json,
    foreign_ct,
    make_foreign,
    remake_manifest,
    tree,
)
from tests.tiny import make_tiny


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
