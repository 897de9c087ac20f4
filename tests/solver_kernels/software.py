"""The solver's kernels on the CPU: SolverKernels whose launches run the kernels' own text, built by a C++ compiler."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from marlinctl.kernels import jit
from marlinctl.solver_kernels import steps
from marlinctl.solver_kernels.steps import SolverKernels
from tests.kernels.built import SOFTWARE_GPU, kernel_library
from tests.kernels.software_kernel import Arguments

HERE = Path(__file__).parent
CALLS = {
    "sweep": "sweep(p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8], p[9], p[10], n[0], n[1], n[2], n[3], n[4])",
    "mask": "mask(p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], n[0], n[1], n[2])",
    "scales": "scales(p[0], p[1], p[2], p[3], n[0], n[1])",
}


def build(name: str, defines: tuple[str, ...], folder: Path, edit: Callable[[str], str] = lambda text: text) -> ctypes.CDLL:
    files = {file: edit(text) for file, text in jit.texts_of(steps.SOURCES).items()}
    files["ptx.cuh"] = (SOFTWARE_GPU / "ptx.cuh").read_text("utf-8")
    named = (*defines, f'SOURCE="{name}.cu"', f"CALL={CALLS[name]}")
    return ctypes.CDLL(str(kernel_library(files, named, folder, HERE / "kernel.cpp")))


def install(
    monkeypatch: pytest.MonkeyPatch, folder: Path, *, backwards: bool = False, edit: Callable[[str], str] = lambda text: text
) -> SolverKernels:
    """Kernels for CPU tensors."""
    built: dict[tuple[str, tuple[str, ...]], ctypes.CDLL] = {}

    def load(self: SolverKernels, name: str, defines: tuple[str, ...], shared_bytes: int) -> ctypes.CDLL:
        if (name, defines) not in built:
            built[name, defines] = build(name, defines, folder / str(len(built)), edit)
        return built[name, defines]

    def launch(self: SolverKernels, function: ctypes.CDLL, ctas: int, tensors: tuple[Tensor, ...], sizes: tuple[int, ...]) -> None:
        pointers = (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
        numbers = (ctypes.c_int * len(sizes))(*sizes)
        given = Arguments(activations=ctypes.addressof(pointers), qweight=ctypes.addressof(numbers))
        function.launch(given, (ctypes.c_int * ctas)(*range(ctas)), ctas, 1, ctypes.c_bool(False), ctypes.c_bool(backwards))

    monkeypatch.setattr(SolverKernels, "_load", load)
    monkeypatch.setattr(SolverKernels, "_launch", launch)
    return SolverKernels(torch.device("cpu"), folder)
