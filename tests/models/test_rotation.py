"""A model whose residual stream and value heads are rotated is the same model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from marlinctl.checkpoint.folder import examine
from marlinctl.checkpoint.reader import Checkpoint, open_checkpoint
from marlinctl.checkpoint.rotated import drawn, rotated_checkpoint
from marlinctl.checkpoint.tied_head import with_own_head
from marlinctl.checkpoint.transformers_model import dense_tensors, model_from
from marlinctl.errors import NumericalProblem
from marlinctl.models.architectures import Architecture
from marlinctl.models.config import sizes_of
from marlinctl.models.families import architecture
from marlinctl.models.lookup import any_architecture
from marlinctl.models.rotation import ROTATABLE, stream_of
from marlinctl.quantize.rotate import rotated
from tests import zoo
from tests.checkpoint.test_sixteen_bit import FP8_BLOCKS, blockwise, edit_json
from tests.tiny import make_tiny

_ROUNDING = 5e-6  # float32; a tensor that is forgotten gives 0.1 and more
_LARGE = 40.0


def uneven(folder: Path) -> Path:
    """Norms and biases that differ from channel to channel, one of them by far, in float32: with ones and zeros nothing could be lost."""
    for path in folder.glob("*.safetensors"):
        tensors = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in load_file(path).items()}
        generator = torch.Generator().manual_seed(0)
        for tensor in tensors.values():
            if tensor.ndim == 1:
                tensor += 0.3 * torch.randn(tensor.shape, generator=generator)
                tensor[1:2] *= _LARGE / 10
        save_file(tensors, path, metadata={"format": "pt"})
    return folder


def opened(folder: Path) -> tuple[Checkpoint, Architecture]:
    """With a head of its own."""
    examined = examine(open_checkpoint(folder), structure="needed", dense=True, tokenizer=True, module_map=None)
    known, checkpoint = examined.architecture, examined.checkpoint
    assert known is not None
    return (checkpoint, known) if known.tied is None else (with_own_head(checkpoint, known), known.untied())


@torch.no_grad()
def logits(checkpoint: Checkpoint) -> Tensor:
    model = model_from(checkpoint, dense_tensors(checkpoint), dtype=torch.float32)
    ids = torch.randint(3, zoo.VOCAB_SIZE, (2, 20), generator=torch.Generator().manual_seed(1))
    return model(ids).logits.double()


def distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("model_type", sorted(ROTATABLE))
def test_every_type_of_the_table_stays_the_same(model_type: str, tmp_path: Path) -> None:
    """A bias, a router or a norm that is forgotten makes another model, and a run would hide it as quantization error."""
    checkpoint, known = opened(uneven(zoo.build(model_type, tmp_path / "model")))
    stream = stream_of(known, sizes_of(checkpoint.config))
    assert stream is not None
    turned = rotated_checkpoint(checkpoint, stream, drawn(stream))
    assert distance(logits(turned), logits(checkpoint)) < _ROUNDING
    changed = [name for name in checkpoint.tensors if not torch.equal(turned.read(name), checkpoint.read(name))]
    assert set(changed) == {*stream.read, *stream.written, *stream.norms, *stream.values_made, stream.entered}


@pytest.mark.parametrize("key", ["head_dim", "num_attention_heads"])
def test_what_config_json_leaves_to_the_type(key: str, tmp_path: Path) -> None:
    """Heads of ernie4_5 have 128 channels whatever hidden_size is. By 256, two value heads would be mixed, and the model another one."""
    folder = zoo.build("ernie4_5", tmp_path / "model", hidden_size=512, num_attention_heads=2, head_dim=128, tie_word_embeddings=False)
    config = json.loads((folder / "config.json").read_text())
    del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    if key == "num_attention_heads":
        known = any_architecture(config | {"num_attention_heads": 2})
        assert stream_of(known, config) is None
        return
    checkpoint, known = opened(uneven(folder))
    stream = stream_of(known, sizes_of(checkpoint.config))
    assert stream is not None and stream.head_dim == 128
    assert (
        distance(logits(rotated_checkpoint(checkpoint, stream, drawn(stream))), logits(checkpoint)) < 2 * _ROUNDING
    )  # wider than the others


def test_values_are_found_in_any_order_of_a_module_map(tmp_path: Path) -> None:
    """q as wide as v, and named last, would be rotated in v's place: before positions turn it, so the model would be another one."""
    config = zoo.config_of("mistral", num_key_value_heads=4, tie_word_embeddings=False).to_dict()
    names = {
        "decoder": "model", "blocks": "model.layers", "embedding": "model.embed_tokens", "norm": "model.norm",
        "attention": {"module": "self_attn", "first": [f"self_attn.{x}_proj" for x in "vkq"], "last": "self_attn.o_proj"},
        "mlp": {"module": "mlp", "first": ["mlp.gate_proj", "mlp.up_proj"], "last": "mlp.down_proj"},
    }  # fmt: skip
    (tmp_path / "map.json").write_text(json.dumps(names))
    assert stream_of(architecture(config, tmp_path / "map.json"), config) == stream_of(architecture(config), config) is not None


