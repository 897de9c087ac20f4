"""Greedy tokens of a folder in vLLM on a CPU: python generate.py FOLDER PROMPTS.json OUT.json. It runs in vLLM's environment, without
marlinctl.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

NEW_TOKENS = 16


def main() -> None:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    from vllm import LLM, SamplingParams

    folder, prompts, out = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
    wraps = "vision_config" in json.loads((Path(folder) / "config.json").read_text())
    engine = LLM(
        model=folder, skip_tokenizer_init=True, dtype="float16", max_model_len=64, max_num_seqs=8, enforce_eager=True, seed=0,
        gpu_memory_utilization=0.2, enable_prefix_caching=False, **({"limit_mm_per_prompt": {"image": 0, "video": 0}} if wraps else {}),
    )  # fmt: skip
    greedy = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    answers = engine.generate([{"prompt_token_ids": ids} for ids in prompts], greedy)
    out.write_text(json.dumps([list(answer.outputs[0].token_ids) for answer in answers]))
    sys.stdout.flush()
    os._exit(0)  # an engine leaves threads behind that do not end


if __name__ == "__main__":
    main()
