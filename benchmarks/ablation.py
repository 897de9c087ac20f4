"""What each setting of a recipe does to the divergence from the original: many runs of `marlinctl quantize` or `sparsify`, and one table.

    python benchmarks/ablation.py MODEL WORK --calibration CAL.jsonl --text wiki=TEST.txt --text web=HELD_OUT.txt --device cuda --at-once 8
        --group-size 64 --samples 128 --variant "base=quantize --recipe int4" --variant "auto=quantize --recipe int4 --damping auto"

Every variant is a run in a process of its own, `--at-once` of them together; seconds are those of runs side by side. KL is the mean over
the predicted tokens, with its standard error. The difference to the first variant whose command begins with the same recipe is paired by
token. What is in WORK already is not made again. `--json FILE` keeps the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from marlinctl.data.text import LONGEST_TEXT, load_text
from marlinctl.evaluation import divergence, loading, statistics, windows
from marlinctl.evaluation.settings import EvalSettings
from marlinctl.system.console import Console


def main() -> int:
    chosen = arguments()
    chosen.work.mkdir(parents=True, exist_ok=True)
    variants = dict(variant.split("=", 1) for variant in chosen.variant)
    with ThreadPoolExecutor(chosen.at_once) as pool:
        seconds = dict(zip(variants, pool.map(lambda name: made(chosen, name, variants[name]), variants), strict=True))
    found = {name: {"command": variants[name], "seconds": seconds[name]} for name in variants if seconds[name] is not None}
    measure(chosen, found)
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1))
    print(table(found, [text.split("=", 1)[0] for text in chosen.text]))
    return int(len(found) < len(variants))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("work", type=Path, help="folder that gets the results and the logs")
    parser.add_argument("--variant", action="append", required=True, metavar="NAME=COMMAND")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--tokens", type=int, default=20480)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def made(chosen: argparse.Namespace, name: str, command: str) -> float | None:
    """Seconds of the run; None where it failed."""
    out = chosen.work / name
    if (out / "marlinctl_report.json").exists():
        return 0.0
    verb, *flags = command.split()
    size = {"--samples": chosen.samples, "--sequence-length": chosen.sequence_length, "--group-size": chosen.group_size}
    common = [str(word) for flag, value in size.items() if flag not in flags for word in (flag, value)]
    fixed = ["--calibration", chosen.calibration, "--device", chosen.device]
    if verb == "sparsify" and "--bits" not in flags:
        common = [*common[:4]]
    arguments = [sys.executable, "-m", "marlinctl", verb, str(chosen.model), str(out), *flags, *common, *fixed]
    started = time.monotonic()
    with (chosen.work / f"{name}.log").open("w") as log:
        code = subprocess.run(arguments, stdout=log, stderr=log, env=dict(os.environ, OMP_NUM_THREADS="2"), check=False).returncode
    took = time.monotonic() - started
    print(f"{name}: {took:.0f} s, exit {code}", file=sys.stderr, flush=True)
    return took if code == 0 else None


def measure(chosen: argparse.Namespace, found: dict[str, dict[str, Any]]) -> None:
    """Add the texts' figures to each variant."""
    console, dtype = Console.quiet(), "float16" if chosen.device == "cuda" else "bfloat16"
    settings = EvalSettings(tokens=chosen.tokens, window=chosen.window)
    original = loading.open_subject(chosen.model)
    baseline = loading.load_model(original, dtype=dtype, device=chosen.device)
    texts = {}
    for text in chosen.text:
        name, file = text.split("=", 1)
        texts[name] = windows.of_models(load_text(file, longest=LONGEST_TEXT), [original], settings)[0]
    kls: dict[str, dict[str, torch.Tensor]] = {}
    for name, record in found.items():
        model = loading.load_model(loading.open_subject(chosen.work / name), dtype=dtype, device=chosen.device)
        kls[name] = {}
        first = next(other for other in found if recipe(found[other]["command"]) == recipe(record["command"]))
        for text, rows in texts.items():
            compared = divergence.measure_divergence(model, baseline, rows, console)
            kls[name][text] = compared.kl
            record[text] = {
                "kl": statistics.token_mean(compared.kl).document(),
                "difference": statistics.token_mean(compared.kl - kls[first][text]).document(),
                "perplexity": statistics.perplexity(compared.losses).document(),
                "original": statistics.perplexity(compared.baseline_losses).document(),
                "top1": statistics.token_mean(compared.agrees).document(),
            }
        del model


def recipe(command: str) -> str:
    """Verb and recipe of a command."""
    return " ".join(command.split()[:3])


def table(found: dict[str, dict[str, Any]], texts: list[str]) -> str:
    lines = ["| | s | " + " | ".join(f"{text}: KL | to the first | perplexity" for text in texts) + " |"]
    lines.append("|---|---:|" + "---:|" * 3 * len(texts))
    for name, record in found.items():
        cells = [name, f"{record['seconds']:.0f}"]
        for text in texts:
            kl, difference, perplexity = (record[text][what] for what in ("kl", "difference", "perplexity"))
            cells.append(f"{kl['value']:.4f} ± {kl['stderr']:.4f}")
            cells.append(f"{difference['value']:+.4f} ± {difference['stderr']:.4f}")
            cells.append(f"{perplexity['value']:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
