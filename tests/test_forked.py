"""Programs that tests run as forks must be what a test takes them for, or what it asserts of a process would hold of nothing."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import forked


def test_a_program_has_its_own_arguments_folder_variables_and_end(tmp_path: Path) -> None:
    """Broken: a program that reads another's environment or whose failure is not seen."""
    program = "import os, sys; print(sys.argv, os.getcwd(), os.environ['OWN'], 'HOME' in os.environ); sys.exit(7)"
    done = forked.run([sys.executable, "-c", program, "a", "ü"], cwd=tmp_path, env={"OWN": "x"}, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (7, f"['-c', 'a', 'ü'] {tmp_path} x False\n", "")
    with pytest.raises(subprocess.CalledProcessError):
        forked.run([sys.executable, "-c", "raise ValueError('told')"], check=True, capture_output=True)
    failed = forked.run([sys.executable, "-c", "raise ValueError('told')"], capture_output=True, text=True)
    assert failed.returncode == 1 and failed.stderr.endswith("ValueError: told\n")
    assert forked.run([sys.executable, "-m", "marlinctl", "--version"], stdout=subprocess.PIPE, text=True).stdout.startswith("marlinctl ")


def test_a_program_can_be_killed_and_is_a_child() -> None:
    """Broken: SIGKILL would reach the server, or nobody; exit codes would be made up."""
    program = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    for number in (signal.SIGKILL, signal.SIGTERM):
        process = forked.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert int(process.stdout.readline()) == process.pid
        process.send_signal(number)
        process.communicate(timeout=20)
        assert process.returncode == -number


def test_programs_leave_nothing_in_each_other() -> None:
    """Broken: what one fork patches or imports would be there in the next."""
    first = "import marlinctl.cli, os; marlinctl.cli.main = None; os.environ['LEFT'] = 'x'; import this"
    second = "import marlinctl.cli, os, sys; print(marlinctl.cli.main is None, 'LEFT' in os.environ, 'this' in sys.modules)"
    forked.run([sys.executable, "-c", first], check=True, stdout=subprocess.DEVNULL)
    assert forked.run([sys.executable, "-c", second], check=True, stdout=subprocess.PIPE, text=True).stdout == "False False False\n"
