"""Folders for benchmarks/vllm_serve.py: Llama-3-8B's shape without weights, and a small random model with weights.

    python benchmarks/vllm_models.py shapes OUT [--blocks 32]   fp16 ct marlin marlin_24, the last three also with a 4-bit head (ct-head)
    python benchmarks/vllm_models.py random OUT                 ct gptq marlin marlin_24 of one 2:4 model of 4 blocks, and its 16-bit copy

vLLM fills the first with random weights (load_format dummy). Of native folders the plugin reads the headers all the same, so those have
shards that are a header and a hole: all names and shapes, and no bytes on the disk.
"""

from __future__ import annotations

import argparse
import json
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from marlinctl.checkpoint.formats import registry
from marlinctl.checkpoint.formats.base import Format
from marlinctl.quantize.types import QuantizedLinear, dequantized
from marlinctl.sparsify.types import SparseQuantizedLinear

GROUP = 128
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu", "tie_word_embeddings": False, "dtype": "float16",
    "bos_token_id": 128000, "eos_token_id": 128001, "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
SMALL = LLAMA | {
    "vocab_size": 1000, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
BYTES = {"F16": 2, "I32": 4, "I16": 2, "I64": 8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["shapes", "random"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--blocks", type=int)
    chosen = parser.parse_args()
    if chosen.what == "shapes":
        shapes(chosen.out, LLAMA | ({"num_hidden_layers": chosen.blocks} if chosen.blocks else {}))
    else:
        random_model(chosen.out, SMALL | ({"num_hidden_layers": chosen.blocks} if chosen.blocks else {}))


def linears(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """(N, K) of each linear of the blocks."""
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = heads * config["num_attention_heads"], heads * config["num_key_value_heads"]
    block = {
        "self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    return {f"model.layers.{i}.{name}": shape for i in range(config["num_hidden_layers"]) for name, shape in block.items()}


def others(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of what stays 16-bit."""
    hidden, words = config["hidden_size"], config["vocab_size"]
    norms = [
        f"model.layers.{i}.{name}_layernorm.weight" for i in range(config["num_hidden_layers"]) for name in ("input", "post_attention")
    ]
    return {
        "model.embed_tokens.weight": (words, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (words, hidden),
    } | dict.fromkeys(norms, (hidden,))


def shapes(out: Path, config: dict[str, Any]) -> None:
    packed, plain = linears(config), others(config)
    write_config(out / "fp16", config)
    head = {"lm_head": (config["vocab_size"], config["hidden_size"])}
    for fmt in registry.FORMATS.values():
        for name, here in ((fmt.name, packed), (f"{fmt.name}-head", packed | head)):
            if fmt is registry.INTERCHANGE or fmt.native:
                ignore = ["lm_head"] if here is packed else []
                write_config(out / name, config, fmt, here, ignore)
                if not fmt.native and here is not packed:
                    target_head(out / name)
                if fmt.native:
                    rest = {tensor: shape for tensor, shape in plain.items() if tensor.rpartition(".")[0] not in here}
                    write_hole(out / name / f"{fmt.files}.safetensors", tensors_of(fmt, here, rest), here)


def tensors_of(
    fmt: Format, packed: Mapping[str, tuple[int, int]], plain: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of every tensor."""
    found = {name: ("F16", shape) for name, shape in plain.items()}
    for layer, (n, k) in packed.items():
        found |= {f"{layer}.{suffix}": (dtypes[0], shape) for suffix, (dtypes, shape) in fmt.shapes(n, k, GROUP).items()}
    return found


def write_config(
    folder: Path, config: dict[str, Any], fmt: Format | None = None, packed: Any = (), ignore: list[str] | None = None
) -> None:
    folder.mkdir(parents=True)
    block = {} if fmt is None else {"quantization_config": registry.quantization_config(fmt, dict.fromkeys(packed, GROUP), ignore or [])}
    (folder / "config.json").write_text(json.dumps(config | block, indent=1))


def target_head(folder: Path) -> None:
    """vLLM takes the head for no `Linear`; a group that names it is followed."""
    document = json.loads((folder / "config.json").read_text())
    for group in document["quantization_config"]["config_groups"].values():
        group["targets"].append("lm_head")
    (folder / "config.json").write_text(json.dumps(document, indent=1))


def write_hole(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], packed: Mapping[str, tuple[int, int]]) -> None:
    """A safetensors file whose tensors are zeros that take no place on the disk, but for weight_shape, which the plugin reads."""
    header: dict[str, Any] = {}
    place = 0
    for name, (dtype, shape) in tensors.items():
        size = BYTES[dtype] * prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + place)
        for layer, (n, k) in packed.items():
            file.seek(8 + len(text) + header[f"{layer}.weight_shape"]["data_offsets"][0])
            file.write(struct.pack("<qq", n, k))


def random_model(out: Path, config: dict[str, Any]) -> None:
    """The same weights in all formats: 2:4, so that marlin_24 can hold them, with scales that keep activations near 1."""
    generator = torch.Generator().manual_seed(0)
    plain = {name: random_plain(name, shape, generator) for name, shape in others(config).items()}
    codes = {layer: random_linear(n, k, generator) for layer, (n, k) in linears(config).items()}
    dense = {f"{layer}.weight": dequantized(q.codes, q.scales, q.group_size).to(torch.float16) for layer, q in codes.items()}
    write_config(out / "fp16", config)
    save_file(plain | dense, out / "fp16" / "model.safetensors", {"format": "pt"})
    for fmt in registry.FORMATS.values():
        if fmt.quantized:
            write_config(out / fmt.name, config, fmt, codes, ["lm_head"])
            packed = {name: tensor for layer, q in codes.items() for name, tensor in registry.linear_tensors(fmt, layer, q).items()}
            save_file(plain | packed, out / fmt.name / f"{fmt.files}.safetensors", {"format": "pt"})


def random_plain(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A head of a tenth: logits of some units, where float16 still has three digits behind the point."""
    scale = 0.1 if name == "lm_head.weight" else 1.0
    return (
        torch.ones(shape, dtype=torch.float16) if len(shape) == 1 else (scale * torch.randn(shape, generator=generator)).to(torch.float16)
    )


def random_linear(n: int, k: int, generator: torch.Generator) -> QuantizedLinear:
    order = torch.rand(n, k // 4, 4, generator=generator).argsort(-1)
    keep = (order < 2).reshape(n, k)
    codes = torch.randint(-8, 8, (n, k), dtype=torch.int8, generator=generator) * keep
    scales = (0.5 + torch.rand(n, k // GROUP, generator=generator)) / (3.3 * k**0.5)
    return SparseQuantizedLinear(codes, scales.to(torch.float16), GROUP, keep)


if __name__ == "__main__":
    main()
