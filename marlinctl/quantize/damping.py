"""The ridge that is added to a Hessian: a fraction of its mean diagonal, given or by the number of calibration tokens.

A Hessian of T tokens knows the input's second moments only up to noise, which is the larger the fewer tokens there are for each of the K
inputs. A solve trusts directions that calibration happened not to show, and the ridge is what holds it back. The best fraction on tokens
that calibration did not see follows about 6 K / T (docs/log/2026-11-30-accuracy.md): GPTQ's 0.01 is right for 600 tokens per input.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `plan` reads this module without torch
    from marlinctl.quantize.types import Hessian

LEAST, MOST = 0.01, 1.0
INPUTS_BY_TOKENS = 6.0  # the fraction where there is one token per input

Damping = float | None  # a fraction of mean(diag H); None: by the tokens per input


def damping_for(tokens: int, k: int) -> float:
    """The fraction for a Hessian [K, K] of so many tokens."""
    return min(max(INPUTS_BY_TOKENS * k / max(tokens, 1), LEAST), MOST)


def damping_of(damping: Damping, hessian: Hessian) -> float:
    """What `damping` means for this Hessian."""
    return damping_for(hessian.tokens, hessian.matrix.shape[0]) if damping is None else damping
