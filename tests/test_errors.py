"""marlinctl/errors.py: the tree of errors, its exit codes, and ids that agree with both."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import marlinctl
from marlinctl import errors
from marlinctl.errors import BadInput, MarlinctlError, Problem, UsageError

PACKAGE = Path(marlinctl.__file__).parent
CLASSES = {cls.__name__: cls for cls in MarlinctlError.__subclasses__()}


def test_the_docstring_draws_the_tree_that_is_there() -> None:
    """The drawing at the top is what people read; it must not lie."""
    drawn = dict(re.findall(r"[├└]── (\w+)\s+(\d+)", errors.__doc__ or ""))
    assert {name: int(code) for name, code in drawn.items()} == {name: cls.exit_code for name, cls in CLASSES.items()}
    assert MarlinctlError.exit_code == 70


def test_several_problems_make_one_error() -> None:
    """A refusal names everything at once; the first problem is the headline."""
    problems = [Problem("a", "here", "mend a"), Problem("b", "there", "mend b")]
    error = BadInput.from_problems("E301", problems)
    assert type(error) is BadInput
    assert str(error) == "a" and error.problems == tuple(problems) and error.error_id == "E301"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_ids_agree_with_their_class(path: Path) -> None:
    """E3xx is exit code 3 and so on: a person who sees the id knows the kind, and scripts the code."""
    raised = re.findall(r"\b(" + "|".join(CLASSES) + r")(?:\.from_problems)?\(\s*\"E(\d)\d\d\"", path.read_text())
    wrong = [(name, digit) for name, digit in raised if CLASSES[name].exit_code != int(digit)]
    assert not wrong


def test_usage_error_is_what_click_calls_usage() -> None:
    """Shell scripts know 2 as wrong usage."""
    assert UsageError.exit_code == 2
