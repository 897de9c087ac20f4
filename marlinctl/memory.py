"""How much memory a run takes, before it and after it."""

from __future__ import annotations

import resource
import sys

from marlinctl.models import Architecture

BASE = int(0.6 * 2**30)  # python, torch and transformers before any tensor


def predicted_peak(architecture: Architecture, *, samples: int, length: int, element: int, chunk_tokens: int, matches: bool) -> int:
    """Upper bound of anonymous memory in bytes: hidden states once, three K x K matrices, two blocks, chunks of the widest activation.

    matches: the original walks along, which takes its hidden states, one more matrix and the double precision of its regression.
    """
    hidden = samples * length * architecture.hidden_size * element * (2 if matches else 1)
    largest_k = max(spec.in_features for spec in architecture.linears.values())
    widest = max(spec.out_features for spec in architecture.linears.values())
    block = max(sum(s.out_features * s.in_features for s in b.linears.values()) for b in architecture.blocks)
    chunk = max(chunk_tokens, length) * max(largest_k, widest) * 4
    matrices = (3 + (5 if matches else 0)) * largest_k * largest_k * 4
    return BASE + hidden + matrices + 2 * block * 4 + 3 * chunk


def peak_rss() -> int:
    """The largest resident size of this process so far, in bytes, mapped file pages included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
