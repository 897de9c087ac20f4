"""What people read about a published folder, from the one JSON document of its run.

    marlinctl_report.json ─► a page ─► marlinctl_report.md, marlinctl_report.html
                          └► a card ─► README.md

All four lie outside the manifest, whose digest they name; they are written when the folder is finished, and may be rewritten.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from marlinctl.checkpoint import manifest, runtimes
from marlinctl.checkpoint.formats.base import Format
from marlinctl.checkpoint.formats.registry import detect
from marlinctl.checkpoint.orders import folded
from marlinctl.checkpoint.reader import open_checkpoint
from marlinctl.report import card, compression, html, markdown, training
from marlinctl.report.provenance import Folder
from marlinctl.system.console import SCHEMA_VERSION, strict
from marlinctl.system.log import redacted

JSON, MARKDOWN, HTML, CARD = "marlinctl_report.json", "marlinctl_report.md", "marlinctl_report.html", "README.md"


def report_files(report: Mapping[str, Any], folder: Path, *, name: str, fmt: Format, layers: Mapping[str, int]) -> dict[str, bytes]:
    """What is published beside the finished checkpoint in `folder`, which will be called `name`. layers: its quantized linears and their
    group sizes.

    The document holds what a person typed: its command, and the names of texts. Secrets in it are taken out here.
    """
    report = redacted(report)
    with open_checkpoint(folder, weight_files="auto") as checkpoint:
        info = detect(checkpoint.config, checkpoint.tensors)
        loads = runtimes.loads(runtimes.packed_of(checkpoint, info))
    about = Folder(name, fmt, manifest.read(folder), manifest.digest(folder), loads, info.used_grids, folded(folder))
    if report["kind"] == "distill":
        page, readme = training.page(report, about), card.of_training(report, about)
    else:
        page, readme = compression.page(report, about), card.of_compression(report, about, layers)
    return {
        CARD: readme.encode(),
        JSON: (json.dumps(strict({"schema_version": SCHEMA_VERSION, **report}), indent=1, allow_nan=False) + "\n").encode(),
        MARKDOWN: markdown.render(page).encode(),
        HTML: html.render(page).encode(),
    }
