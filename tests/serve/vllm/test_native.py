"""Native folders through the plugin, with the few classes of vLLM that it meets (fake_vllm.py): what is loaded multiplies as the codes do,
on one device and on several, and what is wrong with a folder is said."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from marlinctl.checkpoint.formats import registry
from marlinctl.checkpoint.reader import open_checkpoint
from marlinctl.kernels.factored import factored_scales
from marlinctl.kernels.int8_metadata import metadata_for_int8
from marlinctl.kernels.ops import sparse_marlin_gemm
from marlinctl.quantize.activations import nearest
from marlinctl.quantize.types import QuantizedLinear
from marlinctl.serve.native import method, products
from marlinctl.serve.native.folder import NativeFolder
from marlinctl.sparsify.types import SparseQuantizedLinear
from tests.packed import make_packed
from tests.pruned import keep_largest
from tests.serve.vllm.fake_vllm import Head, Linear, Mapper, Vllm, installed
from tests.tiny import make_tiny

JOINED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
LAYER = "model.layers.1."


@pytest.fixture
def vllm() -> Iterator[Vllm]:
    with installed() as state:
        yield state


def pruned(name: str, q: QuantizedLinear) -> SparseQuantizedLinear:
    keep = keep_largest(q.codes)
    return SparseQuantizedLinear(q.codes * keep, q.scales, q.group_size, keep)


def native(place: Path, fmt: str = "marlin", model: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A tiny native folder. K and N are multiples of 128, unless `model` says otherwise."""
    make_tiny(place / "dense", **(model or {}))
    prune = {"prune": pruned} if fmt == "marlin_24" else {}
    make_packed(place / "dense", place / "native", fmt, **({"group_size": 64} | prune | changes))
    return place / "native"


def opened(vllm: Vllm, folder: Path) -> Any:
    block = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = vllm.module_of("config").NativeConfig.from_config(block)
    config.maybe_update_config(str(folder))
    config.packed_modules_mapping = JOINED
    return pickle.loads(pickle.dumps(config))  # as it goes to vLLM's other processes


def weights(folder: Path, names: Sequence[str]) -> list[Tensor]:
    with open_checkpoint(folder, weight_files="marlin") as checkpoint:
        info = registry.detect(checkpoint.config, checkpoint.tensors)
        return [registry.read_parts(checkpoint, info, name).weight() for name in names]


def load(module: Any, folder: Path, names: Sequence[str], shards: Sequence[object]) -> None:
    """As vLLM's loader does: file by file, each tensor whole."""
    for file in sorted(folder.glob("marlin*.safetensors")):
        for name, tensor in load_file(file).items():
            parent, _, leaf = name.rpartition(".")
            if parent in names:
                shard = shards[names.index(parent)]
                parameter = getattr(module, leaf)
                parameter.weight_loader(parameter, tensor, *([] if shard is None else [shard]))


