"""marlinctl/doctor/hub.py: a server on this machine plays the hub, and ports that nobody listens to."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest

from marlinctl.doctor import hub
from marlinctl.doctor.result import Check

TOKEN = "hf_" + "aBcDeFgHiJ1234567890KlMnOpQrStUvWx"
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, str], tuple[Check, list[str | None]]]]:
    """Ask a hub that answers with this status and body; what was found, and the Authorization headers that the hub saw."""
    for name in OFFLINE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # it was read when the library was imported
    servers: list[HTTPServer] = []

    def ask(status: int, body: str) -> tuple[Check, list[str | None]]:
        seen: list[str | None] = []

        class Hub(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                seen.append(self.headers.get("Authorization"))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_args: object) -> None:
                pass

        servers.append(HTTPServer(("127.0.0.1", 0), Hub))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{servers[-1].server_port}")
        (check,) = hub.hub(offline=False, quick=False)
        return check, seen

    yield ask
    for server in servers:
        server.shutdown()
        server.server_close()


Ask = Callable[[int, str], tuple[Check, list[str | None]]]


def test_a_hub_that_answers(asked: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, a working hub would be called unreachable; and the question must not carry the token about."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    check, seen = asked(200, json.dumps([{"id": "a/b"}]))
    assert check.status == "ok"
    assert seen == [None]


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [(503, "busy", "HTTP 503"), (403, "no", "HTTP 403"), (200, "<html>log in", "login page"), (200, "{}", "login page")],
)
def test_a_hub_that_refuses(asked: Ask, status: int, body: str, said: str) -> None:
    """If this failed, a proxy's login page or an outage would count as a hub."""
    check, _ = asked(status, body)
    assert check.status == "warn" and said in check.found


def test_a_port_that_nobody_listens_to(asked: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, a machine without network would get a traceback instead of a line."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
        (check,) = hub.hub(offline=False, quick=False)
    assert check.status == "warn" and "cannot be reached" in check.found and "--offline" in check.cure


def test_offline_is_told_and_nobody_is_asked(asked: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, `--offline` would still send a request, or a forgotten variable would stay a riddle."""
    monkeypatch.setattr(hub, "_answer", lambda: pytest.fail("the hub was asked"))
    (flag,) = hub.hub(offline=True, quick=False)
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "yes")
    (variable,) = hub.hub(offline=False, quick=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert hub.offline_by() is None, "huggingface_hub takes the newer variable first"
    assert list(hub.hub(offline=False, quick=True)) == []
    assert (flag.status, variable.status) == ("ok", "ok")
    assert "--offline" in flag.found and "TRANSFORMERS_OFFLINE=yes" in variable.found


def test_the_token_is_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, a bug report would carry somebody's token; and a token that all users can read must be told."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    (none,) = hub.token()
    file = tmp_path / "token"
    file.write_text(TOKEN)
    file.chmod(0o644)
    (open_to_all,) = hub.token()
    file.chmod(0o600)
    (stored,) = hub.token()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    (variable,) = hub.token()
    assert [check.status for check in (none, open_to_all, stored, variable)] == ["ok", "warn", "ok", "ok"]
    assert none.found.startswith("none") and "HF_TOKEN" in variable.found and str(file) in stored.found
    assert TOKEN not in repr((none, open_to_all, stored, variable))
