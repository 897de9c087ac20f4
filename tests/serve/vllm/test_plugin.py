"""What vLLM finds, and with which releases."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Iterator

import pytest

from marlinctl.serve.vllm import versions
from tests.serve.vllm.fake_vllm import Vllm, installed
from tests.test_architecture import ROOT


@pytest.fixture
def vllm() -> Iterator[Vllm]:
    with installed() as state:
        yield state


def test_the_entry_point_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["entry-points"][versions.GROUP] == {versions.NAME: "marlinctl.serve.vllm.plugin:register"}


@pytest.mark.parametrize("version", ["0.26.0", "0.26.0+cu129"])
def test_the_release_that_was_run_is_taken(version: str) -> None:
    assert versions.refusal(version) is None


@pytest.mark.parametrize("version", ["0.25.1", "0.26.1", "0.27.0", "0.26.0rc1", "1.0", "main", None])
def test_other_releases_are_named(version: str | None) -> None:
    """Inner interfaces change: a guess would load weights into the wrong places."""
    why = versions.refusal(version)
    assert why is not None and "0.26.0" in why and (version is None or version in why)


def test_registering_twice_is_registering_once(vllm: Vllm, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM calls plugins again in some of its processes."""
    monkeypatch.setattr(versions, "installed", lambda: "0.26.0")
    plugin = vllm.module_of("plugin")
    plugin.register()
    plugin.register()
    assert vllm.methods == {"marlinctl": vllm.module_of("config").NativeConfig}
    assert [kernel.__name__ for kernel in vllm.kernels] == ["MarlinctlLinearKernel", "MacheteLinearKernel", "MarlinLinearKernel"]
    vllm.module_of("linear_kernel").put_in_front()
    assert len(vllm.kernels) == 3


def test_kernels_wait_until_vllm_imports_its_own(vllm: Vllm, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are seconds of imports, which a model without quantization must not wait for."""
    monkeypatch.setattr(versions, "installed", lambda: "0.26.0")
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.delitem(sys.modules, "vllm.model_executor.kernels.linear")
    vllm.module_of("plugin").register()
    assert [kernel.__name__ for kernel in vllm.kernels] == ["MacheteLinearKernel", "MarlinLinearKernel"]
    assert "marlinctl.serve.vllm.linear_kernel" not in sys.modules and "marlinctl.serve.vllm.method" not in sys.modules


def test_another_vllm_is_left_alone_and_native_folders_are_refused(
    vllm: Vllm, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(versions, "installed", lambda: "0.27.0")
    with caplog.at_level("WARNING", logger="vllm.marlinctl"):
        plugin = vllm.module_of("plugin")
        plugin.register()
        plugin.register()
    assert len(caplog.records) == 1 and "vLLM 0.27.0" in caplog.text
    assert [kernel.__name__ for kernel in vllm.kernels] == ["MacheteLinearKernel", "MarlinLinearKernel"]
    config = vllm.methods["marlinctl"]
    assert config.override_quantization_method({"quant_method": "gptq"}, None) is None  # vLLM asks it about every model
    with pytest.raises(RuntimeError, match=r"vLLM 0\.27\.0.*pip install 'vllm==0\.26\.0'.*--format ct"):
        config.from_config({"quant_method": "marlinctl"})


def test_a_vllm_without_such_a_registry_is_left_alone(vllm: Vllm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed", lambda: "2.0.0")
    monkeypatch.delattr(sys.modules["vllm.model_executor.layers.quantization"], "register_quantization_config")
    vllm.module_of("plugin").register()
    assert not vllm.methods


def test_the_entry_point_imports_nothing_heavy() -> None:
    """vLLM loads it in its front end, and in each worker, before it knows the model."""
    program = "import sys, marlinctl.serve.vllm.plugin; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert not {"torch", "transformers", "numpy", "safetensors", "vllm"} & set(done.stdout.split())
