"""Who may import whom, who names formats and who opens files for writing, read from the sources.

    quantize <- sparsify <- pack <- kernels      numerics: torch and the rooms to their left
      <- errors <- system <- recipes <- ...      the tool; the whole order is ROOMS

Imports point left only, those inside of functions too, and there are no circles. Evaluation, distillation and benchmarking meet in files.
What `--help` loads imports nothing heavy. A failure names file and line.
"""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "marlinctl"
NUMERICS = ["quantize", "sparsify", "pack", "kernels"]  # the design card; also links at the top of the repository
ROOMS = [
    *NUMERICS,
    "solver_kernels",
    *("errors", "system", "recipes", "models", "checkpoint", "data", "report", "evaluation", "planning", "jobs", "verify", "serve"),
    *("oneshot", "convert", "benchmarking", "doctor", "distillation", "compress", "api", "commands", "cli", "__main__"),
]
STAGES = {"evaluation", "distillation", "benchmarking"}
# The bindings of compiler and driver, inside of functions: a CPU build of torch comes without them.
ROOMS_MAY_ALSO = {"marlinctl.kernels.jit": {"cuda"}, "marlinctl.kernels.driver": {"cuda"}, "marlinctl.sparsify.permute": {"scipy"}}
LIGHT = sys.stdlib_module_names | {"click", "marlinctl"}


@dataclass(frozen=True)
class Import:
    file: str  # relative to the repository
    line: int
    importer: str  # dotted module name
    target: str  # dotted name of what is imported; `from a import b` gives a.b
    at_import: bool  # runs when the importer is imported: neither in a function nor under TYPE_CHECKING

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.importer} imports {self.target}"


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def tree_of(path: Path) -> ast.Module:
    """What several tests walk through."""
    return ast.parse(path.read_text("utf-8"), str(path))


