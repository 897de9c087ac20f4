"""Pages without pictures, for tests that publish folders and look at something else: drawing takes longer than the rest of a tiny run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from marlinctl.report import pictures
from marlinctl.report.page import Picture


@contextmanager
def blank_pictures() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "_draw", _blank)
        pictures.layers.cache_clear()
        try:
            yield
        finally:
            pictures.layers.cache_clear()  # no other test gets a blank one


def _blank(_draw: Any, _heights: Any, caption: str, alt: str = "") -> Picture:
    return Picture("<svg></svg>", "<svg></svg>", caption, alt or caption)
