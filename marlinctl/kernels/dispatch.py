"""Which kernel multiplies: a table of measurements, read from dispatch.json beside this file.

    architecture, dense or 2:4 ─► table ─► nearest shape (N, K) ─► row of M ─► configuration, CTAs per multiprocessor, how they share tiles
                                    │
                                    └──── M >= dequantize_from: one dense weight in memory, and torch.matmul

    {"schema_version": 2,
     "architectures": {
       "sm_90a": {
         "dense": {"measured": {"gpu": "NVIDIA H200", "torch": "2.11.0+cu130", "date": "2026-11-21", "group_size": 128, "dtype": "float16"},
                   "dequantize_from": 192,
                   "choices": [[1, 4096, 4096, "m8n128k512x5/1 even"], ..]},     M, N, K, and a choice by its name
         "sparse": {..}}}}

A file of the same form in the folder of compiled kernels, which is the user's, goes first, table by table; jit.py says whose it must be.
Shapes are compared by the ratio of their sizes: |log N/N'| + |log K/K'|. Of a shape's rows the first with M tokens or more counts; but a
row for fewer whose tile holds all M goes before one for more, as a tile costs the same however full it is. Above the last row the last row
counts. A row may say "dequantize" too: for small matrices that pays earlier than for large ones, and dequantize_from is for all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import log
from pathlib import Path
from typing import Any

from marlinctl.kernels import jit
from marlinctl.kernels.configurations import (
    A8_FACTORED_SM80,
    A8_FACTORED_SM90,
    A8_SM80,
    A8_SM90,
    DENSE,
    DENSE_SM90,
    SHARINGS,
    SPARSE,
    SPARSE_A8_FACTORED_SM90,
    SPARSE_SM90,
    Configuration,
    Sharing,
)
from marlinctl.quantize.scheme import Rounding

OWN = "dispatch.json"  # in the folder of compiled kernels
PACKAGED = Path(__file__).parent / "dispatch.json"
SCHEMA_VERSION = 2
KINDS = ("dense", "sparse")
FACTORED, SPARSE_FACTORED = "factored", "sparse-factored"
# More kinds, of dense weights whose activations may be rounded to int8: with a scale for each token or for each 128 of K, and with a scale
# for each token of weights that are factored too (factored.py). Of 2:4 weights there is the last alone.
ROUNDED: Mapping[Rounding, str] = {"int8": "rounded", "int8-128": "rounded-128"}
SIXTEEN_BIT = "16-bit"  # the choice of a row of those kinds where 16-bit activations are as fast: what `dense` says counts
DEQUANTIZE = "dequantize"  # a choice of the two above, and the column of a measurement, for a dense weight and torch.matmul

_ALL_KINDS = (*KINDS, *ROUNDED.values(), FACTORED, SPARSE_FACTORED)

# Where nothing is measured. A kernel of mma.sync multiplies at most at about 280 TFLOP/s on an H200 (2:4: 390) and torch.matmul at 700,
# but dequantizing costs 2.5 bytes for each weight: equal at about M = 170 (2:4: 330). On GPUs whose tensor cores do not leave
# mma.sync behind, what is left is that every 64 tokens decode the weights anew. NOTE: reasoned, not measured.
DEQUANTIZE_FROM = {"sm_90a": {"dense": 192, "sparse": 320}}
DEQUANTIZE_FROM_ELSEWHERE = {"dense": 512, "sparse": 1024}
# The same of 8-bit activations, where their kernels have no measurements: the fewest rows for which they are rounded. 16-bit products wait
# for memory up to M = rate / (4 x bandwidth): by data sheets 19 (RTX 3090), 38 (A100), 105 (L40S) and 52 (H200), where 8 bits were
# measured to pay from 32 or 48 rows on for large weights, and from 192 or 384 for small ones. NOTE: reasoned, not measured. Blackwell
# keeps 16 bits: nothing of ours has run there.
EIGHT_BITS_FROM = {"sm_80": 64, "sm_86": 64, "sm_89": 64}
LARGE = 4096  # M at which a kernel that still wins is taken to win for ever


@dataclass(frozen=True, slots=True)
class Choice:
    """A kernel, how many of its CTAs each multiprocessor is given at most, and how they share output tiles."""

    configuration: Configuration
    per_multiprocessor: int
    sharing: Sharing = "striped"

    @property
    def name(self) -> str:
        """Such as m16n128k256x3/2, or m16n128k256x3/2 even."""
        return f"{self.configuration.name}/{self.per_multiprocessor}" + ("" if self.sharing == "striped" else f" {self.sharing}")


@dataclass(frozen=True, slots=True)
class Row:
    m: int
    n: int
    k: int
    choice: Choice | None  # None: SIXTEEN_BIT, and of `dense` and `sparse` DEQUANTIZE


@dataclass(frozen=True, slots=True)
class Table:
    """What was measured of one kind of weights on one architecture."""

    dequantize_from: int | None  # the smallest M for which a dense weight pays; None: never
    rows: tuple[Row, ...]

    def choose(self, m: int, n: int, k: int) -> Choice | None:
        def distance(shape: tuple[int, int]) -> float:
            return abs(log(n / shape[0])) + abs(log(k / shape[1]))

        nearest = min(sorted({(row.n, row.k) for row in self.rows}), key=distance)
        rows = sorted((row for row in self.rows if (row.n, row.k) == nearest), key=lambda row: row.m)
        if (measured := next((row for row in rows if row.m == m), None)) is not None:
            return measured.choice
        for row in rows:
            if row.m >= m or (row.choice is not None and row.choice.configuration.tokens >= m):
                return row.choice
        return rows[-1].choice


@lru_cache(maxsize=4096)
def choose(architecture: str, sparse: bool, m: int, n: int, k: int, rounding: Rounding = "none", factored: bool = False) -> Choice | None:
    """How to multiply M rows with a weight [N, K]; None is: dequantize it and multiply with torch.matmul.

    rounding: of activations, where it is allowed. Whether they are rounded is for the choice to say: 16 bits are as fast for few rows, and
    all there is for Blackwell, and for 2:4 weights that are not factored or whose kernel was not measured. factored: the weights are. It
    counts beside "int8" alone.
    """
    if (table := _rounded_table(architecture, sparse, rounding, factored)) is not None:
        choice = table.choose(m, n, k)
        if choice is not None:
            return choice
    kind = KINDS[sparse]
    table = tables().get((architecture, kind)) or reasoned(architecture, kind)
    if table.dequantize_from is not None and m >= table.dequantize_from:
        return None
    return table.choose(m, n, k)


def _rounded_table(architecture: str, sparse: bool, rounding: Rounding, factored: bool) -> Table | None:
    if factored and rounding == "int8":
        kind = SPARSE_FACTORED if sparse else FACTORED
    elif sparse or rounding not in ROUNDED:
        return None
    else:
        kind = ROUNDED[rounding]
    if (table := tables().get((architecture, kind))) is not None or sparse:
        return table
    return reasoned_rounded(architecture, kind) if architecture in EIGHT_BITS_FROM else None


def choices(architecture: str, sparse: bool, n: int, k: int, rounding: Rounding = "none", factored: bool = False) -> set[Choice | None]:
    """Everything that `choose` may answer for a weight [N, K], whatever M is: what has to be compiled before a server may begin."""
    starts = _starts(architecture, sparse, rounding, factored)
    return {choose(architecture, sparse, m, n, k, rounding, factored) for m in starts}


def fewest_rounded(architecture: str, n: int, k: int, rounding: Rounding, factored: bool = False, sparse: bool = False) -> int | None:
    """The fewest rows whose activations are multiplied in 8 bits, where that is allowed, by a weight [N, K]; None: no number is."""
    for m in sorted(_starts(architecture, sparse, rounding, factored)):
        choice = choose(architecture, sparse, m, n, k, rounding, factored)
        if choice is not None and choice.configuration.int8:
            return m
    return None


def _starts(architecture: str, sparse: bool, rounding: Rounding, factored: bool) -> set[int]:
    """Every M from which on `choose` may answer something else: behind a row's M and behind its tile, and where dequantizing begins."""
    kind = KINDS[sparse]
    used = [tables().get((architecture, kind)) or reasoned(architecture, kind)]
    if (rounded := _rounded_table(architecture, sparse, rounding, factored)) is not None:
        used.append(rounded)
    after = {1 + row.m for table in used for row in table.rows}
    after |= {1 + row.choice.configuration.tokens for table in used for row in table.rows if row.choice is not None}
    return {1, *after, *(table.dequantize_from for table in used if table.dequantize_from is not None)}


