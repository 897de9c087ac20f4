"""How many calibration tokens there are for each input of a linear: what decides how well its Hessian is known. Nothing here imports torch.

Under 16 the solve loses accuracy that more samples give back, whatever the damping (docs/log/2026-11-30-accuracy.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from marlinctl.models.architectures import Architecture
from marlinctl.planning.memory import Stage, stages
from marlinctl.recipes.schema import Calibration

ENOUGH = 16


@dataclass(frozen=True, slots=True)
class TokensPerInput:
    """Of the linear that has fewest."""

    value: float
    stage: Stage
    wanted: int  # samples with which there would be enough

    @property
    def few(self) -> bool:
        return self.value < ENOUGH

    def __str__(self) -> str:
        whose = "an expert's widest linear, in the mean over experts" if self.stage.experts > 1 else "the widest linear"
        said = f"{_figure(self.value)} calibration tokens for each input of {whose} (K={self.stage.k:,})"
        return f"{said}: few, and weights are damped more for it; --samples {self.wanted} gives {ENOUGH}" if self.few else said


def fewest(
    architecture: Architecture, compressed: Mapping[str, int], asked: Calibration, tokens: int | None = None
) -> TokensPerInput | None:
    """compressed: linear -> group size. tokens: of all samples, where they are known. None where nothing is compressed."""
    found = [stage for stage in stages(architecture, compressed) if stage.rows]
    if not found:
        return None
    least = min(found, key=lambda stage: stage.share / stage.k)
    most = asked.samples * asked.sequence_length if tokens is None else tokens
    wanted = math.ceil(ENOUGH * least.k / least.share * asked.samples / max(most, 1))
    return TokensPerInput(most * least.share / least.k, least, wanted)


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= ENOUGH else f"{value:.2g}"
