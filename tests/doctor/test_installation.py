"""marlinctl/doctor/installation.py: against distributions that lie in folders as installers leave them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from marlinctl.doctor import installation
from marlinctl.doctor.known_bad import KNOWN_BAD
from tests.doctor.distributions import distribution

CLASSIFIERS = [f"Classifier: Programming Language :: Python :: 3.{minor}" for minor in (11, 12)]


@pytest.mark.parametrize(
    ("version", "status"), [("3.11.7", "ok"), ("3.12.0rc1", "ok"), ("3.10.14", "fail"), ("3.13.1", "warn")], ids=lambda value: str(value)
)
def test_python_is_compared_with_the_metadata(tmp_path: Path, version: str, status: str) -> None:
    """If this failed, a Python that marlinctl refuses would pass, or one that nobody tested would go unmentioned."""
    own = distribution(tmp_path, "marlinctl", "0.1.0", "Requires-Python: >=3.11", *CLASSIFIERS)
    (check,) = installation.python(own, version)
    assert check.status == status
    assert version in check.found


def test_an_editable_installation_is_where_its_record_says(tmp_path: Path) -> None:
    """If this failed, an editable checkout would be called foreign, or another checkout on PYTHONPATH would run unnoticed."""
    own = distribution(tmp_path / "site", "marlinctl", "0.1.0")
    url = (tmp_path / "my code").as_uri()
    (tmp_path / "site" / "marlinctl-0.1.0.dist-info" / "direct_url.json").write_text(
        json.dumps({"url": url, "dir_info": {"editable": True}})
    )
    (same,) = installation.marlinctl(own, tmp_path / "my code" / "marlinctl")
    (other,) = installation.marlinctl(own, tmp_path / "old" / "marlinctl")
    assert same.status == "ok"
    assert other.status == "warn"
    assert str(tmp_path / "old") in other.found and str(tmp_path / "my code") in other.found


def test_an_installed_wheel_is_where_its_files_are(tmp_path: Path) -> None:
    """If this failed, a folder named marlinctl in the current directory would run in place of the installed release."""
    own = distribution(tmp_path, "marlinctl", "0.1.0")
    (tmp_path / "marlinctl-0.1.0.dist-info" / "RECORD").write_text("marlinctl/__init__.py,,\nmarlinctl/cli.py,,\n")
    assert [c.status for c in installation.marlinctl(own, tmp_path / "marlinctl")] == ["ok"]
    assert [c.status for c in installation.marlinctl(own, tmp_path / "elsewhere" / "marlinctl")] == ["warn"]
    assert [c.status for c in installation.marlinctl(None, tmp_path / "marlinctl")] == ["warn"]


def test_requirements_are_those_of_the_metadata(tmp_path: Path) -> None:
    """If this failed, a missing or too old requirement would show as a traceback in the middle of a job."""
    own = distribution(
        tmp_path / "a",
        "marlinctl",
        "0.1.0",
        "Requires-Dist: torch>=2.11",
        "Requires-Dist: transformers>=5.17",
        "Requires-Dist: gguf>=0.17",
        "Requires-Dist: winonly>=1; sys_platform == 'win32'",
        "Requires-Dist: lm_eval>=0.4.12; extra == 'eval'",
        "Requires-Dist: datasets>=5.0; extra == 'distill'",
        "Requires-Dist: pytest>=9; extra == 'test'",
    )
    distribution(tmp_path / "b", "torch", "2.9.1+cpu")  # as text, 2.9 is larger than 2.11
    distribution(tmp_path / "b", "transformers", "5.23.0")
    distribution(tmp_path / "b", "datasets", "4.0")
    distribution(tmp_path / "b", "pytest", "1.0")
    checks = list(installation.requirements(own, [str(tmp_path / "b")]))
    assert [(c.status, c.found.split()[0]) for c in checks] == [("fail", "torch"), ("fail", "gguf"), ("warn", "datasets")]
    assert checks[0].cure == "pip install 'torch>=2.11'"
    distribution(tmp_path / "c", "torch", "2.13.0")
    distribution(tmp_path / "c", "gguf", "0.19")
    distribution(tmp_path / "c", "datasets", "5.0")
    (check,) = installation.requirements(own, [str(tmp_path / "c"), str(tmp_path / "b")])
    assert check.status == "ok"
    assert "lm_eval (eval)" in check.found


def test_versions_known_to_be_bad_are_caught(tmp_path: Path) -> None:
    """If this failed, a version that damages results in silence would continue to do so; the release after it must pass."""
    distribution(tmp_path / "bad", "transformers", "5.10.2")
    distribution(tmp_path / "bad", "vllm", "0.9.2")
    distribution(tmp_path / "good", "transformers", "5.23.0")
    distribution(tmp_path / "good", "vllm", "0.33.0")
    bad = list(installation.known_bad([str(tmp_path / "bad")]))
    assert [(c.status, c.found.split(":")[0]) for c in bad] == [("fail", "transformers 5.10.2"), ("warn", "vllm 0.9.2")]
    assert "#47407" in bad[0].found
    assert [c.status for c in installation.known_bad([str(tmp_path / "good")])] == ["ok"]


def test_the_table_of_bad_versions_can_be_used() -> None:
    """If this failed, one misspelled range would break the check for all others, or accuse without a source."""
    for entry in KNOWN_BAD:
        assert not SpecifierSet(entry.versions).contains("999"), f"{entry.distribution}: a range without an end condemns its own cure"
        assert entry.reason and entry.source and entry.cure
        assert installation.normal(entry.distribution) == entry.distribution


def test_one_distribution_in_two_versions(tmp_path: Path) -> None:
    """If this failed, an upgrade that was cut short would import the code of one version and report the other."""
    distribution(tmp_path / "a", "compressed_tensors", "0.20.0")
    distribution(tmp_path / "a", "torch", "2.13.0")
    distribution(tmp_path / "b", "torch", "2.13.0")  # the same version twice harms nobody
    path = [str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "none")]
    (before,) = installation.duplicates(path)
    assert before.status == "ok" and before.found.startswith("2 ")
    (tmp_path / "b" / "Compressed-Tensors-0.14.0-py3.11.egg-info").mkdir()
    (check,) = installation.duplicates(path)
    assert check.status == "warn"
    assert "0.20.0" in check.found and "0.14.0" in check.found and "compressed-tensors" in check.found


def test_what_is_left_of_an_installation(tmp_path: Path) -> None:
    """If this failed, a dist-info folder without METADATA would break every look at versions, and nobody would say which."""
    distribution(tmp_path, "torch", "2.13.0")
    (tmp_path / "gguf-0.19.0.dist-info").mkdir()
    (check,) = installation.duplicates([str(tmp_path)])
    assert (check.status, "gguf-0.19.0.dist-info" in check.found) == ("warn", True)
    own = distribution(tmp_path / "own", "marlinctl", "0.1.0", "Requires-Dist: gguf>=0.17", "Requires-Dist: torch>=2.11")
    (missing,) = installation.requirements(own, [str(tmp_path)])
    assert missing.found == "gguf is not installed"


@pytest.mark.parametrize(
    ("version", "found", "plugins", "status", "says"),
    [
        (None, False, None, "ok", "not installed; marlinctl serves in vLLM 0.26.0"),
        ("0.26.0", True, None, "ok", "0.26.0, which was tested; it finds"),
        ("0.26.0", True, "other,marlinctl", "ok", "it finds"),
        ("0.26.0", False, None, "warn", "does not find marlinctl's plugin"),
        ("0.26.0", True, "other", "warn", "VLLM_PLUGINS=other keeps"),
        ("0.27.0", True, None, "warn", "not run with vLLM 0.27.0"),
    ],
)
def test_vllm_and_its_plugin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str | None, found: bool, plugins: str | None, status: str, says: str
) -> None:
    """If this failed, vLLM would serve with its own kernels, or refuse a native folder, and the doctor would call it well."""
    if version is not None:
        distribution(tmp_path, "vllm", version)
    monkeypatch.setattr(installation, "plugin_found", lambda: found)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if plugins is not None:
        monkeypatch.setenv("VLLM_PLUGINS", plugins)
    (check,) = installation.vllm([str(tmp_path)])
    assert check.status == status and says in check.found


@pytest.mark.parametrize(
    ("version", "found", "plugins", "status", "says"),
    [
        (None, False, None, "ok", "not installed; marlinctl serves in SGLang 0.5.23"),
        ("0.5.23", True, "other, marlinctl", "ok", "not run on a GPU with; it finds"),
        ("0.5.23", False, None, "warn", "does not find marlinctl's plugin (entry point sglang.srt.plugins)"),
        ("0.5.23", True, "other", "warn", "SGLANG_PLUGINS=other keeps"),
        ("0.5.24", True, None, "warn", "not written for SGLang 0.5.24"),
    ],
)
def test_sglang_and_its_plugin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str | None, found: bool, plugins: str | None, status: str, says: str
) -> None:
    """If this failed, SGLang would refuse a native folder, and the doctor would call it well."""
    if version is not None:
        distribution(tmp_path, "sglang", version)
    monkeypatch.setattr(installation, "sglang_plugin_found", lambda: found)
    monkeypatch.delenv("SGLANG_PLUGINS", raising=False)
    if plugins is not None:
        monkeypatch.setenv("SGLANG_PLUGINS", plugins)
    (check,) = installation.sglang([str(tmp_path)])
    assert check.status == status and says in check.found
