"""What `pip install marlinctl` brings: a pure wheel with one top-level name, its data, and dependencies that are all declared."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from marlinctl import __version__
from tests.test_architecture import PACKAGE, ROOT, SERVERS, all_imports

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
IMPORT_NAMES = {"pyyaml": "yaml", "huggingface-hub": "huggingface_hub", "compressed-tensors": "compressed_tensors", "lm-eval": "lm_eval"}


def requirement_name(line: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", line)
    assert match, line
    return re.sub(r"[-_.]+", "-", match[0]).lower()


def pins() -> dict[str, str]:
    lines = (line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines())
    return {requirement_name(line): line.partition("==")[2] for line in lines if line}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy without the network, as an installer would build it."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for room in ("quantize", "sparsify", "pack", "kernels"):
        (source / room).symlink_to(Path("marlinctl") / room)
    for extra in ("tests", "docs", "scripts"):
        (source / extra).mkdir()
        (source / extra / "__init__.py").touch()
    shutil.copytree(PACKAGE, source / "marlinctl", ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-index", "--no-deps", "--no-build-isolation", "-w", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_is_pure_python(wheel: Path) -> None:
    """A platform wheel would mean that something is compiled at install time."""
    assert wheel.name == f"marlinctl-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith((".so", ".pyd", ".dll"))]


def test_the_top_level_is_marlinctl_alone(wheel: Path) -> None:
    """`kernels`, `pack`, `quantize` or `tests` at the top of site-packages would shadow other people's packages."""
    with zipfile.ZipFile(wheel) as archive:
        top = {name.split("/")[0] for name in archive.namelist()}
    assert top == {"marlinctl", f"marlinctl-{__version__}.dist-info"}


def test_everything_that_is_needed_is_in_the_wheel(wheel: Path) -> None:
    """Recipes, the namespace package without __init__.py and the typing marker are what packaging forgets."""
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    wanted = {str(Path("marlinctl") / path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")}
    wanted |= {f"marlinctl/recipes/{path.name}" for path in (PACKAGE / "recipes").glob("*.yaml")}
    wanted |= {f"marlinctl/kernels/csrc/{path.name}" for path in (PACKAGE / "kernels" / "csrc").iterdir()}
    wanted |= {f"marlinctl/pages/{path.name}" for path in (PACKAGE / "pages").glob("*.jinja")}
    wanted |= {"marlinctl/py.typed", "marlinctl/kernels/reference.py", "marlinctl/recipes/int4.yaml", "marlinctl/recipes/quick.yaml"}
    assert wanted <= packed
    assert not [name for name in packed if "__pycache__" in name]


def test_the_wheel_runs_by_itself(wheel: Path, tmp_path: Path) -> None:
    """An editable install hides files that the wheel lacks."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    program = "import marlinctl, sys; print(marlinctl.__file__); from marlinctl.cli import main; sys.exit(main(['recipes', 'ls']))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=True
    )
    where, *recipes = done.stdout.splitlines()
    assert Path(where).is_relative_to(tmp_path)
    assert [line.split()[0] for line in recipes] == ["int4", "int4-a8", "int4-best", "int4-channel", "quick", "sparse-int4"]


def test_metadata(wheel: Path) -> None:
    """What the index shows and pip obeys."""
    with zipfile.ZipFile(wheel) as archive:
        folder = f"marlinctl-{__version__}.dist-info"
        metadata = Parser().parsestr(archive.read(f"{folder}/METADATA").decode())
        entry_points = archive.read(f"{folder}/entry_points.txt").decode()
        assert f"{folder}/licenses/LICENSE" in archive.namelist()
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert set(metadata.get_all("Provides-Extra") or []) == {"eval", "distill", "tensorboard", "wandb", "docs", "test", "fuzz"}
    assert "marlinctl = marlinctl.cli:main" in entry_points


def test_every_import_is_declared() -> None:
    """A dependency that only happens to be installed with another one disappears with it."""
    extras = [line for name in ("eval", "distill") for line in PROJECT["optional-dependencies"][name]]
    declared = {requirement_name(line) for line in [*PROJECT["dependencies"], *extras]}
    known = {IMPORT_NAMES.get(name, name) for name in declared} | sys.stdlib_module_names | {"marlinctl"}
    strangers = [found for found in all_imports() if found.target.split(".")[0] not in known]
    # a server imports its plugin, so it is there; who else may name it is said in test_architecture.py
    strangers = [found for found in strangers if found.target.split(".")[0] not in SERVERS]
    # CUDA builds of torch depend on cuda-bindings and NVRTC; without a GPU nobody needs them, and jit.py says so when they are missing
    assert {(found.importer, found.target, found.at_import) for found in strangers} == {
        ("marlinctl.kernels.jit", "cuda.bindings.nvrtc", False),
        ("marlinctl.kernels.driver", "cuda.bindings.driver", False),
    }


def test_what_an_extra_brings_is_never_needed_to_start() -> None:
    """Without the extra a verb must be able to say so (exit 4), so no verb and no public module may need it when it is imported."""
    core = {requirement_name(line) for line in PROJECT["dependencies"]}
    extras = {requirement_name(line) for line in PROJECT["optional-dependencies"]["eval"]} - core
    needs = {IMPORT_NAMES.get(name, name) for name in extras}
    imports = [found for found in all_imports() if found.at_import]
    while grown := {i.importer for i in imports if {i.target, i.target.split(".")[0], i.target.rpartition(".")[0]} & needs} - needs:
        needs |= grown
    public = {name for name in needs if name.count(".") == 1 or name.startswith("marlinctl.commands.")}
    assert not {name for name in public if name.startswith("marlinctl.")}


def test_every_dependency_is_pinned_within_its_bounds() -> None:
    """A figure in the docs belongs to exact versions; `make demo` must install those."""
    pinned = pins()
    wanted = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["eval"]
    wanted += [line for line in PROJECT["optional-dependencies"]["test"] if not line.startswith("marlinctl")]

    def version(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in re.findall(r"\d+", text))

    for line in wanted:
        name, lowest = requirement_name(line), line.partition(">=")[2]
        assert name in pinned, f"{name} is not in constraints.txt"
        assert lowest and version(pinned[name]) >= version(lowest), line
    assert all(re.fullmatch(r"[0-9][0-9a-z.]*", pin) for pin in pinned.values())


def test_no_index_host_is_named() -> None:
    """Which index serves a package is the choice of the machine, not of the repository."""
    for name in ("Makefile", ".ci/run", "constraints.txt", "pyproject.toml", "scripts/demo.py", "scripts/fetch.py"):
        text = (ROOT / name).read_text("utf-8")
        assert not re.search(r"index-url|find-links|pypi\.org|files\.pythonhosted", text), name
