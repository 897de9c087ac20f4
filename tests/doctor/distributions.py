"""Distributions as an installer leaves them, in folders of a test."""

from __future__ import annotations

from importlib.metadata import Distribution, PathDistribution
from pathlib import Path


def distribution(folder: Path, name: str, version: str, *lines: str) -> Distribution:
    """NAME-VERSION.dist-info with this METADATA; `lines` are further headers."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    header = ["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}", *lines]
    (info / "METADATA").write_text("\n".join(header) + "\n")
    return PathDistribution(info)
