"""How far compressed folders are from their original on texts that calibration does not look like: code, other languages, chats, and, for
a model whose windows begin with a token of their own (Gemma), windows without it.

    python benchmarks/off_calibration.py MODEL int4=DIR int4-best=DIR --text code=FILE.txt --text german=FILE.txt --device cuda

Mean KL divergence to MODEL with its standard error, in nats, over --tokens tokens of each text in windows of --window; the difference of
each folder to the first one is paired by token. Prints a Markdown table; `--json FILE` keeps the figures.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from marlinctl.data.text import LONGEST_TEXT, load_text
from marlinctl.evaluation import divergence, loading, statistics, windows
from marlinctl.evaluation.settings import EvalSettings
from marlinctl.system.console import Console


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", nargs="+", metavar="NAME=DIR")
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--tokens", type=int, default=20480)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    found = measured(chosen)
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1))
    print(table(found))
    return 0


def measured(chosen: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Folder -> text -> KL, and its difference to the first folder."""
    original = loading.open_subject(chosen.model)
    baseline = loading.load_model(original, dtype=chosen.dtype, device=chosen.device)
    rows = {name: cut for text in chosen.text for name, cut in cuts(text, original, chosen).items()}
    kls: dict[str, dict[str, torch.Tensor]] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, folder in (word.split("=", 1) for word in chosen.folder):
        model = loading.load_model(loading.open_subject(Path(folder)), dtype=chosen.dtype, device=chosen.device)
        kls[name] = {text: divergence.measure_divergence(model, baseline, cut, Console.quiet()).kl for text, cut in rows.items()}
        first = kls[next(iter(kls))]
        found[name] = {
            text: {"kl": statistics.token_mean(kl).document(), "difference": statistics.token_mean(kl - first[text]).document()}
            for text, kl in kls[name].items()
        }
        del model
    return found


def cuts(named: str, original: loading.Subject, chosen: argparse.Namespace) -> dict[str, torch.Tensor]:
    """The windows of a text NAME=FILE; also those without the token that they begin with, where there is one."""
    name, file = named.split("=", 1)
    text, tokenizer = load_text(file, longest=LONGEST_TEXT), loading.load_tokenizer(original)
    start = windows.window_start(tokenizer, original.model_type)
    settings = EvalSettings(tokens=chosen.tokens, window=chosen.window)
    found = {name: windows.of_models(text, [original], settings)[0]}
    if start is not None:
        size = settings.window_for(original.longest)
        found[f"{name}, no BOS"] = windows.cut_windows(
            text, tokenizer, tokens=chosen.tokens, window=size, start=None, longest=original.longest
        )
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    texts = list(next(iter(found.values())))
    lines = ["| | " + " | ".join(texts) + " |", "|---|" + "---:|" * len(texts)]
    for name, record in found.items():
        cells = [f"{record[text]['kl']['value']:.4f} ± {record[text]['kl']['stderr']:.4f}" for text in texts]
        if record is not next(iter(found.values())):
            gains = [record[text]["difference"] for text in texts]
            cells = [f"{cell} ({gain['value']:+.4f} ± {gain['stderr']:.4f})" for cell, gain in zip(cells, gains, strict=True)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