def imports_of(path: Path, root: Path = ROOT) -> Iterator[Import]:
    """Every import statement of one file."""
    importer = module_name(path, root)
    package = importer.split(".") if path.name == "__init__.py" else importer.split(".")[:-1]

    def walk(node: ast.AST, at_import: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            runs = at_import and not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                runs = False
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(str(path.relative_to(root)), child.lineno, importer, alias.name, runs)
            elif isinstance(child, ast.ImportFrom):
                base = ".".join([*package[: len(package) - child.level + 1], child.module or ""]) if child.level else child.module or ""
                for alias in child.names:
                    yield Import(str(path.relative_to(root)), child.lineno, importer, f"{base.strip('.')}.{alias.name}", runs)
            yield from walk(child, runs)

    yield from walk(tree_of(path), True)


@functools.cache
def all_imports(root: Path = ROOT) -> list[Import]:
    return [found for path in sorted((root / "marlinctl").rglob("*.py")) for found in imports_of(path, root)]


def rank(module: str) -> int:
    """0 for the leftmost room. `marlinctl` itself holds the version alone, and everybody may read it. ValueError for a room without a
    place.
    """
    parts = module.split(".")
    return ROOMS.index(parts[1]) if len(parts) > 1 and parts[1] != "__version__" else -1


def is_own(module: str) -> bool:
    return module.split(".")[0] == "marlinctl"


def arrows_to_the_right(imports: list[Import]) -> list[str]:
    own = (found for found in imports if is_own(found.target) and rank(found.importer) >= 0)
    return [str(found) for found in own if rank(found.target) > rank(found.importer)]


def strangers_in_rooms(imports: list[Import]) -> list[str]:
    def allowed(found: Import) -> frozenset[str]:
        also = set() if found.at_import else ROOMS_MAY_ALSO.get(found.importer, set())
        return sys.stdlib_module_names | {"torch", "marlinctl"} | also

    return [
        str(found) for found in imports if 0 <= rank(found.importer) < len(NUMERICS) and found.target.split(".")[0] not in allowed(found)
    ]


def stages_that_meet(imports: list[Import]) -> list[str]:
    def stage(module: str) -> str | None:
        parts = module.split(".")
        return parts[1] if len(parts) > 1 and is_own(module) and parts[1] in STAGES else None

    return [str(i) for i in imports if stage(i.importer) and stage(i.target) and stage(i.importer) != stage(i.target)]


def circles(imports: list[Import], modules: set[str]) -> list[str]:
    """Circles among modules, with imports in functions and for types; each is told once, as the chain that closes it."""

    def resolve(target: str) -> str | None:
        if target in modules:
            return target
        parent = target.rpartition(".")[0]  # `from a.b import name`: the module is a.b
        return parent if parent in modules else None

    edges: dict[str, set[str]] = {module: set() for module in modules}
    for found in imports:
        target = resolve(found.target) if is_own(found.target) else None
        if target is not None and target != found.importer:
            edges[found.importer].add(target)
    told: list[str] = []
    finished: set[str] = set()

    def visit(module: str, chain: list[str]) -> None:
        if module in chain:
            told.append(" -> ".join([*chain[chain.index(module) :], module]))
        elif module not in finished:
            for target in sorted(edges[module]):
                visit(target, [*chain, module])
            finished.add(module)

    for module in sorted(modules):
        visit(module, [])
    return told


def heavy_at_start(imports: list[Import], modules: set[str]) -> list[str]:
    """Imports beyond click and the standard library that run when the command line or a verb's module is imported."""
    by_module: dict[str, list[Import]] = {}
    for found in imports:
        if found.at_import:
            by_module.setdefault(found.importer, []).append(found)
    waiting = [module for module in modules if module in ("marlinctl.cli", "marlinctl.__main__") or module.startswith("marlinctl.commands")]
    seen: set[str] = set()
    told: list[str] = []
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        for found in by_module.get(module, []):
            if found.target.split(".")[0] not in LIGHT:
                told.append(str(found))
            for own in (found.target, found.target.rpartition(".")[0]):
                if own in modules:
                    waiting.append(own)
    return told


def test_imports_point_left() -> None:
    """A room that knows a later one cannot be read, tested or reused by itself; a new folder has no place before it is in ROOMS."""
    assert not arrows_to_the_right(all_imports())


def test_rooms_know_torch_and_nothing_else() -> None:
    """Files, models and the command line belong to the tool."""
    assert not strangers_in_rooms(all_imports())


SERVERS = ("vllm", "sglang")  # each known to its plugin alone, marlinctl.serve.<name>
WITHOUT_SERVER = ("plugin", "versions")  # of a plugin, what is imported without the server: by its entry point and by the doctor


def servers_outside_of_their_plugin(imports: list[Import]) -> list[str]:
    """Imports of a server by other files, or where a file without it is imported; and of the plugin's files that need it."""
    wrong: list[Import] = []
    for server in SERVERS:
        plugin = f"marlinctl.serve.{server}"
        without = {f"{plugin}.{name}" for name in WITHOUT_SERVER}
        of_server = [i for i in imports if i.target.split(".")[0] == server]
        needs = {i.importer for i in of_server if i.importer.startswith(f"{plugin}.") and i.at_import}
        wrong += [i for i in of_server if not i.importer.startswith(f"{plugin}.") or (i.importer in without and i.at_import)]
        wrong += [i for i in imports if not i.importer.startswith(f"{plugin}.") and {i.target, i.target.rpartition(".")[0]} & needs]
    return [str(i) for i in wrong]


def test_a_plugin_alone_knows_its_server() -> None:
    """Servers are not installed where marlinctl compresses, and their inner names change from release to release."""
    assert not servers_outside_of_their_plugin(all_imports())


def test_the_stages_meet_in_files() -> None:
    """Evaluation, distillation and benchmarking are coupled by the JSON files of a run, so that each runs alone."""
    assert not stages_that_meet(all_imports())


def test_no_circles() -> None:
    """A circle works until somebody imports the other end first."""
    modules = {module_name(path, ROOT) for path in PACKAGE.rglob("*.py")}
    assert not circles(all_imports(), modules)


def test_what_help_loads_is_light() -> None:
    """A heavy import at the top of a command, or of anything it imports, costs seconds for every `--help`."""
    modules = {module_name(path, ROOT) for path in PACKAGE.rglob("*.py")}
    assert not heavy_at_start(all_imports(), modules)


def test_the_checks_find_what_they_look_for(tmp_path: Path) -> None:
    """A check that finds nothing in a tree full of mistakes would be green for ever."""
    sources = {
        "cli.py": "from marlinctl.system import helper",
        "system/__init__.py": "",
        "system/helper.py": "import torch\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import rich",
        "distillation/run.py": "def f():\n    from marlinctl.evaluation import table",
        "jobs/one.py": "from marlinctl.jobs.two import x",
        "jobs/two.py": "import marlinctl.jobs.one\nimport marlinctl",
        "quantize/__init__.py": "",
        "quantize/gptq.py": "import numpy\nfrom ..pack import tile\nfrom marlinctl.errors import Problem",
        "pack/__init__.py": "",
        "pack/tile.py": "from marlinctl.quantize import gptq",
        "errors.py": "from vllm import LLM",
        "serve/vllm/config.py": "import vllm",
        "doctor/run.py": "from marlinctl.serve.vllm.config import x",
        "serve/vllm/versions.py": "from vllm import envs",
    }
    for name, text in sources.items():
        path = tmp_path / "marlinctl" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    imports = all_imports(tmp_path)
    modules = {module_name(path, tmp_path) for path in (tmp_path / "marlinctl").rglob("*.py")}
    assert arrows_to_the_right(imports) == [
        "marlinctl/quantize/gptq.py:2: marlinctl.quantize.gptq imports marlinctl.pack.tile",
        "marlinctl/quantize/gptq.py:3: marlinctl.quantize.gptq imports marlinctl.errors.Problem",
    ]
    assert strangers_in_rooms(imports) == ["marlinctl/quantize/gptq.py:1: marlinctl.quantize.gptq imports numpy"]
    assert stages_that_meet(imports) == ["marlinctl/distillation/run.py:2: marlinctl.distillation.run imports marlinctl.evaluation.table"]
    assert circles(imports, modules) == [
        "marlinctl.jobs.one -> marlinctl.jobs.two -> marlinctl.jobs.one",
        "marlinctl.pack.tile -> marlinctl.quantize.gptq -> marlinctl.pack.tile",
    ]
    assert servers_outside_of_their_plugin(imports) == [
        "marlinctl/errors.py:1: marlinctl.errors imports vllm.LLM",
        "marlinctl/serve/vllm/versions.py:1: marlinctl.serve.vllm.versions imports vllm.envs",
        "marlinctl/doctor/run.py:1: marlinctl.doctor.run imports marlinctl.serve.vllm.config.x",
    ]
    assert heavy_at_start(imports, modules) == ["marlinctl/system/helper.py:1: marlinctl.system.helper imports torch"]


# Formats

FORMAT_NAMES = {"ct", "gptq", "marlin", "marlin_24"}  # "dense" is also a kind of kernel
# Recipes and the command line name formats for people; layouts say which label they read; a doctor's check is called after its packer.
MAY_NAME_FORMATS = ("checkpoint/formats/", "recipes/", "commands/", "pack/interchange.py", "doctor/computing.py")


def names_of_formats(root: Path) -> list[str]:
    found = []
    for path in sorted((root / "marlinctl").rglob("*.py")):
        place = str(path.relative_to(root / "marlinctl"))
        if not place.startswith(MAY_NAME_FORMATS):
            constants = (node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Constant))
            found += [f"{place}:{node.lineno}: {node.value!r}" for node in constants if node.value in FORMAT_NAMES]
    return found


