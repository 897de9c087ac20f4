"""Options and fixtures that every test may use.

`pytest --data DIR` points at local copies of evaluation sets and texts (layout: docs/evaluate.md); tests that compare with
published figures need it and are skipped, with the reason, without it. Nothing here reaches the network.
"""

from __future__ import annotations

import gc
import os
import re
import signal
import sys
from collections.abc import Generator, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

# Before any test imports a hub client: no test may depend on the network.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")

# nohup and some CI runners start programs with SIGHUP ignored, and children inherit that; the tests that send it want the usual action.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_addoption(parser: pytest.Parser) -> None:
    if find_spec("pytest_timeout") is None:  # a machine that is there for its GPU: what the plugin would register
        parser.addini("timeout", "ignored without pytest-timeout")
    parser.addoption("--vllm", default=None, metavar="PYTHON", help="python of an environment with vLLM for CPUs (CONTRIBUTING.md)")
    parser.addoption("--data", type=Path, default=None, metavar="DIR", help="folder with local evaluation sets and texts")


def pytest_configure(config: pytest.Config) -> None:
    if find_spec("pytest_timeout") is None:
        config.addinivalue_line("markers", "timeout(seconds): ignored without pytest-timeout")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`slow` and `gpu` tests run only when asked for by -m, so that plain `pytest` is the quick suite everywhere.

    One that is named, or whose file is, is skipped, and says why; the others, thousands, are left out, because a skip costs some
    milliseconds.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:  # all workers must have one order
        items.sort(key=lambda item: str(item.path))
    if config.option.markexpr:
        return
    apart = {item: marker for item in items for marker in ("gpu", "slow") if item.get_closest_marker(marker)}
    if any("::" in argument or argument.endswith(".py") for argument in config.args):
        for item, marker in apart.items():
            item.add_marker(pytest.mark.skip(reason=f"marked {marker}: run with `pytest -m {marker}`"))
    elif apart:
        items[:] = [item for item in items if item not in apart]
        config.hook.pytest_deselected(items=list(apart))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Workers begin with different folders, so that in a clean clone each rewrites a part of the files, and finds the others' rewritten."""
    report = yield
    if isinstance(collector, pytest.Dir) and collector.path == Path(__file__).parent:
        worker, count = (int(re.sub(r"\D", "", os.environ.get(f"PYTEST_XDIST_WORKER{end}", "0"))) for end in ("", "_COUNT"))
        first = len(report.result) * worker // max(count, 1)
        report.result[:] = report.result[first:] + report.result[:first]
    return report


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Imports make a million objects, and nothing that could be collected: a fifth of the time, in every worker."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish() -> None:
    """What was imported stays: without it each gc.collect() of a run looks at a million objects of libraries, and runs have some."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> Generator[None, object, object]:
    """Tests that start programs find a server that has imported what they have."""
    if session.items and "tests.forked" in sys.modules:
        from tests.forked import fork_server

        fork_server()
    return (yield)


@pytest.fixture(scope="session")
def data_dir(request: pytest.FixtureRequest) -> Path:
    """The folder given with --data."""
    folder: Path | None = request.config.getoption("--data")
    if folder is None:
        pytest.skip("needs local data sets: pytest --data DIR")
    if not folder.is_dir():
        pytest.fail(f"--data {folder} is not a folder")
    return folder.resolve()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has a cache of its own: none reads or fills the cache of the person who runs it."""
    cache = tmp_path / "marlinctl-cache"
    monkeypatch.setenv("MARLINCTL_CACHE", str(cache))
    return cache


# Where runs publish, and what they draw for the page does not matter.
UNDRAWN = {"checkpoint", "commands", "convert", "data", "distillation", "evaluation", "jobs", "oneshot", "planning", "serve", "system"}
UNDRAWN |= {"verify", "test_api.py", "test_earlier_versions.py", "test_every_verb.py", "test_faults.py", "test_unpackings.py"}


@pytest.fixture(autouse=True, scope="module")
def pictures(request: pytest.FixtureRequest) -> Iterator[None]:
    """Half a second of matplotlib for each folder that is published; tests/report and the files beside this one draw."""
    if request.path.relative_to(Path(__file__).parent).parts[0] in UNDRAWN:
        from tests.blank import blank_pictures  # not at the top: kernels are tested where torch and pytest are all that is installed

        with blank_pictures():
            yield
    else:
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama; read only."""
    from tests.tiny import make_tiny

    return make_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A calibration text, tmp_path/text.txt."""
    from tests.runs import write_text

    return write_text(tmp_path / "text.txt")
