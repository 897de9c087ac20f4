"""What it costs to round the inputs of a linear to 8 bits, on some of the calibration tokens, and which linears keep 16.

    inputs of a stage, every so many tokens ─► Rows ─► x [T, K] ─► for each linear that reads them, the mean over tokens of
                                                                   |(round(x) - x) Wᵀ|² / |x Wᵀ|²

A token's scale is its own, so each token counts alike however long it is: sums over tokens would be those of the few with massive
activations. Linears that share an input are rounded together or not at all, since servers multiply them as one; the worst of them decides.
Experts of a mixture are never rounded, and not measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from marlinctl.quantize.activations import RoundedAs, nearest

KEPT_ROWS = 512  # of the inputs of a linear: the error is that of all tokens within a few percent
# Of the output's energy. The median linear loses 0.0025 to 0.003 of it by 4-bit weights, nine of ten lose less than 0.0046 to 0.0065
# (SmolLM2-135M, Qwen2.5-Coder-0.5B). Rounding with one scale a token costs 0.0001 to 0.0066, with several 0.0018 at most (2026-12-01).
LIMIT = 0.005


class Rows:
    """Some of the inputs of a linear, evenly spread over the tokens. Those that do not count, or are not finite, are zeros."""

    def __init__(self, tokens: int, length: int) -> None:
        """tokens: that will come. length: of a sample; no number divides both it and the distance of the rows, so that these lie at all
        places of a sample: the first token of each is like no other."""
        self.distance = next(d for d in range(max(1, tokens // KEPT_ROWS), 0, -1) if gcd(d, length) == 1)
        self._seen, self._parts = 0, list[Tensor]()

    def add(self, x: Tensor, counted: Tensor) -> None:
        """x: [T, K], the next tokens. counted: [T] bool."""
        chosen = slice(-self._seen % self.distance, None, self.distance)
        part, wanted = x[chosen], counted[chosen].to(x.device)
        good = wanted & torch.isfinite(torch.linalg.vector_norm(part, torch.inf, dim=-1))
        self._parts.append(torch.where(good.unsqueeze(-1), part, 0))
        self._seen += len(x)

    def tensor(self) -> Tensor | None:
        """[T, K]; None where no token came."""
        return torch.cat(self._parts) if self._parts else None


@dataclass(frozen=True, slots=True)
class InputFacts:
    """Of the inputs that were kept."""

    mean: float  # in standard deviations
    spread: float  # a token's largest magnitude over its root mean square; the mean of all tokens
    rounding_error: float  # share of the output's energy that rounding changes; the mean of all tokens


def measure(x: Tensor, weights: Mapping[str, Tensor], rounding: RoundedAs) -> dict[str, InputFacts]:
    """x: [T, K] of any float type, what all these weights [N, K] float32 are multiplied with. Tokens of zeros do not count."""
    x = x.float()
    x = x[(x != 0).any(-1)]
    if not len(x):
        return {name: InputFacts(0.0, 0.0, 0.0) for name in weights}
    mean, deviation = float(x.mean()), float(x.std(correction=0))
    spread = float((x.abs().amax(-1) / x.square().mean(-1).sqrt()).mean())
    change = nearest(x, rounding) - x
    found = {}
    for name, weight in weights.items():
        energy = (x @ weight.T).square().sum(-1)
        share = (change @ weight.T).square().sum(-1) / energy
        shares = share[energy > 0]
        error = float(shares.mean()) if len(shares) else 0.0
        found[name] = InputFacts(mean / deviation if deviation > 0 else 0.0, spread, error)
    return found


def stays(facts: Mapping[str, InputFacts]) -> bool:
    """Whether linears that share an input keep it as it is."""
    return any(not one.rounding_error <= LIMIT for one in facts.values())  # NaN too
