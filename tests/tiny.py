"""A tiny random Llama as a Hugging Face folder, made in milliseconds: what every other test takes as its good checkpoint.

The weights are written with safetensors itself, so that our reader is tested against files that somebody else wrote. The
tokenizer is byte-level BPE built in code: any text round-trips through it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("Ġ t", "h e", "i n", "Ġ a", "Ġt he", "e r", "o n", "Ġ s", "r e", "a n")
VOCAB_SIZE = 288  # 3 special tokens, 256 bytes, the merges, and rows without a token, as real models have
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_config(**changes: Any) -> dict[str, Any]:
    """config.json of the tiny model: N and K are multiples of 64, so that every group size divides."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "dtype": "float16",
    } | changes


def tiny_tensors(config: Mapping[str, Any], *, seed: int = 0, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """The weights of a Llama of this config: normal with a standard deviation of 0.05 (norms around 1)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, mean: float = 0.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * 0.05 + mean).to(dtype)

    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    q_rows, kv_rows = head_dim * config["num_attention_heads"], head_dim * config["num_key_value_heads"]
    tensors = {"model.embed_tokens.weight": normal(config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        tensors |= {
            p + "input_layernorm.weight": normal(hidden, mean=1.0),
            p + "self_attn.q_proj.weight": normal(q_rows, hidden),
            p + "self_attn.k_proj.weight": normal(kv_rows, hidden),
            p + "self_attn.v_proj.weight": normal(kv_rows, hidden),
            p + "self_attn.o_proj.weight": normal(hidden, q_rows),
            p + "post_attention_layernorm.weight": normal(hidden, mean=1.0),
            p + "mlp.gate_proj.weight": normal(inner, hidden),
            p + "mlp.up_proj.weight": normal(inner, hidden),
            p + "mlp.down_proj.weight": normal(hidden, inner),
        }
    tensors["model.norm.weight"] = normal(hidden, mean=1.0)
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = normal(config["vocab_size"], hidden)
    return tensors


def tiny_tokenizer() -> Tokenizer:
    """Byte-level BPE with a few merges. Ids: special tokens, then the bytes, then what the merges make."""
    vocab = {token: i for i, token in enumerate(SPECIAL_TOKENS)}
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in MERGES)]
    for token in [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in pairs)]:
        vocab[token] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs, fuse_unk=False, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def write_tokenizer(folder: Path, *, chat_template: str | None = CHAT_TEMPLATE) -> None:
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template)


def write_weights(folder: Path, tensors: Mapping[str, Tensor], *, shards: int = 1) -> None:
    """One model.safetensors, or `shards` files of neighbouring tensors with an index."""
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for i in range(shards):
        part = names[len(names) * i // shards : len(names) * (i + 1) // shards]
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def make_tiny(
    folder: Path,
    *,
    shards: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float16,
    tokenizer: bool = True,
    chat_template: str | None = CHAT_TEMPLATE,
    **changes: Any,
) -> Path:
    """A complete good checkpoint in `folder` (made if need be). Keywords beyond the named ones change config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config(dtype=str(dtype).removeprefix("torch."), **changes)
    write_weights(folder, tiny_tensors(config, seed=seed, dtype=dtype), shards=shards)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}))
    if tokenizer:
        write_tokenizer(folder, chat_template=chat_template)
    return folder