@lru_cache(maxsize=1)
def tables() -> dict[tuple[str, str], Table]:
    """What was measured, by architecture and kind, as the user's file and the packaged one have it."""
    folder = jit.default_folder()
    own = jit.read_own(folder, OWN)
    return {**read(PACKAGED), **({} if own is None else parse(own, folder / OWN))}


def reasoned(architecture: str, kind: str) -> Table:
    """For an architecture without measurements, Blackwell's among them: the first configuration for so many tokens that fits."""
    rows = tuple(Row(tokens, 4096, 4096, Choice(c, c.ctas)) for tokens, c in _first_of_each(architecture, kind))
    return Table(DEQUANTIZE_FROM.get(architecture, DEQUANTIZE_FROM_ELSEWHERE)[kind], rows)


def reasoned_rounded(architecture: str, kind: str) -> Table:
    """The same of 8-bit activations, for one of EIGHT_BITS_FROM. No dense weight is made: its product would have 16 bits."""
    start = EIGHT_BITS_FROM[architecture]
    found = [(tokens, c) for tokens, c in _first_of_each(architecture, kind) if tokens >= start]
    return Table(None, (Row(start - 1, 4096, 4096, None), *(Row(tokens, 4096, 4096, Choice(c, c.ctas)) for tokens, c in found)))


