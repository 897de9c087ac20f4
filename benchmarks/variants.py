"""Every variant of one model, and what each of them loses: the tables of docs/sparsify.md and docs/distill.md in one command.

    python benchmarks/variants.py MODEL WORK --calibration CAL.jsonl --text wikitext=TEST.parquet --text web=HELD_OUT.jsonl
        --tasks mmlu,arc,winogrande --task-data DIR --train TRAIN.jsonl --tokens 10000000 --learning-rate 1e-3
        --group-size 64 --samples 512 --device cuda --gpus 0,1 --at-once 2

    int4        one-pass (--method sparsegpt)
    pruned ─► distilled ─► distilled-int4          each ─► texts, against MODEL ─► tasks
    joint       llm-compressor (--llm-compressor PYTHON, its own environment)      (tasks: of those that are meant to be used)

Every step is a marlinctl command in a process of its own. A step runs as soon as what it needs is there and a GPU has room; steps that are
done are not done again, so a run that was stopped is started with the same words. Prints what each step ended with, and two Markdown
tables; `--table` prints the tables alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marlinctl.evaluation.statistics import paired_mean

VARIANTS = {
    "pruned": "2:4",
    "joint": "2:4 and int4",
    "distilled": "2:4, distilled",
    "distilled-int4": "2:4, distilled, and int4",
    "int4": "int4",
    "one-pass": "2:4 and int4, one pass",
    "llm-compressor": "llm-compressor",
}
WITHOUT_TASKS = ("distilled", "one-pass", "llm-compressor")  # a stage on the way and the two baselines: texts tell enough of them
METRICS = {"mmlu": "acc", "arc_easy": "acc_norm", "arc_challenge": "acc_norm", "winogrande": "acc"}


@dataclass(frozen=True, slots=True)
class Step:
    name: str
    command: list[str]
    needs: tuple[str, ...] = ()


def main() -> int:
    chosen = arguments()
    for folder in ("models", "results", "logs", "done"):
        (chosen.work / folder).mkdir(parents=True, exist_ok=True)
    failed = [] if chosen.table else Runner(chosen.work, chosen.gpus.split(",") if chosen.gpus else [""], chosen.at_once).run(steps(chosen))
    print(tables(chosen))
    return int(bool(failed))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("work", type=Path, help="models, results and logs go there")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--tasks", default="")
    parser.add_argument("--task-data")
    parser.add_argument("--limit", type=int, help="documents of each task, for trying out")
    parser.add_argument("--train", help="text to distil on; without it nothing is distilled")
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--learning-rate", default="1e-3")
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--llm-compressor", metavar="PYTHON", help="an interpreter that has llmcompressor")
    parser.add_argument("--only", default=",".join(VARIANTS), help="variants, separated by commas")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--gpus", default="", help="CUDA devices to spread the steps over: 0,1,2,3")
    parser.add_argument("--at-once", type=int, default=1, help="steps on one GPU at the same time")
    parser.add_argument("--table", action="store_true", help="print the tables of what is there, and run nothing")
    return parser.parse_args()


def steps(chosen: argparse.Namespace) -> list[Step]:
    """In the order in which they are started, the longest chain first."""
    tool = [sys.executable, "-m", "marlinctl"]
    model, made, device = str(chosen.model), chosen.work / "models", ["--device", chosen.device]
    calibrated = ["--calibration", chosen.calibration, "--samples", str(chosen.samples), *device]
    groups = ["--group-size", str(chosen.group_size), *calibrated]
    joint = ["--bits", "4", "--no-eval", *groups]
    llm_compressor = [chosen.llm_compressor, str(Path(__file__).with_name("llm_compressor.py")), model, chosen.calibration]
    making = [
        Step("pruned", [*tool, "sparsify", model, str(made / "pruned"), "--drift-correction", "0.5", "--no-eval", *calibrated]),
        Step("joint", [*tool, "sparsify", model, str(made / "joint"), "--drift-correction", "0.5", "--refine", "2", *joint]),
        Step(
            "distilled",
            [
                *(*tool, "distill", str(made / "pruned"), str(made / "distilled"), "--teacher", model, "--data", str(chosen.train)),
                *(
                    "--tokens",
                    str(chosen.tokens),
                    "--learning-rate",
                    chosen.learning_rate,
                    "--micro-batch",
                    str(chosen.micro_batch),
                    *device,
                ),
            ],
            ("pruned",),
        ),
        Step(
            "distilled-int4",
            [*tool, "quantize", str(made / "distilled"), str(made / "distilled-int4"), "--recipe", "int4-best", *groups],
            ("distilled",),
        ),
        Step("int4", [*tool, "quantize", model, str(made / "int4"), "--recipe", "int4-best", *groups]),
        Step("one-pass", [*tool, "sparsify", model, str(made / "one-pass"), "--method", "sparsegpt", *joint]),
        Step(
            "llm-compressor",
            [*llm_compressor, str(made / "llm-compressor"), *groups[:2], "--samples", str(chosen.samples), "--sparse"],
        ),
    ]
    left_out = {"distilled", "distilled-int4"} if not chosen.train else set()
    left_out |= {"llm-compressor"} if not chosen.llm_compressor else set()
    making = [step for step in making if step.name in chosen.only.split(",") and step.name not in left_out]
    measuring = []
    for variant in [*(step.name for step in making), "dense"]:
        folder, needs = (model, ()) if variant == "dense" else (str(made / variant), (variant,))
        evaluation = [*tool, "eval", folder, *device]
        if variant != "dense":
            for text in chosen.text:
                name, file = text.split("=", 1)
                result = ["--out", str(chosen.work / "results" / f"{variant}.{name}.json")]
                measuring.append(Step(f"{variant}.{name}", [*evaluation, "--against", model, "--text", file, *result], needs))
        if chosen.tasks and variant not in WITHOUT_TASKS:
            asked = ["--tasks", chosen.tasks, "--batch-size", "32", "--out", str(chosen.work / "results" / f"{variant}.tasks.json")]
            asked += ["--task-data", chosen.task_data] if chosen.task_data else []
            asked += ["--limit", str(chosen.limit)] if chosen.limit else []
            measuring.append(Step(f"{variant}.tasks", [*evaluation, *asked], needs))
    return [*making, *measuring]


class Runner:
    """Runs steps, each in a process, `at_once` on each GPU."""

    def __init__(self, work: Path, gpus: list[str], at_once: int) -> None:
        self.work, self.at_once = work, at_once
        self.busy = dict.fromkeys(gpus, 0)
        self.changed = threading.Condition()
        self.failed: list[str] = []
        self.started = time.monotonic()

    def run(self, wanted: list[Step]) -> list[str]:
        """Returns the names of steps that failed, or that could not be run because of them."""
        waiting = [step for step in wanted if not self._done(step.name)]
        threads = []
        with self.changed:
            while waiting:
                lost = [step for step in waiting if any(name in self.failed for name in step.needs)]
                self.failed += [step.name for step in lost]
                waiting = [step for step in waiting if step not in lost]
                ready = next((step for step in waiting if all(self._done(name) for name in step.needs)), None)
                gpu = min(self.busy, key=lambda name: self.busy[name])
                if ready is None or self.busy[gpu] >= self.at_once:
                    if waiting:
                        self.changed.wait()
                    continue
                waiting.remove(ready)
                self.busy[gpu] += 1
                threads.append(threading.Thread(target=self._run, args=(ready, gpu)))
                threads[-1].start()
        for thread in threads:
            thread.join()
        return self.failed

    def _done(self, name: str) -> bool:
        return (self.work / "done" / name).exists()

    def _run(self, step: Step, gpu: str) -> None:
        environment = dict(os.environ) | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})
        started = time.monotonic()
        shutil.rmtree(self.work / "models" / f"{step.name}.job", ignore_errors=True)  # of a run that was killed
        (self.work / "results" / f"{step.name}.json").unlink(missing_ok=True)
        log = self.work / "logs" / step.name
        with log.open("w") as file:
            code = subprocess.run(step.command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False).returncode
        lines = log.read_text(errors="replace").strip().splitlines() or [""]
        with self.changed:
            if code == 0:
                (self.work / "done" / step.name).touch()
            else:
                self.failed.append(step.name)
            self.busy[gpu] -= 1
            now = time.monotonic()
            print(f"[{now - self.started:.0f} s] {step.name}: {now - started:.0f} s, exit {code}: {lines[-1][:200]}", flush=True)
            self.changed.notify_all()


def tables(chosen: argparse.Namespace) -> str:
    names = [text.split("=", 1)[0] for text in chosen.text]
    lines = ["| | " + " | ".join(f"{name}: KL | perplexity | top-1" for name in names) + " |", "|---|" + "---:|" * 3 * len(names)]
    for variant, title in VARIANTS.items():
        documents = [read(chosen.work, f"{variant}.{name}") for name in names]
        if any(documents):
            lines.append(f"| {title} | " + " | ".join(text_cells(document) for document in documents) + " |")
    dense = task_scores(read(chosen.work, "dense.tasks"))
    lines += ["", "| | " + " | ".join(METRICS) + " |", "|---|" + "---:|" * len(METRICS)]
    for variant, title in {"dense": "dense", **VARIANTS}.items():
        if scores := task_scores(read(chosen.work, f"{variant}.tasks")):
            lines.append(f"| {title} | " + " | ".join(task_cell(scores.get(task), dense.get(task), variant) for task in METRICS) + " |")
    return "\n".join(lines)


def read(work: Path, name: str) -> dict[str, Any] | None:
    path = work / "results" / f"{name}.json"
    document: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
    return document if document and document["finished"] else None


def text_cells(document: dict[str, Any] | None) -> str:
    if document is None:
        return "- | - | -"
    compared = document["comparison"]
    figures = ((compared["kl"], 4), (document["model"]["perplexity"], 2), (compared["top1"], 3))
    return " | ".join(f"{estimate['value']:.{digits}f} ± {estimate['stderr']:.{digits}f}" for estimate, digits in figures)


def task_scores(document: dict[str, Any] | None) -> dict[str, tuple[float, float, list[float]]]:
    """Task -> score, standard error, and the score of each document."""
    if document is None:
        return {}
    found, side = {}, document["model"]
    for task, metric in METRICS.items():
        record = side["groups"].get(task) or side["tasks"].get(task)
        if record:
            leaves = record.get("tasks", [task])
            samples = [value for leaf in leaves for value in side["tasks"][leaf]["samples"][metric]]
            found[task] = (record["metrics"][metric]["value"], record["metrics"][metric]["stderr"], samples)
    return found


def task_cell(score: tuple[float, float, list[float]] | None, dense: tuple[float, float, list[float]] | None, variant: str) -> str:
    """Per cent with its standard error; in brackets the paired difference to the dense model."""
    if score is None:
        return "-"
    text = f"{100 * score[0]:.1f} ± {100 * score[1]:.1f}"
    if dense is None or variant == "dense":
        return text
    difference = paired_mean(score[2], dense[2])
    return f"{text} ({100 * difference.value:+.1f} ± {100 * (difference.stderr or 0.0):.1f})"


if __name__ == "__main__":
    sys.exit(main())
