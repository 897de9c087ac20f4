"""Draws the pipeline of the home page: docs/figures/pipeline.svg for wide screens, pipeline-narrow.svg for phones.

    python scripts/draw_pipeline.py            # write both
    python scripts/draw_pipeline.py --check    # exit 1 and name the pictures that are not what this script draws

Boxes have a light fill and dark text, and arrows a middle grey, so one picture reads on a light and on a dark page. Who shows it need not
say which: an SVG in an <img> sees the scheme of the system and not that of the page.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

FIGURES = Path(__file__).resolve().parent.parent / "docs" / "figures"
FILLS = {"model": "#e8eaed", "optional": "#fff1d6", "step": "#dbe9fb", "result": "#d9f2e0"}
EDGES = {"model": "#80868b", "optional": "#b7791f", "step": "#2f6fc0", "result": "#2e8b57"}
TEXT, QUIET, ARROW = "#1b1f24", "#4a5057", "#80868b"


@dataclass(frozen=True, slots=True)
class Step:
    name: str
    does: str
    kind: str  # a key of FILLS


STEPS = (
    Step("model", "folder, hub id or GGUF", "model"),
    Step("sparsify", "optional: 2:4 pruning", "optional"),
    Step("distill", "optional: recover quality", "optional"),
    Step("quantize", "GPTQ, block by block", "step"),
    Step("pack", "ct, gptq or MARLIN tiles", "step"),
    Step("verify", "digests and numbers", "step"),
    Step("eval", "tasks, perplexity, KL", "step"),
    Step("OUT", "model, report and card", "result"),
)


@dataclass(frozen=True, slots=True)
class Layout:
    columns: int
    width: int  # of a box
    height: int
    gap: int  # between boxes, both ways
    title: int  # font size
    small: int

    def corner(self, index: int) -> tuple[int, int]:
        row, column = divmod(index, self.columns)
        return 2 + column * (self.width + self.gap), 2 + row * (self.height + self.gap)


WIDE = Layout(columns=4, width=222, height=84, gap=32, title=22, small=16)
NARROW = Layout(columns=1, width=320, height=58, gap=22, title=18, small=14)


def draw(steps: Sequence[Step], layout: Layout) -> str:
    """The picture as SVG."""
    rows = -(-len(steps) // layout.columns)
    width = layout.columns * (layout.width + layout.gap) - layout.gap + 4
    height = rows * (layout.height + layout.gap) - layout.gap + 4
    parts = [_box(step, layout, *layout.corner(index)) for index, step in enumerate(steps)]
    parts += [_arrow(layout, index) for index in range(len(steps) - 1)]
    label = "; ".join(f"{step.name}: {step.does}" for step in steps)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">',
            f"<title>{escape(label)}</title>",
            f'<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            f'<path d="M0 0 8 4 0 8z" fill="{ARROW}"/></marker></defs>',
            *parts,
            "</svg>\n",
        ]
    )


def _box(step: Step, layout: Layout, x: int, y: int) -> str:
    dashes = ' stroke-dasharray="6 4"' if step.kind == "optional" else ""
    middle = x + layout.width // 2
    upper, lower = y + layout.height * 43 // 100, y + layout.height * 77 // 100
    return (
        f'<rect x="{x}" y="{y}" width="{layout.width}" height="{layout.height}" rx="8" fill="{FILLS[step.kind]}" '
        f'stroke="{EDGES[step.kind]}" stroke-width="1.5"{dashes}/>\n'
        f'<text x="{middle}" y="{upper}" text-anchor="middle" font-family="ui-monospace, Menlo, Consolas, monospace" font-weight="600" '
        f'font-size="{layout.title}" fill="{TEXT}">{escape(step.name)}</text>\n'
        f'<text x="{middle}" y="{lower}" text-anchor="middle" font-family="system-ui, Helvetica, Arial, sans-serif" '
        f'font-size="{layout.small}" fill="{QUIET}">{escape(step.does)}</text>'
    )


def _arrow(layout: Layout, index: int) -> str:
    """From a box to the next one: to the right, or from the end of a row down to the beginning of the next."""
    x, y = layout.corner(index)
    to_x, to_y = layout.corner(index + 1)
    if y == to_y:
        path = f"M{x + layout.width + 3} {y + layout.height // 2}H{to_x - 3}"
    else:
        path = f"M{x + layout.width // 2} {y + layout.height + 3}V{to_y - layout.gap // 2}H{to_x + layout.width // 2}V{to_y - 3}"
    return f'<path d="{path}" fill="none" stroke="{ARROW}" stroke-width="2" marker-end="url(#head)"/>'


def pictures() -> dict[str, str]:
    return {"pipeline.svg": draw(STEPS, WIDE), "pipeline-narrow.svg": draw(STEPS, NARROW)}


def main(arguments: Sequence[str]) -> int:
    stale = [name for name, text in pictures().items() if not (FIGURES / name).is_file() or (FIGURES / name).read_text("utf-8") != text]
    if "--check" in arguments:
        if stale:
            print(f"not as drawn: {', '.join(stale)}; run python scripts/draw_pipeline.py", file=sys.stderr)
        return int(bool(stale))
    for name, text in pictures().items():
        (FIGURES / name).write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