def _first_of_each(architecture: str, kind: str) -> list[tuple[int, Configuration]]:
    """By numbers of tokens."""
    fitting = [c for c in configurations(kind) if c.fits(architecture)]
    return sorted({c.tokens: c for c in reversed(fitting)}.items())


def configurations(kind: str) -> tuple[Configuration, ...]:
    """Those of mma.sync first: `reasoned` takes the first that fits."""
    if kind in ROUNDED.values():
        return (*A8_SM80, *A8_SM90)
    if kind == FACTORED:
        return (*A8_FACTORED_SM80, *A8_SM80, *A8_FACTORED_SM90, *A8_SM90)  # on Hopper sums of groups are as fast for few tokens
    if kind == SPARSE_FACTORED:
        return SPARSE_A8_FACTORED_SM90
    return (*SPARSE, *SPARSE_SM90) if kind == "sparse" else (*DENSE, *DENSE_SM90)


# The file


def read(path: Path) -> dict[tuple[str, str], Table]:
    """The tables of a file. ValueError names the file and what is wrong with it."""
    return parse(path.read_bytes(), path)


def parse(data: bytes, path: Path) -> dict[tuple[str, str], Table]:
    """The same of what a file holds."""
    try:
        document = json.loads(data)
        if document["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema_version is {document['schema_version']!r}, and this version reads {SCHEMA_VERSION}")
        return {
            (architecture, kind): _table(architecture, kind, table)
            for architecture, kinds in document["architectures"].items()
            for kind, table in kinds.items()
        }
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is no table of kernels: {what}; measure again, or remove it") from error