def test_nobody_spells_the_name_of_a_format(tmp_path: Path) -> None:
    """Where a name is compared, a new format is forgotten: checkpoint/formats describes them, everything else asks the description."""
    (tmp_path / "marlinctl").mkdir()
    (tmp_path / "marlinctl" / "card.py").write_text('tags = {"ct": 1}\nfiles = "marlin files"\n')
    assert names_of_formats(tmp_path) == ["card.py:1: 'ct'"]
    assert names_of_formats(ROOT) == []


# Files

# Into folders that they have just made, with names that cannot be guessed.
MAY_OPEN_FOR_WRITING = ("checkpoint/gguf/convert.py", "checkpoint/hub.py", "evaluation/tasks.py")


def writers_that_follow_links(root: Path) -> list[str]:
    """Calls that write into whatever has the name: write_text and write_bytes of a path, copies of shutil, open for anything but reading,
    unless the file must be new (x). What goes through a descriptor is os.open's question, whose flags are looked at."""
    found = []
    for path in sorted((root / "marlinctl").rglob("*.py")):
        place = str(path.relative_to(root / "marlinctl"))
        calls = (node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call))
        if not place.startswith(MAY_OPEN_FOR_WRITING):
            found += [f"{place}:{call.lineno}: {ast.unparse(call.func)}" for call in calls if _follows_links(call)]
    return found


