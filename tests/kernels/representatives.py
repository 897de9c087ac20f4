"""Which configurations the quick suite builds: one for each way that a kernel's warps share the work. `make slow` has them all.

Those that it stands for differ in sizes alone. Where a compiler's registers matter it is the largest, which spills first; where products
are computed it is the smallest, which takes the least time. The kernel's other end is built too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from marlinctl.kernels.configurations import Configuration

TYPES = (torch.float16, torch.bfloat16)


def representatives(configurations: Sequence[Configuration], *, largest: bool) -> list[Configuration]:
    """In their order. configurations: of one kernel."""
    by_size = sorted(configurations, key=lambda c: (c.tokens * 4 // c.split, c.columns), reverse=not largest)
    chosen = {(c.split, c.k_warps, c.scale_weights, c.parts, c.ordered): c for c in by_size}
    return [c for c in configurations if c in (by_size[0], *chosen.values())]


def with_types(*kernels: Sequence[Configuration], largest: bool) -> list[tuple[Configuration, torch.dtype]]:
    """Representatives of each kernel, float16 and bfloat16 by turns."""
    return [(c, TYPES[i % 2]) for configurations in kernels for i, c in enumerate(representatives(configurations, largest=largest))]
