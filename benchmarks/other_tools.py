"""int4 by another tool, on the tokens that marlinctl would use, for a comparison. One tool in an environment of its own:

    python benchmarks/calibration_tokens.py MODEL TEXT.jsonl TOKENS.json --samples 128 --sequence-length 512       # marlinctl's
    python -m venv other && other/bin/pip install llmcompressor==0.14.0.1                   # or auto-round==0.16.0, gptqmodel==7.7.0
    other/bin/python benchmarks/other_tools.py MODEL TOKENS.json OUT --tool llm-compressor --group-size 64 --device cuda

    tool             default                                        --best                                               OUT
    llm-compressor   GPTQ: static activation order, damping 0.01    -                                                    compressed-tensors
    auto-round       200 steps a block                              1000 steps, as `auto-round-best`                     GPTQ
    gptqmodel        GPTQ: group-aware order, damping 0.05          and scales by error (mse 2.4)                        GPTQ

All are symmetric, 4 bits, with the head left as it is. `--option NAME=JSON` sets something else of GPTQModifier, AutoRound or
QuantizeConfig: gptaq={"alpha":0.25} and foem={"beta":0.2} are GPTQModel's own extensions of GPTQ. Its desc_act makes folders that
marlinctl does not read. Beside OUT, OUT.json has the settings, the version, seconds of the process and its peaks, host and GPU.

With --sparse (llm-compressor) the model is pruned by SparseGPT first; that 16-bit model is written to OUT-2of4. GPTQ of 0.14.0.1 does not
know the mask: it fills some of the pruned weights again, so OUT is not 2:4; how many is in OUT.json.

`--dtype auto` loads the original in its own dtype, as these tools do by themselves, but on a CPU, where float16 is slow, in bfloat16. Gemma
overflows in float16: give bfloat16.
"""

from __future__ import annotations

import time

STARTED = time.monotonic()

import argparse  # noqa: E402 - the clock runs before the imports: they take seconds, and marlinctl's are counted too
import importlib.metadata  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import re  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

Rows = list[list[int]]
PACKAGES = {"llm-compressor": "llmcompressor", "auto-round": "auto-round", "gptqmodel": "gptqmodel"}


def main() -> None:
    chosen = arguments()
    if chosen.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before the imports below: each tool looks for a GPU by itself
    elif not gpus():
        raise SystemExit("--device cuda: PyTorch of this environment finds no GPU, and the tool would use the CPU without a word")
    os.environ["HF_HUB_OFFLINE"] = "1"
    chosen.model, chosen.out = str(Path(chosen.model).absolute()), chosen.out.absolute()
    rows: Rows = json.loads(chosen.tokens.read_text())["ids"]
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    os.chdir(chosen.out.parent)  # GPTQModel and llm-compressor write logs where they run
    make = {"llm-compressor": llm_compressor, "auto-round": auto_round, "gptqmodel": gptqmodel}[chosen.tool]
    found = make(chosen, rows, dict(option.split("=", 1) for option in chosen.option))
    document = {
        "tool": chosen.tool,
        "version": importlib.metadata.version(PACKAGES[chosen.tool]),
        "best": chosen.best,
        "samples": len(rows),
        "sequence_length": len(rows[0]),
        "group_size": chosen.group_size,
        "device": chosen.device,
        "dtype": chosen.dtype,
        **found,
        "seconds": round(time.monotonic() - STARTED, 1),
        **peaks(chosen.device),
    }
    chosen.out.with_name(f"{chosen.out.name}.json").write_text(json.dumps(document, indent=1))
    print(f"{document['seconds']} s, peak {document['peak_memory_bytes'] / 2**30:.2f} GiB")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("tokens", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tool", choices=PACKAGES, required=True)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--best", action="store_true")
    parser.add_argument("--sparse", action="store_true")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=JSON")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto")
    chosen = parser.parse_args()
    if chosen.dtype == "auto" and chosen.device == "cpu":
        chosen.dtype = "bfloat16"
    if chosen.best and chosen.tool == "llm-compressor":
        parser.error("llm-compressor documents no better settings of GPTQ than its defaults")
    if chosen.sparse and chosen.tool != "llm-compressor":
        parser.error(f"{chosen.tool} does not prune")
    return chosen


