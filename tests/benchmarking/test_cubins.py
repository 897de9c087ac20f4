"""The tool's side of compiling kernels: the user's cache folder, and errors with ids."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from marlinctl.benchmarking import cubins
from marlinctl.errors import EnvironmentProblem
from marlinctl.kernels import jit
from marlinctl.kernels.configurations import DENSE


def test_the_cache_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, MARLINCTL_CACHE would hold everything but the kernels."""
    seen = []
    monkeypatch.setattr(jit, "cubin", lambda *arguments: seen.append(arguments) or b"code")
    monkeypatch.setenv("MARLINCTL_CACHE", str(tmp_path / "cache"))
    assert cubins.kernel_cubin("marlin_sm80.cu", ("A=1",), "sm_90", None) == b"code"
    assert seen == [("marlin_sm80.cu", ("A=1",), "sm_90", tmp_path / "cache" / "kernels")]


def refusal(tmp_path: Path, defines: tuple[str, ...] = ()) -> EnvironmentProblem:
    with pytest.raises(EnvironmentProblem) as caught:
        cubins.kernel_cubin("marlin_sm80.cu", defines, "sm_90", tmp_path)
    return caught.value


def test_a_missing_compiler_has_a_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, a machine without CUDA's wheels would show a traceback."""
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    error = refusal(tmp_path)
    assert error.error_id == "E403"
    assert "pip install cuda-bindings nvidia-cuda-nvrtc" in error.problems[0].fix


@pytest.mark.skipif(sys.platform != "linux", reason="NVIDIA's compiler comes for Linux alone here")
def test_a_failed_compilation_shows_the_log(tmp_path: Path) -> None:
    """If this failed, a report of the problem would lack the one thing that explains it."""
    error = refusal(tmp_path, tuple(define for define in DENSE[0].defines(torch.float16) if not define.startswith("TOKENS")))
    assert error.error_id == "E403"
    assert 'identifier "TOKENS" is undefined' in str(error)
    assert error.problems[0].where == "marlin_sm80.cu for sm_90"


def test_a_folder_of_somebody_elses_is_an_error_with_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, a shared cache folder would end in a traceback."""
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    error = refusal(tmp_path)
    assert error.error_id == "E490"
    assert "belongs to user" in str(error)
