"""The site that `make site` builds: whole, and readable in a real browser on a phone and on a desk, by day and by night.

Needs the extra `docs`; the browser's part is `slow`, needs playwright and an installed Chromium, and is run by `make site`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.report.test_browser import browser, contrast
from tests.test_architecture import ROOT
from tests.test_docs import DOCS

__all__ = ["browser"]  # a fixture of the report's tests

# What a reader would not see: a page wider than the screen, a table or code that ends at the edge and does not scroll.
CLIPPED = """() => {
    const wide = document.documentElement.clientWidth, found = [];
    if (document.documentElement.scrollWidth > wide) found.push(`the page is ${document.documentElement.scrollWidth} wide`);
    const scrolls = e => ['auto', 'scroll'].includes(getComputedStyle(e).overflowX);
    for (const table of document.querySelectorAll('.md-content table')) {
        let box = table.parentElement;
        while (box.tagName !== 'BODY' && !scrolls(box)) box = box.parentElement;
        const right = (scrolls(box) ? box : table).getBoundingClientRect().right;
        if (right > wide + 1) found.push(`a table ends at ${right}: ${table.innerText.slice(0, 40)}`);
    }
    for (const code of document.querySelectorAll('.md-content pre > code')) {
        const language = code.closest('[class*=language-]')?.className.match(/language-(\\w+)/)[1] ?? 'none';
        if (code.scrollWidth > code.clientWidth + 1) found.push(`code in ${language} is cut: ${code.innerText.slice(0, 40)}`);
        else if (code.getBoundingClientRect().right > wide + 1) found.push(`code in ${language} leaves the page`);
    }
    return found;
}"""
COLOURS = """() => {
    const brush = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
    const seen = (...layers) => {  // colours with opacity, as they lie over each other
        for (const layer of layers) { brush.fillStyle = layer; brush.fillRect(0, 0, 1, 1); }
        return `rgb(${[...brush.getImageData(0, 0, 1, 1).data].slice(0, 3)})`;
    };
    return [...document.querySelectorAll('.md-content .highlight code')].flatMap(code => {
        const paper = getComputedStyle(code).backgroundColor;
        const parts = [...code.querySelectorAll('span[class]')];
        return parts.map(part => [seen(paper, getComputedStyle(part).color), seen(paper), part.innerText]);
    });
}"""


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="needs the extra `docs`; `make site` builds the site in continuous integration")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "-q", "-d", str(folder)],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def fences() -> dict[str, list[str]]:
    """Page -> languages of its blocks, in their order."""
    return {
        str(page.relative_to(DOCS)): re.findall(r"^```(\w*)\n.*?^```", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
        for page in sorted(DOCS.rglob("*.md"))
    }


def test_every_block_says_its_language() -> None:
    """A block without one has no colours on any site."""
    assert [page for page, languages in fences().items() if "" in languages] == []


def test_the_site_builds(site: Path) -> None:
    """A broken link or anchor in the site, which its own generator finds."""
    assert (site / "index.html").is_file()


def test_code_has_colours(site: Path) -> None:
    """Commands and their comments would look alike."""
    for page, languages in fences().items():
        place = site / page.removesuffix("README.md").removesuffix(".md") / "index.html"
        blocks = re.findall(r'<div class="language-(\w+) highlight">(.*?)</div>', place.read_text("utf-8"), re.DOTALL)
        blocks = [(language, code) for language, code in blocks if language != "text"]  # indented ones are text, too
        assert [language for language, _ in blocks] == [language for language in languages if language != "text"], page
        assert not blocks or any('<span class="' in code for _, code in blocks), page


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_cut(browser: Any, site: Path, width: int) -> None:
    """Half of a comment, or a table without its last columns, on every page."""
    found = {}
    page = browser.new_page(viewport={"width": width, "height": 900})
    for file in sorted(site.rglob("index.html")):
        page.goto(file.as_uri())
        page.wait_for_selector(".md-typeset__scrollwrap, .md-content:not(:has(table))", state="attached")  # the theme's script ran
        may_scroll = () if width >= 1280 else ("code in text is cut", "code in console is cut")
        if cut := [line for line in page.evaluate(CLIPPED) if not line.startswith(may_scroll)]:
            found[str(file.parent.relative_to(site))] = cut
    page.close()
    assert found == {}


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_code_is_readable(browser: Any, site: Path, scheme: str) -> None:
    """Grey on grey in one of the two schemes (WCAG 2.2, 3:1 for what colour adds)."""
    page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme=scheme)
    for name in ("quantize", "api", "serve", "recipes"):
        page.goto((site / name / "index.html").as_uri())
        colours = page.evaluate(COLOURS)
        assert len({colour for colour, _, _ in colours}) > 2
        assert [entry for entry in colours if contrast(*entry[:2]) < 3] == []
    page.close()
