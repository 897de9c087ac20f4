"""What the scripts that make a page of docs/ share: they write it, or with --check exit 1 when it would change."""

from __future__ import annotations

import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"


def main(page: Path, text: str) -> int:
    if "--check" not in sys.argv[1:]:
        page.write_text(text, encoding="utf-8")
        return 0
    if page.is_file() and page.read_text("utf-8") == text:
        return 0
    print(f"{page} is out of date: run scripts/{Path(sys.argv[0]).name}")
    return 1
