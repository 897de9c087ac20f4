"""The page in a real browser: phone and desktop, light and dark. Needs playwright (extra `test`) and an installed Chromium."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from marlinctl.report import comparison, compression, html, training
from tests.report import documents

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PAGES = {
    "compression": lambda: compression.page(documents.report(), documents.folder()),
    "hostile": lambda: compression.page(documents.report(list(documents.HOSTILE)), documents.folder()),
    "comparison": lambda: comparison.page(documents.outputs()),
    "comparison, hostile": lambda: comparison.page(documents.outputs([*documents.HOSTILE, "a" * 200])),
    "training": lambda: training.page(documents.training(), documents.folder("dense")),
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("needs a browser: apt-get install chromium")
    with api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2) of `rgb(r, g, b)`."""
    channels = [int(part) / 255 for part in colour.removeprefix("rgb(").rstrip(")").split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@cache
def rendered(name: str) -> str:
    return html.render(PAGES[name]())


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", list(PAGES))
def test_readable_everywhere(browser: Any, name: str, width: int, scheme: str, tmp_path: Path) -> None:
    """A page that scrolls sideways, or grey on grey, is a page that nobody reads on a phone or at night."""
    file = tmp_path / "page.html"
    file.write_text(rendered(name), encoding="utf-8")
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    told: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: told.append(message.text))
    page.on("pageerror", lambda error: told.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.title() == page.text_content("h1") != ""
    assert told == [] and asked == [file.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    colours = page.evaluate(
        """() => {
            const paper = getComputedStyle(document.body).backgroundColor;
            const of = s => [...document.querySelectorAll(s)].map(e => [getComputedStyle(e).color, paper]);
            const fill = [...document.querySelectorAll('svg text')].map(e => [getComputedStyle(e).fill, paper]);
            return [...of('p, dt, dd, th, td, h1, h2, figcaption, footer'), ...fill];
        }"""
    )
    assert min(contrast(*pair) for pair in colours) >= 4.5  # WCAG AA
    assert luminance(colours[0][1]) < 0.05 if scheme == "dark" else luminance(colours[0][1]) > 0.9
    shown = page.evaluate("[...document.querySelectorAll('figure svg')].filter(s => s.getBoundingClientRect().width > 0).length")
    assert shown == page.evaluate("document.querySelectorAll('figure').length") > 0  # of wide and narrow, one
    text = page.evaluate(
        "Math.min(...[...document.querySelectorAll('figure svg text')].map(t => t.getBoundingClientRect().height).filter(h => h))"
    )
    assert text >= 9, "labels too small to read"
    page.close()
