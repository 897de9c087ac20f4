"""`marlinctl explain`: the pages of the errors, at a terminal without docs/."""

from __future__ import annotations

import json

import pytest

from marlinctl import cli
from marlinctl.system.troubleshooting import CATALOG


def test_every_error_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    """A wheel holds no docs: the last line of an error would lead nowhere."""
    for entry in CATALOG:
        assert cli.main(["explain", entry.error_id.lower()]) == 0
        page = capsys.readouterr().out
        assert page.startswith(f"{entry.error_id} (exit code ") and "](" not in page
        prose = page.partition("```")[0]
        assert all(len(line) <= 80 for line in prose.splitlines()), entry.error_id


def test_the_list_has_all_ids_with_their_titles(capsys: pytest.CaptureFixture[str]) -> None:
    """Who looks for an error by what it says would not find it."""
    assert cli.main(["explain"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{entry.error_id}  {entry.title}" for entry in CATALOG]
    assert cli.main(["explain", "E255", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["exit_code"] == 2


def test_a_former_id_is_explained_by_its_successor(capsys: pytest.CaptureFixture[str]) -> None:
    """An id in the log of an earlier version would mean nothing."""
    assert cli.main(["explain", "E204"]) == 0
    assert capsys.readouterr().out.startswith("E204 of an earlier version is E244 now.\n")


def test_an_unknown_id_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    """A typing error would end in a list of sixty ids."""
    assert cli.main(["explain", "E998"]) == 2
    assert "nearest: E9" in capsys.readouterr().err