@pytest.mark.parametrize("part", ["read", "written", "norms", "values_made", "values_taken", "entered"])
def test_each_part_is_needed(part: str, tmp_path: Path) -> None:
    """If the model stayed the same without it, the test above would show nothing of it."""
    checkpoint, known = opened(uneven(zoo.build("llama", tmp_path / "model")))
    stream = stream_of(known, sizes_of(checkpoint.config))
    assert stream is not None
    rotation = drawn(stream)
    turned = rotated_checkpoint(checkpoint, stream, rotation)
    own = getattr(stream, part)
    names = {own} if isinstance(own, str) else set(own)
    lost = replace(turned, made={name: made for name, made in turned.made.items() if name not in names})
    assert distance(logits(lost), logits(checkpoint)) > 0.01


@pytest.mark.parametrize("model_type", ["gemma", "gemma2", "olmo2", "exaone4", "lfm2", "qwen3_5_text"])
def test_other_types_are_left_alone(model_type: str, tmp_path: Path) -> None:
    """Norms behind a branch, norms that subtract a mean, norms of 1 + weight: such a model would become another one, and say nothing."""
    checkpoint, known = opened(zoo.build(model_type, tmp_path / "model"))
    assert stream_of(known, sizes_of(checkpoint.config)) is None


@pytest.mark.parametrize("wrapper", ["llava", "mistral3"])
def test_wrappers_are_left_alone(wrapper: str, tmp_path: Path) -> None:
    """Images enter the stream by a part that is copied as it is."""
    checkpoint, known = opened(zoo.build(wrapper, tmp_path / "model"))
    assert stream_of(known, sizes_of(checkpoint.config)) is None


def test_what_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    """Infinite weights would be solved for as they are, and the model would say nothing but NaN."""
    folder = zoo.build("llama", tmp_path / "model", dtype=torch.float16)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if name.endswith("1.input_layernorm.weight"):
                tensor[3] = 60_000
            if name.endswith("1.self_attn.k_proj.weight"):
                tensor[:, 3] = 100
        save_file(tensors, path, metadata={"format": "pt"})
    checkpoint, known = opened(folder)
    stream = stream_of(known, sizes_of(checkpoint.config))
    assert stream is not None
    turned = rotated_checkpoint(checkpoint, stream, drawn(stream))
    turned.read("model.layers.0.self_attn.k_proj.weight")
    with pytest.raises(NumericalProblem, match=r"layers\.1\.self_attn\.k_proj.*does not fit into float16"):
        turned.read("model.layers.1.self_attn.k_proj.weight")


def test_a_large_channel_is_spread(tmp_path: Path) -> None:
    """What the rotation is for: columns of about one size."""
    folder = zoo.build("llama", tmp_path / "model")
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if name.endswith("q_proj.weight"):
                tensor[:, 5] *= _LARGE
        save_file(tensors, path, metadata={"format": "pt"})
    checkpoint, known = opened(folder)
    stream = stream_of(known, sizes_of(checkpoint.config))
    assert stream is not None
    turned = rotated_checkpoint(checkpoint, stream, drawn(stream))
    name = "model.layers.0.self_attn.q_proj.weight"
    before, after = (one.read(name).double().norm(dim=0) for one in (checkpoint, turned))
    assert float(before.max() / before.median()) > 0.8 * _LARGE
    assert float(after.max() / after.median()) < 2


