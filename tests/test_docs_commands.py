"""Every command that README, the pages and the help texts show is run, on tiny models in place of the real ones, or says here why not.

A command is run as it stands: the folder in which it runs holds, under the very names that the page uses, a tiny model of the kind that is
meant (dense, 2:4, quantized, packed). Only what decides the time is made small: tokens, samples, tasks. Commands that differ in nothing but
names and sizes are run once; every line is parsed, and those that together have every option, format and task set of a verb are run at
once, the rest with `-m slow`.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import click
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from marlinctl import cli
from marlinctl.errors import MarlinctlError
from tests.blank import blank_pictures
from tests.checkpoint.gguf import test_gguf
from tests.evaluation.local_copies import saved_layout
from tests.report import documents
from tests.runs import TEXT
from tests.test_architecture import ROOT
from tests.test_docs import PAGES
from tests.test_output import commands
from tests.tiny import make_tiny

# pattern of a line -> why nobody runs it here
REASONS = {
    r"^(\.venv/bin/|other/bin/)?pip install": "installs from an index",
    r"^git clone": "fetches the repository",
    r"^python3\.11 -m venv": "makes an environment; `make test` does",
    r"^vllm-cpu/bin/|^\.venv/bin/python -m pytest": "needs vLLM in an environment of its own: tests/serve/vllm/test_on_a_cpu.py",
    r"^other/bin/python": "runs another program in an environment of its own",
    r"^make ": "is how these tests are run",
    r"^vllm serve|^python -m sglang": "needs that server and a GPU: tests/serve/vllm and tests/serve/sglang",
    r"^docker (build|run) ": "needs Docker: tests/test_container.py",
    r"^hf ": "belongs to huggingface_hub, and asks the hub",
    r"^marlinctl report \S+ \./": "needs several folders that were measured: tests/report/test_comparison.py",
    r"^tensorboard ": "belongs to TensorBoard, and serves until it is stopped",
    r"^marlinctl distill .*--tracker": "needs TensorBoard or wandb: tests/distillation/test_tracking.py",
    r"^accelerate launch": "several processes: tests/distillation/test_distributed.py, tests/oneshot/test_ranks.py",
    r"^marlinctl (?!plan).*--device cuda": "needs a GPU",
    r"^marlinctl plan .*--device cuda --probe": "needs a GPU",
    r"^OMP_NUM_THREADS=1 marlinctl bench --device cpu": "measures for a minute: tests/benchmarking/test_processor.py",
    r"^marlinctl bench": "needs a GPU: tests/benchmarking/test_run.py and tests/benchmarking",
    r"^marlinctl (resume|jobs)": "needs a job that was killed: tests/oneshot/test_resume.py and tests/jobs/test_kill.py",
    r"^(MARLINCTL_CACHE=\S+ )?python3? (benchmarks|-m pytest)": "measures for minutes or hours, mostly on a GPU",
    r"--module-map map\.json": "needs a model of an unknown architecture: tests/oneshot/test_sequential.py",
    r"--tasks gsm8k,ifeval": "needs packages and data of these tasks: tests/evaluation/test_generation.py",
    r"--gptq-v2": "needs zeros of 8 under the label of version 1: tests/convert/test_repack_foreign.py",
    r"demo-out/": "is what `make demo` runs, on a real model",
    r"^MARLINCTL_CACHE=/sys/kernel": "shows what a wrong setting looks like: tests/doctor/test_places.py",
}
SMALL = """
extends: {name}
sparsify: {{ls_iterations: 4, mask_sweeps: 1}}
calibration: {{samples: 8, sequence_length: 64, minimum_tokens: 256}}
evaluate: {{tokens: 128, window: 32}}
distill: {{sequence_length: 16, batch_tokens: 32, micro_batch: 2}}
"""
# option -> its value here: only time and the quality of a random model depend on it
SIZES = {"--tokens": "128", "--distill-tokens": "64", "--limit": "1", "--max-ppl-ratio": "1000"}
MODELS = ("--teacher", "--against", "--source")
WRITES = ("compress", "quantize", "sparsify", "distill", "pack")
READS_PACKED = ("verify", "inspect", "report", "pack")


@dataclass(frozen=True)
class Shown:
    where: str
    line: str


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """Language and body of every fence."""
    yield from re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def of_page(page: Path) -> Iterator[Shown]:
    """All lines of shell fences; of other fences those after a `$ `, with the lines of options that continue them."""
    for language, body in blocks(page.read_text("utf-8")):
        joined = re.sub(r"\\\n\s*", " ", body)
        if language not in ("bash", "sh"):
            sessions = re.findall(r"^\$ (.*(?:\n +--.*)*)", joined, flags=re.MULTILINE)
            joined = "\n".join(re.sub(r"\n +", " ", session) for session in sessions)
        for line in joined.splitlines():
            if words(line):
                yield Shown(str(page.relative_to(ROOT)), line.removeprefix("$ ").strip())


def of_help(name: str, command: click.Command) -> Iterator[Shown]:
    for line in re.findall(r"^ +(marlinctl .*)$", command.help or "", flags=re.MULTILINE):
        yield Shown(f"marlinctl {name} --help", re.sub(r"   +\(.*", "", line).strip())


def words(line: str) -> list[str]:
    return shlex.split(line.removeprefix("$ "), comments=True)


def shown() -> list[Shown]:
    found = [item for page in PAGES if page.name != "cli.md" for item in of_page(page)]
    return [*found, *(item for name, command in commands() for item in of_help(name, command))]


# ---- what runs -------------------------------------------------------------------------------------------------------------------------


def reason(item: Shown) -> str | None:
    return next((why for pattern, why in REASONS.items() if re.search(pattern, item.line)), None)


def arguments(item: Shown) -> list[str]:
    """Of marlinctl, without the shell's part of the line."""
    parts = words(re.split(r" [|>]|&&", item.line)[0])
    assert parts[0] == "marlinctl", f"{item}: neither run nor in REASONS"
    return parts[1:]


