"""marlinctl/errors.py: the tree of errors, its exit codes, and ids that agree with both."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import marlinctl
from marlinctl import errors
from marlinctl.errors import BadInput, CheckFailed, GateRefused, MarlinctlError, Problem, UsageError, exit_code, number_of

PACKAGE = Path(marlinctl.__file__).parent
CLASSES = {cls.__name__: cls for cls in MarlinctlError.__subclasses__()}
ALL: dict[str, type[MarlinctlError]] = {"MarlinctlError": MarlinctlError, "GateRefused": GateRefused, **CLASSES}


def ids_of_another_class(source: str) -> Iterator[str]:
    """Errors that are made with an id whose hundreds belong to another class."""
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant)):
            continue
        error_id = str(node.args[0].value)
        made = node.func.value if isinstance(node.func, ast.Attribute) and node.func.attr == "from_problems" else node.func
        name = made.attr if isinstance(made, ast.Attribute) else made.id if isinstance(made, ast.Name) else ""
        if name in ALL and (not re.fullmatch(r"E\d{3}", error_id) or exit_code(error_id) != ALL[name].exit_code):
            yield f"line {node.lineno}: {name} {error_id}"


def test_the_docstring_draws_the_tree_that_is_there() -> None:
    """The drawing at the top is what people read; it must not lie."""
    drawn = dict(re.findall(r"[├└]── (\w+)\s+(\d+)", errors.__doc__ or ""))
    assert {name: int(code) for name, code in drawn.items()} == {name: cls.exit_code for name, cls in CLASSES.items()}
    assert MarlinctlError.exit_code == 70


def test_several_problems_make_one_error() -> None:
    """A refusal names everything at once; the first problem is the headline."""
    problems = [Problem("a", "here", "fix a"), Problem("b", "there", "fix b")]
    error = BadInput.from_problems("E301", problems)
    assert type(error) is BadInput
    assert str(error) == "a" and error.problems == tuple(problems) and error.error_id == "E301"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_ids_agree_with_their_class(path: Path) -> None:
    """E3xx is exit code 3 and so on: a person who sees the id knows the kind, and scripts the code."""
    assert list(ids_of_another_class(path.read_text("utf-8"))) == []


def test_an_id_of_another_class_is_found() -> None:
    """Broken: the test above passes whatever is raised."""
    source = 'BadInput("E301", "w")\nraise errors.UsageError.from_problems("E301", [])\nGateRefused("E215", "w")\nBadInput("301", "w")'
    assert list(ids_of_another_class(source)) == ["line 2: UsageError E301", "line 3: GateRefused E215", "line 4: BadInput 301"]


@pytest.mark.parametrize(("kind", "error_id"), [(UsageError, "E301"), (BadInput, "E900"), (CheckFailed, "E202"), (MarlinctlError, "E701")])
def test_an_id_of_another_class_cannot_be_raised(kind: type[MarlinctlError], error_id: str) -> None:
    """Ids that come out of a table or a variable would end with the exit code of another kind."""
    with pytest.raises(ValueError, match=f"{error_id} is not an id of {kind.__name__}"):
        kind(error_id, "w", where="p", fix="f")


def test_usage_error_is_what_click_calls_usage() -> None:
    """Shell scripts know 2 as wrong usage."""
    assert UsageError.exit_code == 2


def test_one_is_not_many() -> None:
    """If messages did not tell one from many, they would read `1 tensors have`."""
    assert number_of(1, "tensor") == "1 tensor" and number_of(0, "tensor") == "0 tensors" and number_of(1200, "tensor") == "1,200 tensors"
    assert number_of(1, "weight is", "weights are") == "1 weight is" and number_of(2, "weight is", "weights are") == "2 weights are"
