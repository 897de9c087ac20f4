"""Headers without weights: what `plan` sees of a folder, a GGUF file and a hub model must be what a run then gets."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from marlinctl.checkpoint import remote_headers as module
from marlinctl.checkpoint.reader import open_checkpoint
from marlinctl.checkpoint.source import resolve_model
from marlinctl.errors import BadInput, UsageError
from marlinctl.system.console import Console
from tests.checkpoint.gguf.test_gguf import write_model
from tests.checkpoint.test_source import COMMIT, REPOSITORY, Hub, ask, hub_environment, serving
from tests.tiny import make_tiny


def seen(model: str | Path, **options: Any) -> Any:
    return module.headers(str(model), **{"revision": None, "cache_dir": None, "offline": False, "console": Console.quiet()} | options)


def test_a_gguf_file_has_the_headers_of_its_folder(tmp_path: Path) -> None:
    """The plan of a GGUF file is that of the folder it is turned into: same names, shapes, dtypes and config."""
    path, _ = write_model(tmp_path / "model.gguf", "llama")
    with seen(path, cache_dir=tmp_path / "cache") as found:
        assert not (tmp_path / "cache").exists(), "a plan writes nothing"
        planned = {name: (info.dtype, info.shape, info.nbytes) for name, info in found.checkpoint.tensors.items()}
        config, to_fetch = found.checkpoint.config, found.to_fetch
    source = resolve_model(str(path), revision=None, cache_dir=tmp_path / "cache", offline=True, console=Console.quiet())
    with open_checkpoint(source.folder) as made:
        assert planned == {name: (info.dtype, info.shape, info.nbytes) for name, info in made.tensors.items()}
        assert config == made.config
        assert to_fetch == sum(info.nbytes for info in made.tensors.values())


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    """The same refusals as a run's: a plan of something else would be a plan of nothing."""
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(BadInput, match="neither a folder nor a GGUF file"), seen(tmp_path / "notes.txt"):
        pass
    with pytest.raises(UsageError, match="--revision"), seen(tmp_path, revision="main"):
        pass


def plan(endpoint: str, cache: Path, *more: str) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, "-m", "marlinctl", "plan", "org/tiny", "--group-size", "32", "--cache-dir", str(cache), "--json", *more]
    done = subprocess.run(command, cwd=REPOSITORY, env=hub_environment(endpoint, cache), capture_output=True, text=True, timeout=120)
    return done.returncode, json.loads(done.stdout)


@pytest.mark.parametrize("fault", ["", "no ranges"])
def test_a_hub_model_is_planned_from_one_request_a_shard(tmp_path: Path, fault: str) -> None:
    """A plan that downloads 140 GB to say that they do not fit is none; one that differs from the local folder's is wrong."""
    folder = make_tiny(tmp_path / "served", shards=3)
    hub = Hub(folder, fault)
    with serving(hub) as endpoint:
        code, document = plan(endpoint, tmp_path / "cache")
        asked = [line for line in hub.asked if ".safetensors" in line and "index" not in line]
        assert len(asked) == 3 and all(line.startswith("GET") for line in asked)
    assert code == 0 and document["model"]["revision"] == COMMIT
    weights = sum(info.nbytes for info in open_checkpoint(folder).tensors.values())
    assert document["model"]["bytes"] == weights
    assert document["disk"]["fetch"] == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    local = subprocess.run(
        [sys.executable, "-m", "marlinctl", "plan", str(folder), "--group-size", "32", "--json"],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    same = json.loads(local.stdout)
    assert document["outputs"] == same["outputs"] and document["linears"] == same["linears"] and document["memory"] == same["memory"]
    left = {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert not any(name.endswith(".safetensors") for name in left)


def test_cached_shards_are_not_asked_for_again(tmp_path: Path) -> None:
    """After a download nothing is left to fetch, with the hub or without it."""
    hub = Hub(make_tiny(tmp_path / "served", shards=2))
    with serving(hub) as endpoint:
        ask(endpoint, tmp_path / "cache")
        hub.asked.clear()
        code, document = plan(endpoint, tmp_path / "cache")
        assert code == 0 and document["disk"]["fetch"] == 0
        assert not [line for line in hub.asked if ".safetensors" in line and "index" not in line]
    code, offline = plan("http://127.0.0.1:9", tmp_path / "cache", "--offline")
    assert code == 0 and offline["outputs"] == document["outputs"]


@pytest.mark.parametrize(
    ("fault", "error_id", "what"), [("gated", "E701", "gated"), ("not found", "E702", "no model"), ("bad token", "E701", "token")]
)
def test_refusals_of_the_hub_are_one_line_each(tmp_path: Path, fault: str, error_id: str, what: str) -> None:
    """The most common end of a first try; the same ids as for a download."""
    with serving(Hub(make_tiny(tmp_path / "served"), fault)) as endpoint:
        code, document = plan(endpoint, tmp_path / "cache")
    assert (code, document["error"]["id"]) == (7, error_id) and what in document["error"]["problems"][0]["what"]


def test_a_damaged_header_on_the_hub_is_refused(tmp_path: Path) -> None:
    """The plan's folder of headers and holes passes the same strict reader as a real one."""
    folder = make_tiny(tmp_path / "served")
    shard = folder / "model.safetensors"
    data = bytearray(shard.read_bytes())
    data[:8] = (1 << 40).to_bytes(8, "little")
    shard.write_bytes(bytes(data))
    with serving(Hub(folder)) as endpoint:
        code, document = plan(endpoint, tmp_path / "cache")
    assert (code, document["error"]["id"]) == (3, "E301")
