"""Work in a thread beside the rest: its result, its errors, and its end."""

from __future__ import annotations

import threading

import pytest

from marlinctl.errors import BadInput
from marlinctl.system.background import begun


def test_the_result_of_the_work_arrives() -> None:
    with begun(lambda over: 7) as result:
        assert result() == 7


def test_what_the_work_raises_is_raised_where_its_result_is_wanted() -> None:
    """If this failed, damaged weights that a thread found would be taken for sound ones."""

    def refuse(over: threading.Event) -> None:
        raise BadInput("E301", "cut off", where="w", fix="f")

    with pytest.raises(BadInput), begun(refuse) as result:
        result()


def test_an_error_beside_the_work_ends_it() -> None:
    """If this failed, a wrong calibration text would be refused only after all weights were read."""
    ended = []

    def until_over(over: threading.Event) -> None:
        ended.append(over.wait(20))

    with pytest.raises(ZeroDivisionError), begun(until_over):
        raise ZeroDivisionError
    assert ended == [True]
