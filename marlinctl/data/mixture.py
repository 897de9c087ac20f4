"""Sources of calibration text, several at once: `web.jsonl:0.5,chat.jsonl:0.5`. Nothing here imports torch or reads a file.

    mixture   part,part,...        shares of the samples; any positive numbers, divided by their sum; without numbers all alike
    part      source[:share]       a file, or a data set of the hub (org/name:config:split:0.3)

A name that is a file as it stands is one source, whatever signs are in it. A share of a single file means nothing, and does no harm.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from marlinctl.errors import UsageError, number_of

SELF = "self"
_NUMBER = re.compile(r"\d+(\.\d*)?|\.\d+")
_EXAMPLE = "for example web.jsonl:0.5,chat.jsonl:0.5"


@dataclass(frozen=True, slots=True)
class Part:
    source: str
    share: float  # of the samples; all shares are 1 together


def parts_of(source: str) -> tuple[Part, ...]:
    """One part for a plain source. UsageError E246 for shares that are none, or for `self` beside others."""
    if "," not in source or Path(source).expanduser().exists():
        name, share = _divided(source)
        alone = bool(share) and not Path(source).expanduser().exists() and Path(name).expanduser().exists()
        return (Part(name if alone else source, 1.0),)
    found = [_divided(piece.strip()) for piece in source.split(",")]
    where = f"calibration {source}"
    if any(not name for name, _ in found):
        raise UsageError("E246", "a part of the mixture has no name", where=where, fix=_EXAMPLE)
    if any(name == SELF for name, _ in found):
        what = "text that the model writes itself cannot be a part of a mixture"
        raise UsageError("E246", what, where=where, fix="give files or data sets of the hub, or --calibration self alone")
    weights = [weight for _, weight in found]
    if None in weights and set(weights) != {None}:
        raise UsageError("E246", "some parts of the mixture have a share and some have none", where=where, fix=_EXAMPLE)
    numbers = [1.0 if weight is None else weight for weight in weights]
    if min(numbers) <= 0 or not math.isfinite(sum(numbers)):
        raise UsageError("E246", "a share of the mixture is not above 0", where=where, fix=_EXAMPLE)
    return tuple(Part(name, number / sum(numbers)) for (name, _), number in zip(found, numbers, strict=True))


def samples_of_parts(parts: tuple[Part, ...], samples: int) -> tuple[int, ...]:
    """Whole samples for each part, `samples` together: rounded down, and the largest remainders get one more.

    UsageError E246 where a part would have none.
    """
    exact = [part.share * samples for part in parts]
    counts = [math.floor(number + 1e-9) for number in exact]
    for place in sorted(range(len(parts)), key=lambda i: counts[i] - exact[i])[: samples - sum(counts)]:
        counts[place] += 1
    for part, count in zip(parts, counts, strict=True):
        if count == 0:
            what = f"a share of {part.share:.3g} of {number_of(samples, 'sample')} is less than one"
            raise UsageError("E246", what, where=f"calibration {part.source}", fix="more --samples, or a larger share")
    return tuple(counts)


def _divided(piece: str) -> tuple[str, float | None]:
    name, colon, last = piece.rpartition(":")
    return (name, float(last)) if colon and _NUMBER.fullmatch(last) else (piece, None)
