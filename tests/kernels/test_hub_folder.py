"""scripts/make_kernels_hub.py: the folder stands alone, under a name of its own, and multiplies as marlinctl does."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

import pytest

from tests.test_architecture import ROOT

# What a process does that has the folder and torch. `marlinctl` cannot be imported in it.
PROGRAM = """
import sys, warnings
from pathlib import Path
import torch

class NoMarlinctl:
    def find_spec(self, name, path=None, target=None):
        assert name.partition(".")[0] != "marlinctl", f"{name} was imported"

sys.meta_path.insert(0, NoMarlinctl())
warnings.simplefilter("ignore")
LOAD
codes = torch.randint(-8, 8, (128, 256), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
scales = (torch.arange(256).view(128, 2) / 1000 + 0.1).half()
packed = hub.pack_marlin(hub.QuantizedLinear(codes, scales, 128))
x = torch.randn(3, 256, generator=torch.Generator().manual_seed(1)).half()
weight = codes.float() * scales.float().repeat_interleave(128, 1)
exact = x.float() @ weight.T
torch.testing.assert_close(hub.marlin_gemm(x, packed.qweight, packed.scales, 128, 128).float(), exact, rtol=2e-3, atol=2e-3)
assert (hub.MarlinLinear(packed)(x).float() - exact).norm() < 5e-3 * exact.norm()  # a module has bfloat16 on a CPU
keep = torch.tensor([True, False, False, True]).repeat(128, 64)
sparse = hub.pack_sparse_marlin(hub.SparseQuantizedLinear(codes * keep, scales, 128, keep))
exact = x.float() @ (weight * keep).T
assert (hub.SparseMarlinLinear(sparse)(x).float() - exact).norm() < 5e-3 * exact.norm()
jit = sys.modules[hub.__name__ + ".kernels.jit"]
print(hub.__name__, hub.marlin_gemm, jit.SOURCES)
"""
BY_PATH = """
import importlib.util, json
variant = Path(sys.argv[1]) / "build" / "torch-universal"
name = json.loads((variant / "metadata.json").read_text())["id"]
spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
hub = sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hub)
"""
BY_PACKAGE = """
import kernels
hub = kernels.get_local_kernel(Path(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_kernels_hub", ROOT / "scripts" / "make_kernels_hub.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp("hub") / "marlinctl"
    script.write(out)
    return out


def loaded(folder: Path, how: str, cwd: Path) -> list[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    program = PROGRAM.replace("LOAD", how)
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()


@pytest.mark.slow
def test_the_folder_stands_alone(folder: Path, tmp_path: Path) -> None:
    """Loaded as `kernels` 0.17.2 does it. An import of marlinctl, or a module that was forgotten, would work here and nowhere else."""
    name, operator, sources, *_ = loaded(folder, BY_PATH, tmp_path)
    assert name.startswith("marlinctl_") and operator.startswith(f"{name}.marlin_gemm")
    assert Path(sources).is_relative_to(folder)


def test_the_package_kernels_loads_it(folder: Path, tmp_path: Path) -> None:
    """With the package itself, where it is installed: marlinctl does not depend on it."""
    try:
        version("kernels")
    except PackageNotFoundError:
        pytest.skip("needs the package kernels (pip install kernels)")
    name, *_ = loaded(folder, BY_PACKAGE, tmp_path)
    assert name == json.loads((folder / "build" / "torch-universal" / "metadata.json").read_text())["id"]


def test_kernels_are_compiled_from_the_copied_sources(folder: Path) -> None:
    """Other sources or flags would be other kernels than those that were measured."""
    from marlinctl.kernels import jit

    copied = folder / "build" / "torch-universal" / "kernels" / "csrc"
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == {path.name: path.read_bytes() for path in jit.SOURCES.iterdir()}


def test_other_contents_have_another_name(script: ModuleType, folder: Path) -> None:
    """Two versions in one process would define the same operator, and torch would stop the second."""
    files = script.sources()
    assert script.digest_of(files) in (folder / "README.md").read_text("utf-8")
    assert script.digest_of(files | {"kernels/jit.py": files["kernels/jit.py"] + "\n"}) != script.digest_of(files)
    with pytest.raises(FileExistsError):
        script.write(folder)


@pytest.mark.parametrize("line", ["import numpy", "from marlinctl.errors import BadInput", "from cuda.bindings import nvrtc"])
def test_an_import_that_the_hub_forbids_is_refused(script: ModuleType, line: str) -> None:
    """At the top of a file even the bindings: the folder must be importable without them."""
    import ast

    with pytest.raises(ValueError, match="may not"):
        script._modules(ast.parse(line), "kernels/new.py")
