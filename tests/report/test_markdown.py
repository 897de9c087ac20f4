"""The page as Markdown: names stay names."""

from __future__ import annotations

import re
from typing import Any

from marlinctl.report import compression, markdown, training
from tests.report import documents


def test_names_cannot_leave_their_place() -> None:
    """A tensor's name would add a row, a heading, a link or a tag to a page on the hub."""
    page = markdown.render(compression.page(documents.report(list(documents.HOSTILE)), documents.folder()))
    rows = [line for line in page.splitlines() if line.startswith("| `") and "64 x 128" in line]
    assert len(rows) == len(documents.HOSTILE)
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {10}
    assert "\n## forged" not in page and "\x1b" not in page
    outside = re.sub(r"(`+) ?.*? ?\1", "", page)
    assert "<" not in re.sub(r"\\<", "", outside) and "](" not in re.sub(r"\\[\[\]]", "", outside)


def test_a_code_span_holds_any_text() -> None:
    """A backtick in a name would end the span, and the rest would be Markdown."""
    assert markdown.code("a`b") == "`` a`b ``"
    assert markdown.code("``") == "``` `` ```"
    assert markdown.code("a|b") == "`a\\|b`"
    assert markdown.listing("x\n````\ny").startswith("`````text\n")


def test_plain_text_is_escaped() -> None:
    """A remark such as <b> or [x](y) would be rendered instead of shown."""
    assert markdown.text("<b> [x](y) *z* a|b `c`") == r"\<b\> \[x\](y) \*z\* a\|b \`c\`"


def test_figures_and_tables_are_there() -> None:
    """The Markdown page is what people read in a terminal and on the hub."""
    page = markdown.render(compression.page(documents.report(), documents.folder()))
    assert "| pythondoc | perplexity | 14.400 ± 0.700 | 14.000 ± 0.700 | +0.400 ± 0.100 |" in page
    assert "| `model.layers.5.mlp.down_proj` | 64 x 128 | 64 | - | 4.266 |" in page
    page = markdown.render(training.page(documents.training(), documents.folder("dense")))
    assert "| loss | 2 | 1 |" in page and "| 60 | 960 | 0.0001 | 0.05 |" in page


def test_memory_of_a_gpu_is_told_beside_that_of_the_host() -> None:
    """Somebody with a smaller GPU would take the host's figure for what the job needs."""
    taken: dict[str, Any] = {"peak_device_memory_bytes": 5 << 29, "peak_device_reserved_bytes": 7 << 29}
    on_gpu = (
        compression.page(documents.report(**taken), documents.folder()),
        training.page(documents.training(**taken), documents.folder("dense")),
    )
    for page in map(markdown.render, on_gpu):
        assert "0.50 GiB" in page and "of the host; 2.50 GiB alive on the GPU" in page
    assert "alive on the GPU" not in markdown.render(compression.page(documents.report(), documents.folder()))
