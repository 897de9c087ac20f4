"""Per-layer rules: which linears are quantized, with which group size and how many bits.

A pattern is a shell glob that is held against a linear's full name and against every tail of it that begins after a dot: `k_proj` and
`*.k_proj` mean all k_proj, `layers.0.*` the first block. `re:EXPRESSION` is a regular expression searched in the full name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase

from marlinctl.checkpoint.formats.base import EXPERTS
from marlinctl.errors import Problem, UsageError, number_of
from marlinctl.models.architectures import Architecture, LinearSpec
from marlinctl.quantize.scheme import INT4, Grid
from marlinctl.system.patterns import Time, compiled

GROUP_SIZES = (128, 64, 32, -1)
_MOST_PROBLEMS = 20
_MOST_LIKELY = 1000  # names among which the nearest is looked for: 20 us each


@dataclass(frozen=True, slots=True)
class Plan:
    """What happens to each linear. group_sizes: quantized linears -> group size, -1 for one scale per row."""

    group_sizes: Mapping[str, int]
    kept: Mapping[str, str]  # linears that stay 16-bit -> reason
    head: LinearSpec | None  # the output head, when it is quantized too; a tied one gets a weight of its own
    idle: tuple[str, ...] = ()  # patterns of `skip` that name the output head alone, where it stays 16-bit anyway
    grids: Mapping[str, Grid] = field(default_factory=dict)  # of the quantized linears whose codes are not INT4

    def grid(self, name: str) -> Grid:
        return self.grids.get(name, INT4)


def plan(
    architecture: Architecture, *, group_size: int, skip: Sequence[str], overrides: Mapping[str, int], include: Sequence[str],
    grid: Grid = INT4, grids: Mapping[str, Grid] | None = None,
) -> Plan:  # fmt: skip
    """Resolve the rules against a model. All problems at once: UsageError E255 (patterns, group sizes).

    overrides: pattern -> group size. grid: of all linears; grids: pattern -> another one. Linears whose activations are rounded have one
    scale per row, whatever the group size of all linears is.
    """
    grids = grids or {}
    linears = dict(architecture.linears)
    head = _head(architecture, include)
    if head is not None:
        linears[head.name] = head
    names = _Names(linears)
    problems: list[Problem] = []
    sixteen_bit = _Names(spec.name for spec in (architecture.head, architecture.tied) if spec is not None and head is None)
    idle = tuple(pattern for pattern in dict.fromkeys(skip) if not names.matching(pattern) and sixteen_bit.matching(pattern))
    for pattern in dict.fromkeys((*skip, *overrides, *grids)):
        if pattern not in idle and not names.matching(pattern):
            if len(problems) == _MOST_PROBLEMS:
                problems.append(Problem("and maybe more patterns", "--skip / --override", "fix the ones above first"))
                break
            likely = {*list(linears)[:_MOST_LIKELY], *(name.rpartition(".")[2] for name in linears)}
            near = get_close_matches(pattern[:200], likely, n=3, cutoff=0.3) or list(linears)[:3]
            problems.append(
                Problem(f"the pattern {pattern[:200]!r} matches no linear", "--skip / --override", f"nearest names: {', '.join(near)}")
            )
    if problems:
        raise UsageError.from_problems("E255", problems)

    kept = {name: f"--skip {pattern}" for pattern in skip for name in names.matching(pattern)}
    sizes = dict.fromkeys((name for name in linears if name not in kept), group_size)
    asked: dict[str, tuple[str, int]] = {}  # linears that a rule names -> its pattern and group size
    for pattern, size in overrides.items():
        asked |= dict.fromkeys((name for name in names.matching(pattern) if name not in kept), (pattern, size))
    sizes |= {name: size for name, (_, size) in asked.items()}
    if not sizes:
        raise UsageError("E255", "every linear is skipped; nothing would be quantized", where="--skip", fix="skip fewer linears")
    chosen = dict.fromkeys(sizes, grid)
    for pattern, other in grids.items():
        chosen |= dict.fromkeys((name for name in names.matching(pattern) if name in sizes), other)
    rounding = {name: other for name, other in chosen.items() if other.rounds_activations}
    _refuse_rounding(rounding, asked)
    sizes |= dict.fromkeys(rounding, -1)
    _require_divisible(linears, sizes)
    for name, spec in architecture.linears.items():
        if name not in sizes and name not in kept:
            kept[name] = f"K={spec.in_features}"
    if architecture.head is not None and head is None:
        kept[architecture.head.name] = "output head (--include lm_head)"
    return Plan(sizes, kept, head, idle, {name: grid for name, grid in chosen.items() if grid != INT4})


class _Names:
    """The linears' names, asked for what a pattern means. A pattern without a wildcard costs a look-up, however many there are."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = list(names)
        self._tails: dict[str, list[str]] = {}
        for name in self._names:
            for tail in _tails(name):
                self._tails.setdefault(tail, []).append(name)
        self._time = Time()
        self._known: dict[str, list[str]] = {}

    def matching(self, pattern: str) -> list[str]:
        """UsageError E255 for an expression that is none, or for patterns that take too long."""
        if pattern not in self._known:
            try:
                self._known[pattern] = self._found(pattern)
            except ValueError as error:
                fix = "docs/recipes.md has what a pattern may hold"
                what = f"the pattern {pattern[:200]!r} cannot be used: {error}"
                raise UsageError("E255", what, where="--skip / --override", fix=fix) from error
        return self._known[pattern]

    def _found(self, pattern: str) -> list[str]:
        if pattern.startswith("re:"):
            search = compiled(pattern[3:]).search
            return [name for name in self._names if self._time.matches(search, name)]
        if not any(letter in pattern for letter in "*?["):
            return self._tails.get(pattern, [])
        hits = {name for tail, names in self._tails.items() if fnmatchcase(tail, pattern) for name in names}
        return [name for name in self._names if name in hits]


