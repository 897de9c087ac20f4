"""marlinctl/doctor/child.py: real processes that finish, die, hang and babble; a torch that cannot be imported."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from marlinctl.doctor import child

TOLD = """
import json, os, signal, sys, time
def started(name): print(json.dumps({{"started": name}}), flush=True)
def told(name): print(json.dumps({{"name": name, "status": "ok", "found": "it is there", "cure": ""}}), flush=True)
started("torch"); told("torch"); started("gpu")
"""


def test_what_is_told_comes_back_whatever_is_printed_in_between() -> None:
    """If this failed, a library that greets on stdout would cost all results."""
    checks = child.computing(TOLD + "print('Welcome!'); print('[1, 2]'); print('3'); told('gpu')")
    assert [(check.name, check.status) for check in checks] == [("torch", "ok"), ("gpu", "ok")]


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "was ended by SIGSEGV"),
        ("os.kill(os.getpid(), signal.SIGILL)", "was ended by SIGILL"),
        ("sys.exit('the last words')", "ended with 1: the last words"),
        ("time.sleep(60)", "did not come back within 1 s"),
    ],
)
def test_a_process_that_does_not_finish(end: str, said: str) -> None:
    """If this failed, a sick driver would take the doctor with it, and with it the name of what was sick."""
    first, last = child.computing(TOLD + end, seconds=1)
    assert (first.name, first.status) == ("torch", "ok")
    assert (last.name, last.status) == ("gpu", "fail")
    assert said in last.found and "nvidia-smi" in last.cure


@pytest.mark.parametrize(
    ("torch", "said"),
    [
        ("raise ImportError('libcudart.so.13: cannot open shared object file')", "ImportError: libcudart.so.13"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "was ended by SIGILL"),
        ("raise SystemExit(3)", "ended with 3"),
    ],
)
def test_a_torch_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torch: str, said: str) -> None:
    """If this failed, the most common illness of all would end in a traceback. The child searches where this process does."""
    (tmp_path / "torch.py").write_text(torch)
    monkeypatch.syspath_prepend(tmp_path)
    (check,) = child.computing()
    assert (check.name, check.status) == ("torch", "fail")
    assert said in check.found


def test_everything_that_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, a check would be missing from the answer, in its real process, in the folder where somebody works."""
    monkeypatch.setattr(sys, "argv", ["marlinctl"])
    checks = child.computing()
    assert [check.name for check in checks if check.name != "shared-memory"] == ["torch", "gpu", "nvrtc", "marlin", "sparse-marlin"]
    assert {check.status for check in checks if "marlin" in check.name or check.name == "torch"} == {"ok"}
