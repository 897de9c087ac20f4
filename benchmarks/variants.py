"""One model by every recipe and by other tools, and what each of them loses: the tables of the documentation in one command.

    python benchmarks/variants.py MODEL WORK --calibration CAL.jsonl --text wikitext=TEST.parquet --text web=HELD_OUT.jsonl
        --tasks mmlu,arc,winogrande --task-data DIR --group-size 64 --samples 512 --device cuda --gpus 0,1 --at-once 2
        --other llm-compressor=PYTHON --other auto-round=PYTHON --other gptqmodel=PYTHON --folder NAME=DIR
        --train TRAIN.jsonl --tokens 10000000 --learning-rate 1e-3

    int4, int4-best, sparse-int4      the recipes as they are; int4-best-rotated: with --rotate always
    gptqmodel{,-best,-gptaq}, auto-round{,-best}, llm-compressor{,-sparse}      other tools on the same tokens (other_tools.py)
    pruned ─► distilled ─► distilled-int4     joint     one-pass                the variants of docs/sparsify.md
    each ─► texts, against MODEL ─► tasks

`--only` takes names of these. A tool runs with the interpreter that is given for it; `--folder` measures a folder that is there already, in
any format that marlinctl reads (DIR.json of other_tools.py, or the folder's own report, gives its seconds and memory).

Every step is a process of its own. A step runs as soon as what it needs is there and a GPU has room; steps that are done are not done
again, so a run that was stopped is started with the same words. Seconds are those of whole processes, side by side where `--at-once` is
more than 1. Prints what each step ended with, and two Markdown tables; `--table` prints the tables alone.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.steps import Runner, Step
from benchmarks.variant_tables import tables

TITLES = {
    "int4": "`int4`",
    "int4-best": "`int4-best`",
    "int4-best-rotated": "`int4-best --rotate always`",
    "gptqmodel": "GPTQModel",
    "gptqmodel-best": "GPTQModel, best",
    "gptqmodel-gptaq": "GPTQModel, best, and GPTAQ",
    "auto-round": "auto-round",
    "auto-round-best": "auto-round, best",
    "llm-compressor": "llm-compressor: GPTQ",
    "sparse-int4": "`sparse-int4`",
    "llm-compressor-sparse": "llm-compressor: SparseGPT, then GPTQ",
    "pruned": "2:4",
    "joint": "2:4 and int4, not tuned",
    "one-pass": "2:4 and int4, one pass",
    "distilled": "2:4, distilled",
    "distilled-int4": "2:4, distilled, and int4",
}
OTHERS: dict[str, dict[str, list[str]]] = {  # tool -> end of the variant's name -> flags of other_tools.py
    "llm-compressor": {"": [], "-sparse": ["--sparse"]},
    "auto-round": {"": [], "-best": ["--best"]},
    "gptqmodel": {"": [], "-best": ["--best"], "-gptaq": ["--best", "--option", 'gptaq={"alpha":0.25}']},
}
WITHOUT_TASKS = ("distilled", "one-pass")  # a stage on the way and a baseline: texts tell enough of them


def main() -> int:
    chosen = arguments()
    for folder in ("models", "results", "logs", "done"):
        (chosen.work / folder).mkdir(parents=True, exist_ok=True)
    failed = [] if chosen.table else Runner(chosen.work, chosen.gpus.split(",") if chosen.gpus else [""], chosen.at_once).run(steps(chosen))
    texts = [text.split("=", 1)[0] for text in chosen.text]
    print(tables(chosen.work, TITLES | {name: name for name in chosen.folder}, texts, chosen.folder))
    return int(bool(failed))


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("work", type=Path, help="models, results and logs go there")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--text-tokens", type=int, default=20480, help="tokens of each text that are measured")
    parser.add_argument("--tasks", default="")
    parser.add_argument("--task-data")
    parser.add_argument("--limit", type=int, help="documents of each task, for trying out")
    parser.add_argument("--other", action="append", default=[], metavar="TOOL=PYTHON", help=f"one of {', '.join(OTHERS)}")
    parser.add_argument("--other-dtype", default="auto", help="in which other tools load the model")
    parser.add_argument("--folder", action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--train", help="text to distil on; without it nothing is distilled")
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--learning-rate", default="1e-3")
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--only", default=",".join(TITLES), help="variants, separated by commas")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto", help="of measurements; name one: tools store different ones")
    parser.add_argument("--gpus", default="", help="CUDA devices to spread the steps over: 0,1,2,3")
    parser.add_argument("--at-once", type=int, default=1, help="steps on one GPU at the same time")
    parser.add_argument("--table", action="store_true", help="print the tables of what is there, and run nothing")
    chosen = parser.parse_args(words)
    for given in (chosen.text, chosen.other, chosen.folder):
        for word in given:
            if "=" not in word:
                parser.error(f"{word}: NAME=VALUE is needed")
    chosen.other = dict(word.split("=", 1) for word in chosen.other)
    chosen.folder = {name: Path(folder) for name, folder in (word.split("=", 1) for word in chosen.folder)}
    if unknown := chosen.other.keys() - OTHERS.keys():
        parser.error(f"--other {', '.join(sorted(unknown))}: one of {', '.join(OTHERS)}")
    if unknown := set(chosen.only.split(",")) - {"", *TITLES}:
        parser.error(f"--only {', '.join(sorted(unknown))}: of {', '.join(TITLES)}")
    if known := chosen.folder.keys() & {"dense", *TITLES}:
        parser.error(f"--folder {', '.join(sorted(known))}: the name of a variant; give another")
    return chosen


def steps(chosen: argparse.Namespace) -> list[Step]:
    """In the order in which they are started, the longest chain first."""
    tool, model, made = [sys.executable, "-m", "marlinctl"], str(chosen.model), chosen.work / "models"
    size = ["--samples", str(chosen.samples), "--sequence-length", str(chosen.sequence_length)]
    calibrated = ["--calibration", chosen.calibration, *size, "--device", chosen.device]
    groups = ["--group-size", str(chosen.group_size)]
    one_shot = {
        "pruned": ["sparsify", "--no-eval", "--drift-correction", "0.5"],
        "joint": ["sparsify", "--no-eval", "--bits", "4", "--drift-correction", "0.5", "--refine", "2", *groups],
        "sparse-int4": ["sparsify", "--no-eval", "--bits", "4", "--recipe", "sparse-int4", *groups],
        "one-pass": ["sparsify", "--no-eval", "--bits", "4", "--method", "sparsegpt", *groups],
        "int4-best": ["quantize", "--recipe", "int4-best", *groups],
        "int4-best-rotated": ["quantize", "--recipe", "int4-best", "--rotate", "always", *groups],
        "int4": ["quantize", "--recipe", "int4", *groups],
    }
    making = [Step(name, [*tool, verb, model, str(made / name), *flags, *calibrated]) for name, (verb, *flags) in one_shot.items()]
    if chosen.train:
        trained = ["--teacher", model, "--data", chosen.train, "--tokens", str(chosen.tokens), "--learning-rate", chosen.learning_rate]
        distil = [*tool, "distill", str(made / "pruned"), str(made / "distilled"), *trained, "--micro-batch", str(chosen.micro_batch)]
        quantize = [*tool, "quantize", str(made / "distilled"), str(made / "distilled-int4"), "--recipe", "int4-best"]
        making.insert(1, Step("distilled", [*distil, "--device", chosen.device], ("pruned",)))
        making.insert(2, Step("distilled-int4", [*quantize, *groups, *calibrated], ("distilled",)))
    tokens = str(chosen.work / "tokens.json")
    for name, python in chosen.other.items():
        command = [python, str(Path(__file__).with_name("other_tools.py")), model, tokens]
        for end, more in OTHERS[name].items():
            flags = ["--tool", name, *groups, "--device", chosen.device, "--dtype", chosen.other_dtype, *more]
            making.append(Step(name + end, [*command, str(made / (name + end)), *flags], ("tokens",)))
    making = [step for step in making if step.name in chosen.only.split(",")]
    measuring = [
        step for variant in [*(step.name for step in making), *chosen.folder, "dense"] for step in measures(chosen, variant, making)
    ]
    script = str(Path(__file__).with_name("calibration_tokens.py"))
    first = Step("tokens", [sys.executable, script, model, chosen.calibration, tokens, *size])
    return [*([first] if any("tokens" in step.needs for step in making) else []), *making, *measuring]


def measures(chosen: argparse.Namespace, variant: str, making: list[Step]) -> list[Step]:
    """The texts against the original, and the tasks, of one variant; of the original the tasks alone."""
    folder = {"dense": chosen.model, **chosen.folder}.get(variant, chosen.work / "models" / variant)
    needs = (variant,) if any(step.name == variant for step in making) else ()
    evaluation = [sys.executable, "-m", "marlinctl", "eval", str(folder), "--device", chosen.device, "--dtype", chosen.dtype]
    results = chosen.work / "results"
    found = []
    for text in chosen.text if variant != "dense" else ():
        name, file = text.split("=", 1)
        asked = ["--against", str(chosen.model), "--text", file, "--tokens", str(chosen.text_tokens)]
        found.append(Step(f"{variant}.{name}", [*evaluation, *asked, "--out", str(results / f"{variant}.{name}.json")], needs))
    if chosen.tasks and variant not in WITHOUT_TASKS:
        asked = ["--tasks", chosen.tasks, "--batch-size", "32", "--out", str(results / f"{variant}.tasks.json")]
        asked += ["--task-data", chosen.task_data] if chosen.task_data else []
        asked += ["--limit", str(chosen.limit)] if chosen.limit else []
        found.append(Step(f"{variant}.tasks", [*evaluation, *asked], needs))
    return found


if __name__ == "__main__":
    sys.exit(main())
