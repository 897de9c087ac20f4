"""What compilers made for the tests of the kernels, kept by content: sources, flags and versions are the key.

    .cache/tests/<key>.o       the software GPU, by the C++ compiler
    .cache/tests/<key>.so      a kernel, linked with it
    .cache/tests/<key>.json    what the disassembler says of a kernel's machine code
    .cache/tests/cubins/       the machine code, by NVRTC (marlinctl/kernels/jit.py)
    .cache/tests/gpu/          the same of kernels that run on a GPU

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
SOFTWARE_GPU = Path(__file__).parent / "software_gpu"
FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-w")
CUBINS = FOLDER / "cubins"  # for jit.cubin, which keys its entries itself
GPU_CACHE = FOLDER / "gpu"  # as MARLINCTL_CACHE: hundreds of kernels, which tests with a cache of their own would compile again


def entry(kind: str, inputs: Any) -> Path:
    """Where what is made from `inputs` (anything that JSON can spell) is kept, whether it is there or not."""
    return FOLDER / f"{hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()}.{kind}"


def kept(kind: str, inputs: Any, make: Callable[[Path], object]) -> Path:
    """The file that `make` writes to the path that it is given, or wrote for equal `inputs` before."""
    place = entry(kind, inputs)
    if not place.exists():
        FOLDER.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=FOLDER, prefix=".") as folder:
            make(Path(folder) / "made")
            (Path(folder) / "made").replace(place)  # two workers may make the same: each leaves a whole file
    return place


def kernel_library(files: dict[str, str], defines: Sequence[str], folder: Path, main: Path = SOFTWARE_GPU / "kernel.cpp") -> Path:
    """`main`, compiled beside `files` (name -> text) and linked with the software GPU.

    In a folder of its own: a second load of one path would share its static variables.
    """
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    header = (SOFTWARE_GPU / "gpu.h").read_text("utf-8")
    gpu = _software_gpu(compiler, header)
    # A kernel runs for less time than it takes to optimize it, and what is slow, the instructions, is in `gpu`.
    flags = [*FLAGS, "-O0", "-shared", *(f"-D{define}" for define in defines)]
    files = {**files, "gpu.h": header, "kernel.cpp": main.read_text("utf-8")}

    def make(target: Path) -> None:
        for name, text in files.items():
            (target.parent / name).write_text(text, "utf-8")
        subprocess.run([compiler, *flags, "-o", str(target), str(target.parent / "kernel.cpp"), str(gpu)], check=True)

    made = kept("so", [gpu.name, flags, files], make)
    folder.mkdir(parents=True)
    return Path(shutil.copy(made, folder / "kernel.so"))


@functools.cache
def _software_gpu(compiler: str, header: str) -> Path:
    """The object file that all kernels share; its name is the key of all that decides it."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    source, fragments, flags = SOFTWARE_GPU / "gpu.cpp", SOFTWARE_GPU / "fragments.h", [*FLAGS, "-O2"]

    def make(target: Path) -> None:
        subprocess.run([compiler, *flags, "-c", "-o", str(target), str(source)], check=True)

    return kept("o", [version, flags, header, fragments.read_text("utf-8"), source.read_text("utf-8")], make)
