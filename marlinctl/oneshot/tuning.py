"""A block's scales and norms, tuned toward the original block's output after its linears are solved. Codes and masks stay.

    hidden states of the compressed model ─► block, scale x factor, norm x factor ─► output      original model's hidden states behind it
                                                    ▲                                  └── relative error of each token ──┘
                                                    └── Adam on the factors, from 1; the best on held-out samples is kept

A solve minimises the error of one linear at a time; here those of a block make up for each other and for the blocks before. With codes
free as well the result is worse, and so is plain rounding with more steps (docs/log/2026-11-30-accuracy.md). Factors are rounded as the
checkpoint holds scales and norms before they are judged. Scales that are small integers times one number for each row (integer group
scales) have one factor a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from marlinctl.models.architectures import Block
from marlinctl.quantize.grid import round_scales
from marlinctl.quantize.integer_fit import has_form, rescaled
from marlinctl.quantize.scheme import INT4
from marlinctl.quantize.types import QuantizedLinear, values_of
from marlinctl.system.processes import ALONE, Processes

HELD_OUT = 8  # of so many chunks of samples one judges
_LOOKS = 8  # at the held-out samples
_WARM_UP = 0.1  # of the steps


class Walk(Protocol):
    """What is asked of the pipeline (sequential.py)."""

    device: torch.device
    dtype: torch.dtype

    def chunks(self) -> Iterator[slice]: ...

    def is_counted(self, samples: slice) -> Tensor: ...

    def output_with(self, block: Block, layer: nn.Module, values: Mapping[str, Tensor], samples: slice) -> Tensor: ...

    def target(self, samples: slice) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class TuneSettings:
    """The recipe has the defaults (recipes/schema.py)."""

    steps: int  # of the optimiser for each block, each over one chunk of samples in each process
    learning_rate: float  # of factors, so a share of each scale


@dataclass(frozen=True, slots=True)
class Tuned:
    """What became of a block."""

    linears: Mapping[str, QuantizedLinear]  # with new scales
    others: Mapping[str, Tensor]  # norms and biases by their names in the checkpoint, in the dtype in which they are stored
    before: float  # mean relative error of the held-out tokens
    after: float


def tunable(block: Block) -> list[str]:
    """Norms and biases of a block, by their names in the checkpoint. Not what is named otherwise: decays and time steps of a recurrence
    (A_log, dt_bias) are exponents, and sinks and scalars of a layer no part of a linear's output."""
    apart = {*block.buffers, *block.pieces}
    found = (name for name, shape in block.others.items() if len(shape) == 1 and name not in apart)
    return [name for name in found if name.endswith((".weight", ".bias"))] if block.in_one_pass else []


def holds_out(walk: Walk, processes: Processes = ALONE) -> bool:
    """Whether each process has a chunk of samples to train with and one that judges."""
    return not processes.largest(sum(1 for _ in walk.chunks()) < 2)


