"""From a name to a folder. The hub is a server on 127.0.0.1 that behaves, or misbehaves, as the test wants."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from marlinctl.checkpoint import hub as hubs
from marlinctl.checkpoint import source
from marlinctl.checkpoint.contents import read_contents
from marlinctl.checkpoint.hub import is_hub_id
from marlinctl.checkpoint.model_files import ORDER_FILE
from marlinctl.checkpoint.reader import open_checkpoint
from marlinctl.checkpoint.source_digests import check_known_digests
from marlinctl.errors import BadInput, EnvironmentProblem, UsageError
from marlinctl.system.console import Console
from tests.tiny import make_tiny

REPOSITORY = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"

PROGRAM = """
import json, sys, time
from pathlib import Path
from marlinctl.checkpoint import hub, source
from marlinctl.system.console import Console
from marlinctl.errors import MarlinctlError
hub._FIRST_WAIT = 0.01
sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.01))
name, revision, cache, offline = json.loads(sys.argv[1])
try:
    found = source.resolve_model(name, revision=revision, cache_dir=Path(cache), offline=offline, console=Console.quiet())
    print(json.dumps({"folder": str(found.folder), "kind": found.kind, "revision": found.revision, "note": found.note}))
except MarlinctlError as error:
    p = error.problems[0]
    print(json.dumps({"id": error.error_id, "exit": error.exit_code, "what": p.what, "where": p.where, "fix": p.fix}))
