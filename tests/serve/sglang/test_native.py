"""Native folders through the plugin, with stand-ins for SGLang's classes (fake_sglang.py): what is loaded multiplies as the codes do, on
one device and on several, and what is wrong with a folder, or is not asked for, is said.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from marlinctl.checkpoint.formats import registry
from marlinctl.checkpoint.reader import open_checkpoint
from tests.serve.sglang.fake_sglang import (
    Group,
    LinearBase,
    Model,
    QKVParallelLinear,
    ReplicatedLinear,
    Sglang,
    WeightsMapper,
    get_quant_config,
    installed,
)
from tests.serve.vllm.test_native import close, drop, native, newer, packed_with_head, replace, rounding, with_model_files
from tests.tiny import make_tiny

pytestmark = pytest.mark.filterwarnings("ignore:packed linears on the CPU")
LAYER = "model.layers.1."
PARTS = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
WIDE = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture
def sglang() -> Iterator[Sglang]:
    with installed() as state:
        yield state


def opened(sglang: Sglang, folder: Path) -> Any:
    block = json.loads((folder / "config.json").read_text())["quantization_config"]
    return get_quant_config(sglang.module_of("config").NativeConfig, block, str(folder))


def tensors_of(folder: Path) -> list[tuple[str, Tensor]]:
    """As SGLang's loader yields them: file by file, each whole."""
    return [item for file in sorted(folder.glob("*.safetensors")) for item in load_file(file).items()]


def made(sglang: Sglang, folder: Path, blocks: Sequence[int] | None = None) -> Model:
    return Model(json.loads((folder / "config.json").read_text()), opened(sglang, folder), blocks)


def served(sglang: Sglang, folder: Path) -> Model:
    model = made(sglang, folder)
    model.load_weights(tensors_of(folder))
    model.process()
    return model


def weights(folder: Path, name: str) -> list[Tensor]:
    """Of the linears of the folder that a module is made of, [N, K] each, in their order."""
    parent, _, leaf = name.rpartition(".")
    with open_checkpoint(folder, weight_files="marlin") as checkpoint:
        info = registry.detect(checkpoint.config, checkpoint.tensors)
        return [registry.read_parts(checkpoint, info, f"{parent}.{part}".lstrip(".")).weight() for part in PARTS.get(leaf, [leaf])]


