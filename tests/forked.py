"""`subprocess.run` and `subprocess.Popen` for Python programs, without the seconds that torch and transformers take to be imported.

    test ──► one server process, which has imported everything and made one run ──► a fork for each program

The server is a fork too, of the process that runs the tests, made when all of them are imported and none has begun (tests/conftest.py).
A program is as real a process as any other: a pid, signals, pipes, limits, and the test is its parent. What it lacks is a start and an
end of the interpreter, and variables that libraries read when they are imported come too late: tests of those start a process themselves.
Where the system has no subreapers (it is not Linux), these are subprocess's own.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import json
import logging
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any, NoReturn

from tests.test_architecture import ROOT

_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of linux/prctl.h


class _Forked(subprocess.Popen[Any]):
    """[sys.executable, "-c" or "-m" or a script, ...]; cwd, env, pipes and start_new_session as usual, SIGINT as in a terminal."""

    def _execute_child(
        self, args: Any, executable: Any, preexec_fn: Any, close_fds: Any, pass_fds: Any, cwd: Any, env: Any, startupinfo: Any,
        creationflags: Any, shell: Any, p2cread: int, p2cwrite: int, c2pread: int, c2pwrite: int, errread: int, errwrite: int,
        restore_signals: Any, gid: Any, gids: Any, uid: Any, umask: Any, start_new_session: bool, *more: Any,
    ) -> None:  # fmt: skip
        assert args[0] == sys.executable and preexec_fn is None, "for this there is subprocess"
        asked = {"arguments": args[1:], "cwd": str(cwd or Path.cwd()), "environment": dict(env or os.environ), "session": start_new_session}
        streams = [own if given == -1 else given for own, given in enumerate((p2cread, c2pwrite, errwrite))]
        self.pid = _ask(json.dumps(asked).encode(), streams)
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)  # type: ignore[attr-defined]


Popen = _Forked if sys.platform == "linux" else subprocess.Popen


def run(
    arguments: list[str], *, timeout: float | None = None, check: bool = False, capture_output: bool = False, **options: Any
) -> subprocess.CompletedProcess[Any]:
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Popen(arguments, **options) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(arguments, process.returncode, out, err)
    if check:
        done.check_returncode()
    return done


_forks: list[socket.socket] = []  # what fork_server() leaves for the first who asks


def fork_server() -> None:
    """Prepares for programs without another import of torch and transformers. Nothing that tests patch may be patched yet."""
    if sys.platform != "linux" or _forks:
        return
    ours, theirs = _sockets()
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # other threads wait for messages, and hold nothing
        server = os.fork()
    if server == 0:
        try:
            _leave_pytest(theirs.fileno())
            _serve(socket.socket(fileno=3))
        except BaseException:  # noqa: BLE001  never back into pytest
            traceback.print_exc()
        finally:
            os._exit(0)
    theirs.close()
    _forks.append(ours)


def _leave_pytest(control: int) -> None:
    """What the server has of the process that it was: modules, but for those of tests, which pytest has rewritten."""
    os.setsid()
    os.chdir(ROOT)
    with open(os.devnull, "r+") as nothing:
        for stream in (0, 1):
            os.dup2(nothing.fileno(), stream)
    os.dup2(control, 3)
    os.closerange(4, 4096)
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("_pytest.")]
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests" or name == "marlinctl.__main__"]:
        del sys.modules[name]
    logging.getLogger().handlers.clear()


def _sockets() -> tuple[socket.socket, socket.socket]:
    """Of a process that becomes the parent of what its children leave behind."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)  # programs and environments in one message
    assert ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0) == 0
    return ours, theirs


@functools.cache
def _server() -> socket.socket:
    """That of fork_server(), or one that the first who asks has started; it ends with this process."""
    if _forks:
        return _forks[0]
    ours, theirs = _sockets()
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])  # where a machine without an installation has our dependencies
    subprocess.Popen(
        [sys.executable, "-m", "tests.forked", str(theirs.fileno())], cwd=ROOT, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONPATH": path},
        start_new_session=True,
    )  # fmt: skip
    theirs.close()
    return ours


def _ask(message: bytes, streams: list[int]) -> int:
    server = _server()
    socket.send_fds(server, [message], streams)
    pid = server.recv(32)
    assert pid, "the server process is gone"
    return int(pid)


# ---- the server process --------------------------------------------------------------------------------------------------------------


def _serve(control: socket.socket) -> None:
    """Nothing is imported before somebody asks."""
    message, streams, *_ = socket.recv_fds(control, 1 << 20, 3)
    if not message:
        return

    import torch

    import marlinctl.commands.compress
    import marlinctl.commands.resume
    import marlinctl.compress
    import marlinctl.distillation.run
    import marlinctl.evaluation.run  # noqa: F401
    import tests.faults.machines  # noqa: F401
    from tests.blank import blank_pictures

    torch.set_num_threads(1)  # a fork has no threads but its own
    with blank_pictures():
        _warm()
        gc.freeze()  # neither looked at nor copied by a fork
        while message:
            told, telling = os.pipe()
            between = os.fork()
            if between == 0:
                program = os.fork()
                if program:
                    os.write(telling, str(program).encode())
                    os._exit(0)  # an orphan falls to the test
                control.close()
                _become(streams, **json.loads(message))
            os.waitpid(between, 0)
            control.send(os.read(told, 32))
            for descriptor in (told, telling, *streams):
                os.close(descriptor)
            message, streams, *_ = socket.recv_fds(control, 1 << 20, 3)


def _warm() -> None:
    """One run, so that forks find what the first run of a process makes: late imports, compiled patterns, tables of transformers."""
    from marlinctl.cli import main
    from tests.tiny import make_tiny

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_tiny(folder / "model")
        (folder / "text.txt").write_text("Some words that are read to see what a layer gets. " * 40)
        walk = ["--calibration", str(folder / "text.txt"), "--samples", "2", "--sequence-length", "32", "--group-size", "32", "-q"]
        (folder / "small.yaml").write_text("extends: int4\nquantize: {refine: 0}\ncalibration: {minimum_tokens: 16}\n")
        with open(os.devnull, "w") as sys.stdout:
            assert main(["quantize", str(folder / "model"), str(folder / "out"), "--recipe", str(folder / "small.yaml"), *walk]) == 0


def _become(streams: list[int], arguments: list[str], cwd: str, environment: dict[str, str], session: bool) -> NoReturn:
    """The program that was asked for."""
    code: object = 99
    try:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
            setattr(sys, name, open(number, mode, buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False))  # noqa: SIM115
        os.closerange(3, max(streams) + 16)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(cwd)
        if session:
            os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        sys.modules["torch"].set_num_threads(1)  # makes its pool again, which two threads at once would not do well
        sys.path[:0] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path and path not in sys.path]
        code = _end_of(arguments)
    except BaseException:  # noqa: BLE001  a fork must never continue with what its parent was doing
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def _end_of(arguments: list[str]) -> object:
    """The exit code of a Python program, given as to the interpreter."""
    first, *rest = arguments
    try:
        if first == "-c":
            sys.argv = ["-c", *rest[1:]]
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
        elif first == "-m":
            sys.argv = [rest[0], *rest[1:]]
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            sys.path.insert(0, str(Path(first).parent))
            runpy.run_path(first, run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return 0 if end.code is None else end.code
    return 0


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
