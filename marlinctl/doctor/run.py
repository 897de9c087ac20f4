"""Is this machine fit for marlinctl? Every check tries the thing itself (marlinctl/checks); none can stop the others.

quick   installation, names, places, settings of the hub, driver     no torch, no network: a quarter of a second
all     the hub's answer, then torch, GPU, NVRTC and packed products in a child process
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import marlinctl
from marlinctl.doctor import driver, hub, installation, names, places
from marlinctl.doctor.result import ORDER, Check, worst
from marlinctl.system.driver import find_driver
from marlinctl.system.log import redact, without_home

Ask = Callable[[], Iterable[Check]]


def examine(*, quick: bool, offline: bool) -> Iterator[Check]:
    """Line by line as they are found, free of secrets and of the home folder. offline: --offline was given."""
    own = installation.own_distribution()
    asks: list[tuple[str, Ask]] = [
        ("python", lambda: installation.python(own)),
        ("marlinctl", lambda: installation.marlinctl(own, Path(marlinctl.__file__).parent)),
        ("requirements", lambda: installation.requirements(own, sys.path)),
        ("vllm", lambda: installation.vllm(sys.path)),
        ("sglang", lambda: installation.sglang(sys.path)),
        ("known-bad", lambda: installation.known_bad(sys.path)),
        ("duplicates", lambda: installation.duplicates(sys.path)),
        ("names", lambda: names.shadowed(own, Path.cwd(), sys.path, os.environ.get("PYTHONPATH", ""))),
        ("cache", places.cache),
        ("temporary", lambda: places.temporary(os.environ.get("TMPDIR"))),
        ("disk", lambda: places.space(Path.cwd())),
        ("hub", lambda: hub.hub(offline=offline, quick=quick)),
        ("token", hub.token),
        ("driver", lambda: driver.driver(find_driver())),
    ]
    if not quick:
        from marlinctl.doctor import child

        asks.append(("torch", child.computing))
    for name, ask in asks:
        for check in guarded(name, ask):
            yield Check(check.name, check.status, private(check.found), private(check.cure))


def guarded(name: str, ask: Ask) -> Iterator[Check]:
    """What a check finds, or that it could not be made: a broken machine breaks checks too."""
    try:
        yield from ask()
    except OSError as error:
        cure = "see that the path is there and may be read; without a path it is the current folder: change into one that exists"
        yield Check(name, "fail", f"cannot be tested: {error}", cure)
    except ModuleNotFoundError as error:
        yield Check(name, "fail", f"cannot be tested: {error}", f"pip install {(error.name or 'marlinctl').partition('.')[0]}")
    except Exception as error:  # noqa: BLE001  any exception here is a finding about the machine, and the other checks must run
        cause = (str(error).splitlines() or [""])[0]
        cure = "pip install --force-reinstall marlinctl; if it stays, report it with this line"
        yield Check(name, "fail", f"cannot be tested: {type(error).__name__}: {cause}", cure)


def private(text: str) -> str:
    return without_home(redact(text))


def document(checks: Sequence[Check], *, quick: bool) -> dict[str, Any]:
    """JSON-ready: {version, quick, status, counts: {ok, warn, fail}, checks: [{name, status, found, cure}]}."""
    counts = Counter(check.status for check in checks)
    return {
        "version": marlinctl.__version__,
        "quick": quick,
        "status": worst(checks),
        "counts": {status: counts[status] for status in ORDER},
        "checks": [asdict(check) for check in checks],
    }


def table(checks: Sequence[Check]) -> str:
    """A line each, and beneath what is not ok its cure."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.status:4}  {check.name:{width}}  {check.found}")
        if check.cure:
            lines.append(f"{'':4}  {'':{width}}  cure: {check.cure}")
    counts = Counter(check.status for check in checks)
    return "\n".join([*lines, ", ".join(f"{counts[status]} {status}" for status in ORDER)])