def multiplied(module: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
    out: Tensor = module.quant_method.apply(module, x, bias)
    return out


@pytest.mark.parametrize("fmt", ["marlin", "marlin_24"])
@pytest.mark.parametrize("group_size", [64, -1])
@pytest.mark.parametrize("devices", [1, 2])
def test_a_model_multiplies_as_its_codes_do(sglang: Sglang, tmp_path: Path, fmt: str, group_size: int, devices: int) -> None:
    """A shard in the wrong place, or scales in the wrong order, would be a wrong model without an error."""
    folder = native(tmp_path, fmt, WIDE, group_size=group_size)
    for rank in range(devices):
        sglang.group = Group(rank, devices) if devices > 1 else None
        model = served(sglang, folder)
        for name in ("self_attn.qkv_proj", "mlp.gate_up_proj", "self_attn.o_proj", "mlp.down_proj"):
            whole = weights(folder, LAYER + name)
            rows = name in ("self_attn.o_proj", "mlp.down_proj")
            weight = torch.cat([part.chunk(devices, 1 if rows else 0)[rank] for part in whole])
            x, bias = torch.randn(3, weight.shape[1]).half(), torch.randn(len(weight)).half()
            close(multiplied(model(LAYER + name), x, bias), x, weight, bias.float())
        assert not [key for module in model.linears.values() for key, _ in module.named_parameters() if key == "weight_shape"]


def test_linears_that_may_be_rounded_are(sglang: Sglang, tmp_path: Path) -> None:
    """If the operator were not told, SGLang would never use the 8-bit kernels of a folder that allows them."""
    model = served(sglang, native(tmp_path, edit_config=rounding([f"{LAYER}mlp.down_proj"])))
    assert model("model.layers.0.mlp.down_proj").quant_method.more == ("int8",)
    assert model(f"{LAYER}mlp.down_proj").quant_method.more == ()


def test_more_devices_than_key_heads(sglang: Sglang, tmp_path: Path) -> None:
    """Devices 0 and 1 have the first head of keys, 2 and 3 the second. One of the wrong head would attend to other tokens."""
    folder = native(tmp_path, model=WIDE)
    q, k, v = weights(folder, f"{LAYER}self_attn.qkv_proj")
    for rank in range(4):
        sglang.group = Group(rank, 4)
        config = opened(sglang, folder)
        module = QKVParallelLinear(256, 64, 4, 2, quant_config=config, prefix=f"{LAYER}self_attn.qkv_proj")
        for name, tensor in tensors_of(folder):
            parent, _, leaf = name.rpartition(".")
            if parent.startswith(f"{LAYER}self_attn.") and parent[-6:] in ("q_proj", "k_proj", "v_proj"):
                parameter = getattr(module, leaf)
                parameter.weight_loader(parameter, tensor, parent[-6])
        sglang.pp_size = 2  # the other linears are not of this test
        config.claimed.update(config.folder.layers)
        module.quant_method.process_weights_after_loading(module)
        x = torch.randn(2, 256).half()
        close(multiplied(module, x), x, torch.cat([q.chunk(4)[rank], k.chunk(2)[rank // 2], v.chunk(2)[rank // 2]]))


@pytest.mark.parametrize("devices", [1, 3])
def test_a_packed_head(sglang: Sglang, tmp_path: Path, devices: int) -> None:
    """SGLang pads the vocabulary and divides that: 130 words are 192 rows, of which the last of three devices has two words."""
    folder = tmp_path / "native"
    make_tiny(tmp_path / "dense", vocab_size=130, hidden_size=384, num_attention_heads=6, num_key_value_heads=3, intermediate_size=384)
    packed_with_head(tmp_path / "dense", folder)
    sglang.group = Group(devices - 1, devices) if devices > 1 else None
    model = served(sglang, folder)
    x = torch.randn(3, 384).half()
    rows = torch.nn.functional.pad(weights(folder, "lm_head")[0], (0, 0, 0, 192 - 130))
    close(multiplied(model("lm_head"), x), x, rows.chunk(devices)[-1])
    assert not hasattr(model("lm_head"), "weight")  # then SGLang's logits processor asks the method


def test_what_is_not_packed_stays_with_sglang(sglang: Sglang, tmp_path: Path) -> None:
    folder = native(tmp_path, skip=[f"{LAYER}self_attn.o_proj"])
    model = served(sglang, folder)
    assert type(model(f"{LAYER}self_attn.o_proj").quant_method).__name__ == "UnquantizedLinearMethod"
    assert type(model("lm_head").quant_method).__name__ == "UnquantizedEmbeddingMethod"
    config = opened(sglang, folder)
    assert config.is_linear_unquantized(f"{LAYER}self_attn.o_proj") and not config.is_linear_unquantized(f"{LAYER}mlp.gate_up_proj")
    assert not config.claimed and config.get_quant_method(torch.nn.Embedding(2, 2), f"{LAYER}self_attn.attn") is None


def test_weights_may_be_loaded_again(sglang: Sglang, tmp_path: Path) -> None:
    """update_weights_from_disk loads other weights into the running model. The tensor that was dropped must have a place again."""
    model = served(sglang, native(tmp_path / "first"))
    other = native(tmp_path / "second", model={"seed": 5})
    model.restore()
    model.load_weights(tensors_of(other))
    model.process()
    name = f"{LAYER}mlp.down_proj"
    x = torch.randn(2, 256).half()
    close(multiplied(model(name), x), x, weights(other, name)[0])


# What is wrong with a folder


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (drop(f"{LAYER}mlp.up_proj.s"), r"E302.*mlp\.up_proj\.s is missing"),
        (replace(f"{LAYER}mlp.up_proj.s", lambda scales: scales.float()), r"E302.*mlp\.up_proj\.s is F32"),
        (newer, r"E340.*format_version 3; this marlinctl reads up to 2.*fix: update marlinctl"),
        (with_model_files, r"E301.*other weights too, model\.safetensors, and SGLang would load both"),
        (
            lambda folder: shutil.copy(folder.parent / "dense" / "model.safetensors", folder / "marlinctl_mask.safetensors"),
            r"E301.*other weights too, marlinctl_mask\.safetensors",
        ),
        (lambda folder: next(iter(sorted(folder.glob("marlin*.safetensors")))).unlink(), "E301"),
    ],
    ids=["scales", "dtype", "newer", "two models", "masks", "a file"],
)
def test_a_damaged_folder_is_refused_before_the_model_is_made(
    sglang: Sglang, tmp_path: Path, damage: Callable[[Path], object], what: str
) -> None:
    folder = native(tmp_path)
    damage(folder)
    with pytest.raises(RuntimeError, match=f"(?s){what}"):
        opened(sglang, folder)


def test_a_config_without_a_name_is_refused(sglang: Sglang) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)E301.*does not say where the model lies"):
        get_quant_config(sglang.module_of("config").NativeConfig, {"quant_method": "marlinctl"}, "")


def test_tensors_that_do_not_come(sglang: Sglang, tmp_path: Path) -> None:
    """SGLang's models skip what they do not know, and miss nothing."""
    folder = native(tmp_path)
    model = made(sglang, folder)
    model.load_weights((name, tensor) for name, tensor in tensors_of(folder) if name != f"{LAYER}mlp.up_proj.B")
    with pytest.raises(RuntimeError, match=r"E302(?s:.*)model\.layers\.1\.mlp\.up_proj\.B was not loaded"):
        model.process()


def test_tensors_that_come_twice(sglang: Sglang, tmp_path: Path) -> None:
    """Of two files the last one would win."""
    folder = native(tmp_path)
    model = made(sglang, folder)
    again = [(name, tensor) for name, tensor in tensors_of(folder) if name == f"{LAYER}self_attn.k_proj.s"]
    with pytest.raises(RuntimeError, match=r"k_proj\.s is there twice"):
        model.load_weights([*tensors_of(folder), *again])


def test_a_linear_of_the_model_that_the_folder_lacks(sglang: Sglang, tmp_path: Path) -> None:
    """SGLang would leave its weight as the memory was, 16-bit ones too."""
    folder = native(tmp_path, skip=[f"{LAYER}self_attn.o_proj"])
    drop(f"{LAYER}self_attn.o_proj.weight")(folder)
    with pytest.raises(RuntimeError, match=r"no tensor of model\.layers\.1\.self_attn\.o_proj"):
        made(sglang, folder)
    with pytest.raises(RuntimeError, match=r"SGLang's model has a linear model\.new, and the folder has no tensor of model\.new"):
        ReplicatedLinear(64, 64, quant_config=opened(sglang, native(tmp_path / "other")), prefix="model.new")


def test_a_linear_of_the_folder_that_the_model_lacks(sglang: Sglang, tmp_path: Path) -> None:
    """A model that calls it otherwise would answer with whatever stands in its place."""
    folder = native(tmp_path)
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 1}
    model = Model(config, opened(sglang, folder))
    model.load_weights(tensors_of(folder))
    with pytest.raises(RuntimeError, match=r"model\.layers\.1\.self_attn\.q_proj is packed, and SGLang's model has no linear for it"):
        model.process()
    packed_with_head(folder.parent / "dense", tmp_path / "head")
    tied = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    model = Model(tied, opened(sglang, tmp_path / "head"))
    model.load_weights(tensors_of(tmp_path / "head"))
    with pytest.raises(RuntimeError, match="lm_head is packed"):
        model.process()


def test_a_process_may_have_some_of_the_blocks(sglang: Sglang, tmp_path: Path) -> None:
    """Pipeline parallelism: other blocks are other processes', but of a block nothing may be left over."""
    folder = native(tmp_path)
    sglang.pp_size = 2
    model = made(sglang, folder, blocks=[1])
    model.load_weights(tensors_of(folder))
    model.process()
    config = opened(sglang, folder)
    again = Model(json.loads((folder / "config.json").read_text()), config, [1])
    config.claimed.discard(f"{LAYER}mlp.up_proj")
    again.load_weights(tensors_of(folder))
    with pytest.raises(RuntimeError, match=r"model\.layers\.1\.mlp\.up_proj is packed"):
        again.process()


def test_linears_that_belong_together_are_packed_alike(sglang: Sglang, tmp_path: Path) -> None:
    folder = native(tmp_path, overrides={f"{LAYER}self_attn.k_proj": 32})
    with pytest.raises(RuntimeError, match=r"SGLang loads these as one linear.*q_proj group 64, .*k_proj group 32, .*v_proj group 64"):
        made(sglang, folder)


def test_divisions_that_it_does_not_know_are_refused(sglang: Sglang, tmp_path: Path) -> None:
    """Parts that are divided otherwise would be cut out of the wrong place."""
    config = opened(sglang, native(tmp_path, model=WIDE))
    given = {"quant_config": config, "prefix": f"{LAYER}self_attn.qkv_proj"}
    sglang.group, sglang.kv_group = Group(1, 2), Group(0, 1)
    with pytest.raises(RuntimeError, match="keys and values otherwise"):
        QKVParallelLinear(256, 64, 4, 2, **given)
    sglang.kv_group = None
    with pytest.raises(RuntimeError, match="divided already"):
        QKVParallelLinear(256, 64, 4, 2, load_presharded_attn=True, **given)
    sglang.group = Group(0, 4)
    with pytest.raises(RuntimeError, match=r"cannot be divided"):
        made(sglang, native(tmp_path / "narrow"))


def test_names_of_another_model_tree(sglang: Sglang, tmp_path: Path) -> None:
    """SGLang renames the parts of some models; a linear that is not found under its new name would be taken for a 16-bit one."""
    config = opened(sglang, native(tmp_path))
    config.apply_weight_name_mapper(WeightsMapper({"model.": "language_model.model."}))
    layer = LinearBase.__new__(LinearBase)
    assert type(config.get_quant_method(layer, f"language_model.{LAYER}mlp.down_proj")).__name__ == "MarlinctlLinearMethod"
    assert config.claimed == {f"language_model.{LAYER}mlp.down_proj"}