def _follows_links(call: ast.Call) -> bool:
    called = ast.unparse(call.func)
    name = called.rpartition(".")[2]
    if called == "os.open":
        flags = ast.unparse(call.args[1])
        return "O_CREAT" in flags and "O_EXCL" not in flags
    if name == "open":  # of a path, or with the path as the first argument
        modes = [*call.args[:2], *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
        return any(isinstance(mode, ast.Constant) and re.fullmatch(r"[rwatb+]*[wa+][rwatb+]*", str(mode.value)) for mode in modes)
    return (name in ("write_text", "write_bytes") and "." in called) or called in ("shutil.copy", "shutil.copy2", "shutil.copyfile")


def test_nobody_writes_through_a_link(tmp_path: Path) -> None:
    """A model folder holds links with the names of our files: who opens one for writing overwrites what it leads to. system/atomic.py
    writes under a new name and renames; the only file that is appended to as it is, is the log that the person named."""
    (tmp_path / "marlinctl").mkdir()
    text = """
        path.write_bytes(b"")
        path.open("xb"); path.open("rb"); open(path); os.fdopen(1, "wb"); write_bytes(path, b""); os.open(path, os.O_RDONLY)
        path.open("wb")
        open(path, mode="a")
        os.open(path, os.O_WRONLY | os.O_CREAT)
        os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        shutil.copyfile(path, other)
    """
    (tmp_path / "marlinctl" / "card.py").write_text(textwrap.dedent(text).lstrip())
    calls = ["1: path.write_bytes", "3: path.open", "4: open", "5: os.open", "7: shutil.copyfile"]
    assert writers_that_follow_links(tmp_path) == [f"card.py:{call}" for call in calls]
    (named,) = writers_that_follow_links(ROOT)
    assert named.startswith("system/log.py:")


# Folders


@pytest.mark.parametrize("room", NUMERICS)
def test_rooms_are_links_at_the_top(room: str) -> None:
    """The rooms are found at the top level; an absolute link would point into somebody's home."""
    link = ROOT / room
    assert link.is_symlink()
    assert link.readlink() == Path("marlinctl") / room
    assert link.is_dir()


def test_kernels_is_a_namespace_package() -> None:
    """kernels/__init__.py at the root would shadow Hugging Face's `kernels` and break `import transformers`."""
    assert not (PACKAGE / "kernels" / "__init__.py").exists()
    without = {path.parent.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if not (path.parent / "__init__.py").exists()}
    assert without == {Path("kernels")}, "every other package has an __init__.py"


# Without the package, every test that loads a model finds out: pytest has the root of the repository on its path.
@pytest.mark.parametrize(
    "with_stub", [pytest.param(True, id="kernels installed"), pytest.param(False, id="kernels missing", marks=pytest.mark.slow)]
)
def test_transformers_works_from_the_repository_root(with_stub: bool, tmp_path: Path) -> None:
    """From the root, `import kernels` must find Hugging Face's distribution, not our folder of the same name."""
    if with_stub:
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels" / "__init__.py").write_text(
            textwrap.dedent(
                """
                STUB = True
                class Anything:
                    def __init__(self, *args, **kwargs): pass
                    def __call__(self, *args, **kwargs): return args[0] if args else self
                def __getattr__(name):
                    if name.startswith("__"):
                        raise AttributeError(name)
                    return Anything
                """
            )
        )
        (tmp_path / "kernels-0.18.2.dist-info").mkdir()
        (tmp_path / "kernels-0.18.2.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    program = f"""
        import sys
        sys.path.insert(0, "")                 # as `python -c` and notebooks have it: the current directory first
        sys.path.append({str(tmp_path)!r})
        import transformers.integrations.hub_kernels
        from transformers.utils import is_kernels_available
        assert is_kernels_available() is {with_stub}
        if {with_stub}:
            import kernels
            assert kernels.STUB
        import marlinctl.kernels.reference     # and ours is still reached by its full name
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