def _tails(name: str) -> Iterable[str]:
    parts = name.split(".")
    return (".".join(parts[i:]) for i in range(len(parts)))


def _head(architecture: Architecture, include: Sequence[str]) -> LinearSpec | None:
    for name in include:
        if name != "lm_head":
            fix = "lm_head is the only one there is; no runtime loads 4-bit embeddings"
            raise UsageError("E255", f"{name!r} cannot be quantized", where="--include", fix=fix)
        head = architecture.head or architecture.tied
        if head is None:
            what = "the model has no linear that is called lm_head"
            raise UsageError("E255", what, where="--include lm_head", fix="leave it out: the output head stays 16-bit")
        if head.name.rpartition(".")[2] != name:
            what = f"the output head of this checkpoint is called {head.name}, and programs load a packed one as {name} alone"
            raise UsageError("E255", what, where="--include lm_head", fix="leave it out: the output head stays 16-bit")
    return (architecture.head or architecture.tied) if include else None


def _refuse_rounding(rounding: Mapping[str, Grid], asked: Mapping[str, tuple[str, int]]) -> None:
    """UsageError E255 where activations are to be rounded beside groups of weights, or of experts."""
    problems = []
    for name, grid in rounding.items():
        pattern, size = asked.get(name, ("", -1))
        if size != -1:
            what = f"{name} has {grid.activations} activations and so one scale per row, and a rule gives it group size {size}"
            problems.append(Problem(what, f"--override {pattern}=group_size:{size}", "leave one of the two rules out for this linear"))
        elif EXPERTS in name:
            what = f"{name} is an expert, and its activations stay 16-bit: transformers fuses experts, and does not round what enters them"
            problems.append(
                Problem(what, f"--override ...=activations:{grid.activations}", "--override 're:experts=bits:8' without activations")
            )
    if problems:
        raise UsageError.from_problems("E255", problems[:_MOST_PROBLEMS])


def _require_divisible(linears: Mapping[str, LinearSpec], sizes: Mapping[str, int]) -> None:
    bad = {name: size for name, size in sizes.items() if size != -1 and linears[name].in_features % size}
    if not bad:
        return
    common = [s for s in GROUP_SIZES if s == -1 or all(linears[name].in_features % s == 0 for name in sizes)]
    listed: dict[tuple[int, int], list[str]] = {}
    for name, size in bad.items():
        listed.setdefault((linears[name].in_features, size), []).append(name)
    raise UsageError.from_problems(
        "E255",
        [
            Problem(
                f"K={k} is not a multiple of group size {size} in {number_of(len(names), 'linear')}",
                f"{names[0]}{' ... ' + names[-1] if len(names) > 1 else ''}",
                f"--group-size {' or '.join(str(s) for s in common)} fits every layer, or --override / --skip these",
            )
            for (k, size), names in listed.items()
        ],
    )
