"""Every way marlinctl stops, and the exit code of each.

    MarlinctlError                70   internal: a defect of marlinctl itself
    ├── CheckFailed                1   a check ran and the answer is no
    ├── UsageError                 2   the command line or the recipe asks for something impossible
    ├── BadInput                   3   a checkpoint, a data file or a packed file is not what it must be
    ├── EnvironmentProblem         4   this machine lacks something: a package, a device, a writable folder
    ├── ResourceProblem            5   disk or memory ran out
    ├── NumericalProblem           6   NaN, infinity, or a matrix that cannot be factored
    ├── HubProblem                 7   the hub or the network
    └── Interrupted              130   Ctrl-C (129: SIGHUP, 143: SIGTERM)

An error is written for the person at the terminal: what is wrong, where, and how to mend it. It carries one or more
problems, because a refusal names everything that is wrong at once. Ids are stable; docs/troubleshooting.md explains each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MOST_PROBLEMS = 200  # a config of a stranger can be wrong for each of a hundred thousand layers


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong. `where` names file, tensor, byte, option or line; `fix` says what would be right."""

    what: str
    where: str
    fix: str


class MarlinctlError(Exception):
    """Base of the tree. `error_id` is stable across releases (docs/troubleshooting.md)."""

    exit_code = 70

    def __init__(self, error_id: str, what: str, *, where: str, fix: str, more: Sequence[Problem] = ()) -> None:
        super().__init__(what)
        self.error_id = error_id
        self.problems = (Problem(what, where, fix), *more)

    @classmethod
    def from_problems(cls, error_id: str, problems: Sequence[Problem]) -> MarlinctlError:
        """One error that lists all problems found, up to MOST_PROBLEMS; the first one gives the headline."""
        first, *rest = problems[:MOST_PROBLEMS]
        if len(problems) > MOST_PROBLEMS:
            rest.append(Problem(f"and {len(problems) - MOST_PROBLEMS:,} more problems", first.where, "mend the ones above first"))
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


class Interrupted(MarlinctlError):
    exit_code = 130
