"""llm-compressor's GPTQ W4A16, with --sparse after its SparseGPT 2:4, on the tokens that marlinctl would use, for a comparison.

    python -m venv other && other/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1
    other/bin/python benchmarks/llm_compressor.py MODEL TEXT.jsonl OUT --group-size 64 --samples 128 --sequence-length 512 [--sparse]

It needs an environment of its own: llm-compressor 0.14.0.1 wants an older transformers than marlinctl. Documents are joined by blank
lines, tokenized without special tokens and cut, as `marlinctl quantize --calibration TEXT.jsonl` does. Prints seconds and peak memory.

With --sparse the pruned 16-bit model is written to OUT-2of4 and what GPTQ makes of it to OUT. GPTQ of 0.14.0.1 does not know the mask: it
fills some of the pruned weights again, so OUT is not 2:4; how many is printed.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "text", "out"):
        parser.add_argument(name)
    for name, default in (("group-size", 128), ("samples", 128), ("sequence-length", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--sparse", action="store_true")
    chosen = parser.parse_args()
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    started = time.monotonic()
    model = AutoModelForCausalLM.from_pretrained(chosen.model, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(chosen.model)
    with open(chosen.text, encoding="utf-8") as lines:
        documents = [json.loads(line)["text"] for line in lines]
    needed = chosen.samples * chosen.sequence_length
    taken, size = 0, 0
    while size < 6 * needed and taken < len(documents):  # six characters a token are more than enough for English
        size += len(documents[taken]) + 2
        taken += 1
    ids = tokenizer("\n\n".join(documents[:taken]), add_special_tokens=False)["input_ids"][:needed]
    if len(ids) < needed:
        raise SystemExit(f"{len(ids)} tokens are there, {needed} are needed")
    rows = [ids[i : i + chosen.sequence_length] for i in range(0, needed, chosen.sequence_length)]
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * chosen.sequence_length] * chosen.samples})
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=chosen.group_size)
    gptq = GPTQModifier(config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}, ignore=["lm_head"])
    common = {
        "dataset": data, "tokenizer": tokenizer, "max_seq_length": chosen.sequence_length, "num_calibration_samples": chosen.samples,
    }  # fmt: skip
    if chosen.sparse:
        oneshot(model=model, recipe=SparseGPTModifier(sparsity=0.5, mask_structure="2:4", ignore=["re:.*lm_head"]), **common)
        masks = {name: module.weight != 0 for name, module in linears(model)}
        save(model, tokenizer, chosen.out + "-2of4")
        oneshot(model=model, recipe=gptq, **common)
        refilled = sum(int((module.weight[~masks[name]] != 0).sum()) for name, module in linears(model))
        print(f"GPTQ filled {refilled} of {sum(int((~mask).sum()) for mask in masks.values())} pruned weights")
        save(model, tokenizer, chosen.out)
    else:
        oneshot(model=model, recipe=gptq, output_dir=chosen.out, **common)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{time.monotonic() - started:.1f} s, peak {peak:.2f} GiB")


def linears(model: torch.nn.Module) -> list[tuple[str, torch.nn.Linear]]:
    return [(name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and not name.endswith("lm_head")]


def save(model: Any, tokenizer: Any, out: str) -> None:
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
