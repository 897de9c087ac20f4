"""What compilers made for the tests of the kernels, kept by content: sources, flags and versions are the key.

    .cache/tests/<key>.so      a kernel and the software GPU, by the C++ compiler
    .cache/tests/<key>.json    what the disassembler says of a kernel's machine code
    .cache/tests/cubins/       the machine code, by NVRTC (marlinctl/kernels/jit.py)

So an entry never becomes wrong: whoever changes a source gets a new one. The folder may be deleted at any time.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.test_architecture import ROOT

FOLDER = ROOT / ".cache" / "tests"
CUBINS = FOLDER / "cubins"  # for jit.cubin, which keys its entries itself


def kept(kind: str, inputs: Any, make: Callable[[Path], None]) -> Path:
    """The file that `make` writes to the path that it is given, or wrote for equal `inputs` before (anything that JSON can spell)."""
    entry = FOLDER / f"{hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()}.{kind}"
    if not entry.exists():
        FOLDER.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=FOLDER, prefix=".") as folder:
            make(Path(folder) / "made")
            (Path(folder) / "made").replace(entry)  # two workers may make the same: each leaves a whole file
    return entry


def shared_library(main: Path, files: dict[str, str], defines: Sequence[str], folder: Path) -> Path:
    """`main` compiled beside `files` (name -> text), in a folder of its own: a second load of one path would share its static variables."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-w", *(f"-D{define}" for define in defines)]

    def make(target: Path) -> None:
        for name, text in files.items():
            (target.parent / name).write_text(text, "utf-8")
        subprocess.run([compiler, *flags, f"-I{target.parent}", "-o", str(target), str(main)], check=True)

    made = kept("so", [_version(compiler), flags, main.read_text("utf-8"), files], make)
    folder.mkdir(parents=True)
    return Path(shutil.copy(made, folder / "kernel.so"))


@functools.cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
