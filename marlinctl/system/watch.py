"""Who of the processes is still there. A process that is gone never answers, and whoever waits for it in a collective waits for hours.

    process 1 ──┐                          a connection that closes without a farewell: that process is dead
    process 2 ──┼──► process 0             the others hear of it, and all of them end; one of them says which process it was
    process 3 ──┘

The kernel closes the connection of a process that dies, however it dies; a machine that is cut off is noticed by TCP keepalive. A thread
reads. The run itself mostly finds out in its next collective, which fails (gloo) and asks here why; where it does not come back (NCCL
waits in the driver, or the block takes long), the thread ends the process.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import selectors
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from click.exceptions import Exit

from marlinctl.errors import MarlinctlError, Problem, ResourceProblem

_CONNECT_SECONDS = 120
_ASK_SECONDS = 5  # for the reason of a collective that failed
_GRACE_SECONDS = 60  # for the run to notice, to write what is finished and to leave by itself
_KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}  # a machine that is cut off is noticed after a minute
_MOST_BYTES = 1 << 20  # of a message


@dataclass(frozen=True, slots=True)
class Lost:
    """A process that has left before the end."""

    index: int
    code: int | None = None  # its exit code; None where it said nothing
    problems: tuple[tuple[str, str, str], ...] = ()  # what, where, fix of the error that it has not reported itself
    error_id: str = ""


class Watch:
    """Of one process over the others: of the main one over all, of any other over the main one."""

    def __init__(self, index: int, count: int, share: Callable[[Any], Any]) -> None:
        """share: hands the main process's value to all. All processes make their watch together."""
        self._index, self._count = index, count
        self._lost: Lost | None = None
        self._found, self._leaving = threading.Event(), threading.Event()  # the end, or a process that is lost; this one goes too
        self._free, self._value = False, None
        self._names = {0: f"process 0 (at {os.environ.get('MASTER_ADDR', 'unknown')})"}
        self._peers = self._accept(share) if index == 0 else self._connect(share)
        for peer in self._peers:
            peer.settimeout(None)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in _KEEPALIVE.items():
                if hasattr(socket, name):  # not everywhere
                    peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def leave(self, error: BaseException) -> BaseException | None:
        """This process leaves with an error. Informs the others; returns what is to be raised instead: nothing, what the main process will
        report for another one, or an exit without a report."""
        self._leaving.set()
        ours = isinstance(error, (MarlinctlError, Exit))
        if not ours and isinstance(error, RuntimeError):  # a collective that failed because another process has left?
            self._found.wait(_ASK_SECONDS)
        lost = self._lost
        if lost is not None and not ours and (isinstance(error, RuntimeError) or lost.code is None):
            instead = self._error_of(lost) if self._reports(lost) else Exit(_code_of(lost))
            self._say({"left": _code_of(lost)})
            return instead
        code = _exit_code(error)
        if self._index and isinstance(error, MarlinctlError):
            problems = [(problem.what, problem.where, problem.fix) for problem in error.problems]
            self._say({"left": code, "id": error.error_id, "problems": problems})
            return Exit(code)
        self._say({"left": code})
        return None

    def free(self) -> None:
        """After the last collective: the main process needs the others no more, and misses none."""
        self._free = True

    def close(self, value: Any) -> None:
        """Of the main process: the run is over, with this value."""
        self._leaving.set()
        self._say({"farewell": value})

    def wait(self) -> Any:
        """Of any other: until the run is over; the value. RuntimeError where the main process has left before (`leave` knows why)."""
        self._found.wait()
        if self._lost is not None:
            raise RuntimeError("the main process has left")
        self._leaving.set()
        return self._value

    # Connections

    def _accept(self, share: Callable[[Any], Any]) -> list[socket.socket]:
        token = secrets.token_hex(16)
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        with socket.create_server(("", 0), family=family, dualstack_ipv6=dual, backlog=self._count) as server:
            server.settimeout(_CONNECT_SECONDS)
            share((server.getsockname()[1], token))
            found: dict[int, socket.socket] = {}
            while len(found) < self._count - 1:
                peer, _ = server.accept()
                peer.settimeout(_CONNECT_SECONDS)
                with suppress(OSError, ValueError, KeyError, TypeError):
                    said = json.loads(_line(peer))
                    if hmac.compare_digest(str(said["token"]), token) and 0 < int(said["index"]) < self._count:
                        found[int(said["index"])] = peer
                        self._names[int(said["index"])] = f"process {said['index']} (pid {said['pid']} on {said['host']})"
                        continue
                peer.close()  # a stranger
        return [found[index] for index in range(1, self._count)]

    def _connect(self, share: Callable[[Any], Any]) -> list[socket.socket]:
        port, token = share(None)
        peer = socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=_CONNECT_SECONDS)
        said = {"token": token, "index": self._index, "pid": os.getpid(), "host": socket.gethostname()}
        peer.sendall(json.dumps(said).encode() + b"\n")
        return [peer]

    def _say(self, message: dict[str, Any], apart: int = -1) -> None:
        data = json.dumps(message).encode() + b"\n"
        for index, peer in enumerate(self._peers, start=1):
            if index != apart:
                with suppress(OSError):
                    peer.sendall(data)

    # The thread

    def _run(self) -> None:
        """Until the run is over or a process is lost."""
        with selectors.DefaultSelector() as selector:
            for position, peer in enumerate(self._peers):
                selector.register(peer, selectors.EVENT_READ, position + 1 if self._index == 0 else 0)
            buffers = {key.data: b"" for key in selector.get_map().values()}
            while selector.get_map():
                for key, _ in selector.select():
                    try:
                        data = key.fileobj.recv(65536)  # type: ignore[union-attr]
                    except OSError:
                        data = b""
                    *lines, buffers[key.data] = (buffers[key.data] + data).split(b"\n")
                    said = [json.loads(line) for line in lines]
                    if said and "farewell" in said[0]:
                        self._value = said[0]["farewell"]
                        self._found.set()
                        return
                    if (said or not data) and self._index == 0 and self._free:
                        selector.unregister(key.fileobj)
                    elif said or not data:
                        self._miss(key.data, said[0] if said else {})
                        return

    def _miss(self, index: int, said: dict[str, Any]) -> None:
        """said: its last words."""
        problems = tuple((what, where, fix) for what, where, fix in said.get("problems", ()))
        lost = Lost(said.get("lost", index), said.get("left"), problems, said.get("id", ""))
        if self._index == 0:
            self._say({"lost": lost.index, "left": lost.code}, apart=index)
        self._lost = lost
        self._found.set()
        if self._leaving.wait(_GRACE_SECONDS):
            return
        if self._reports(lost):
            error = self._error_of(lost)
            lines = [line for p in error.problems for line in (f"error: {p.what}", f"  where: {p.where}", f"  fix: {p.fix}")]
            with suppress(OSError):
                os.write(2, ("\n".join(lines) + "\n").encode())
        os._exit(_code_of(lost))  # what is finished is in the journal, as after a kill

    # Reports

    def _reports(self, lost: Lost) -> bool:
        """Whether it is this process that says so."""
        return self._index == 0 if lost.index else self._index == 1 and lost.code is None

    def _error_of(self, lost: Lost) -> MarlinctlError:
        name = self._names.get(lost.index, f"process {lost.index}")
        if lost.error_id:
            kinds = {kind.exit_code: kind for kind in MarlinctlError.__subclasses__()}
            problems = [Problem(what, f"{where}; {name}", fix) for what, where, fix in lost.problems]
            return kinds.get(lost.code or 0, MarlinctlError).from_problems(lost.error_id, problems)
        how = "ended: it was killed, or its machine is gone" if lost.code is None else f"left with exit code {lost.code}"
        return ResourceProblem(
            "E505", f"process {lost.index} of {self._count} {how}, so all of them end", where=name,
            fix="look there for memory that ran out; `marlinctl resume OUT` continues, with any number of processes",
        )  # fmt: skip


def _line(peer: socket.socket) -> bytes:
    data = b""
    while not data.endswith(b"\n"):
        more = peer.recv(4096)
        if not more or len(data) > _MOST_BYTES:
            raise ValueError("no greeting")
        data += more
    return data


def _code_of(lost: Lost) -> int:
    return ResourceProblem.exit_code if lost.code is None else lost.code


def _exit_code(error: BaseException) -> int:
    """As marlinctl/cli.py ends with it."""
    if isinstance(error, (MarlinctlError, Exit)):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return 130
    number = getattr(error, "signal", None)  # SIGTERM and SIGHUP, as cli.py raises them
    return MarlinctlError.exit_code if number is None else 128 + int(number)
