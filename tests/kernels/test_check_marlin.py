"""Both kernels on a real GPU: workspaces, streams, graphs and overlap. Products are checked in tests/benchmarking/test_on_a_gpu.py."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.test_architecture import ROOT


@pytest.mark.gpu
@pytest.mark.timeout(900)
def test_the_kernels_are_right_on_this_gpu() -> None:
    """If this failed, what passes on the software GPU would not hold on a real one."""
    script = ROOT / "benchmarks" / "check_marlin.py"
    done = subprocess.run([sys.executable, str(script)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "all checks passed" in done.stdout