def llm_compressor(chosen: argparse.Namespace, rows: Rows, options: dict[str, str]) -> dict[str, Any]:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.pruning import SparseGPTModifier

    model, tokenizer = load(chosen)
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=chosen.group_size)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    settings = {name: json.loads(value) for name, value in options.items()}
    gptq = GPTQModifier(config_groups={"group_0": scheme}, ignore=["re:.*lm_head"], **settings)
    common = {"dataset": data, "tokenizer": tokenizer, "max_seq_length": len(rows[0]), "num_calibration_samples": len(rows)}
    found: dict[str, Any] = {"settings": settings}
    if chosen.sparse:
        oneshot(model=model, recipe=SparseGPTModifier(sparsity=0.5, mask_structure="2:4", ignore=["re:.*lm_head"]), **common)
        masks = {name: (module.weight != 0).cpu() for name, module in linears(model)}
        pruned = chosen.out.with_name(f"{chosen.out.name}-2of4")
        model.save_pretrained(pruned)
        tokenizer.save_pretrained(pruned)
    oneshot(model=model, recipe=gptq, **common)
    if chosen.sparse:
        found["pruned"] = sum(int((~mask).sum()) for mask in masks.values())
        found["filled_again"] = sum(int((module.weight.cpu()[~masks[name]] != 0).sum()) for name, module in linears(model))
    model.save_pretrained(chosen.out, save_compressed=True)
    tokenizer.save_pretrained(chosen.out)
    return found


def auto_round(chosen: argparse.Namespace, rows: Rows, options: dict[str, str]) -> dict[str, Any]:
    import torch
    from auto_round import AutoRound

    model, tokenizer = load(chosen)
    settings = {"iters": 1000 if chosen.best else 200, "batch_size": 8, **{name: json.loads(value) for name, value in options.items()}}
    size = settings["batch_size"]
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in torch.tensor(rows).split(size)]
    rounding = AutoRound(
        model, tokenizer, scheme="W4A16", group_size=chosen.group_size, sym=True, dataset=batches, nsamples=len(rows), seqlen=len(rows[0]),
        device_map="cpu" if chosen.device == "cpu" else 0, **settings,
    )  # fmt: skip
    stage = chosen.out.with_name(f"{chosen.out.name}.stage")  # auto-round makes a folder of its own naming in the one that it is given
    rounding.quantize_and_save(str(stage), format="auto_gptq")
    (made,) = stage.iterdir()
    made.rename(chosen.out)
    stage.rmdir()
    return {"settings": settings}


def gptqmodel(chosen: argparse.Namespace, rows: Rows, options: dict[str, str]) -> dict[str, Any]:
    if (os.cpu_count() or 1) < 3:
        os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # 7.7.0 takes half of the processors, and fails with fewer than two
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.quantization.config import FOEMConfig, GPTAQConfig

    settings: dict[str, Any] = {"mse": 2.4} if chosen.best else {}
    settings |= {name: json.loads(value) for name, value in options.items()}
    kinds = {"gptaq": GPTAQConfig, "foem": FOEMConfig}
    given = {name: kinds[name](**value) if name in kinds else value for name, value in settings.items()}
    config = QuantizeConfig(bits=4, group_size=chosen.group_size, sym=True, device=chosen.device, **given)
    model = GPTQModel.load(chosen.model, config, **({} if chosen.dtype == "auto" else {"dtype": getattr(torch, chosen.dtype)}))
    model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows], batch_size=1)
    model.save(str(chosen.out))
    return {"settings": settings}


def load(chosen: argparse.Namespace) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(chosen.model, dtype=chosen.dtype)
    return model, AutoTokenizer.from_pretrained(chosen.model)


def linears(model: Any) -> list[tuple[str, Any]]:
    import torch

    return [(name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and not name.endswith("lm_head")]


def peaks(device: str) -> dict[str, int | None]:
    """Under the names of marlinctl_report.json. Host memory by VmHWM, which begins with this program; the GPU as PyTorch counts it."""
    import torch

    host = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert host is not None
    allocated, reserved = (
        None if device == "cpu" else sum(peak(gpu) for gpu in range(gpus()))
        for peak in (torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved)
    )
    return {
        "peak_memory_bytes": int(host[1]) * 1024,
        "peak_device_memory_bytes": allocated,
        "peak_device_reserved_bytes": reserved,
    }


def gpus() -> int:
    import torch

    return torch.cuda.device_count()


if __name__ == "__main__":
    main()
