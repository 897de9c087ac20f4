"""Which configurations the quick suite builds: those in which each way that a kernel's warps share the work occurs. `make slow` has all.

Where a compiler's registers matter they are the largest, which spill first; where products are computed they are the smallest, which take
the least time. The kernel's other end is built too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from marlinctl.kernels.configurations import Configuration

TYPES = (torch.float16, torch.bfloat16)


def representatives(configurations: Sequence[Configuration], *, largest: bool) -> list[Configuration]:
    """In their order. configurations: of one kernel."""
    by_size = sorted(configurations, key=lambda c: (c.tokens * 4 // c.split, c.columns), reverse=largest)
    seen, chosen = set[tuple[str, object]](), [by_size[-1]]
    for c in by_size:
        ways = {"split": c.split, "K": c.k_warps > 1, "scales": c.scale_weights, "parts": c.parts, "ordered": c.ordered}
        if not ways.items() <= seen:
            seen |= ways.items()
            chosen.append(c)
    return [c for c in configurations if c in chosen]


def with_types(*kernels: Sequence[Configuration], largest: bool) -> list[tuple[Configuration, torch.dtype]]:
    """Representatives of each kernel, float16 and bfloat16 by turns."""
    return [(c, TYPES[i % 2]) for configurations in kernels for i, c in enumerate(representatives(configurations, largest=largest))]
