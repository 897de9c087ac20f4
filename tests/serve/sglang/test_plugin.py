"""What SGLang finds, and with which release."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Iterator

import pytest

from marlinctl.serve.sglang import versions
from tests.serve.sglang.fake_sglang import Sglang, installed
from tests.test_architecture import ROOT


@pytest.fixture
def sglang() -> Iterator[Sglang]:
    with installed() as state:
        yield state


def test_the_entry_point_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["entry-points"][versions.GROUP] == {versions.NAME: "marlinctl.serve.sglang.plugin:register"}


@pytest.mark.parametrize("version", ["0.5.23", "0.5.23+cu130"])
def test_the_release_that_it_was_written_for_is_taken(version: str) -> None:
    assert versions.refusal(version) is None


@pytest.mark.parametrize("version", ["0.5.22", "0.5.23.post1", "0.5.24", "0.6.0", "main", None])
def test_other_releases_are_named(version: str | None) -> None:
    """Inner interfaces change: a guess would load weights into the wrong places."""
    why = versions.refusal(version)
    assert why is not None and "0.5.23" in why and (version is None or f"SGLang {version}" in why)


def test_registering_twice_is_registering_once(sglang: Sglang, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang loads plugins in each of its processes, some of them forked."""
    monkeypatch.setattr(versions, "installed", lambda: "0.5.23")
    plugin = sglang.module_of("plugin")
    plugin.register()
    plugin.register()
    assert sglang.choices == ["fp8", "marlinctl"]
    assert sglang.methods == {"fp8": object, "marlinctl": sglang.module_of("config").NativeConfig}


def test_the_method_waits_until_sglang_imports_its_own(sglang: Sglang, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are seconds of imports, and plugins are loaded before arguments are parsed."""
    monkeypatch.setattr(versions, "installed", lambda: "0.5.23")
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.delitem(sys.modules, "sglang.srt.layers.quantization")
    sglang.module_of("plugin").register()
    assert sglang.choices == ["fp8", "marlinctl"] and list(sglang.methods) == ["fp8"]
    assert "marlinctl.serve.sglang.config" not in sys.modules


def test_native_folders_are_refused_in_another_sglang(
    sglang: Sglang, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a method of that name SGLang would say that it does not know it, and not what to do."""
    monkeypatch.setattr(versions, "installed", lambda: "0.6.0")
    with caplog.at_level("WARNING", logger="sglang.marlinctl"):
        sglang.module_of("plugin").register()
    assert len(caplog.records) == 1 and "SGLang 0.6.0" in caplog.text
    config = sglang.methods["marlinctl"]
    assert config.override_quantization_method({"quant_method": "gptq"}, None) is None  # SGLang asks it about every model
    with pytest.raises(RuntimeError, match=r"SGLang 0\.6\.0.*pip install 'sglang==0\.5\.23'.*--format ct"):
        config.from_config({"quant_method": "marlinctl"})
    config()  # no method is missing: SGLang's base class is abstract


def test_the_entry_point_imports_nothing_heavy() -> None:
    """SGLang loads it in its front end, and in each worker, before it knows the model."""
    program = "import sys, marlinctl.serve.sglang.plugin; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert not {"torch", "transformers", "numpy", "safetensors", "sglang"} & set(done.stdout.split())
