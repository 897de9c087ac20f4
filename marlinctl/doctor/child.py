"""Runs computing.py in a process of its own: a wheel for another processor, a sick driver or a half-installed library may crash or hang
there, and the doctor reports it.

The child searches the modules that this process searches, in the same order: its sys.path is handed over.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys

from marlinctl.doctor.result import Check

SECONDS = 180  # importing torch from a cold network drive takes a minute
PROGRAM = "import sys; sys.path[:] = {path!r}; from marlinctl.doctor.computing import main; main()"
_CURES = {
    "torch": "pip install --force-reinstall torch, in the variant for this processor and driver",
    "gpu": "see nvidia-smi and the kernel's log (dmesg); until it works, give --device cpu",
    "nvrtc": "pip install --force-reinstall cuda-bindings nvidia-cuda-nvrtc",
    "kernels": "update the driver; until it works, compress on the CPU, and do not serve packed folders from this GPU",
}
_DEFECT = "run marlinctl doctor again; if it stays, report it with this line"


def computing(program: str = PROGRAM, seconds: float = SECONDS) -> list[Check]:
    """program: Python, with {path!r} for sys.path. A process that dies or takes longer gives the results so far, and one `fail`."""
    command = [sys.executable, "-P", "-c", program.format(path=sys.path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=seconds, check=False)
        output, errors, ended = done.stdout, done.stderr, _ended(done.returncode)
    except subprocess.TimeoutExpired as late:
        output, errors = _text(late.stdout), ""
        ended = f"did not come back within {seconds:g} s"
    checks, last = _read(output)
    if ended is None:
        return checks
    lines = errors.strip().splitlines()
    found = f"the process that tested it {ended}{': ' + lines[-1] if lines else ''}"
    return [*checks, Check(last, "fail", found, _CURES.get(last, _DEFECT))]


def _read(output: str) -> tuple[list[Check], str]:
    """The finished checks, and the name of the last one that was started. Libraries may print between the lines."""
    checks, last = [], "torch"
    for line in output.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and "started" in entry:
            last = entry["started"]
        elif isinstance(entry, dict) and entry.keys() == {"name", "status", "found", "cure"}:
            checks.append(Check(**entry))
    return checks, last


def _ended(code: int) -> str | None:
    if code == 0:
        return None
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with {code}"


def _text(output: bytes | str | None) -> str:
    """subprocess hands over bytes when the time is up, text or not."""
    return output.decode("utf-8", "replace") if isinstance(output, bytes) else output or ""
