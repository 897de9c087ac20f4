"""The drawings in docs/formats are what tile.py says."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "draw_formats.py"


@pytest.fixture
def drawing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The script as a module, working on a copy of the pages."""
    spec = importlib.util.spec_from_file_location("draw_formats", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "PAGES", Path(shutil.copytree(ROOT / "docs" / "formats", tmp_path / "formats")))
    return module


def test_pages_are_current() -> None:
    """If this failed, the documented layout would differ from the one that is written: run scripts/draw_formats.py."""
    done = subprocess.run([sys.executable, str(SCRIPT), "--check"], cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_changed_digit_is_noticed_and_mended(drawing: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """If this failed, --check would pass whatever the pages say."""
    page = drawing.PAGES / "marlin.md"
    original = page.read_text()
    page.write_text(original.replace("0x19910880   lane  0, word 0", "0x19910808   lane  0, word 0"))
    assert page.read_text() != original
    assert drawing.main(["--check"]) == 1
    assert "marlin.md" in capsys.readouterr().err
    assert drawing.main([]) == 0
    assert page.read_text() == original


def test_a_changed_map_is_noticed(drawing: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, the drawings would come from something other than tile.py."""
    assert drawing.main(["--check"]) == 0
    right = drawing.tile.marlin_place
    monkeypatch.setattr(drawing.tile, "marlin_place", lambda k, n: right(k ^ 1, n))
    assert drawing.main(["--check"]) == 1


def test_every_drawing_is_on_exactly_one_page(drawing: ModuleType) -> None:
    """If this failed, a marker would be misspelled or unclosed, and its page would never be drawn again."""
    pages = [path.read_text() for path in drawing.PAGES.glob("*.md")]
    assert sorted(match["name"] for page in pages for match in drawing.MARKED.finditer(page)) == sorted(drawing.DRAWINGS)
    assert sum(page.count("<!-- drawn by") for page in pages) == len(drawing.DRAWINGS)


def test_words_quoted_in_prose_are_those_of_the_drawings(drawing: ModuleType) -> None:
    """If this failed, a page would explain a word by hand that the layout no longer has."""
    assert "B[0,   0] = 0x19910880" in drawing.marlin_example()
    assert "0x19910880." in (drawing.PAGES / "marlin.md").read_text()
    assert drawing.DRAWINGS["ct-word"]().endswith("0x76543210  0xFEDCBA98")
    assert drawing.DRAWINGS["gptq-word"]().endswith("0x76543210  0xFEDCBA98")


def test_unknown_arguments_are_refused(drawing: ModuleType) -> None:
    """If this failed, `--chek` would rewrite the pages instead of checking them."""
    with pytest.raises(SystemExit, match="usage"):
        drawing.main(["--chek"])
