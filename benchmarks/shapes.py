"""The shapes of published models, and folders with random weights of these shapes: times and memory need shapes and not weights.

A shape is a config.json; names and shapes of its tensors are those of models/architectures.py, spelled as the model's checkpoint spells
them (one tensor for each expert and projection). A block is one file, made by itself with a seed of its own, so folders of one shape with
more or fewer blocks share their files (hard links).

    llama-3-8b       0.44 GB a block, embedding and head 2.1 GB
    llama-3-70b      1.7 GB a block, 4.2 GB
    qwen3-30b-a3b    1.2 GB a block, 1.2 GB
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from marlinctl.models.families import architecture

_LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "vocab_size": 128256, "num_key_value_heads": 8,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu", "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "llama-3-8b": _LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama-3-70b": _LLAMA | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "dtype": "bfloat16", "vocab_size": 151936,
        "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "hidden_act": "silu", "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    },
}  # fmt: skip
_SPECIAL = ["<pad>", "<s>", "</s>"]


def make_model(config: Mapping[str, Any], blocks: int, files: Path, folder: Path, text: Path, device: str) -> None:
    """A model of this shape with `blocks` blocks in `folder`, its tokenizer a byte-level BPE of the text (JSONL).

    files: where the shards of this shape lie, or will. device: where random numbers are made.
    """
    config = {**config, "num_hidden_layers": blocks}
    known = architecture(config)
    files.mkdir(exist_ok=True)
    blocks_of = {f"block-{b.index:05d}": [*b.others, *(f"{name}.weight" for name in b.linears)] for b in known.blocks}
    inside = {name for names in blocks_of.values() for name in names}
    pieces = {"rest": [name for name in known.expected if name not in inside], **blocks_of}
    made = folder.with_name(folder.name + ".part")
    made.mkdir(exist_ok=True)
    where: dict[str, str] = {}
    for seed, (piece, names) in enumerate(pieces.items()):
        shard = files / f"{piece}.safetensors"
        if not shard.exists():
            generator = torch.Generator(device).manual_seed(seed)
            tensors = {name: _random(name, known.expected[name], generator) for name in names}
            save_file(tensors, shard.with_suffix(".part"), metadata={"format": "pt"})
            shard.with_suffix(".part").rename(shard)
        (made / shard.name).unlink(missing_ok=True)
        os.link(shard, made / shard.name)
        where |= dict.fromkeys(names, shard.name)
    (made / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (made / "config.json").write_text(json.dumps(config))
    _write_tokenizer(made, text)
    made.rename(folder)


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Norms are one. Other weights are small enough that hidden states keep their size from block to block."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    scale = 1.0 if "embed_tokens" in name else shape[1] ** -0.5 if name == "lm_head.weight" else 0.6 * shape[1] ** -0.5
    return (torch.randn(shape, generator=generator, device=generator.device) * scale).bfloat16().cpu()


def _write_tokenizer(folder: Path, text: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=8192, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False)
    lines = [json.loads(line)["text"] for line in text.read_text("utf-8").splitlines()[:200]]
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"})
    )
