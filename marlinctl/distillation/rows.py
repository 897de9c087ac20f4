"""The training text as rows of tokens, and which rows each step reads.

    text    documents joined by blank lines and cut into rows of equal length, so that no position is padding
    chats   the model's template, one chat a row, padded on the right
    self    the teacher writes the rows itself, with a seed of its own

The last twentieth of the rows is held out: it is measured before and after, and never trained on. The order is drawn from the seed for
each pass over the data, and a step's rows follow from its number alone, so a resumed run needs no random state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from marlinctl.checkpoint import findings
from marlinctl.data.calibration import Samples, load_tokenizer, read_samples, write_samples
from marlinctl.errors import BadInput, number_of
from marlinctl.planning.training_settings import HELD_OUT_SHARE, held_out_rows, rows_per_step, steps_of
from marlinctl.recipes.schema import Calibration, Distill
from marlinctl.system.console import Console
from marlinctl.system.digests import sha256_of_tensors

SELF_TOGETHER = 128  # rows that the teacher writes at a time


@dataclass(frozen=True, slots=True)
class Rows:
    """ids: [R, L] int64, right-padded; counted: [R, L] bool, False for padding. The last `held_out` rows are not trained on."""

    ids: Tensor
    counted: Tensor
    held_out: int
    facts: Mapping[str, Any]  # for report and manifest

    @property
    def trained(self) -> int:
        return self.ids.shape[0] - self.held_out

    @property
    def sha256(self) -> str:
        return sha256_of_tensors(self.ids, self.counted)


def load_rows(asked: Distill, folder: Path, *, console: Console, load_teacher: Callable[[], torch.nn.Module]) -> Rows:
    """As many rows as the budget asks for, or as many as there are; then they are read several times, and that is said."""
    wanted = steps_of(asked) * rows_per_step(asked)
    held_out = held_out_rows(wanted)
    sample = Calibration(
        source=asked.data,
        samples=wanted + held_out,
        sequence_length=asked.sequence_length,
        seed=asked.seed,
        chat="auto",
        minimum_tokens=1,
    )
    tokenizer = load_tokenizer(folder)
    if asked.data == "self":
        teacher = load_teacher()
        found = Samples(write_samples(teacher, tokenizer, sample, console, together=SELF_TOGETHER), "written by the teacher", 0)
    else:
        found = read_samples(sample, tokenizer)
    ids = found.ids
    padding = ids < 0
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    return make_rows(torch.where(padding, pad, ids), ~padding, asked, found, console)


def make_rows(ids: Tensor, counted: Tensor, asked: Distill, found: Samples, console: Console) -> Rows:
    """found: what the rows were read from."""
    got = ids.shape[0]
    if got < 2:
        raise BadInput(
            "E393",
            f"{number_of(got, 'row')} of {asked.sequence_length} tokens to read; at least one to train on and one to measure on are needed",
            where=f"--data {asked.data}",
            fix="give more text, or a smaller --sequence-length",
        )
    wanted = steps_of(asked) * rows_per_step(asked)
    held_out = min(held_out_rows(wanted), max(1, got // HELD_OUT_SHARE))
    passes = wanted / (got - held_out)
    facts = {
        "source": asked.data,
        "how": found.how,
        "rows": {"trained": got - held_out, "held_out": held_out},
        "sequence_length": int(ids.shape[1]),
        "tokens": int(counted[: got - held_out].sum()),
        "passes": round(passes, 2),
        "cut": found.cut,
        **({"parts": found.parts} if found.parts else {}),
    }
    for warning in findings.of_text(facts, "--sequence-length"):
        console.warn(warning)
    rows = Rows(ids, counted, held_out, facts)
    console.say(
        f"data: {asked.data} ({found.how}), {number_of(rows.trained, 'row')} of {ids.shape[1]} tokens to train on, {held_out} held out"
        + (f"; the budget of {asked.tokens:,} tokens reads them {passes:.1f} times" if passes > 1 else "")
    )
    return rows


def rows_of_step(step: int, per_step: int, trained: int, seed: int) -> Tensor:
    """[per_step] int64: the rows that a step reads."""
    positions = torch.arange(step * per_step, (step + 1) * per_step)
    found = torch.empty(per_step, dtype=torch.int64)
    for number in torch.unique(positions // trained).tolist():
        mine = positions // trained == number
        found[mine] = _order(number, trained, seed)[positions[mine] % trained]
    return found


@lru_cache(maxsize=2)
def _order(number: int, trained: int, seed: int) -> Tensor:
    """The permutation of pass `number` over the data."""
    return torch.randperm(trained, generator=torch.Generator().manual_seed(seed + number))
