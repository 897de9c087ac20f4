"""Seconds and peak memory of whole runs of `marlinctl quantize`, `sparsify` or `compress` on a model of Llama-3-8B's shape, by blocks.

    python benchmarks/compress_speed.py FOLDER TEXT.jsonl --blocks 2 --blocks 6 -- quantize --recipe int4 --no-eval
    python benchmarks/compress_speed.py FOLDER TEXT.jsonl --blocks 2 --profile -- quantize --recipe int4 --no-eval

The model has random bfloat16 weights, its tokenizer is trained on the text, the calibration is that text. With two numbers of blocks, or
more, the line through the first and the last is printed, and what it says of 32 blocks. Each run is a process of its own, with a cold
start; the kernels' cache in FOLDER is filled by a run that is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import pstats
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from benchmarks.llama_shape import HIDDEN, INTERMEDIATE, LINEARS, VOCABULARY

BLOCKS = 32
SPECIAL = ["<pad>", "<s>", "</s>"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--blocks", type=int, action="append")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--profile", action="store_true", help="print where the time of the last run went, by cProfile")
    own, _, rest = "\0".join(sys.argv[1:]).partition("\0--\0")
    chosen, command = parser.parse_args(own.split("\0")), rest.split("\0")
    chosen.folder.mkdir(parents=True, exist_ok=True)
    size = ["--calibration", str(chosen.text), "--samples", str(chosen.samples), "--sequence-length", str(chosen.sequence_length)]
    seconds: dict[int, float] = {}
    for blocks in chosen.blocks or [2, 6]:
        model, out = chosen.folder / f"model-{blocks}", chosen.folder / "out"
        if not model.exists():
            make(model, blocks, chosen.text)
        if not seconds:
            run([*command[:1], str(model), str(out), *command[1:], *size[:2], "--samples", "8", "--sequence-length", "512"], chosen.folder)
            shutil.rmtree(out)
        last = blocks == (chosen.blocks or [2, 6])[-1]
        seconds[blocks] = run([*command[:1], str(model), str(out), *command[1:], *size], chosen.folder, profile=chosen.profile and last)
        report = json.loads((out / "marlinctl_report.json").read_text())
        peaks = {key: f"{value / 2**30:.1f} GiB" for key, value in report.items() if key.startswith("peak") and value}
        print(f"{blocks} blocks: {seconds[blocks]:.1f} s {peaks} {report.get('phases', '')}", flush=True)
        shutil.rmtree(out)
    if len(seconds) > 1:
        (first, a), *_, (last_blocks, b) = seconds.items()
        block = (b - a) / (last_blocks - first)
        print(f"a block: {block:.2f} s; {BLOCKS} blocks, by the line: {a + block * (BLOCKS - first):.1f} s")
    return 0


def run(arguments: list[str], folder: Path, *, profile: bool = False) -> float:
    profiler = ["-m", "cProfile", "-o", str(folder / "profile")] if profile else []
    started = time.monotonic()
    environment = {**os.environ, "MARLINCTL_CACHE": str(folder / "cache")}
    ended = subprocess.run(
        [sys.executable, *profiler, "-m", "marlinctl", *arguments, "--device", "cuda"], env=environment, capture_output=True, text=True
    )
    seconds = time.monotonic() - started
    if ended.returncode:
        raise SystemExit(f"{' '.join(arguments)}: exit {ended.returncode}\n{ended.stderr[-2000:]}")
    if profile:
        for order in ("cumtime", "tottime"):
            pstats.Stats(str(folder / "profile")).sort_stats(order).print_stats(60)
    return seconds


def make(folder: Path, blocks: int, text: Path) -> None:
    """A model of the shape, with a byte-level BPE of the text."""
    folder.mkdir()
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape: int, scale: float) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator, device="cuda") * scale).bfloat16().cpu()

    where: dict[str, str] = {}
    for i in range(blocks):
        prefix, name = f"model.layers.{i}.", f"model-{i + 1:05d}.safetensors"
        tensors = {f"{prefix}{linear}.weight": random(*shape, scale=0.6 * shape[1] ** -0.5) for linear, shape in LINEARS.items()}
        tensors |= {f"{prefix}{norm}.weight": torch.ones(HIDDEN).bfloat16() for norm in ("input_layernorm", "post_attention_layernorm")}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, name)
    tensors = {"model.embed_tokens.weight": random(VOCABULARY, HIDDEN, scale=1.0), "model.norm.weight": torch.ones(HIDDEN).bfloat16()}
    tensors["lm_head.weight"] = random(VOCABULARY, HIDDEN, scale=HIDDEN**-0.5)
    save_file(tensors, folder / "model-00000.safetensors", metadata={"format": "pt"})
    where |= dict.fromkeys(tensors, "model-00000.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": blocks, "num_attention_heads": 32,
        "num_key_value_heads": 8, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu",
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=8192, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    lines = [json.loads(line)["text"] for line in text.read_text("utf-8").splitlines()[:200]]
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"})
    )


if __name__ == "__main__":
    sys.exit(main())
