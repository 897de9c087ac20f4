"""Our errors as a server shows them: the text of an exception, mostly below a traceback, so it holds all that a terminal would show."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from marlinctl.errors import MarlinctlError


class Refused(RuntimeError):
    """Not a ValueError: pydantic, in vLLM, would wrap it and print all of the engine's arguments."""


def text(error: MarlinctlError) -> str:
    lines = [f"marlinctl {error.error_id}"]
    for problem in error.problems:
        lines += [f"  error: {problem.what}", f"    where: {problem.where}", f"    fix: {problem.fix}"]
    return "\n".join([*lines, f"  docs: marlinctl explain {error.error_id}"])


@contextmanager
def as_refusals() -> Iterator[None]:
    """Refused instead of any MarlinctlError."""
    try:
        yield
    except MarlinctlError as error:
        raise Refused(text(error)) from None
