"""Registers and stack out of a cubin's ELF header, against NVIDIA's own tool."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from marlinctl.benchmarking.machine_code import resources
from marlinctl.kernels import jit
from marlinctl.kernels.configurations import DENSE, SPARSE
from tests.kernels.built import CUBINS

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="NVIDIA's compiler comes for Linux alone here")


def usage(cubin: Path) -> dict[str, int]:
    """What cuobjdump says."""
    (tool,) = [path for path in metadata.files("nvidia-cuda-cuobjdump") or () if path.name == "cuobjdump" and path.parent.name == "bin"]
    printed = subprocess.run([str(tool.locate()), "--dump-resource-usage", str(cubin)], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK):(\d+)", printed)}


@on_linux
@pytest.mark.parametrize(
    ("configuration", "architecture", "tight"),
    [
        pytest.param(DENSE[0], "sm_80", False, id="dense, as built"),
        pytest.param(DENSE[0], "sm_80", True, id="dense, with a spill"),
        pytest.param(SPARSE[4], "sm_90a", False, id="sparse, as built", marks=pytest.mark.slow),
        pytest.param(SPARSE[4], "sm_90a", True, id="sparse, with a spill", marks=pytest.mark.slow),
    ],
)
def test_the_header_says_what_cuobjdump_says(tmp_path: Path, configuration: object, architecture: str, tight: bool) -> None:
    """If this failed, `bench --build` would print registers that are not there, or hide a spill."""
    assert isinstance(configuration, type(DENSE[0]))
    defines = [re.sub(r"CTAS=\d+", "CTAS=8", define) if tight else define for define in configuration.defines(torch.float16)]
    code = jit.cubin(f"{configuration.kernel}.cu", defines, architecture, CUBINS)
    (tmp_path / "one.cubin").write_bytes(code)
    found, expected = resources(code), usage(tmp_path / "one.cubin")
    assert (found.registers, found.stack_bytes) == (expected["REG"], expected["STACK"])
    assert (found.stack_bytes > 0) == tight


@pytest.mark.parametrize("content", [b"", b"\x7fELF", b"no cubin" * 100, b"\x7fELF" + bytes(200)])
def test_what_is_no_cubin_is_refused(content: bytes) -> None:
    """If this failed, a damaged entry would show as a struct.error."""
    with pytest.raises(ValueError, match="not a cubin"):
        resources(content)
