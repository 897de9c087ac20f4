"""marlinctl/doctor/result.py: one line, and which of several decides."""

from __future__ import annotations

import pytest

from marlinctl.doctor.result import Check, Status, worst


@pytest.mark.parametrize(("status", "cure"), [("ok", "rename it"), ("warn", ""), ("fail", ""), ("bad", "rename it")])
def test_what_is_not_ok_has_a_cure(status: Status, cure: str) -> None:
    """If this failed, somebody would be told that a machine is sick and not what helps."""
    with pytest.raises(ValueError, match="cure"):
        Check("disk", status, "found", cure)


def test_the_worst_decides() -> None:
    """If this failed, the exit code would follow the last line, or the alphabet, in which `warn` comes after `fail`."""
    ok, warn, fail = Check("a", "ok", ""), Check("b", "warn", "", "c"), Check("d", "fail", "", "e")
    assert [worst(found) for found in ([], [ok], [warn, ok], [fail, warn, ok])] == ["ok", "ok", "warn", "fail"]
