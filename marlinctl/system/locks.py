"""Locks between processes: a file that one of them holds. Who dies lets go of it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from marlinctl.errors import ResourceProblem


class Held(Exception):
    """Another process holds the lock."""


@contextmanager
def lock(path: Path, *, wait: bool) -> Iterator[None]:
    """Hold a lock, whose file is made where there is none. Without `wait`: Held where another process has it.

    ResourceProblem E503 for what cannot be locked: a folder, a link, a file system without locks.
    """
    from filelock import FileLock, Timeout

    refuse_unusable(path)
    taken = FileLock(path)
    try:
        taken.acquire(timeout=-1 if wait else 0)
    except Timeout:
        raise Held from None
    except OSError as problem:
        raise _unusable(path, problem.strerror or str(problem)) from problem
    try:
        yield
    finally:
        taken.release()


def refuse_unusable(path: Path) -> None:
    """ResourceProblem E503 for a lock file that is a folder, a link or the like."""
    if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
        raise _unusable(path, "it is not a regular file")


def _unusable(path: Path, why: str) -> ResourceProblem:
    return ResourceProblem("E503", f"the lock cannot be taken: {why}", where=str(path), fix="move it away, or name another place")