def _table(architecture: str, kind: str, document: Mapping[str, Any]) -> Table:
    if architecture not in jit.ARCHITECTURES or kind not in _ALL_KINDS:
        raise ValueError(f"there is no kernel for {architecture}, {kind}")
    by_name = {c.name: c for c in configurations(kind) if c.fits(architecture)}
    rows = []
    for m, n, k, name in document["choices"]:
        if not all(isinstance(number, int) and number > 0 for number in (m, n, k)):
            raise ValueError(f"{[m, n, k, name]}: M, N and K are positive integers")
        no_kernel = DEQUANTIZE if kind in KINDS else SIXTEEN_BIT
        rows.append(Row(m, n, k, None if name == no_kernel else _choice(name, by_name, architecture)))
    least = document["dequantize_from"]
    if not rows or not (least is None or (isinstance(least, int) and least > 0)):
        raise ValueError(f"{architecture}, {kind}: no choices, or dequantize_from is no positive integer or null")
    return Table(least, tuple(rows))


def _choice(name: object, by_name: Mapping[str, Configuration], architecture: str) -> Choice:
    """By its name."""
    found = re.fullmatch(r"([^/ ]+)/([1-9]\d*)(?: (\w+))?", str(name))
    if found is None or (found[3] or "striped") not in SHARINGS:
        raise ValueError(f"{name!r} is not CONFIGURATION/CTAs, followed by one of {', '.join(SHARINGS)} or nothing")
    if found[1] not in by_name:
        raise ValueError(f"{architecture} has no configuration {found[1]!r}")
    sharing: Sharing = next((sharing for sharing in SHARINGS if sharing == found[3]), "striped")
    return Choice(by_name[found[1]], int(found[2]), sharing)


def table_of(architecture: str, measured: Mapping[str, Any], timing: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The document of one kind from measurements: a row for each linear and M, all dense or all 2:4.

    Each of its rows has m, n, k, sparse and the microseconds of choices by their names, of "torch.matmul" and, where it was measured, of
    "dequantize".
    """
    kind = KINDS[timing[0]["sparse"]]
    choices = []
    for row in sorted(timing, key=lambda row: (row["n"], row["k"], row["m"])):
        if bool(row["sparse"]) != (kind == "sparse"):
            raise ValueError("rows of dense and of 2:4 kernels in one table")
        name = best(row)
        choices.append([row["m"], row["n"], row["k"], DEQUANTIZE if row.get(DEQUANTIZE, row[name]) < row[name] else name])
    return {"measured": dict(measured), "dequantize_from": _dequantize_from(architecture, kind, timing), "choices": choices}


def text_of(document: Mapping[str, Any]) -> str:
    """The document as a file has it: a choice on each line."""
    return re.sub(r"\[\s+([^\[\]]*?)\s+\]", lambda match: f"[{' '.join(match[1].split())}]", json.dumps(document, indent=1)) + "\n"


def best(row: Mapping[str, Any]) -> str:
    """The name of the fastest choice of a measured row."""
    times = {name: time for name, time in row.items() if "/" in name}
    return min(times, key=times.__getitem__)


def _dequantize_from(architecture: str, kind: str, timing: Iterable[Mapping[str, Any]]) -> int | None:
    """The smallest measured M from which dequantizing is faster for every shape.

    Reasoned, but beyond what was measured, where it was slower at the largest M, and reasoned where it was not measured at all.
    """
    guess = DEQUANTIZE_FROM.get(architecture, DEQUANTIZE_FROM_ELSEWHERE)[kind]
    rows = [row for row in timing if DEQUANTIZE in row]
    if not rows:
        return guess
    lost = [int(row["m"]) for row in rows if row[DEQUANTIZE] >= row[best(row)]]
    won = [int(row["m"]) for row in rows if row["m"] > max(lost, default=0)]
    if won:
        return min(won)
    return max(guess, max(lost) + 1) if max(lost) < LARGE else None