def kind(name: str, verb: str) -> str:
    """Which of the tiny models stands behind a name of the pages."""
    name = name.rpartition("/")[2]
    if name.endswith(".gguf"):
        return "gguf"
    for pattern, found in (
        ("sparse", "sparse"),
        ("2of4|pruned|distilled|-kd", "pruned"),
        ("marlin", "marlin"),
        ("int4|ours|theirs|OUT", "ct"),
    ):
        if re.search(pattern, name):
            return found
    return "ct" if verb in READS_PACKED else "dense"


def models(parts: list[str]) -> dict[str, str]:
    """Every model that a command reads, by the name it has there: its first argument, and those of a few options."""
    verb, *rest = parts
    found = (
        {rest[0]: "sparse" if verb == "pack" and "marlin_24" in rest else kind(rest[0], verb)}
        if verb in (*WRITES, *READS_PACKED, "eval", "plan")
        else {}
    )
    return found | {rest[i + 1]: kind(rest[i + 1], "compress") for i, word in enumerate(rest) if word in MODELS}


def small(parts: list[str], folder: Path) -> list[str]:
    """The same command with little to do."""
    verb = parts[0]
    parts = [SIZES.get(before, word) for before, word in zip(["", *parts], parts, strict=False)]
    if verb in WRITES and verb != "pack":
        place = parts.index("--recipe") + 1 if "--recipe" in parts else None
        if place is None or not parts[place].endswith(".yaml"):
            (folder / "small.yaml").write_text(SMALL.format(name=parts[place] if place else "int4"))
            parts = [*parts[: place - 1], *parts[place + 1 :]] if place else parts
            parts += ["--recipe", "small.yaml"]
    if verb == "eval":
        parts += ["--tokens", "128", "--window", "32"]
    if "--tasks" in parts:
        parts = [word.replace("mmlu", "mmlu_anatomy") for word in parts]
        parts += [] if "--task-data" in parts else ["--task-data", "tasks"]
        parts += [] if "--limit" in parts else ["--limit", "1"]
    return parts


def once() -> list[Shown]:
    """What can be run, each kind of command once."""
    found: dict[str, Shown] = {}
    for item in shown():
        if reason(item) is None and not arguments(item)[0].startswith("-"):
            parts = arguments(item)
            names = models(parts)
            out = parts[2:3] if parts[0] in WRITES else []
            like = [
                names.get(word, "OUT" if word in out else re.sub(r"^[\w./-]+\.(jsonl|txt|parquet)$", r"text.\1", word)) for word in parts
            ]
            found.setdefault(" ".join(SIZES.get(before, word) for before, word in zip(["", *like], like, strict=False)), item)
    return list(found.values())


def traits(item: Shown) -> set[tuple[str, str]]:
    """What a run of this command would show: of its verb that it runs, words of a choice, and kinds of models; and each option, which verbs
    that have it take from one table. That each verb has it, the test of all lines sees.
    """
    parts = arguments(item)
    verb = " ".join(parts[:2]) if parts[0] in ("recipes", "completion") else parts[0]
    options = {word for word in parts[1:] if word.startswith("-")}
    choices = {"ct", "gptq", "marlin", "marlin_24", "dense", "sparse-int4", "wanda", "scales"} & set(parts)
    kinds = set(models(parts).values()) if verb in (*READS_PACKED, "eval", "plan") else set[str]()
    return {(verb, trait) for trait in {"runs"} | choices | kinds} | {("any", option) for option in options}


def split() -> tuple[list[Shown], list[Shown]]:
    """The commands that together show every trait of every verb, those with most first, and the others."""
    quick, seen = [], set[tuple[str, str]]()
    items = once()
    for item in sorted(items, key=lambda item: -len(traits(item))):
        if not traits(item) <= seen:
            quick.append(item)
            seen |= traits(item)
    return quick, [item for item in items if item not in quick]


