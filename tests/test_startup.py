"""Help, inspect, plan and `doctor --quick` answer at once, because they import little: no torch, no numpy, no transformers. So do refusals.

What is counted is imports, not seconds: a busy machine says nothing about the program. docs/log/2026-11-21-start-up.md has the times.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from marlinctl import cli
from marlinctl.checkpoint.ownership import mark_job
from tests.packed import make_packed
from tests.tiny import make_tiny

HEAVY = {"torch", "transformers", "tokenizers", "numpy", "huggingface_hub", "safetensors", "lm_eval", "datasets", "gguf", "accelerate"}
HEAVY |= {"matplotlib", "jinja2", "rich", "compressed_tensors", "pyarrow", "PIL", "httpx", "requests"}
RECIPES = {"pydantic", "yaml"}  # what reads recipes needs them; a tenth of a second
QUICK = ["doctor", "--quick"]
HELP = [["--help"], ["--version"], [], *([verb, "--help"] for verb in cli.VERBS)]
FOLDERS = [["inspect", "dense"], ["inspect", "packed"], ["inspect", "packed", "--json"], ["plan", "dense"], ["plan", "dense", "--json"]]
# modules that a call may import, the interpreter's own included: a few more than it does (2026-11-30, Python 3.11)
AT_MOST = {"--help": 160, "inspect": 209, "doctor": 260, "plan": 379}

MODEL, OUT = "dense", "new/out"
RUNS = [["quantize", MODEL], ["sparsify", MODEL], ["compress", MODEL], ["distill", "--teacher", MODEL, "--tokens", "5000", MODEL]]
REFUSED = {
    "an unknown recipe": [[*run, OUT, "--recipe", "int5"] for run in RUNS],
    "bits": [[*run, OUT, "--bits", "3"] for run in RUNS[:3]],
    "a format that is not written": [["compress", MODEL, OUT, "--format", "awq"], ["pack", "packed", OUT, "--format", "awq"]],
    "no such text": [
        *([*run, OUT, "--calibration", "/there/is/none"] for run in RUNS[:3]),
        [*RUNS[3], OUT, "--data", "none.jsonl"],
        ["compress", MODEL, OUT, "--text", "none.txt"],
        ["eval", MODEL, "--text", "none.txt"],
    ],
    "an output that is there": [*([*run, "packed"] for run in RUNS), ["pack", "packed", MODEL, "--format", "gptq"]],
    "the input as output": [[*run, MODEL] for run in RUNS],
    "no such model": [[verb, "./none", OUT] for verb in ("quantize", "sparsify", "compress", "pack")] + [["eval", "./none"]],
    "a damaged config": [[verb, "damaged", OUT] for verb in ("quantize", "sparsify", "compress", "pack")] + [["eval", "damaged"]],
    "an architecture without support": [[verb, "unknown", OUT] for verb in ("quantize", "sparsify", "compress")],
    "a pattern of nothing": [[*run, OUT, "--skip", "nothing_like_it"] for run in RUNS[:3]],
    "a window that is too long": [[*run, OUT, "--sequence-length", "4096"] for run in RUNS[:3]],
    "a device": [*([*run, OUT, "--device", "tpu"] for run in RUNS), ["eval", MODEL, "--device", "tpu"], ["plan", MODEL, "--device", "tpu"]],
    "a dtype": [[*run, OUT, "--dtype", "float16"] for run in RUNS],
    "an unfinished job": [[*run, "begun"] for run in (RUNS[0], RUNS[1], RUNS[3])],
}

REFUSALS = """
import json, sys
from marlinctl.cli import main
for arguments in json.loads(sys.argv[1]):
    code = main([*arguments, "-q"])
    print(json.dumps([arguments, code, sorted({"torch", "transformers", "lm_eval", "datasets"} & set(sys.modules))]))
"""

PROGRAM = """
import json, sys
from marlinctl.cli import main
code = main(sys.argv[1:])
print("\\n" + json.dumps(sorted(sys.modules)), file=sys.stderr)
sys.exit(code)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("startup")
    make_tiny(place / "dense")
    make_packed(place / "dense", place / "packed")
    return place


def imported(arguments: list[str], folder: Path) -> set[str]:
    """Every module that is there when a call of the program ends."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout
    return set(json.loads(done.stderr.splitlines()[-1]))


@pytest.mark.parametrize("arguments", [*HELP, QUICK, *FOLDERS], ids=" ".join)
def test_nothing_heavy_is_imported(arguments: list[str], folder: Path) -> None:
    """`import torch` alone takes seconds; one careless import at the top of a module would cost them for every call."""
    heavy = HEAVY if arguments[:1] == ["plan"] and "--help" not in arguments else HEAVY | RECIPES
    assert not heavy & {name.partition(".")[0] for name in imported(arguments, folder)}


@pytest.mark.parametrize("arguments", [["--help"], FOLDERS[0], QUICK, FOLDERS[3]], ids=" ".join)
def test_little_is_imported(arguments: list[str], folder: Path) -> None:
    """A hundred light modules are as slow as a heavy one: a millisecond each adds up."""
    found = imported(arguments, folder)
    assert len(found) <= AT_MOST[arguments[0]], len(found)


def test_refusals_come_without_torch(folder: Path) -> None:
    """A typing error would be answered after seconds, and each try to correct it once more. One process runs them all: what it has imported
    in the end, one of them has imported."""
    damaged, unknown, begun = folder / "damaged", folder / "unknown", folder / "begun.job"
    for copy in (damaged, unknown):
        shutil.copytree(folder / "dense", copy)
    (damaged / "config.json").write_text("{")
    config = json.loads((unknown / "config.json").read_text())
    (unknown / "config.json").write_text(json.dumps(config | {"model_type": "nonesuch", "architectures": ["Nonesuch"]}))
    begun.mkdir()
    mark_job(begun)
    (begun / "job.json").write_text("{}")
    (begun / "journal.jsonl").write_text('{"step": "begun", "fingerprint": {}}\n{"step": "block"}\n')
    before = {path.relative_to(folder) for path in folder.rglob("*")}
    cases = [case for of_kind in REFUSED.values() for case in of_kind]
    done = subprocess.run(
        [sys.executable, "-c", REFUSALS, json.dumps(cases)], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(told) == len(cases), done.stderr[-2000:]
    assert [(arguments, code, heavy) for arguments, code, heavy in told if code not in (2, 3) or heavy] == []
    assert {path.relative_to(folder) for path in folder.rglob("*")} == before
