"""Peak memory of `quantize` on a synthetic checkpoint of several GB, against what `marlinctl plan` says of it.

    python benchmarks/peak_memory.py [--blocks 30] [--hidden 2048] [--intermediate 5632] [--samples 64] [--length 512] [--folder DIR]
                                     [further flags of quantize: --drift-correction 0.5 --dtype float32 ...]

The checkpoint is written block by block with random weights. The job runs as a child process; anonymous resident memory is sampled
from /proc (mapped file pages are not counted: the system gives them back when it needs them). With --device cuda the plan is also compared
with what was alive on the GPU, as the run reports it, and the CUDA context; what nvidia-smi counts beyond that is memory that torch's
allocator keeps and would give back, and is printed beside it. Exit code 1 where either is more than 15 % away from the plan.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from marlinctl.planning.memory import BASE_ON_DEVICE
from marlinctl.system.console import gibibytes

VOCABULARY = 4096
TOLERANCE = 0.15


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("blocks", 30), ("hidden", 2048), ("intermediate", 5632), ("samples", 64), ("length", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--folder", type=Path, help="where to put the checkpoint (default: a temporary folder)")
    chosen, further = parser.parse_known_args()
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        return run(Path(folder), chosen, further)


def run(folder: Path, chosen: argparse.Namespace, further: list[str]) -> int:
    source = folder / "model"
    size = write_checkpoint(source, chosen)
    (folder / "text.txt").write_text(" ".join(f"w{i * 7919 % VOCABULARY}" for i in range(chosen.samples * chosen.length + 1)))
    flags = [
        *("--group-size", "128", "--calibration", str(folder / "text.txt"), "--quiet", "--json"),
        *("--samples", str(chosen.samples), "--sequence-length", str(chosen.length), *further),
    ]
    marlinctl = [sys.executable, "-m", "marlinctl"]
    planned = json.loads(subprocess.run([*marlinctl, "plan", str(source), *flags], capture_output=True, text=True, check=False).stdout)
    promised = planned["memory"]["host"]["stages"]["quantize"]
    started = time.monotonic()
    device = planned["memory"]["device"]
    before = peak_of_device = used_of_device() if device else 0
    child = subprocess.Popen([*marlinctl, "quantize", str(source), str(folder / "out"), *flags], stdout=subprocess.DEVNULL)
    peak = 0
    while child.poll() is None:
        peak = max(peak, anonymous(child.pid))
        if device:
            peak_of_device = max(peak_of_device, used_of_device())
        else:
            time.sleep(0.02)
    seconds = time.monotonic() - started
    if child.returncode:
        return child.returncode
    print(f"checkpoint {gibibytes(size)}, {chosen.blocks} blocks, {chosen.samples} x {chosen.length} tokens {' '.join(further)}")
    print(f"peak anonymous memory {gibibytes(peak)}, planned {gibibytes(promised)} ({promised / max(peak, 1) - 1:+.1%})")
    print(f"{seconds:.0f} s, planned {planned['time']['seconds']} s")
    wrong = abs(promised / peak - 1) > TOLERANCE
    if device:
        report = json.loads((folder / "out" / "marlinctl_report.json").read_text())
        measured, promised = report["peak_device_memory_bytes"] + BASE_ON_DEVICE, device["peak"] + device["activations"]
        print(f"peak GPU memory {gibibytes(measured)}, planned {gibibytes(promised)} ({promised / measured - 1:+.1%})")
        reserved, counted = report["peak_device_reserved_bytes"], peak_of_device - before
        print(f"nvidia-smi {gibibytes(counted)}, of which torch held {gibibytes(reserved)}")
        wrong |= abs(promised / measured - 1) > TOLERANCE
    return int(wrong)


def used_of_device() -> int:
    """Bytes in use on the first GPU, by whomever."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout) << 20


def anonymous(process: int) -> int:
    """Resident anonymous bytes of a process; 0 once it is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


def write_checkpoint(folder: Path, chosen: argparse.Namespace) -> int:
    """A Llama of this size with random bfloat16 weights, one shard a block. Returns its bytes."""
    folder.mkdir()
    heads = chosen.hidden // 64
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "hidden_size": chosen.hidden, "intermediate_size": chosen.intermediate,
        "num_hidden_layers": chosen.blocks, "num_attention_heads": heads, "num_key_value_heads": heads // 4,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": chosen.length, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    generator = torch.Generator().manual_seed(0)

    def matrix(n: int, k: int) -> torch.Tensor:
        return (torch.randn(n, k, generator=generator) * k**-0.5).to(torch.bfloat16)

    kv, hidden, wide = chosen.hidden // 4, chosen.hidden, chosen.intermediate
    shapes = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden), "mlp.down_proj": (hidden, wide),
    }  # fmt: skip
    ones = torch.ones(hidden, dtype=torch.bfloat16)
    where: dict[str, str] = {}
    for i in range(chosen.blocks + 1):
        if i < chosen.blocks:
            prefix = f"model.layers.{i}."
            tensors = {f"{prefix}{name}.weight": matrix(*shape) for name, shape in shapes.items()}
            tensors |= {f"{prefix}{norm}.weight": ones.clone() for norm in ("input_layernorm", "post_attention_layernorm")}
        else:
            tensors = {"model.embed_tokens.weight": matrix(VOCABULARY, hidden), "model.norm.weight": ones.clone()}
        name = f"model-{i + 1:05d}-of-{chosen.blocks + 1:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


if __name__ == "__main__":
    sys.exit(main())
