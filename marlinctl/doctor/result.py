"""One line of the doctor's answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail"]
ORDER: tuple[Status, ...] = ("ok", "warn", "fail")


@dataclass(frozen=True, slots=True)
class Check:
    """`warn`: marlinctl works, with less or not everywhere. `fail`: something it needs is missing or gives wrong results."""

    name: str
    status: Status
    found: str
    cure: str = ""  # what would make it ok; empty only where it is

    def __post_init__(self) -> None:
        if self.status not in ORDER or (self.status == "ok") == bool(self.cure):
            raise ValueError(f"{self.name}: {self.status!r} with the cure {self.cure!r}; what is not ok has one, and nothing else")


def worst(checks: Sequence[Check]) -> Status:
    return max((check.status for check in checks), key=ORDER.index, default="ok")
