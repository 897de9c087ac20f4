"""How much text calibration takes, and what can be refused before any is tokenized. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from marlinctl.data.mixture import SELF, parts_of
from marlinctl.errors import BadInput, UsageError
from marlinctl.models.config import positions
from marlinctl.recipes.schema import AUTO, Calibration

SELF_BATCH = 32  # samples that the model writes at a time, when it writes its calibration text
CHARACTERS_PER_TOKEN = 6  # generous first guess of how much calibration text is enough; what is missing is read after it
PIECE = 4_000_000  # characters that are tokenized at a time


def check_documents(source: str) -> None:
    """Text to calibrate with or to train on, each part of it: the file is there, and it begins with a row that can be used."""
    if source in (SELF, AUTO):
        return
    from marlinctl.data.text import check_text, names_a_file  # what unpacks files is not imported for nothing

    for part in parts_of(source):
        if names_a_file(part.source):
            check_text(part.source, chats=True)


def check_length(asked: Calibration, config: Mapping[str, Any]) -> None:
    limit = positions(config)
    if limit is not None and asked.sequence_length > limit:
        raise UsageError(
            "E246",
            f"samples of {asked.sequence_length} tokens are longer than the model can read ({limit})",
            where="--sequence-length",
            fix=f"--sequence-length {limit} or less",
        )


def too_few_tokens(asked: Calibration, count: str) -> BadInput:
    return BadInput(
        "E393",
        f"{count} tokens count for calibration, at least {asked.minimum_tokens} are needed",
        where=f"calibration {asked.source}",
        fix="more --samples or a greater --sequence-length (fewer tokens do not determine the Hessians)",
    )
