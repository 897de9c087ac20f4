"""Whether a run rotates the model (--rotate), decided before weights are read."""

from __future__ import annotations

from marlinctl.checkpoint.model_files import ORDER_FILE
from marlinctl.checkpoint.reader import Checkpoint
from marlinctl.checkpoint.sparsity import Pattern
from marlinctl.errors import UsageError
from marlinctl.models.architectures import Architecture
from marlinctl.models.config import sizes_of
from marlinctl.models.rotation import ROTATABLE, Stream, stream_of
from marlinctl.recipes.schema import Recipe
from marlinctl.system.files import exists

_FLAG = "--rotate always"


def refuse_idle_rotation(recipe: Recipe) -> None:
    """UsageError E273 where a rotation that is required has nothing to gain."""
    if recipe.quantize.rotate == "always" and recipe.scheme.prunes:
        what = "a rotation spreads weights over all channels, and 2:4 needs channels that can be left out"
        raise UsageError("E273", what, where=_FLAG, fix="leave it out, or do not prune")


def stream_to_rotate(checkpoint: Checkpoint, known: Architecture, recipe: Recipe) -> Stream | None:
    """What the run is to rotate, if its weights are not 2:4. None: nothing. known: the model, whose head may be tied.

    `auto` rotates models whose head is their own: a tied one has to be copied. UsageError E288 where a rotation is required and not
    possible.
    """
    mode = recipe.quantize.rotate
    if mode == "never" or not recipe.scheme.quantizes or recipe.scheme.prunes or (mode == "auto" and known.head is None):
        return None
    folded = exists(checkpoint.folder, ORDER_FILE)
    own = known.untied() if known.tied is not None else known
    stream = None if folded else stream_of(own, sizes_of(checkpoint.config))
    if stream is None and mode == "always":
        why = f"{known.model_type} is not known to stay the same"
        if known.model_type in ROTATABLE:
            why = f"beside the {known.model_type} that is known to stay the same it has other parts, names or blocks"
        if folded:
            why = "an earlier run folded something into its weights"
        fix = f"--rotate never; these can be rotated, as language models alone: {', '.join(sorted(ROTATABLE))}"
        raise UsageError("E288", f"the model cannot be rotated: {why}", where=_FLAG, fix="start from the original model" if folded else fix)
    return stream


def refuse_rotated_pattern(found: Pattern, recipe: Recipe) -> None:
    """UsageError E273 for a rotation of weights that are 2:4 already."""
    if found.linears and recipe.quantize.rotate == "always":
        what = "the model is 2:4, and a rotation would fill what is pruned"
        raise UsageError("E273", what, where=_FLAG, fix="leave it out: the pattern is kept then")