def test_what_is_read_is_the_formula_rounded_once(tmp_path: Path) -> None:
    """W diag(g) R and R^T W in float64, and value heads: a second rounding would cost accuracy that the codes cannot give back."""
    checkpoint, known = opened(zoo.build("llama", tmp_path / "model", dtype=torch.bfloat16))
    stream = stream_of(known, sizes_of(checkpoint.config))
    assert stream is not None
    rotation = drawn(stream)
    turned = rotated_checkpoint(checkpoint, stream, rotation)
    hidden = rotated(torch.eye(stream.hidden, dtype=torch.float64), rotation.stream)
    heads = rotated(torch.eye(stream.head_dim, dtype=torch.float64), rotation.values)
    block = "model.layers.1."

    def read(name: str) -> Tensor:
        return checkpoint.read(block + name).double()

    gain, attention = read("post_attention_layernorm.weight"), read("input_layernorm.weight")
    kv, all_heads = (torch.block_diag(*[heads] * count) for count in (2, 4))
    wanted = {
        "mlp.up_proj.weight": read("mlp.up_proj.weight") * gain @ hidden,
        "mlp.down_proj.weight": hidden.T @ read("mlp.down_proj.weight"),
        "mlp.down_proj.bias": read("mlp.down_proj.bias") @ hidden,
        "self_attn.v_proj.weight": kv.T @ (read("self_attn.v_proj.weight") * attention @ hidden),
        "self_attn.v_proj.bias": read("self_attn.v_proj.bias") @ kv,
        "self_attn.o_proj.weight": hidden.T @ read("self_attn.o_proj.weight") @ all_heads,
    }
    for name, tensor in wanted.items():
        found = turned.read(block + name)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, tensor.bfloat16()), name
        assert bytes(turned.raw(block + name)) == bytes(found.view(torch.uint8).numpy().reshape(-1).data)
    ids = [7, 3, 3]
    embedding = checkpoint.read("model.embed_tokens.weight").double()[ids] @ hidden
    assert torch.equal(turned.rows("model.embed_tokens.weight", ids), embedding.bfloat16())


def test_a_part_of_a_tensor_is_computed_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An embedding of 128k x 4096 is 4 GiB in float64, and its rotation several times that; a text of many languages asks for half."""
    checkpoint, known = opened(zoo.build("llama", tmp_path / "model"))
    stream = stream_of(known, sizes_of(checkpoint.config))
    assert stream is not None
    turned = rotated_checkpoint(checkpoint, stream, drawn(stream))
    names = [stream.entered, "lm_head.weight", *(f"model.layers.0.{part}.weight" for part in ("self_attn.o_proj", "mlp.down_proj"))]
    whole = {name: turned.read(name) for name in names}
    sizes: list[int] = []

    def noted(x: Tensor, signs: Tensor) -> Tensor:
        sizes.append(x.numel())
        return rotated(x, signs)

    monkeypatch.setattr("marlinctl.quantize.rotate.rotated", noted)
    monkeypatch.setattr("marlinctl.checkpoint.rotated._VALUES", 1024)
    ids = torch.arange(zoo.VOCAB_SIZE).flip(0)
    parts = {name: turned.read(name) for name in names}
    assert torch.allclose(turned.rows(stream.entered, ids), whole[stream.entered][ids])
    assert all(torch.allclose(parts[name], whole[name]) for name in names)
    assert max(sizes) <= 1024


def test_an_fp8_model_is_rotated_as_what_it_means(tmp_path: Path) -> None:
    """Its tensors are computed already: rotated without their scales, weights would be of another size in each block."""
    folder = make_tiny(tmp_path / "model", dtype=torch.bfloat16)
    blockwise(folder)
    edit_json(folder / "config.json", lambda config: config.update(quantization_config=FP8_BLOCKS["_scale_inv"]))
    checkpoint, known = opened(folder)
    stream = stream_of(known, sizes_of(checkpoint.config))
    assert checkpoint.made and stream is not None
    turned = rotated_checkpoint(checkpoint, stream, drawn(stream))
    assert distance(logits(turned), logits(checkpoint)) < 0.05  # weights are rounded to bfloat16 once more
