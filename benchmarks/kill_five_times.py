"""`compress`, killed at random moments with SIGKILL and resumed each time, against a run that was left alone: the same bytes?

    python benchmarks/kill_five_times.py MODEL FOLDER [--kills 5] [--seed 0] [-- OPTIONS OF COMPRESS]
    python benchmarks/kill_five_times.py ./smollm2 ./kills -- --group-size 64 --calibration text.jsonl --samples 16 --also marlin

FOLDER/whole gets the undisturbed run, FOLDER/killed the other. Each life of the killed one lasts a random time up to --longest (a share of
the undisturbed run's), so kills fall into loading, the walk, packing, checking and evaluating as chance has it. Exit 1 where a published
file differs; card, report and log, which tell times, are apart. A run that ends before it was killed often enough is an exit 2.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

APART = {"README.md", "marlinctl_report.json", "marlinctl_report.md"}


def main() -> int:
    asked, options = arguments()
    folder: Path = asked.folder
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("whole", "killed"):
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir()
    command = [sys.executable, "-m", "marlinctl", "compress", str(asked.model)]

    started = time.monotonic()
    subprocess.run([*command, str(folder / "whole" / "out"), *options, "-q"], check=True, stdout=subprocess.DEVNULL)
    alone = time.monotonic() - started
    print(f"left alone: {alone:.0f} s", flush=True)

    chance = random.Random(asked.seed)
    out = folder / "killed" / "out"
    total = 0.0
    for life in range(asked.kills + 1):
        first = not (out.with_name("out.job") / "job.json").is_file()
        words = [*command, str(out), *options, "-q"] if first else [*command[:-2], "resume", str(out), "-q"]
        longest = chance.uniform(0.0, asked.longest) * alone if life < asked.kills else None
        seconds, code = live(words, longest)
        total += seconds
        if longest is None:
            print(f"resumed: exit {code} after {seconds:.0f} s; {total:.0f} s in all lives", flush=True)
            if code:
                return 2
        elif code != -signal.SIGKILL:
            print(f"life {life + 1} ended by itself with {code} after {seconds:.0f} s, before kill {life + 1} of {asked.kills}")
            return 2
        else:
            print(f"kill {life + 1} after {seconds:.1f} s: {where(out)}", flush=True)

    whole, killed = (digests(folder / name) for name in ("whole", "killed"))
    differing = sorted(name for name in whole.keys() | killed.keys() if whole.get(name) != killed.get(name))
    size = sum((folder / "whole" / name).stat().st_size for name in whole)
    left = sorted(path.name for path in (folder / "killed").iterdir() if path.name.endswith(".job"))
    print(f"{len(whole)} files, {size / 1e6:,.1f} MB: " + (f"these differ: {', '.join(differing)}" if differing else "all equal"))
    if left:
        print(f"left behind: {', '.join(left)}")
    return 1 if differing or left else 0


def arguments() -> tuple[argparse.Namespace, list[str]]:
    """Ours, and what stands behind `--` for compress."""
    words = sys.argv[1:]
    place = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=0.45, help="longest life, as a share of the undisturbed run's time")
    return parser.parse_args(words[:place]), words[place + 1 :]


def live(words: list[str], longest: float | None) -> tuple[float, int]:
    """Run, and kill after `longest` seconds; how long it lived, and its exit code."""
    started = time.monotonic()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    try:
        process.wait(longest)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return time.monotonic() - started, process.returncode


def where(out: Path) -> str:
    """What the journals of the killed run say is finished."""
    found = []
    for path in sorted(out.with_name("out.job").rglob("journal.jsonl")):
        lines: list[dict[str, Any]] = []
        for line in path.read_text().splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
        blocks = sum(line["step"] in ("block", "head") for line in lines)
        last = lines[-1]["step"] if lines else "nothing"
        found.append(f"{path.parent.name}: " + (f"{blocks} blocks" if blocks and last in ("block", "head") else last))
    return "; ".join(found) or "nothing noted yet"


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in APART and path.suffix != ".log"]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


if __name__ == "__main__":
    sys.exit(main())
