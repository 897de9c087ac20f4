"""marlinctl/doctor/names.py: real folders along a real search path."""

from __future__ import annotations

import os
import sys
from importlib.metadata import Distribution
from pathlib import Path

import pytest

from marlinctl.doctor.names import needed_names, shadowed
from marlinctl.doctor.result import Check
from tests.doctor.distributions import distribution
from tests.test_architecture import ROOT


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A site-packages with transformers in it."""
    site = tmp_path / "site"
    distribution(site, "transformers", "5.23.0")
    (site / "transformers").mkdir()
    (site / "transformers" / "__init__.py").touch()
    return site


@pytest.fixture
def own(tmp_path: Path) -> Distribution:
    lines = ("Requires-Dist: transformers>=5.17", "Requires-Dist: pyyaml>=6", "Requires-Dist: datasets>=5; extra == 'eval'")
    return distribution(tmp_path / "own", "marlinctl", "0.1.0", *lines, "Requires-Dist: pytest>=9; extra == 'test'")


def look(own: Distribution, cwd: Path, path: list[Path], pythonpath: str = "") -> list[Check]:
    return list(shadowed(own, cwd, [str(entry) for entry in path], pythonpath))


def package(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()


def test_names_are_those_of_the_requirements(own: Distribution) -> None:
    """If this failed, a new requirement would not be watched, or `yaml` would be looked for as `pyyaml`."""
    assert needed_names(own) == {"transformers", "yaml", "datasets"}


@pytest.mark.parametrize("form", ["folder", "file"])
def test_a_package_in_the_current_folder(tmp_path: Path, installed: Path, own: Distribution, form: str) -> None:
    """If this failed, `python -m`, torchrun and notebooks would import somebody's own file, and no one would know why it breaks."""
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    if form == "folder":
        package(cwd / "transformers")
    else:
        (cwd / "transformers.py").touch()
    (check,) = look(own, cwd, [installed])
    assert check.status == "warn" and str(cwd / "transformers") in check.found
    (searched,) = look(own, cwd, [cwd, installed])
    assert searched.status == "fail" and "is imported instead" in searched.found


def test_kernels_counts_even_if_it_is_not_installed(tmp_path: Path, installed: Path, own: Distribution) -> None:
    """If this failed, the very case that breaks `import transformers` would pass: it imports `kernels` if it finds one."""
    cwd = tmp_path / "cwd"
    package(cwd / "kernels")
    (check,) = look(own, cwd, [installed])
    assert check.status == "warn" and "kernels" in check.found


def test_a_folder_without_init_hides_nothing(tmp_path: Path, installed: Path, own: Distribution) -> None:
    """If this failed, every folder of data named `datasets` would be an alarm."""
    for name in ("transformers", "datasets", "kernels"):
        (tmp_path / "cwd" / name).mkdir(parents=True)
    (check,) = look(own, tmp_path / "cwd", [tmp_path / "cwd", installed])
    assert check.status == "ok"


def test_our_own_folder_names_count_only_if_they_hide_something(tmp_path: Path, installed: Path, own: Distribution) -> None:
    """If this failed, marlinctl's own repository would be an alarm, or an installed `quantize` would be hidden in silence."""
    package(tmp_path / "cwd" / "quantize")
    assert [c.status for c in look(own, tmp_path / "cwd", [installed])] == ["ok"]
    package(installed / "quantize")
    assert [c.status for c in look(own, tmp_path / "cwd", [installed])] == ["warn"]


def test_pythonpath_is_searched_and_the_package_itself_is_no_shadow(tmp_path: Path, installed: Path, own: Distribution) -> None:
    """If this failed, a folder on PYTHONPATH would go unseen, or a target folder of pip there would be called an impostor."""
    package(tmp_path / "lib" / "yaml")
    (tmp_path / "cwd").mkdir()
    pythonpath = os.pathsep.join([str(tmp_path / "lib"), str(installed), ""])
    (check,) = look(own, tmp_path / "cwd", [tmp_path / "lib", installed], pythonpath)
    assert check.status == "fail" and str(tmp_path / "lib" / "yaml") in check.found and "PYTHONPATH" in check.cure


def test_a_module_of_the_standard_library(tmp_path: Path, installed: Path, own: Distribution) -> None:
    """If this failed, a script named random.py would break numpy with an error about something else."""
    (tmp_path / "cwd").mkdir()
    (tmp_path / "cwd" / "random.py").touch()
    (check,) = look(own, tmp_path / "cwd", [installed])
    assert check.status == "warn" and "random.py" in check.found


def test_the_repository_itself_is_sound() -> None:
    """If this failed, working on marlinctl would mean working under an alarm: its rooms are links at the top level."""
    assert [c.status for c in shadowed(None, ROOT, [str(ROOT), *sys.path], str(ROOT))] == ["ok"]
