"""What a task of lm_eval needs beyond lm_eval itself: packages, and data of NLTK.

A task names functions of Python files beside its definition (`ifeval/utils.py`). Their imports are read, not run: loading a task may
fetch data and run code, and a package that is missing shows before that, with all others that are missing.
"""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from marlinctl.errors import EnvironmentProblem, Problem

_HOME = "lm_eval.tasks."
_NLTK_DATA = {"ifeval": ("tokenizers/punkt_tab", "punkt_tab")}  # lm_eval fetches it when the task is loaded
_DISTRIBUTIONS = {"sklearn": "scikit-learn", "PIL": "pillow", "yaml": "pyyaml", "rouge_score": "rouge-score"}


def require(configs: Mapping[str, Mapping[str, Any]]) -> None:
    """configs: leaf -> its definition. EnvironmentProblem E402 that names every task and what it lacks."""
    found = {name: lacking for name, config in configs.items() if (lacking := _lacking(config))}
    if found:
        raise refusal(found)


def missing(error: BaseException | None) -> str | None:
    """The module whose absence caused `error`, directly or not."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and error.name:
            return error.name.split(".")[0]
        error = error.__cause__ or error.__context__
    return None


def refusal(found: Mapping[str, Sequence[str]]) -> EnvironmentProblem:
    """found: task -> modules that it lacks."""
    problems = []
    for name, modules in found.items():
        problems.append(Problem(f"the task {name} needs packages that are not installed: {', '.join(modules)}", "--tasks", _fix(modules)))
    error = EnvironmentProblem.from_problems("E402", problems)
    assert isinstance(error, EnvironmentProblem)
    return error


def require_nltk_data(leaves: Mapping[str, Any]) -> None:
    """EnvironmentProblem E402 where NLTK's data are not there; asked after the task was loaded, which tries to fetch them."""
    for name in leaves:
        data = next((data for part, data in _NLTK_DATA.items() if part in name), None)
        nltk = sys.modules.get("nltk")  # the code of the task has imported it
        if data is None or nltk is None:
            continue
        try:
            nltk.data.find(data[0])
        except LookupError:
            raise EnvironmentProblem(
                "E402",
                f"the task {name} needs the data {data[1]} of NLTK, which could not be fetched",
                where="--tasks",
                fix=f"python -m nltk.downloader {data[1]} on a machine with network, then copy its folder nltk_data to your home",
            ) from None


def _fix(modules: Sequence[str]) -> str:
    """lm_eval's own extra where one holds them all, else the packages by name."""
    wanted = {_plain(_DISTRIBUTIONS.get(module, module)) for module in modules}
    extras: dict[str, set[str]] = {}
    for line in importlib.metadata.requires("lm_eval") or ():
        if (match := re.fullmatch(r"\s*([\w.-]+).*;\s*extra\s*==\s*[\"']([\w-]+)[\"']\s*", line)) is not None:
            extras.setdefault(match[2], set()).add(_plain(match[1]))
    holding = sorted((len(held), extra) for extra, held in extras.items() if wanted <= held and extra != "dev")
    return f"pip install 'lm_eval[{holding[0][1]}]'" if holding else f"pip install {' '.join(sorted(wanted))}"


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _lacking(config: Mapping[str, Any]) -> list[str]:
    """Modules that cannot be found among those that the files of a definition import, and the files of lm_eval's tasks behind them."""
    lm_eval = find_spec("lm_eval")
    assert lm_eval is not None and lm_eval.origin is not None
    above = Path(lm_eval.origin).parent.parent
    waiting = list(dict.fromkeys(_files(config)))
    seen = set(waiting)
    lacking: set[str] = set()
    while waiting:
        for module in _imports(waiting.pop()):
            if module.startswith(_HOME):
                file = above.joinpath(*module.split(".")).with_suffix(".py")
                if file.is_file() and file not in seen:
                    seen.add(file)
                    waiting.append(file)
            elif find_spec(module.split(".")[0]) is None:
                lacking.add(module.split(".")[0])
    return sorted(lacking)


def _files(value: Any) -> Iterator[Path]:
    """lm_eval's index holds `!function utils.process_results` as /path/to/utils.process_results."""
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _files(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _files(item)
    elif isinstance(value, str) and value.startswith("/") and "\n" not in value:
        path = Path(value.rpartition(".")[0] + ".py")
        if len(value) < 1000 and path.is_file():
            yield path


def _imports(path: Path) -> Iterator[str]:
    """What a file cannot be loaded without: imports at its top, those in `try` left out. `from a.b import c` may mean the module a.b.c."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):  # shows when lm_eval loads it
        return
    beside = {file.stem for file in path.parent.glob("*.py")}
    for node in tree.body:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names if f"{node.module}.".startswith(_HOME))]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] not in beside)
