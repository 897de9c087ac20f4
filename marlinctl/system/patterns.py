r"""Regular expressions of configs and recipes, matched in bounded time.

`re` may take 2^n steps for n letters: `(a+)+$` in a downloaded config.json would hold `inspect` forever. The package `regex` has the same
grammar and can be given a time for each match. Every set of expressions has SECONDS of processor time for all of its matches.

Only what `re` accepts is accepted: that is what the runtimes compile.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import regex

LONGEST = 2000  # characters of an expression
MOST_GROUPS = 100  # the parsers recurse once for each level
MOST_PATTERNS = 5000  # in one list; compiling one takes about a millisecond
SECONDS = 20.0  # of processor time, for all matches of one set; 20 expressions on 30,000 names take about 4
_EXACT = re.compile(r"\^((?:[\w-]|\\[^A-Za-z0-9])+)\$", re.ASCII)  # a name written as an expression


class Time:
    """Processor time that matches may take, shared by all expressions of a config or a recipe."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self.left = seconds

    def matches(self, method: Callable[..., Any], name: str) -> bool:
        """`method(name)` of a compiled expression, such as `match`. ValueError where the time is used up."""
        begun = time.process_time()
        try:
            found = method(name, timeout=self.left) is not None
        except TimeoutError:
            raise ValueError("matching the regular expressions takes too long") from None
        self.left = max(self.left - (time.process_time() - begun), 1e-6)  # a timeout of 0 would be none
        return found


def compiled(expression: str) -> regex.Pattern[str]:
    """ValueError for an expression that is none, or that is too long."""
    import regex

    if len(expression) > LONGEST:
        raise ValueError(f"a regular expression of {len(expression):,} characters is too long for a layer pattern")
    if expression.count("(") > MOST_GROUPS:
        raise ValueError(f"a regular expression of more than {MOST_GROUPS} groups is too complex for a layer pattern")
    try:
        re.compile(expression)
        return regex.compile(expression)
    except (re.error, regex.error, OverflowError, RecursionError) as problem:
        raise ValueError(f"{expression!r} is not a regular expression: {problem}") from None


class Expressions:
    """Many expressions that are asked together, in the order given. Those that spell out one name cost a look-up, however many there are.

    ValueError as of `compiled`, for too many of them, and where matching takes too long.
    """

    def __init__(self, expressions: Iterable[str]) -> None:
        self._exact: dict[str, int] = {}
        self._patterns: list[tuple[int, regex.Pattern[str]]] = []
        self._time = Time()
        for place, expression in enumerate(expressions):
            name = _EXACT.fullmatch(expression)
            if name is not None:
                self._exact.setdefault(name[1].replace("\\", ""), place)
                continue
            if len(self._patterns) == MOST_PATTERNS:
                raise ValueError(f"more than {MOST_PATTERNS:,} regular expressions in one list")
            self._patterns.append((place, compiled(expression)))

    def first(self, name: str) -> int | None:
        """The place of the first expression that matches from the beginning of the name, as `re.match` does."""
        exact = self._exact.get(name)
        for place, pattern in self._patterns:
            if exact is not None and place > exact:
                break
            if self._time.matches(pattern.match, name):
                return place
        return exact
