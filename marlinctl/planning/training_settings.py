"""The settings of a distillation: what they come to, and which contradict each other. Without torch: `plan` asks too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from marlinctl.errors import Problem, UsageError
from marlinctl.models.config import positions

if TYPE_CHECKING:
    from marlinctl.models.architectures import Architecture
    from marlinctl.recipes.schema import Distill

HELD_OUT_SHARE = 20  # one row in so many
MOST_HELD_OUT = 64


def steps_of(asked: Distill) -> int:
    return -(-asked.tokens // asked.batch_tokens)


def rows_per_step(asked: Distill) -> int:
    return asked.batch_tokens // asked.sequence_length


def check_sizes(asked: Distill, config: Mapping[str, Any], processes: int, *, where: str = "--sequence-length") -> None:
    """Refuse sizes that do not fit together, before anything is read. where: the flag of the length, which `compress` calls otherwise."""
    limit = positions(config)
    if limit is not None and asked.sequence_length > limit:
        raise UsageError(
            "E246",
            f"rows of {asked.sequence_length} tokens are longer than the model can read ({limit})",
            where=where,
            fix=f"{where} {limit} or less",
        )
    rows = rows_per_step(asked)
    if not rows:
        what = f"a step of {asked.batch_tokens} tokens is shorter than one row of {asked.sequence_length}"
        raise UsageError("E288", what, where="--batch-tokens", fix=f"--batch-tokens {asked.sequence_length} or more")
    if rows % processes:
        what = f"{rows} rows in a step cannot be shared equally by {processes} processes"
        fix = f"--batch-tokens {asked.sequence_length * -(-rows // processes) * processes}"
        raise UsageError("E288", what, where="--batch-tokens", fix=fix)


def held_out_rows(wanted: int) -> int:
    return max(1, min(MOST_HELD_OUT, wanted // HELD_OUT_SHARE))


def check_settings(asked: Distill, processes: int) -> None:
    """Refuse settings that contradict each other."""
    if not asked.tokens:
        raise UsageError("E202", "nothing says for how long to train", where="--tokens", fix="--tokens 2000000, for two million tokens")
    problems: list[Problem] = []
    if asked.mode == "blockwise":
        if asked.cache_logits:
            problems.append(Problem("a block learns from hidden states, not from logits", "--cache-logits", "leave it out"))
        if processes > 1:
            problems.append(Problem("one block at a time is for one process", "--mode blockwise", "start one process, or --mode full"))
    elif not (asked.ce or asked.squarehead or asked.kl):
        problems.append(Problem("every loss has weight 0: there is nothing to train on", "--ce, --squarehead, --kl", "--kl 1"))
    elif asked.cache_logits and asked.squarehead:
        what = "SquareHead needs the teacher's hidden states, and a cache holds its predictions only"
        problems.append(Problem(what, "--cache-logits and --squarehead", "--squarehead 0, or no --cache-logits"))
    if asked.mask == "renewed" and asked.mode != "full":
        what, fix = {
            "blockwise": ("a mask is renewed while the whole model is trained, not one block at a time", "--mode full, or --mask fixed"),
            "scales": ("codes stay as they are, and so does their mask", "renew the mask of the 16-bit model, and quantize the result"),
        }[asked.mode]
        problems.append(Problem(what, f"--mask renewed and --mode {asked.mode}", fix))
    if problems:
        raise UsageError.from_problems("E288", problems)


def refuse_blockwise(asked: Distill, architecture: Architecture) -> None:
    """UsageError E288 for one block at a time of a model whose blocks cannot be run with hidden states alone."""
    if asked.tokens and asked.mode == "blockwise" and (architecture.per_token or architecture.shared):
        what = f"blocks of {architecture.model_type} are given more than hidden states, and cannot be trained one at a time"
        raise UsageError("E288", what, where="--mode blockwise", fix="--mode full")
