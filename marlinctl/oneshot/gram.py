"""Sums over calibration tokens that become the Hessian of the linears which read them, and who takes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from marlinctl.errors import NumericalProblem
from marlinctl.oneshot.input_rounding import Rows
from marlinctl.quantize.hessian import add_cross, add_gram, mirror
from marlinctl.quantize.types import Hessian
from marlinctl.system.processes import ALONE, Processes

LOST_TOKENS_LIMIT = 0.1  # share of calibration tokens whose activations may be NaN or infinite before the run stops

# Called with the names of linears that share an input, that input's Hessian (None where they are solved already and only replayed), and a
# remark for the report ("" mostly); returns each linear's final weight [N, K] float32.
SolveStage = Callable[[tuple[str, ...], Hessian | None, str], Mapping[str, Tensor]]


@dataclass(frozen=True, slots=True)
class StageInput:
    """What a SolveStage is called with."""

    names: tuple[str, ...]
    hessian: Hessian | None
    remark: str = ""


# The same for linears with several inputs, which do not depend on each other: the experts of a block.
SolveStages = Callable[[Sequence[StageInput]], Sequence[Mapping[str, Tensor]]]


class Gram:
    """The running sum of x xᵀ over counted tokens. A token with a value that is not finite is dropped and counted.

    Where drift is corrected, also those of x x'ᵀ and x (r' - r)ᵀ (quantize/types.py, Hessian).
    """

    def __init__(self, k: int, device: torch.device, *, collects: bool = True, drifts: bool = False, rows: Rows | None = None) -> None:
        """collects: False for a replay, which needs no Hessian: nothing is summed. drifts: there is a sum of x x'ᵀ also where no token
        comes, as it may be for an expert in one of several processes. rows: takes some of the inputs."""
        self.rows = rows
        self.collects = collects
        size = k if collects else 0
        self.total = torch.zeros(size, size, dtype=torch.float32, device=device)
        self.tokens: int | Tensor = 0  # on a GPU tensors, so that no chunk waits for it
        self.lost: int | Tensor = 0
        self.cross: Tensor | None = torch.zeros_like(self.total) if collects and drifts else None
        self.residual: Tensor | None = None

    def add(self, x: Tensor, counted: Tensor) -> None:
        if not self.collects:
            return
        rows = x.reshape(-1, x.shape[-1])
        if self.rows is not None:
            self.rows.add(rows, counted.reshape(-1))
        if rows.is_cuda:  # zeros add nothing, and no chunk waits for their number
            wanted = counted.reshape(-1, 1).to(rows.device)
            good = _finite(rows).unsqueeze(-1) & wanted
            self.tokens, self.lost = self.tokens + good.sum(), self.lost + (wanted & ~good).sum()
            add_gram(self.total, torch.where(good, rows, 0))
            return
        if not bool(counted.all()):
            rows = rows[counted.reshape(-1).to(rows.device)]
        if not bool(torch.isfinite(rows.sum())):
            good = torch.isfinite(rows).all(-1)
            self.lost += int((~good).sum())
            rows = rows[good]
        self.tokens += rows.shape[0]
        add_gram(self.total, rows)

    def add_drift(self, x: Tensor, original: Tensor, counted: Tensor) -> None:
        if self.cross is None:
            self.cross = torch.zeros_like(self.total)
        add_cross(self.cross, *self._usable(x, original, counted))

    def add_residual(self, x: Tensor, difference: Tensor, counted: Tensor) -> None:
        if self.residual is None:
            self.residual = torch.zeros(x.shape[-1], difference.shape[-1], dtype=torch.float32, device=x.device)
        wide = x if x.dtype == torch.bfloat16 and x.is_cuda else x.float()
        add_cross(self.residual, *self._usable(wide, difference, counted))

    def _usable(self, x: Tensor, y: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of both that are counted and finite; on a GPU the others are there as zeros."""
        x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        good = counted.reshape(-1).to(x.device) & _finite(x) & _finite(y)
        if x.is_cuda:  # zeros add nothing, and no chunk waits for their number
            return torch.where(good.unsqueeze(-1), x, 0), torch.where(good.unsqueeze(-1), y, 0)
        return x[good], y[good]

    def hessian(self, names: tuple[str, ...], processes: Processes = ALONE) -> Hessian | None:
        """The mean over the tokens of all processes, which ask together. NumericalProblem E620 where too many were not finite."""
        if not self.collects:
            return None
        if processes.count > 1:
            counts = torch.tensor([int(self.tokens), int(self.lost)], device=self.total.device)
            self.tokens, self.lost = processes.sum(counts).tolist()
            for summed in (self.total, self.cross, self.residual):
                if summed is not None:
                    processes.sum(summed)
        self.tokens, self.lost = int(self.tokens), int(self.lost)
        if self.lost > LOST_TOKENS_LIMIT * (self.tokens + self.lost):
            raise NumericalProblem(
                "E620",
                f"the inputs of this linear are NaN or infinite for {self.lost} of {self.tokens + self.lost} calibration tokens",
                where=", ".join(names),
                fix="check the model with its own weights first; a model that overflows in bfloat16 needs --dtype float32",
            )
        count = max(self.tokens, 1)
        matrix = mirror(self.total).div_(count)
        drift = None if self.cross is None else self.cross.div_(count).sub_(matrix)
        residual, inputs = None if self.residual is None else self.residual.div_(count), None if self.rows is None else self.rows.tensor()
        return Hessian(matrix, self.tokens, drift, residual, inputs)


def settle(grams: Sequence[Gram]) -> None:
    """The numbers of tokens of all as integers, with one wait for the device in place of two for each."""
    if any(isinstance(gram.tokens, Tensor) for gram in grams):
        numbers = [torch.as_tensor(number, device=gram.total.device) for gram in grams for number in (gram.tokens, gram.lost)]
        flat = torch.stack(numbers).tolist()
        for i, gram in enumerate(grams):
            gram.tokens, gram.lost = flat[2 * i], flat[2 * i + 1]


def _finite(rows: Tensor) -> Tensor:
    """[T, K] -> [T] bool: no value is NaN or infinite. One pass; isfinite(rows).all(-1) is five (13 against 2 ms a block of Llama-3-8B)."""
    return torch.isfinite(torch.linalg.vector_norm(rows, torch.inf, dim=-1))
