"""`pack` of folders that other tools wrote, and what no format can hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from marlinctl.checkpoint import manifest
from marlinctl.checkpoint.formats import registry
from marlinctl.checkpoint.reader import open_checkpoint
from marlinctl.checkpoint.transformers_model import load_dense
from marlinctl.convert import repack
from marlinctl.errors import BadInput, MarlinctlError, UsageError
from tests.convert.folders import LAYER, weights
from tests.packed import (
    ct_block,
    foreign_ct,
    foreign_gptq,
    gptq_block,
    make_foreign,
    make_packed,
)
from tests.tiny import make_tiny


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
