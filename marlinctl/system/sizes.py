"""Sizes as people write them."""

from __future__ import annotations

import re

from marlinctl.errors import UsageError


def size_in_bytes(text: str | None, flag: str) -> int | None:
    """4GiB, 4G, 800MiB, 1.5GB -> bytes. A bare number is bytes; UsageError E202 below a MiB, where the unit was forgotten."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if not match:
        raise UsageError("E202", f"{text!r} is not a number of bytes", where=flag, fix="write it as 4GiB or 800MiB")
    unit = 1024 if match[3] or not match[2] else 1000
    size = int(float(match[1]) * unit ** " KMGT".index(match[2].upper() or " "))
    if size < 2**20 and not match[2]:
        raise UsageError("E202", f"{text.strip()} without a unit is bytes", where=flag, fix=f"{flag} {match[1]}GiB or {match[1]}MiB")
    return size
