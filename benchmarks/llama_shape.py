"""A native folder of Llama-3-8B's shape with random tiles, for `marlinctl bench --model`: times need shapes and not weights.

    python benchmarks/llama_shape.py OUT [--format marlin_24] [--blocks 32] [--group-size 128] [--device cuda]
    marlinctl bench --model OUT --batch 1,16 --lengths 64:64

Words, scales and metadata are random, as those of a model are. 5.7 GB in marlin, 4.8 GB in marlin_24, of which 2.1 GB are the
embedding and the output head, which stay 16 bit.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.shapes import SHAPES
from marlinctl.models.families import architecture

SHAPE = SHAPES["llama-3-8b"]
HIDDEN, VOCABULARY = SHAPE["hidden_size"], SHAPE["vocab_size"]
_BLOCK = architecture(SHAPE).blocks[0]
LINEARS = {name[len(_BLOCK.prefix) + 1 :]: (spec.out_features, spec.in_features) for name, spec in _BLOCK.linears.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--format", choices=["marlin", "marlin_24"], default="marlin")
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where random numbers are made")
    chosen = parser.parse_args()
    chosen.out.mkdir()
    where: dict[str, str] = {}
    for i in range(chosen.blocks):
        prefix = f"model.layers.{i}."
        tensors = {f"{prefix}{norm}.weight": ones(HIDDEN) for norm in ("input_layernorm", "post_attention_layernorm")}
        for name, (n, k) in LINEARS.items():
            made = tiles(chosen.format == "marlin_24", n, k, chosen.group_size, chosen.device)
            tensors |= {f"{prefix}{name}.{suffix}": tensor for suffix, tensor in made.items()}
        save(chosen.out, f"marlin-{i + 1:05d}-of-{chosen.blocks + 1:05d}.safetensors", tensors, where)
    matrix = {"model.embed_tokens.weight": 1.0, "lm_head.weight": HIDDEN**-0.5}
    tensors = {name: (torch.randn(VOCABULARY, HIDDEN, device=chosen.device) * scale).half().cpu() for name, scale in matrix.items()}
    save(
        chosen.out,
        f"marlin-{chosen.blocks + 1:05d}-of-{chosen.blocks + 1:05d}.safetensors",
        {**tensors, "model.norm.weight": ones(HIDDEN)},
        where,
    )
    (chosen.out / "marlin.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (chosen.out / "config.json").write_text(json.dumps(config(chosen)))
    return 0


def config(chosen: argparse.Namespace) -> dict[str, object]:
    from marlinctl.checkpoint.formats.registry import FORMATS, quantization_config

    layers = {f"model.layers.{i}.{name}": chosen.group_size for i in range(chosen.blocks) for name in LINEARS}
    return {
        **SHAPE, "dtype": "float16", "num_hidden_layers": chosen.blocks,
        "quantization_config": quantization_config(FORMATS[chosen.format], layers, ["lm_head"]),
    }  # fmt: skip


def tiles(sparse: bool, n: int, k: int, group_size: int, device: str) -> dict[str, Tensor]:
    """The tensors of one linear, as docs/formats has them."""
    words = torch.randint(-(2**31), 2**31, (k // (32 if sparse else 16), 2 * n), dtype=torch.int32, device=device)
    scales = (torch.randn(k // group_size, n, device=device) * 0.2 * k**-0.5).half()  # products keep their size from block to block
    shape = torch.tensor([n, k], dtype=torch.int64)
    if not sparse:
        return {"B": words.cpu(), "s": scales.cpu(), "weight_shape": shape}
    pairs = torch.tensor([first + 4 * second for second in range(4) for first in range(second)], dtype=torch.int16, device=device)
    meta = torch.zeros(k // 32, 2 * n, dtype=torch.int16, device=device)
    for shift in (0, 4, 8, 12):
        meta |= pairs[torch.randint(len(pairs), meta.shape, device=device)] << shift
    return {"B_24": words.cpu(), "B_meta": meta.cpu(), "s": scales.cpu(), "weight_shape": shape}


def ones(size: int) -> Tensor:
    return torch.ones(size, dtype=torch.float16)


def save(out: Path, name: str, tensors: dict[str, Tensor], where: dict[str, str]) -> None:
    save_file(tensors, out / name, metadata={"format": "pt"})
    where |= dict.fromkeys(tensors, name)


if __name__ == "__main__":
    sys.exit(main())