def tune_block(
    block: Block, layer: nn.Module, linears: Mapping[str, QuantizedLinear], stored: Mapping[str, torch.dtype], walk: Walk,
    settings: TuneSettings, *, bfloat16_exact: bool, processes: Processes = ALONE,
) -> Tuned | None:  # fmt: skip
    """linears: the solved ones by their names, which `layer` holds. stored: dtypes of `tunable` tensors. None where nothing gets better.
    Where `holds_out`."""
    if not linears:
        return None
    trained = list(walk.chunks())
    held_out = [trained.pop() for _ in range(max(1, len(trained) // HELD_OUT))]
    factors = _Factors(block, layer, linears, stored, walk.dtype, bfloat16_exact)

    def error(values: Mapping[str, Tensor], samples: slice) -> tuple[Tensor, Tensor]:
        """Sum of the relative errors of the counted tokens, and their number."""
        target = walk.target(samples).float()
        energy = target.square().sum(-1)
        lost = (walk.output_with(block, layer, values, samples).float() - target).square().sum(-1)
        usable = walk.is_counted(samples) & torch.isfinite(lost.detach()) & (energy > 0)
        return torch.where(usable, lost / energy.clamp_min(torch.finfo(torch.float32).tiny), 0).sum(), usable.sum()

    def judged() -> float:
        values = factors.rounded()
        parts = [torch.stack([part.double() for part in error(values, samples)]) for samples in held_out]
        lost, count = processes.sum(torch.stack(parts).sum(0)).tolist()
        return float(lost / max(count, 1.0))

    before = best = judged()
    kept = factors.copies()
    optimizer = torch.optim.Adam(factors.trained, lr=settings.learning_rate, betas=(0.9, 0.99), eps=1e-12)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _schedule(settings.steps))
    for step in range(settings.steps):
        optimizer.zero_grad()
        with torch.enable_grad():
            error(factors.values(), trained[(step * _stride(len(trained))) % len(trained)])[0].backward()
        for factor in factors.trained:
            assert factor.grad is not None
            processes.sum(factor.grad)
        optimizer.step()
        schedule.step()
        if (step + 1) % max(1, settings.steps // _LOOKS) == 0 and (now := judged()) < best:
            best, kept = now, factors.copies()
    if not best < before:
        return None
    factors.put_back(kept)
    return Tuned(factors.linears(), factors.others(), before, best)


def _schedule(steps: int) -> Callable[[int], float]:
    """Share of the learning rate at each step: up, and down to nothing."""
    warm_up = max(1, round(_WARM_UP * steps))
    return lambda step: min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))


def _stride(count: int) -> int:
    """So that consecutive steps see samples from all over the text: about 0.6 of `count`, without a common divisor."""
    found = max(1, round(0.618 * count))
    while math.gcd(found, count) > 1:
        found += 1
    return found


class _Factors:
    """Parameters of a block's module as functions of factors, all 1 at first."""

    def __init__(
        self, block: Block, layer: nn.Module, linears: Mapping[str, QuantizedLinear], stored: Mapping[str, torch.dtype], dtype: torch.dtype,
        bfloat16_exact: bool,
    ) -> None:  # fmt: skip
        self._block, self._linears, self._stored, self._dtype, self._bfloat16_exact = block, linears, stored, dtype, bfloat16_exact
        self._steps = {name: _steps_of(linear).to(dtype) for name, linear in linears.items()}  # [N, G, group]
        self._scales = {name: linear.scales.float() for name, linear in linears.items()}
        self._plain = {name: layer.get_parameter(block.parameter(name)).detach().float() for name in stored}
        self._of = {name: torch.ones_like(start) for name, start in (self._scales | self._plain).items()}
        self._integer = {name for name, scales in self._scales.items() if linears[name].grid == INT4 and has_form(scales)}
        self._of |= {name: self._of[name][:, :1].clone() for name in self._integer}
        for factor in self._of.values():
            factor.requires_grad_(True)

    @property
    def trained(self) -> list[Tensor]:
        return list(self._of.values())

    def copies(self) -> list[Tensor]:
        return [factor.detach().clone() for factor in self.trained]

    def put_back(self, copies: list[Tensor]) -> None:
        for factor, copy in zip(self.trained, copies, strict=True):
            factor.data.copy_(copy)

    def values(self) -> dict[str, Tensor]:
        """What the block computes with while it is trained."""
        found = {
            self._parameter(f"{name}.weight"): (steps * (self._scales[name] * self._of[name]).to(self._dtype).unsqueeze(-1)).flatten(-2)
            for name, steps in self._steps.items()
        }
        return found | {self._parameter(name): (start * self._of[name]).to(self._dtype) for name, start in self._plain.items()}

    def rounded(self) -> dict[str, Tensor]:
        """What it would compute with from the checkpoint."""
        found = {self._parameter(f"{name}.weight"): linear.dequantize().to(self._dtype) for name, linear in self.linears().items()}
        return found | {self._parameter(name): value.to(self._dtype) for name, value in self.others().items()}

    def linears(self) -> dict[str, QuantizedLinear]:
        return {name: replace(linear, scales=self._rounded(name).to(linear.scales.dtype)) for name, linear in self._linears.items()}

    def _rounded(self, name: str) -> Tensor:
        """Scales [N, G] of a linear."""
        start, factor = self._scales[name], self._of[name].detach()
        if name in self._integer:
            return rescaled(start, factor, self._bfloat16_exact)
        return round_scales(start * factor, self._bfloat16_exact)

    def others(self) -> dict[str, Tensor]:
        return {name: (start * self._of[name].detach()).to(self._stored[name]) for name, start in self._plain.items()}

    def _parameter(self, name: str) -> str:
        return self._block.parameter(name)


def _steps_of(linear: QuantizedLinear) -> Tensor:
    """Codes as steps from zero, [N, G, group]; of FP8 their values."""
    codes = values_of(linear.codes, linear.grid) if linear.grid.floating else linear.codes
    codes = codes.unflatten(-1, (linear.scales.shape[-1], -1))
    return codes if linear.zeros is None else codes.short() - linear.zeros.unsqueeze(-1)
