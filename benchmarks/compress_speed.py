"""Seconds and peak memory of whole runs of `marlinctl quantize`, `sparsify` or `compress` on a model with random weights, by blocks.

    python benchmarks/compress_speed.py FOLDER TEXT.jsonl --blocks 2 --blocks 6 -- quantize --recipe int4
    python benchmarks/compress_speed.py FOLDER TEXT.jsonl --shape qwen3-30b-a3b --blocks 2 --blocks 4 -- quantize --recipe int4
    python benchmarks/compress_speed.py FOLDER TEXT.jsonl --blocks 2 --profile -- compress --recipe sparse-int4 --no-eval

Shapes are those of benchmarks/shapes.py. The model's tokenizer is trained on the text, and the calibration is that text. With two numbers
of blocks, or more, the line through the first and the last is printed, and what it says of the whole model. Each run is a process of its
own, with a cold start; the kernels' cache in FOLDER is filled by a run that is not counted.

Disk beside the models: the output, the hidden states of two blocks, and activations that do not fit into half of the GPU's memory.
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

from benchmarks.shapes import SHAPES, make_model


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--blocks", type=int, action="append", help="may be given several times (default: 2 and 6)")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--profile", action="store_true", help="print where the time of the last run went, by cProfile")
    own, _, rest = "\0".join(sys.argv[1:]).partition("\0--\0")
    chosen, command = parser.parse_args(own.split("\0")), rest.split("\0")
    chosen.folder.mkdir(parents=True, exist_ok=True)
    shape, counts = SHAPES[chosen.shape], chosen.blocks or [2, 6]
    size = ["--calibration", str(chosen.text), "--samples", str(chosen.samples), "--sequence-length", str(chosen.sequence_length)]
    seconds: dict[int, float] = {}
    for blocks in counts:
        model, out = chosen.folder / f"{chosen.shape}-{blocks}", chosen.folder / "out"
        if not model.exists():
            files = chosen.folder / f"{chosen.shape}-files"
            make_model(shape, blocks, files, model, chosen.text, "cuda" if torch.cuda.is_available() else "cpu")
        if not seconds:
            run([*command[:1], str(model), str(out), *command[1:], *size[:2], "--samples", "8", "--sequence-length", "512"], chosen.folder)
            shutil.rmtree(out)
        last = blocks == counts[-1]
        seconds[blocks] = run([*command[:1], str(model), str(out), *command[1:], *size], chosen.folder, profile=chosen.profile and last)
        report = json.loads((out / "marlinctl_report.json").read_text())
        peaks = {key: f"{value / 2**30:.1f} GiB" for key, value in report.items() if key.startswith("peak") and value}
        print(f"{blocks} blocks: {seconds[blocks]:.1f} s {peaks} {report.get('phases', '')}", flush=True)
        shutil.rmtree(out)
    if len(seconds) > 1:
        (first, a), *_, (last_blocks, b) = seconds.items()
        block, whole = (b - a) / (last_blocks - first), shape["num_hidden_layers"]
        print(f"a block: {block:.2f} s; {whole} blocks, by the line: {a + block * (whole - first):.1f} s")
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


if __name__ == "__main__":
    sys.exit(main())