"""


class Hub:
    """What the server serves: a folder, and a fault."""

    def __init__(self, folder: Path, fault: str = "") -> None:
        self.folder, self.fault = folder, fault
        self.commit = COMMIT
        self.asked: list[str] = []

    def listing(self) -> list[dict[str, Any]]:
        entries = []
        for path in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            data, name = path.read_bytes(), path.relative_to(self.folder).as_posix()
            sha1, sha256 = hashlib.sha1(data).hexdigest(), hashlib.sha256(data).hexdigest()
            entry: dict[str, Any] = {
                "type": "file",
                "path": name,
                "rfilename": name,
                "size": len(data),
                "oid": sha1,
                "blobId": sha1,
            }
            if path.suffix == ".safetensors":
                entry["lfs"] = {"oid": sha256, "sha256": sha256, "size": len(data), "pointerSize": 134}
            entries.append(entry)
        return entries


@contextmanager
def serving(hub: Hub) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            hub.asked.append(f"{self.command} {self.path}")
            refusals = {
                "gated": (401, {"X_Error_Code": "GatedRepo", "X_Error_Message": "Access to model org/tiny is restricted"}),
                "gated, with a token": (403, {"X_Error_Code": "GatedRepo", "X_Error_Message": "You are not in the authorized list"}),
                "bad token": (401, {"X_Error_Message": "Invalid credentials in Authorization header"}),
                "not found": (404, {"X_Error_Code": "RepoNotFound"}),
                "unknown revision": (404, {"X_Error_Code": "RevisionNotFound"}),
                "too many requests": (429, {}),
                "broken": (503, {}),
            }
            if hub.fault in refusals:
                status, headers = refusals[hub.fault]
                self.answer(status, b"", **headers)
            elif self.path.startswith("/api/models/org/tiny/tree/"):
                self.answer(200, json.dumps(hub.listing()).encode(), Content_Type="application/json")
            elif hub.fault == "busy after the first answer" and len(hub.asked) > 1:
                self.answer(503)
            elif self.path.startswith("/api/models/org/tiny"):
                body = {
                    "_id": "x",
                    "id": "org/tiny",
                    "modelId": "org/tiny",
                    "sha": hub.commit,
                    "siblings": hub.listing(),
                    "tags": [],
                    "private": False,
                }
                self.answer(200, json.dumps(body).encode(), Content_Type="application/json")
            else:
                self.file()

        def file(self) -> None:
            name = self.path.split("?")[0].partition("/resolve/")[2].partition("/")[2]
            path = hub.folder / name
            if not path.is_file():
                self.answer(404, b"", X_Error_Code="EntryNotFound")
                return
            data = path.read_bytes()
            weights = path.suffix == ".safetensors"
            etag = hashlib.sha256(data).hexdigest() if weights else hashlib.sha1(data).hexdigest()
            common = {"X_Repo_Commit": hub.commit, "ETag": f'"{etag}"', "Accept_Ranges": "bytes"}
            start, stop = 0, len(data)
            if (asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))) and hub.fault != "no ranges":
                start, stop = int(asked[1]), min(stop, int(asked[2] or len(data)) + 1)
                common["Content_Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            if hub.fault == "cut" and weights and self.command == "GET":
                self.send_response(206 if start else 200)
                for key, value in {"Content-Length": str(len(data) - start), **{k.replace("_", "-"): v for k, v in common.items()}}.items():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(data[start : start + 1000] if start < 5000 else b"")
                self.close_connection = True
                return
            self.answer(206 if "Content_Range" in common else 200, data[start:stop], **common)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def hub_environment(endpoint: str, cache: Path) -> dict[str, str]:
    """The environment of a process whose hub is at `endpoint`."""
    unwanted = ("HF_", "HUGGING", "TRANSFORMERS_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(unwanted) and "proxy" not in k.lower()}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache / "home"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return environment


def ask(
    endpoint: str, cache: Path, *, name: str = "org/tiny", revision: str | None = None, offline: bool = False, **more: str
) -> dict[str, Any]:
    """resolve_model in a process of its own: the hub library reads its settings when it is imported."""
    environment = hub_environment(endpoint, cache)
    command = [sys.executable, "-c", PROGRAM, json.dumps([name, revision, str(cache), offline])]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment | more, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = make_tiny(tmp_path / "served", shards=2)
    (folder / "pytorch_model.bin").write_bytes(b"never fetched")
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    (folder / "README.md").write_text("card")
    (folder / "LICENSE.txt").write_text("licence")
    return folder


def test_download_then_offline(tmp_path: Path, model: Path) -> None:
    """A model on the hub would not arrive whole, would bring pickles or code along, or would be fetched again each time."""
    hub = Hub(model)
    with serving(hub) as endpoint:
        first = ask(endpoint, tmp_path / "cache")
        folder = Path(first["folder"])
        assert (first["kind"], first["revision"]) == ("hub", COMMIT)
        names = {p.name for p in folder.iterdir()}
        assert {"config.json", "tokenizer.json", "chat_template.jinja", "LICENSE.txt", "model-00001-of-00002.safetensors"} <= names
        assert not names & {"pytorch_model.bin", "modeling_evil.py"}
        checkpoint = open_checkpoint(folder)
        assert len(checkpoint.tensors) == 21
        assert check_known_digests(checkpoint, read_contents(checkpoint, Console.quiet())) == 2
        hub.asked.clear()
        ask(endpoint, tmp_path / "cache")
        assert not [line for line in hub.asked if "GET" in line and "safetensors" in line]
    again = ask("http://127.0.0.1:9", tmp_path / "cache", offline=True)
    assert again["folder"] == first["folder"] and "offline" in again["note"]
    assert ask("http://127.0.0.1:9", tmp_path / "cache", HF_HUB_OFFLINE="1")["folder"] == first["folder"]
    # a file disappears from the cache
    (folder / "model-00002-of-00002.safetensors").unlink()
    partial = ask("http://127.0.0.1:9", tmp_path / "cache", offline=True)
    assert (partial["id"], partial["exit"]) == ("E709", 7) and "model-00002-of-00002.safetensors" in partial["what"]


def test_orders_of_channels_arrive_and_no_other_file_of_a_subfolder(tmp_path: Path, model: Path) -> None:
    """Without the file the manifest's list would not be complete, and `verify --source` would take a reordered model for a damaged one."""
    for name in (ORDER_FILE, "onnx/config.json", "onnx/model.safetensors", "marlinctl/other.json"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_bytes((model / "config.json").read_bytes())
    with serving(Hub(model)) as endpoint:
        folder = Path(ask(endpoint, tmp_path / "cache")["folder"])
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*/*")) == [ORDER_FILE]
    assert ask("http://127.0.0.1:9", tmp_path / "cache", offline=True)["folder"] == str(folder)


@pytest.mark.parametrize(
    ("fault", "error_id", "text"),
    [
        ("gated", "E701", "gated"),
        ("gated, with a token", "E701", "gated"),
        ("not found", "E702", "no model of that name"),
        ("unknown revision", "E702", "no revision 'v9'"),
        ("bad token", "E701", "token"),
        ("too many requests", "E707", "slow down"),
        ("broken", "E707", "HTTP 503"),
    ],
)
def test_refusals_of_the_hub(tmp_path: Path, model: Path, fault: str, error_id: str, text: str) -> None:
    """A refusal of the hub would be a traceback, or would not say what to do; or a busy hub would be asked without end."""
    hub = Hub(model, fault)
    with serving(hub) as endpoint:
        answer = ask(endpoint, tmp_path / "cache", revision="v9", HF_TOKEN="hf_notarealtokenatall")
    assert (answer["id"], answer["exit"]) == (error_id, 7)
    assert text in answer["what"]
    assert not any("hf_notarealtoken" in part for part in answer.values() if isinstance(part, str))
    assert "\n" not in answer["what"]
    assert len(hub.asked) == (hubs.ATTEMPTS if fault in ("too many requests", "broken") else 1)


def test_connection_cut_in_the_middle_of_a_file(tmp_path: Path, model: Path) -> None:
    """Half a shard would be used, or the download would be tried without end; once the line is up it would start from zero."""
    hub = Hub(model, "cut")
    with serving(hub) as endpoint:
        answer = ask(endpoint, tmp_path / "cache")
        assert (answer["id"], answer["exit"]) == ("E707", 7), answer
        assert len(hub.asked) < 200
        partial = ask(endpoint, tmp_path / "cache", offline=True)
        assert (partial["id"], partial["exit"]) == ("E709", 7) and "model-0000" in partial["what"]
        hub.fault = ""
        assert "folder" in ask(endpoint, tmp_path / "cache")


def test_an_older_copy_is_never_used_unasked(tmp_path: Path, model: Path) -> None:
    """The hub library falls back to what an earlier run left when the hub stops answering: the job would use last month's weights."""
    hub = Hub(model)
    with serving(hub) as endpoint:
        assert ask(endpoint, tmp_path / "cache")["revision"] == COMMIT
        hub.commit, hub.fault = "f" * 40, "busy after the first answer"
        hub.asked.clear()
        answer = ask(endpoint, tmp_path / "cache")
    assert (answer["id"], answer["exit"]) == ("E707", 7) and COMMIT in answer["what"]


def test_no_server_and_no_cache(tmp_path: Path) -> None:
    """Without a network there would be a traceback, or a long wait."""
    assert ask("http://127.0.0.1:9", tmp_path / "cache")["id"] == "E707"
    offline = ask("http://127.0.0.1:9", tmp_path / "cache", offline=True)
    assert (offline["id"], offline["exit"]) == ("E709", 7) and "no local path" in offline["where"]


def test_only_pickles_on_the_hub(tmp_path: Path) -> None:
    """A model of pickles would be downloaded for nothing, or the person would not learn why it is refused."""
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    (folder / "config.json").write_text("{}")
    hub = Hub(folder)
    with serving(hub) as endpoint:
        answer = ask(endpoint, tmp_path / "cache")
    assert (answer["id"], answer["exit"]) == ("E301", 3) and "pytorch_model.bin" in answer["what"]
    assert len(hub.asked) == 1


# ---- local paths ---------------------------------------------------------------------------------------------------------------------


def local(name: str, **options: Any) -> source.Source:
    return source.resolve_model(name, **{"revision": None, "cache_dir": None, "offline": True, "console": Console.quiet()} | options)


NO_NAMES = [
    "./no/such/model",
    "/no/such",
    "../no/such",
    "a/b/c",
    "model.gguf",
    "org/model.safetensors",
    "a--b",
    "x/..",
    "",
    "org/na me",
    "a\0b",
    "-x",
]


@pytest.mark.parametrize("name", NO_NAMES)
def test_neither_a_path_nor_a_hub_id(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A misspelled path would be looked up on the hub, or the error would not say that both readings were tried."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no folder or file") as caught:
        local(name)
    assert "hub id" in caught.value.problems[0].what


@pytest.mark.parametrize("name", ["gpt2", "org/name", "HuggingFaceTB/SmolLM2-135M", "Qwen/Qwen2.5-0.5B", "a/b_c.d-e"])
def test_hub_ids_are_recognised(name: str) -> None:
    """A good hub id would be refused."""
    assert is_hub_id(name)


def test_local_folder_and_other_files(tmp_path: Path) -> None:
    """A folder would be looked up on the hub; a shard, a FIFO or a link into nowhere would hang or give a traceback."""
    folder = make_tiny(tmp_path / "model")
    found = local(str(folder))
    assert (found.folder, found.kind, found.revision) == (folder, "folder", None)
    with pytest.raises(UsageError, match="--revision"):
        local(str(folder), revision="main")
    with pytest.raises(BadInput, match="neither a folder nor a GGUF") as caught:
        local(str(folder / "model.safetensors"))
    assert "folder that holds it" in caught.value.problems[0].fix
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadInput, match="neither a folder nor a GGUF"):
        local(str(tmp_path / "pipe"))
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(BadInput, match="cannot be read"):
        local(str(tmp_path / "loop"))


def test_cache_root_and_its_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--cache-dir would not win over the environment; a cache that cannot be written would be found out in the middle of a job."""
    monkeypatch.setenv("MARLINCTL_CACHE", str(tmp_path / "environment"))
    assert source.cache_root(tmp_path / "flag") == tmp_path / "flag"
    assert source.cache_root(None) == tmp_path / "environment"
    assert not (tmp_path / "environment").exists()
    assert source.writable_cache(None).is_dir()
    monkeypatch.delenv("MARLINCTL_CACHE")
    assert source.cache_root(None).name == "marlinctl"
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentProblem, match="cache folder"):
        source.writable_cache(tmp_path / "file" / "cache")