def product(module: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
    module.quant_method.process_weights_after_loading(module)
    out: Tensor = module.quant_method.apply(module, x, bias)
    return out


def close(got: Tensor, x: Tensor, weight: Tensor, bias: Tensor | float = 0.0) -> None:
    wanted = x.float() @ weight.T + bias
    assert got.shape == wanted.shape
    torch.testing.assert_close(got.float(), wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.filterwarnings("ignore:packed linears on the CPU")
@pytest.mark.parametrize("fmt", ["marlin", "marlin_24"])
@pytest.mark.parametrize("group_size", [64, 128, -1])
@pytest.mark.parametrize("devices", [1, 2])
def test_joined_and_divided_linears_multiply_as_their_codes_do(vllm: Vllm, tmp_path: Path, fmt: str, group_size: int, devices: int) -> None:
    """A part in the wrong place, or scales in the wrong order, would be a wrong model without an error."""
    folder = native(tmp_path, fmt, {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}, group_size=group_size)
    config = opened(vllm, folder)
    qkv = [f"{LAYER}self_attn.{one}_proj" for one in "qkv"]
    for rank in range(devices):
        module = Linear(
            config, f"{LAYER}self_attn.qkv_proj", 256, [256 // devices, 128 // devices, 128 // devices], devices=devices, rank=rank
        )
        load(module, folder, qkv, ["q", "k", "v"])
        x = torch.randn(3, 256).half()
        close(product(module, x), x, torch.cat([weight.chunk(devices)[rank] for weight in weights(folder, qkv)]))
        down = [f"{LAYER}mlp.down_proj"]
        module = Linear(config, down[0], 256, [256], devices=devices, rank=rank, rows=True)
        load(module, folder, down, [None])
        bias = torch.randn(256).half()
        x = torch.randn(2, 5, 256 // devices).half()
        close(product(module, x, bias), x, weights(folder, down)[0].chunk(devices, 1)[rank], bias.float())


@pytest.mark.filterwarnings("ignore:packed linears on the CPU")
@pytest.mark.parametrize("fmt", ["marlin", "marlin_24"])
def test_widths_that_fill_no_tiles(vllm: Vllm, tmp_path: Path, fmt: str) -> None:
    """Keys of 48 outputs are padded to 64 in the folder, and vLLM expects them right behind the queries; biases too."""
    model = {"hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 160}
    folder = native(tmp_path, fmt, model, group_size=32)
    qkv = [f"{LAYER}self_attn.{one}_proj" for one in "qkv"]
    module = Linear(opened(vllm, folder), f"{LAYER}self_attn.qkv_proj", 96, [96, 48, 48])
    load(module, folder, qkv, ["q", "k", "v"])
    x, bias = torch.randn(3, 96).half(), torch.randn(192).half()
    close(product(module, x, bias), x, torch.cat(weights(folder, qkv)), bias.float())


@pytest.mark.filterwarnings("ignore:packed linears on the CPU")
@pytest.mark.parametrize("fmt", ["marlin", "marlin_24"])
@pytest.mark.parametrize("widths", [[128, 64, 64], [96, 48, 48]], ids=["tiles", "gaps"])
def test_a_compiled_model_holds_it_whole(vllm: Vllm, tmp_path: Path, fmt: str, widths: list[int]) -> None:
    """vLLM compiles the model without graph breaks; one in each linear would stop it."""
    hidden = widths[0]
    model = {"hidden_size": hidden, "num_attention_heads": 4, "num_key_value_heads": 2}
    folder = native(tmp_path, fmt, model, group_size=32)
    qkv = [f"{LAYER}self_attn.{one}_proj" for one in "qkv"]
    module = Linear(opened(vllm, folder), f"{LAYER}self_attn.qkv_proj", hidden, widths)
    load(module, folder, qkv, ["q", "k", "v"])
    x = torch.randn(3, hidden).half()
    eager = product(module, x)
    compiled = torch.compile(lambda x: module.quant_method.apply(module, x), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), eager)


@pytest.mark.filterwarnings("ignore:packed linears on the CPU")
@pytest.mark.parametrize("devices", [1, 3])
def test_a_packed_head(vllm: Vllm, tmp_path: Path, devices: int) -> None:
    """vLLM pads the vocabulary to 64 and divides that: 130 words are 192 rows, of which the last of three devices has two words."""
    folder = tmp_path / "native"
    make_tiny(tmp_path / "dense", vocab_size=130)
    packed_with_head(tmp_path / "dense", folder)
    vllm.rank = devices - 1
    module = Head(opened(vllm, folder), "lm_head", 128, 130, devices=devices)
    load(module, folder, ["lm_head"], [None])
    x = torch.randn(3, 128).half()
    rows = torch.nn.functional.pad(weights(folder, ["lm_head"])[0], (0, 0, 0, 192 - 130))
    close(product(module, x), x, rows.chunk(devices)[-1])


def packed_with_head(source: Path, out: Path) -> None:
    """make_packed, with the head packed too: written by hand, as `quantize --include lm_head` and `pack` would."""
    from marlinctl.checkpoint.formats.registry import FORMATS
    from tests.packed import rtn

    make_packed(source, out, "marlin", group_size=64)
    (shard,) = [file for file in out.glob("marlin*.safetensors") if "lm_head.weight" in load_file(file)]
    tensors = load_file(shard)
    head = registry.linear_tensors(FORMATS["marlin"], "lm_head", rtn(tensors.pop("lm_head.weight"), 64))
    rewrite(out, shard.name, tensors | head)


def rewrite(folder: Path, file: str, tensors: dict[str, Tensor]) -> None:
    """Another content of a shard, with an index that agrees."""
    save_file(tensors, folder / file, {"format": "pt"})
    index = folder / "marlin.safetensors.index.json"
    if index.exists():
        document = json.loads(index.read_text())
        kept = {name: shard for name, shard in document["weight_map"].items() if shard != file}
        document["weight_map"] = kept | dict.fromkeys(tensors, file)
        index.write_text(json.dumps(document))


def rounding(exact: Sequence[str], group: int = -1) -> Callable[[dict[str, Any]], None]:
    """Activations of all linears but `exact` may be rounded."""
    said = {"format_version": 2, "activations": "int8", "activation_group": group, "sixteen_bit_activations": list(exact)}
    return lambda config: config["quantization_config"].update(said)


@pytest.mark.filterwarnings("ignore:packed linears on the CPU")
@pytest.mark.parametrize("group", [-1, 128])
@pytest.mark.parametrize("widths", [[128, 64, 64], [96, 48, 48]], ids=["tiles", "gaps"])
def test_linears_that_may_be_rounded_are(vllm: Vllm, tmp_path: Path, widths: list[int], group: int) -> None:
    """If the operator were not told, vLLM would never use the 8-bit kernels; if it were told of a linear that calibration keeps out, or of
    one that is joined with such a linear, the model would be another one than was measured."""
    hidden = widths[0]
    qkv, down = [f"{LAYER}self_attn.{one}_proj" for one in "qkv"], f"{LAYER}mlp.down_proj"
    model = {"hidden_size": hidden, "num_attention_heads": 4, "num_key_value_heads": 2}
    folder = native(tmp_path, model=model, group_size=32, edit_config=rounding([down, f"{LAYER}mlp.up_proj"], group))
    config = opened(vllm, folder)
    module = Linear(config, f"{LAYER}self_attn.qkv_proj", hidden, widths)
    load(module, folder, qkv, ["q", "k", "v"])
    x = torch.randn(3, hidden, generator=torch.Generator().manual_seed(0)).half()
    x[:, 7] = 40
    found = product(module, x)
    close(found, nearest(x, "int8" if group == -1 else "int8-128"), torch.cat(weights(folder, qkv)))
    with pytest.raises(AssertionError):
        close(found, x, torch.cat(weights(folder, qkv)))
    way = "int8" if group == -1 else "int8-128"
    assert way in {one.rounding for one in products._expected}, "the first prompt would wait for the compiler, or stop a capture"
    compiled = torch.compile(lambda x: module.quant_method.apply(module, x), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), found)
    for prefix, size, outputs, names, shards in (
        (down, 256, [hidden], [down], [None]),
        (f"{LAYER}mlp.gate_up_proj", hidden, [256, 256], [f"{LAYER}mlp.{one}_proj" for one in ("gate", "up")], [0, 1]),
    ):
        module = Linear(config, prefix, size, outputs)
        load(module, folder, names, shards)
        x = torch.randn(3, size, generator=torch.Generator().manual_seed(0)).half()
        x[:, 7] = 40
        close(product(module, x), x, torch.cat(weights(folder, names)))


@pytest.mark.filterwarnings("ignore:packed linears on the CPU")
@pytest.mark.parametrize("used", [False, True])
def test_sparse_linears_give_the_operator_what_int8_products_need(
    vllm: Vllm, tmp_path: Path, used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this failed, a server would multiply 2:4 linears with metadata in the wrong order, or with those of weights before. No format says
    yet that activations beside 2:4 weights may be rounded."""
    monkeypatch.setattr(NativeFolder, "rounding_of", lambda folder, names: "int8")
    monkeypatch.setattr(method, "int8_operands", lambda p: (factored_scales(p), metadata_for_int8(p.meta)) if used else None)
    given: list[tuple[object, ...]] = []

    def gemm(*arguments: Any) -> Tensor:
        given.append(arguments[8:])
        out: Tensor = sparse_marlin_gemm(*arguments)
        return out

    monkeypatch.setattr(method, "sparse_marlin_gemm", gemm)
    folder, down = native(tmp_path, "marlin_24", group_size=-1), f"{LAYER}mlp.down_proj"
    module: Any = Linear(opened(vllm, folder), down, 256, [128])
    load(module, folder, [down], [None])
    x = torch.randn(3, 256).half()
    x[:, 7] = 40
    close(product(module, x), nearest(x, "int8"), weights(folder, [down])[0])
    assert module.quant_method.product.factored == used and given[0][0] == "int8"
    prepared = (module.factored, module.int8_meta) if used else ()
    assert all(a is b for a, b in zip(given[0][1:], prepared, strict=True))
    if used:
        assert torch.equal(module.int8_meta, metadata_for_int8(module.B_meta)) and not torch.equal(module.int8_meta, module.B_meta)
        place, before = module.int8_meta.data_ptr(), module.int8_meta.clone()
        module.B_meta.data.copy_(module.B_meta.flip(0))
        module.quant_method.finish(module, logging.getLogger(__name__))
        assert module.int8_meta.data_ptr() == place and not torch.equal(module.int8_meta, before), "a graph has its address"
        assert torch.equal(module.int8_meta, metadata_for_int8(module.B_meta))


def test_the_cache_of_compiled_models_knows_what_is_rounded(vllm: Vllm, tmp_path: Path) -> None:
    """A program that was traced without rounding would be run for a folder that allows it, and the reverse."""
    factors = []
    for name, edit in (("a", lambda config: None), ("b", rounding([])), ("c", rounding([], 128))):
        vllm.module_of("cache_key")._linears.clear()
        Linear(opened(vllm, native(tmp_path / name, edit_config=edit)), f"{LAYER}mlp.down_proj", 256, [128])
        (factor,) = vllm.envs.environment_variables.values()
        factors.append(factor())
    assert len(set(factors)) == 3


def test_what_is_not_packed_stays_with_vllm(vllm: Vllm, tmp_path: Path) -> None:
    folder = native(tmp_path, skip=[f"{LAYER}self_attn.o_proj"])
    config = opened(vllm, folder)
    assert type(Linear(config, f"{LAYER}self_attn.o_proj", 128, [128]).quant_method).__name__ == "Unquantized"
    assert Head(config, "lm_head", 128, 288).quant_method is None
    assert config.get_quant_method(torch.nn.Embedding(2, 2), "model.embed_tokens") is None


def test_names_of_another_model_tree(vllm: Vllm, tmp_path: Path) -> None:
    """vLLM renames the parts of some models; a linear that is not found under its new name would be taken for a 16-bit one."""
    config = opened(vllm, native(tmp_path))
    config.apply_vllm_mapper(Mapper(orig_to_new_prefix={"model.": "language_model.model."}))
    assert (
        config.get_quant_method(Linear.__new__(Linear), f"language_{LAYER}mlp.down_proj".replace("language_", "language_model."))
        is not None
    )


def test_masks_beside_the_weights_are_no_part_of_the_model(vllm: Vllm) -> None:
    """vLLM reads each *.safetensors file, and stops at a tensor that it has no place for."""
    mapper = vllm.module_of("config").NativeConfig.get_cache_scale_mapper()
    assert mapper.apply_list(["model.layers.0.mlp.up_proj.keep", "model.norm.weight"]) == ["model.norm.weight"]


def test_the_cache_of_compiled_models_knows_our_linears(vllm: Vllm, tmp_path: Path) -> None:
    """A folder that was packed otherwise, under the same name, would be run by the program of the old one."""
    assert not vllm.envs.environment_variables
    Linear(opened(vllm, native(tmp_path)), f"{LAYER}mlp.down_proj", 256, [128])
    (factor,) = vllm.envs.environment_variables.values()
    before = factor()
    Linear(opened(vllm, native(tmp_path / "other", group_size=32)), f"{LAYER}mlp.down_proj", 256, [128])
    assert before != factor()


@pytest.mark.parametrize("fmt", ["marlin", "marlin_24"])
def test_dummy_weights_are_valid(vllm: Vllm, tmp_path: Path, fmt: str) -> None:
    """vLLM's load_format dummy leaves integers as they are: metadata that the hardware has no meaning for."""
    vllm.load_format = "dummy"
    module = Linear(opened(vllm, native(tmp_path, fmt)), f"{LAYER}mlp.down_proj", 256, [128])
    module.quant_method.process_weights_after_loading(module)
    words = [parameter for name, parameter in module.named_parameters() if name != "s"]
    assert len(words) == 1 + (fmt == "marlin_24") and all(len(parameter.unique()) > 100 for parameter in words)


# What is wrong with a folder


def drop(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for file in folder.glob("marlin*.safetensors"):
            tensors = load_file(file)
            if name in tensors:
                del tensors[name]
                rewrite(folder, file.name, tensors)

    return damage


def replace(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for file in folder.glob("marlin*.safetensors"):
            tensors = load_file(file)
            if name in tensors:
                rewrite(folder, file.name, tensors | {name: change(tensors[name]).contiguous()})

    return damage


def newer(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = 3
    (folder / "config.json").write_text(json.dumps(config))


def with_model_files(folder: Path) -> None:
    shutil.copy(folder.parent / "dense" / "model.safetensors", folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (drop(f"{LAYER}mlp.up_proj.s"), r"E302.*mlp\.up_proj\.s is missing"),
        (drop(f"{LAYER}mlp.up_proj.B"), r"E302.*mlp\.up_proj\.B is missing"),
        (replace(f"{LAYER}mlp.up_proj.B", lambda words: words[:-1]), r"E302.*mlp\.up_proj\.B is I32 \[7, 512\], expected I32 \[8, 512\]"),
        (replace(f"{LAYER}mlp.up_proj.s", lambda scales: scales.float()), r"E302.*mlp\.up_proj\.s is F32"),
        (newer, r"E340.*format_version 3; this marlinctl reads up to 2.*fix: update marlinctl"),
        (with_model_files, r"E301.*other weights too, model\.safetensors, and vLLM would load both"),
        (lambda folder: next(iter(sorted(folder.glob("marlin*.safetensors")))).unlink(), "E301"),
    ],
    ids=["scales", "words", "shape", "dtype", "newer", "two models", "a file"],
)
def test_a_damaged_folder_is_refused_before_weights_are_read(vllm: Vllm, tmp_path: Path, damage: Callable[[Path], None], what: str) -> None:
    folder = native(tmp_path)
    damage(folder)
    with pytest.raises(RuntimeError, match=f"(?s){what}"):
        opened(vllm, folder)


def test_a_module_without_any_tensor_is_refused(vllm: Vllm, tmp_path: Path) -> None:
    """An index that has lost them agrees with the files; vLLM would leave the weight as the memory was."""
    folder = native(tmp_path)
    for suffix in ("B", "s", "weight_shape"):
        drop(f"{LAYER}self_attn.o_proj.{suffix}")(folder)
        drop(f"{LAYER}mlp.up_proj.{suffix}")(folder)
    config = opened(vllm, folder)
    with pytest.raises(RuntimeError, match=r"no tensor of model\.layers\.1\.self_attn\.o_proj"):
        Linear(config, f"{LAYER}self_attn.o_proj", 128, [128])
    with pytest.raises(RuntimeError, match=r"not packed alike: .*gate_proj group 64, .*up_proj 16-bit"):
        Linear(config, f"{LAYER}mlp.gate_up_proj", 128, [256, 256])


def test_linears_that_belong_together_are_packed_alike(vllm: Vllm, tmp_path: Path) -> None:
    config = opened(vllm, native(tmp_path, overrides={f"{LAYER}self_attn.k_proj": 32}))
    with pytest.raises(RuntimeError, match=r"q_proj group 64, .*k_proj group 32, .*v_proj group 64"):
        Linear(config, f"{LAYER}self_attn.qkv_proj", 128, [128, 64, 64])


def test_tensors_that_do_not_come_or_come_twice(vllm: Vllm, tmp_path: Path) -> None:
    """Whatever the headers said: what counts is what was put into the module."""
    folder = native(tmp_path)
    names = [f"{LAYER}mlp.gate_proj", f"{LAYER}mlp.up_proj"]
    module = Linear(opened(vllm, folder), f"{LAYER}mlp.gate_up_proj", 128, [256, 256])
    load(module, folder, names[:1], [0])
    with pytest.raises(RuntimeError, match=r"(?s)up_proj\.B was not loaded.*up_proj\.s was not loaded.*up_proj\.weight_shape was not"):
        module.quant_method.process_weights_after_loading(module)
    with pytest.raises(RuntimeError, match=r"gate_proj\.\w+ is there twice"):
        load(module, folder, names[:1], [0])


def test_a_folder_of_another_model(vllm: Vllm, tmp_path: Path) -> None:
    folder = native(tmp_path)
    name = f"{LAYER}mlp.down_proj"
    module = Linear(opened(vllm, folder), name, 512, [128])
    with pytest.raises(RuntimeError, match=r"down_proj\.\w+ (is I32|is F16|says)"):
        load(module, folder, [name], [None])


def test_invalid_metadata_is_refused(vllm: Vllm, tmp_path: Path) -> None:
    """The hardware does something with it, and the kernels do not look."""
    folder = native(tmp_path, "marlin_24")
    name = f"{LAYER}mlp.down_proj"
    module = Linear(opened(vllm, folder), name, 256, [128])
    load(module, folder, [name], [None])
    module.get_parameter("B_meta").data[1, 5] = 0
    with pytest.raises(RuntimeError, match=r"(?s)E346.*down_proj: B_meta: metadata of row"):
        module.quant_method.process_weights_after_loading(module)
