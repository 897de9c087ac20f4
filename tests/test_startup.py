"""Help, inspect, plan and `doctor --quick` answer at once, because they import little: no torch, no numpy, no transformers.

What is counted is imports, not seconds: a busy machine says nothing about the program. docs/log/2026-11-21-start-up.md has the times.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from marlinctl import cli
from tests.packed import make_packed
from tests.tiny import make_tiny

HEAVY = {"torch", "transformers", "tokenizers", "numpy", "huggingface_hub", "safetensors", "lm_eval", "datasets", "gguf", "accelerate"}
HEAVY |= {"matplotlib", "jinja2", "rich", "compressed_tensors", "pyarrow", "PIL", "httpx", "requests"}
RECIPES = {"pydantic", "yaml"}  # what reads recipes needs them; a tenth of a second
QUICK = ["doctor", "--quick"]
HELP = [["--help"], ["--version"], [], *([verb, "--help"] for verb in cli.VERBS)]
FOLDERS = [["inspect", "dense"], ["inspect", "packed"], ["inspect", "packed", "--json"], ["plan", "dense"], ["plan", "dense", "--json"]]
# modules that a call may import, the interpreter's own included: a few more than it does (2026-11-29, Python 3.11)
AT_MOST = {"--help": 160, "inspect": 198, "doctor": 260, "plan": 350}

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
