"""Every way marlinctl stops, and the exit code of each.

    MarlinctlError                70   internal: a defect of marlinctl itself
    ├── CheckFailed                1   a check ran and the answer is no
    ├── UsageError                 2   the command line or the recipe asks for something impossible
    ├── BadInput                   3   a checkpoint, a data file or a packed file is not what it must be
    ├── EnvironmentProblem         4   this machine lacks something: a package, a device, a writable folder
    ├── ResourceProblem            5   disk or memory ran out
    ├── NumericalProblem           6   NaN, infinity, or a matrix that cannot be factored
    └── HubProblem                 7   the hub or the network

An error is written for the person at the terminal: what is wrong, where, and how to fix it. It carries one or more problems, because a
refusal names everything that is wrong at once. Its id says the kind of problem; system/troubleshooting.py explains each, and the page
docs/troubleshooting.md is written from that. Ids are stable. E3xx belongs to exit code 3, and so on; E9xx to 70.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MOST_PROBLEMS = 200  # a config of a stranger can be wrong for each of a hundred thousand layers


def number_of(count: int, one: str, many: str = "") -> str:
    """In words of a message: `1 tensor has`, `1,200 tensors have`. many: where it is not `one` and an s."""
    return f"{count:,} {one if count == 1 else many or f'{one}s'}"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong. `where` names file, tensor, byte, option or line; `fix` says what would be right."""

    what: str
    where: str
    fix: str


def exit_code(error_id: str) -> int:
    """The exit code that the hundreds of an id stand for."""
    hundreds = int(error_id[1])
    return MarlinctlError.exit_code if hundreds == 9 else hundreds


class MarlinctlError(Exception):
    """Base of the tree. `error_id` is stable across releases (docs/troubleshooting.md); ValueError for one of another class."""

    exit_code = 70

    def __init__(self, error_id: str, what: str, *, where: str, fix: str, more: Sequence[Problem] = ()) -> None:
        if exit_code(error_id) != self.exit_code:
            raise ValueError(f"{error_id} is not an id of {type(self).__name__}, which ends with {self.exit_code}")
        super().__init__(what)
        self.error_id = error_id
        self.problems = (Problem(what, where, fix), *more)

    @classmethod
    def from_problems(cls, error_id: str, problems: Sequence[Problem]) -> MarlinctlError:
        """One error that lists all problems found, each once, up to MOST_PROBLEMS; the first one gives the headline."""
        problems = list(dict.fromkeys(problems))  # each once
        first, *rest = problems[:MOST_PROBLEMS]
        if len(problems) > MOST_PROBLEMS:
            rest.append(Problem(f"and {number_of(len(problems) - MOST_PROBLEMS, 'more problem')}", first.where, "fix the ones above first"))
        return cls(error_id, first.what, where=first.where, fix=first.fix, more=rest)


class CheckFailed(MarlinctlError):
    exit_code = 1


class GateRefused(CheckFailed):
    """The result is worse than the quality gate allows; it is finished and kept, but not published."""


class UsageError(MarlinctlError):
    exit_code = 2


class BadInput(MarlinctlError):
    exit_code = 3


class EnvironmentProblem(MarlinctlError):
    exit_code = 4


class ResourceProblem(MarlinctlError):
    exit_code = 5


class NumericalProblem(MarlinctlError):
    exit_code = 6


class HubProblem(MarlinctlError):
    exit_code = 7
