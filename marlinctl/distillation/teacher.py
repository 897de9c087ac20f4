"""What the teacher says about a batch.

    live     the teacher is in memory and is asked for every batch: hidden states and logits
    cached   it was asked once for every row; its k most likely next tokens, and how likely all others are together, lie in the job's folder

A cache frees the teacher's memory and its share of the time of every further pass over the data. It takes 12 k bytes of disk per token, and
holds no hidden states, so it is for the divergence alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack

import torch
from torch import Tensor, nn

from marlinctl.checkpoint.reader import Checkpoint
from marlinctl.distillation.distributed import Processes
from marlinctl.distillation.losses import Signals, Top, Weights, top_of
from marlinctl.distillation.rows import Rows
from marlinctl.distillation.state import DistillJob
from marlinctl.system.atomic import write_tensors
from marlinctl.system.console import Console

CACHE_ROWS = 256  # rows in one file of the cache

# Called with the numbers of the rows and their ids [B, L] on the device.
Teacher = Callable[[Tensor, Tensor], Signals]


def live(model: nn.Module, weights: Weights) -> Teacher:
    """Ask the model itself."""

    def ask(_rows: Tensor, ids: Tensor) -> Signals:
        if not (weights.kl or weights.squarehead):
            return Signals()
        with torch.no_grad():
            out = model(input_ids=ids, use_cache=False, output_hidden_states=bool(weights.squarehead))
        return Signals(out.hidden_states[1:] if weights.squarehead else (), out.logits if weights.kl else None)

    return ask


def write_cache(
    model: nn.Module, rows: Rows, k: int, weights: Weights, together: int, job: DistillJob, processes: Processes, console: Console
) -> None:
    """One pass of the teacher over all rows. Files that a killed run has finished stay; processes share the work by files."""
    files = range(0, rows.ids.shape[0], CACHE_ROWS)
    mine = [first for first in files if first // CACHE_ROWS % processes.count == processes.index]
    with console.progress("the teacher predicts", len(mine)) as progress:
        for first in mine:
            target = job.path / _name(first)
            if not target.exists():
                ids = rows.ids[first : first + CACHE_ROWS]
                parts = [_predict(model, part.to(processes.device), k, weights) for part in ids.split(together)]
                write_tensors(target, {key: torch.cat([getattr(part, key) for part in parts]).cpu() for key in ("ids", "logp", "rest")})
            progress.advance()
    processes.wait()


@torch.no_grad()
def _predict(model: nn.Module, ids: Tensor, k: int, weights: Weights) -> Top:
    """The top k of one forward pass. Each row is flat, so that rows of the file are rows of a matrix: [B, L k] and [B, L]."""
    logits = model(input_ids=ids, use_cache=False).logits
    tops = [top_of(row, k, weights.temperature) for row in logits]  # one row at a time: the logits in float32 are large
    return Top(
        torch.stack([top.ids.flatten() for top in tops]),
        torch.stack([top.logp.flatten() for top in tops]),
        torch.stack([top.rest for top in tops]),
    )


class Cached(AbstractContextManager["Cached"]):
    """Answers from the cache. Files are opened when they are first needed."""

    def __init__(self, job: DistillJob) -> None:
        self._job, self._stack = job, ExitStack()
        self._open: dict[int, Checkpoint] = {}

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __call__(self, rows: Tensor, ids: Tensor) -> Signals:
        found = [self._row(int(row)) for row in rows]
        parts = (torch.cat(column).to(ids.device) for column in zip(*found, strict=True))
        token_ids, logp, rest = parts
        shape = (*ids.shape, -1)
        return Signals(top=Top(token_ids.reshape(shape), logp.reshape(shape), rest))

    def _row(self, row: int) -> Sequence[Tensor]:
        first = row // CACHE_ROWS * CACHE_ROWS
        if first not in self._open:
            self._open[first] = self._stack.enter_context(self._job.tensors(_name(first)))
        return [self._open[first].rows(key, [row - first]) for key in ("ids", "logp", "rest")]


def _name(first: int) -> str:
    return f"teacher-{first // CACHE_ROWS:05d}.safetensors"
