"""`--calibration auto`, the default: a data set of the hub where it can be read, else text that the model writes itself.

UltraChat 200k are conversations of good quality, in the open licence MIT, and what other tools calibrate instruct models on. Text that a
model writes needs no network and no data, but the whole model in memory once, and a forward pass for every token. Which one it became is
said before any work, and recorded: recipe, report and manifest name the data set or `self`, never `auto`.
"""

from __future__ import annotations

from importlib.util import find_spec

from marlinctl.data.calibration_size import SELF_BATCH
from marlinctl.data.mixture import SELF
from marlinctl.recipes.schema import AUTO, Recipe, resolve
from marlinctl.system.console import Console

DEFAULT_SET = "HuggingFaceH4/ultrachat_200k:train_sft"
_SECONDS = 5  # that the hub has for its answer


def settled(recipe: Recipe, console: Console, *, offline: bool) -> Recipe:
    """The recipe with a source of its own instead of `auto`; any other is handed back as it is."""
    asked = recipe.calibration
    if asked.source != AUTO:
        return recipe
    reason = _unreachable(offline=offline)
    if reason is None:
        console.say(f"calibration: {DEFAULT_SET} of the hub, the default; only the rows that are needed are read")
        return resolve(recipe, {"calibration.source": DEFAULT_SET})[0]
    passes = -(-asked.samples // SELF_BATCH) * (asked.sequence_length - 1)
    console.say(
        f"calibration: self, because {reason}: the model writes {asked.samples} x {asked.sequence_length} tokens itself, which loads "
        f"all of it once and takes {passes:,} forward passes; --calibration FILE reads a text instead"
    )
    return resolve(recipe, {"calibration.source": SELF})[0]


def _unreachable(*, offline: bool) -> str | None:
    """Why the data set cannot be read; None where it can."""
    if offline:
        return "of --offline"
    if find_spec("datasets") is None:
        return f"{DEFAULT_SET} needs the package datasets, which is not installed (pip install 'marlinctl[eval]')"
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "of HF_HUB_OFFLINE"
    from huggingface_hub import HfApi  # slow, and only now it is needed
    from huggingface_hub.errors import HTTPError  # the base class of whichever HTTP client it uses

    try:
        HfApi().dataset_info(DEFAULT_SET.split(":")[0], timeout=_SECONDS)
    except (HTTPError, OSError) as error:
        return f"the hub does not answer for {DEFAULT_SET} ({type(error).__name__})"
    return None