QUICK, OTHERS = split()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tiny model of each kind, and everything else that the pages name."""
    folder = tmp_path_factory.mktemp("store")
    (folder / "text.txt").write_text(TEXT)
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": part}) + "\n" for part in TEXT.split(". ")))
    pq.write_table(pa.table({"text": TEXT.split(". ")}), folder / "text.parquet")
    (folder / "mine.yaml").write_text(SMALL.format(name="int4"))
    make_tiny(folder / "dense")
    flags = ["--recipe", str(folder / "mine.yaml"), "--calibration", str(folder / "text.txt"), "-q"]
    assert cli.main(["quantize", str(folder / "dense"), str(folder / "ct"), *flags]) == 0
    assert cli.main(["sparsify", str(folder / "dense"), str(folder / "pruned"), "--no-eval", *flags]) == 0
    assert cli.main(["sparsify", str(folder / "dense"), str(folder / "sparse"), "--no-eval", "--bits", "4", *flags]) == 0
    assert cli.main(["pack", str(folder / "ct"), str(folder / "marlin"), "--format", "marlin", "-q"]) == 0
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4}
    with pytest.MonkeyPatch.context() as larger:  # so that groups of 128 divide, and the samples of recipes fit
        for key, size in {**sizes, "max_position_embeddings": 2048}.items():
            larger.setitem(test_gguf.COMMON, key, size)
        test_gguf.write_model(folder / "model.gguf", "llama")
    saved_layout(folder / "tasks")
    (folder / "bench").mkdir()
    (folder / "bench" / "bench.json").write_text(json.dumps(documents.bench()))
    return folder


@pytest.mark.parametrize(
    "item", [*QUICK, *(pytest.param(item, marks=pytest.mark.slow) for item in OTHERS)], ids=lambda item: f"{item.where}: {item.line}"
)
def test_what_the_docs_show_works(item: Shown, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that is copied from a page and fails is the end of somebody's patience."""
    monkeypatch.chdir(tmp_path)
    parts = arguments(item)
    for name, which in models(parts).items():
        place = Path(name)
        place.parent.mkdir(parents=True, exist_ok=True)
        if which == "gguf":
            place.symlink_to(store / "model.gguf")
        else:
            shutil.copytree(store / which, place)
    for word in parts:
        if re.fullmatch(r"[\w-]+\.(txt|jsonl|parquet)", word):
            shutil.copy(store / f"text.{word.rpartition('.')[2]}", word)
    for name in ("tasks", "bench", "mine.yaml"):
        Path(name).symlink_to(store / name)
    if parts[0] in WRITES and len(parts) > 2 and not parts[2].startswith("-"):
        Path(parts[2]).parent.mkdir(parents=True, exist_ok=True)
    if "--scores" in parts:
        assert cli.main(["eval", parts[1], "--tokens", "128", "--window", "32", "--out", "scores.json", "-q"]) == 0
    elif "--out" in parts and parts[0] == "eval":
        Path(parts[parts.index("--out") + 1]).parent.mkdir(parents=True, exist_ok=True)
    answers = (0, 1) if "--check" in parts else (0,)  # the verdict on a tiny model is not the point
    with nullcontext() if parts[0] == "report" else blank_pictures():
        assert cli.main(small(parts, tmp_path)) in answers


def test_every_command_is_run_or_has_a_reason_and_every_reason_a_command() -> None:
    """A reason that fits nothing hides the next command that it happens to fit; one that names no test is no reason."""
    assert [name for name in re.findall(r"tests/[\w/.]+", " ".join(REASONS.values())) if not (ROOT / name).exists()] == []
    found = shown()
    for item in found:
        if reason(item) is None:
            arguments(item)
    assert [pattern for pattern in REASONS if not any(re.search(pattern, item.line) for item in found)] == []
    assert len(once()) > 40


def parse(parts: list[str]) -> None:
    """As main does it, without running anything."""
    with suppress(click.exceptions.Exit), cli.marlinctl.make_context("marlinctl", list(parts), obj=[]) as context:  # --version ends here
        command: click.Command = cli.marlinctl
        while isinstance(command, click.Group):
            name, found, words = command.resolve_command(context, [*context._protected_args, *context.args])
            assert found is not None
            command, context = found, found.make_context(name, words, parent=context)


def test_what_the_docs_show_are_command_lines() -> None:
    """An option that was renamed, a word for a number, an argument too many: in lines that nobody runs here, too."""
    wrong = []
    for item in shown():
        if item.line.startswith("marlinctl "):
            try:
                parse(arguments(item))
            except (click.ClickException, MarlinctlError) as error:
                wrong.append(f"{item.where}: {item.line}: {error}")
    assert wrong == []
    for line in ("quantise a b", "quantize a b c", "quantize a b --groupsize 3", "pack a b --tp many", "recipes ls --group-size 3"):
        with pytest.raises((click.ClickException, MarlinctlError)):
            parse(line.split())
