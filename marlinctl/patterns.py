"""Regular expressions from configs and recipes, in time that the expression and the names bound.

Python's `re` goes back: `(a+)+$` takes 2^n steps for n letters, and what is slow is not always seen from outside. Here an expression is
a function from a set of places in a text to the places where a match from there may end, so nothing is tried twice: the work is at most
(nodes of the expression) x (length of the name), times the repetitions that are spelled out. A set is a whole number, one bit for each
place, and a name mostly fits into one machine word. Whether there is a match is all that is told.

    literals  .  [...]  \\d \\w \\s and their opposites  |  groups  *  +  ?  {m,n}, greedy or not
    ^ $ \\A \\Z \\b \\B  (?=...) (?!...) (?<=...) (?<!...)

`re` parses, so the grammar is Python's. What needs more than sets of places is refused by name: references to groups, conditions,
possessive and atomic groups, flags. docs/decisions has why this is no library.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from re import _constants as ops  # type: ignore[attr-defined]  # the parser of the standard library; tests compare every operation
from re import _parser  # type: ignore[attr-defined]
from typing import Any

LONGEST = 2000  # characters of an expression
MOST_GROUPS = 100
MOST_PATTERNS = 5000  # in one list; each takes a fifth of a millisecond to read
MOST_STEPS = 100_000_000  # of all matches of one set of expressions; a step takes a fifth of a microsecond
_CATEGORIES: dict[Any, Callable[[str], bool]] = {
    ops.CATEGORY_DIGIT: str.isdecimal,
    ops.CATEGORY_SPACE: str.isspace,
    ops.CATEGORY_WORD: lambda letter: letter.isalnum() or letter == "_",
}
_OPPOSITES = {
    ops.CATEGORY_NOT_DIGIT: ops.CATEGORY_DIGIT,
    ops.CATEGORY_NOT_SPACE: ops.CATEGORY_SPACE,
    ops.CATEGORY_NOT_WORD: ops.CATEGORY_WORD,
}
_EXACT = re.compile(r"\^((?:[\w-]|\\[^A-Za-z0-9])+)\$", re.ASCII)  # a name written as an expression
_NAMES = {
    "GROUPREF": "a reference to a group",
    "GROUPREF_EXISTS": "a condition on a group",
    "ATOMIC_GROUP": "an atomic group",
    "POSSESSIVE_REPEAT": "a possessive repetition",
}


class TooSlow(ValueError):
    """The steps were used up."""


class Steps:
    """What matches may cost, shared by all expressions of a config."""

    def __init__(self, most: int = MOST_STEPS) -> None:
        self.left = most

    def take(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise TooSlow("matching the regular expressions takes too long")


class _Text:
    """A name, and for each of its letters the places where it stands."""

    __slots__ = ("everywhere", "length", "places", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.length = len(text)
        self.everywhere = (1 << len(text)) - 1
        self.places: dict[str, int] = {}
        bit = 1
        for letter in text:
            self.places[letter] = self.places.get(letter, 0) | bit
            bit <<= 1


_text = lru_cache(maxsize=64)(_Text)  # a name is compared with one expression after the other
_Node = Callable[[_Text, int, Steps], int]  # text, places, budget -> places


class Pattern:
    """One expression. ValueError where it is none, is too long, or holds what is not offered."""

    def __init__(self, expression: str) -> None:
        if len(expression) > LONGEST:
            raise ValueError(f"a regular expression of {len(expression):,} characters is no layer pattern")
        if expression.count("(") > MOST_GROUPS:  # Python's parser and what is made here call themselves once for each level
            raise ValueError(f"a regular expression of more than {MOST_GROUPS} groups is no layer pattern")
        try:
            parsed = _parser.parse(expression)
            if parsed.state.flags & ~re.UNICODE:
                raise _NotOffered("flags")
            self._run = _sequence(parsed)
        except _NotOffered as problem:
            raise ValueError(f"{expression!r} holds {problem}, which a layer pattern cannot have here") from None
        except (re.error, OverflowError) as problem:
            raise ValueError(f"{expression!r} is no regular expression: {problem}") from None
        self.expression = expression
        self._needed = max(_literals(parsed), key=len, default="")

    def match(self, text: str, steps: Steps) -> bool:
        """As `re.match`: from the beginning of the text. ValueError where the steps are used up."""
        steps.take(1)
        return self._needed in text and self._run(_text(text), 1, steps) != 0

    def search(self, text: str, steps: Steps) -> bool:
        """As `re.search`: from anywhere in it."""
        steps.take(1)
        return self._needed in text and self._run(_text(text), (2 << len(text)) - 1, steps) != 0


class Expressions:
    """Many expressions that are asked together, in the order given. Those that spell out one name cost a look-up, however many there are.

    ValueError as of Pattern, for too many of them, and where matching takes too long.
    """

    def __init__(self, expressions: Iterable[str], steps: Steps | None = None) -> None:
        self._exact: dict[str, int] = {}
        self._patterns: list[tuple[int, Pattern]] = []
        self._steps = steps or Steps()
        for place, expression in enumerate(expressions):
            name = _EXACT.fullmatch(expression)
            if name is not None:
                self._exact.setdefault(name[1].replace("\\", ""), place)
                continue
            if len(self._patterns) == MOST_PATTERNS:
                raise ValueError(f"more than {MOST_PATTERNS:,} regular expressions in one list")
            self._patterns.append((place, Pattern(expression)))

    def first(self, name: str) -> int | None:
        """The place of the first expression that matches from the beginning of the name."""
        exact = self._exact.get(name)
        for place, pattern in self._patterns:
            if exact is not None and place > exact:
                break
            if pattern.match(name, self._steps):
                return place
        return exact


class _NotOffered(Exception):
    pass


def _literals(parsed: Iterable[tuple[Any, Any]]) -> Iterator[str]:
    """Runs of letters that every match contains."""
    run = ""
    for op, argument in parsed:
        if op is ops.LITERAL:
            run += chr(argument)
        else:
            yield run
            run = ""
    yield run


def _sequence(parsed: Iterable[tuple[Any, Any]]) -> _Node:
    nodes: list[_Node] = []
    literal = ""
    for op, argument in parsed:
        if op is ops.LITERAL:
            literal += chr(argument)
            continue
        if literal:
            nodes.append(_literal(literal))
            literal = ""
        nodes.append(_node(op, argument))
    if literal:
        nodes.append(_literal(literal))

    def run(text: _Text, places: int, steps: Steps) -> int:
        steps.take(1)
        for node in nodes:
            if not places:
                break
            places = node(text, places, steps)
        return places

    return nodes[0] if len(nodes) == 1 else run


def _literal(literal: str) -> _Node:
    def run(text: _Text, places: int, steps: Steps) -> int:
        steps.take(1)
        if not places & (places - 1):  # one place: mostly so
            return places << len(literal) if text.text.startswith(literal, places.bit_length() - 1) else 0
        for letter in literal:
            places = (places & text.places.get(letter, 0)) << 1
            if not places:
                break
        return places

    return run


def _letter(op: Any, argument: Any) -> Callable[[_Text], int] | None:
    """Where a letter stands that the node takes; None for a node that takes more or less than one letter."""
    if op is ops.LITERAL:
        return lambda text: text.places.get(chr(argument), 0)
    if op is ops.NOT_LITERAL:
        return lambda text: text.everywhere & ~text.places.get(chr(argument), 0)
    if op is ops.ANY:
        return lambda text: text.everywhere & ~text.places.get("\n", 0)
    if op is ops.IN:
        fits = lru_cache(maxsize=1024)(_set(argument))
        return lambda text: sum(there for letter, there in text.places.items() if fits(letter))
    return None


def _node(op: Any, argument: Any) -> _Node:
    letter = _letter(op, argument)
    if letter is not None:
        return _one(letter)
    if op is ops.BRANCH:
        return _either([_sequence(branch) for branch in argument[1]])
    if op is ops.SUBPATTERN:
        _, added, removed, parsed = argument
        if added or removed:
            raise _NotOffered("flags for a group")
        return _sequence(parsed)
    if op in (ops.MAX_REPEAT, ops.MIN_REPEAT):  # the same ends, tried in another order
        least, most, parsed = argument
        letter = _letter(*parsed[0]) if len(parsed) == 1 else None
        if letter is not None and most is ops.MAXREPEAT:
            return _run_of(letter, int(least))
        return _repeated(_sequence(parsed), int(least), None if most is ops.MAXREPEAT else int(most))
    if op is ops.AT:
        return _at(argument)
    if op in (ops.ASSERT, ops.ASSERT_NOT):
        direction, parsed = argument
        width = 0 if direction > 0 else parsed.getwidth()[0]
        return _looking(_sequence(parsed), width, wanted=op is ops.ASSERT, behind=direction < 0)
    if op is ops.FAILURE:  # an empty negative lookahead
        return lambda text, places, steps: 0
    raise _NotOffered(_NAMES.get(str(op), str(op)))


def _one(letter: Callable[[_Text], int]) -> _Node:
    def run(text: _Text, places: int, steps: Steps) -> int:
        steps.take(1)
        return (places & letter(text)) << 1

    return run


def _run_of(letter: Callable[[_Text], int], least: int) -> _Node:
    """`least` letters or more. Reaches are doubled: from where one step is allowed to where 2, 4, 8, ... are."""

    def run(text: _Text, places: int, steps: Steps) -> int:
        allowed = letter(text)
        for _ in range(min(least, text.length + 1)):
            steps.take(1)
            places = (places & allowed) << 1
        reach = 1
        while allowed and places:
            steps.take(1)
            places |= (places & allowed) << reach
            allowed &= allowed >> reach
            reach *= 2
        return places

    return run


def _set(items: Iterable[tuple[Any, Any]]) -> Callable[[str], bool]:
    """The test of [...]."""
    negated, letters, ranges, tests = False, set(), [], []
    for op, argument in items:
        if op is ops.NEGATE:
            negated = True
        elif op is ops.LITERAL:
            letters.add(chr(argument))
        elif op is ops.RANGE:
            ranges.append(argument)
        else:
            tests.append(_category(argument))

    def fits(letter: str) -> bool:
        code = ord(letter)
        inside = letter in letters or any(low <= code <= high for low, high in ranges) or any(test(letter) for test in tests)
        return inside is not negated

    return fits


def _category(category: Any) -> Callable[[str], bool]:
    if category in _CATEGORIES:
        return _CATEGORIES[category]
    opposite = _CATEGORIES[_OPPOSITES[category]]
    return lambda letter: not opposite(letter)


def _either(branches: list[_Node]) -> _Node:
    def run(text: _Text, places: int, steps: Steps) -> int:
        steps.take(len(branches))
        found = 0
        for branch in branches:
            found |= branch(text, places, steps)
        return found

    return run


def _repeated(node: _Node, least: int, most: int | None) -> _Node:
    """Ends after `least` to `most` repetitions. What was begun from once is not begun from again, so it ends by itself."""

    def run(text: _Text, places: int, steps: Steps) -> int:
        for _ in range(least):
            steps.take(1)
            following = node(text, places, steps)
            if following == places:  # more repetitions change nothing
                break
            places = following
            if not places:
                return 0
        reached = new = places
        count = least
        while new and (most is None or count < most):
            steps.take(1)
            new = node(text, new, steps) & ~reached
            reached |= new
            count += 1
        return reached

    return run


def _at(where: Any) -> _Node:
    is_word = _CATEGORIES[ops.CATEGORY_WORD]

    def run(text: _Text, places: int, steps: Steps) -> int:
        steps.take(1)
        end = 1 << text.length
        if where in (ops.AT_BEGINNING, ops.AT_BEGINNING_STRING):
            return places & 1
        if where is ops.AT_END:  # $ also holds before a newline at the very end
            return places & (end | (end >> 1 if text.text.endswith("\n") else 0))
        if where is ops.AT_END_STRING:
            return places & end
        words = sum(there for letter, there in text.places.items() if is_word(letter))
        boundaries = words ^ (words << 1)
        return places & (boundaries if where is ops.AT_BOUNDARY else ~boundaries)

    return run


def _looking(node: _Node, width: int, *, wanted: bool, behind: bool) -> _Node:
    """(?=...) and its kin: each place is asked by itself. Behind, `width` is that of the expression, which `re` wants to be fixed."""

    def holds(text: _Text, place: int, steps: Steps) -> bool:
        if place < width:
            return False
        ends = node(text, 1 << (place - width), steps)
        return bool(ends >> place & 1) if behind else ends != 0

    def run(text: _Text, places: int, steps: Steps) -> int:
        steps.take(places.bit_count())
        return sum(1 << place for place in range(places.bit_length()) if places >> place & 1 and holds(text, place, steps) is wanted)

    return run
