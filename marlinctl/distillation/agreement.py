"""What several processes must agree on before they train.

    weights    every process has loaded the same student and teacher: one checksum of each parameter and buffer, compared exactly,
               before the models are shared out
    losses     a sharded model computes what the whole one does: one held-out row, token by token, in every process, against the whole
               model on the main process's device, if it fits

A run that fails here has written nothing but its job folder.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from marlinctl.distillation.distributed import Processes
from marlinctl.errors import CheckFailed, Problem, number_of
from marlinctl.system.console import Console
from marlinctl.system.host import available_memory

_TOKENS = 256  # of the row that is compared
_SHARE_FOR_WEIGHTS = 0.9  # of the free memory, for the weights; the rest is for activations
_REPORT = "use --multi_gpu where the model fits; please report it, with `marlinctl doctor --json`"


def require_same_weights(title: str, model: nn.Module, processes: Processes) -> None:
    """CheckFailed E117 where a process holds other parameters or buffers than the main one. All processes must ask together."""
    if processes.count == 1:
        return
    mine = {name: checksum(tensor) for name, tensor in chain(model.named_parameters(), model.named_buffers())}
    wanted = processes.share(mine)
    others = sorted(name for name in mine.keys() | wanted.keys() if mine.get(name) != wanted.get(name))
    fix = f"the {title}'s files must be equal on every machine (sha256sum); if they are, please report it, with `marlinctl doctor --json`"
    problems = [
        Problem(
            f"process {index} holds another {title} than process 0: {count} of {number_of(len(wanted), 'tensor')} not the same",
            f"{title}, {first}",
            fix,
        )
        for index, (count, first) in enumerate(processes.gather((len(others), others[0] if others else "")))
        if count
    ]
    if problems:
        processes.stop(CheckFailed.from_problems("E117", problems))


def checksum(tensor: Tensor) -> int:
    """A sum over the bits that depends on the order of the rows.

    Words of 8 bytes are added, whatever the dtype: 6 GB/s on one core, where a sum of 4-byte words in int64 runs at 0.5.
    """
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    rows = tensor.shape[0] if tensor.dim() and flat.numel() and flat.numel() % (8 * tensor.shape[0]) == 0 else 1
    even = flat.numel() // (8 * rows) * 8 * rows
    sums = flat[:even].view(torch.int64).reshape(rows, -1).sum(-1)
    return int((sums * torch.arange(1, rows + 1, device=sums.device)).sum() + flat[even:].sum(dtype=torch.int64))


class Comparison:
    """One row of tokens [1, L] through whole models, and later through the sharded ones."""

    def __init__(self, row: Tensor, dtype: torch.dtype, processes: Processes, console: Console) -> None:
        self._ids = row[:, :_TOKENS]
        self._dtype, self._processes, self._console = dtype, processes, console
        self._expected: dict[str, Tensor] = {}

    def measure(self, title: str, nbytes: int, load: Callable[[], nn.Module]) -> None:
        """The main process loads the whole model onto its device, where its nbytes fit; that they do not is said."""
        losses = self._processes.share(self._processes.main_first(lambda: self._of_whole(title, nbytes, load)))
        if losses is not None:
            self._expected[title] = losses
        gc.collect()
        if self._processes.device.type == "cuda":
            torch.cuda.empty_cache()

    def require_same_losses(self, title: str, sharded: nn.Module) -> None:
        """CheckFailed E117 where the losses are not those of the whole model up to rounding; nothing where that was not measured.

        All processes must ask together. The median token decides: a mixture may send a token to another expert for one bit.
        """
        if title not in self._expected:
            return
        expected, found = self._expected[title], self._losses(sharded)
        bound = tolerance(self._dtype) * float(expected.std())
        whole = f"{float(expected.mean()):.4f} in the whole model"
        apart = self._processes.gather((float((found - expected).abs().median()), float(found.mean())))
        problems = [
            Problem(
                f"sharded, the {title} computes something else: a loss of {mean:.4f}, {whole}",
                f"process {index}, {self._ids.shape[1]} tokens, the median one {median:.1e} apart (rounding: up to {bound:.1e})",
                _REPORT,
            )
            for index, (median, mean) in enumerate(apart)
            if not median <= bound  # NaN too
        ]
        if problems:
            self._processes.stop(CheckFailed.from_problems("E117", problems))
        median, mean = max(apart)
        self._console.say(f"sharded, the {title} computes the same: a loss of {mean:.4f}, {whole}; the median token {median:.0e} apart")

    def _of_whole(self, title: str, nbytes: int, load: Callable[[], nn.Module]) -> Tensor | None:
        if not self._processes.main:
            return None
        device = self._processes.device
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
        try:
            if nbytes <= _SHARE_FOR_WEIGHTS * free:
                return self._losses(load())
        except torch.OutOfMemoryError:  # something else on the device took it in between
            pass
        self._console.say(f"the whole {title} does not fit on {device}: what it computes is not compared with what its shards compute")
        return None

    @torch.no_grad()
    def _losses(self, model: nn.Module) -> Tensor:
        """[1, L] float32 on the CPU: cross entropy of each next token; the last position is asked for the first token."""
        ids = self._ids.to(self._processes.device)
        with torch.autocast(ids.device.type, self._dtype, enabled=self._dtype != torch.float32):
            logits = model(input_ids=ids, use_cache=False).logits
        return cross_entropy(logits.flatten(0, 1).float(), ids.roll(-1, 1).flatten(), reduction="none").reshape(ids.shape).cpu()


def tolerance(dtype: torch.dtype) -> float:
    """Half of the digits of the dtype that products are in, as a share of how far the losses of a row are spread.

    Relative to the spread, because half of a random model that is zero moves losses by 0.3 nats, and of a trained one by several.
    """
    return float(torch.finfo(dtype).eps ** 0.5)
