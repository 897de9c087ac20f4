"""How much each calibration token counts in the Hessian of each linear (recipe: token_weights).

GuidedQuant (arXiv 2505.07004) weights a token by the mean square of the gradient of the loss with respect to the outputs of the linear.
Here outputs are one group, and linears that share an input have one weight. The loss is that of gradients.py. The root of the mean square
is taken: the mean square itself gains less in most recipes (docs/log/2026-12-01-accuracy.md).

Weights are computed once, with the original's weights, before the first block is solved, and kept with the job.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from marlinctl.models.architectures import Architecture, Block
from marlinctl.oneshot.gradients import squared_gradients, stages_of
from marlinctl.oneshot.resume import RunJob
from marlinctl.oneshot.sequential import SequentialPipeline
from marlinctl.system.console import Console
from marlinctl.system.processes import ALONE, Processes

_POWER = 0.5
LARGEST = 100.0


def weights_of(squares: Tensor, counted: Tensor, processes: Processes = ALONE) -> Tensor:
    """[S, L] float32: the root of each mean square, over its mean over the counted tokens of all processes, and then at most LARGEST, so
    that the mean of the result may be below 1. Tokens that do not count, and those whose square is not finite, have weight 0. Where every
    square is 0, the loss does not depend on these outputs, and all tokens that count have weight 1.

    squares: [S, L] float32. counted: [S, L] bool, on the same device.
    """
    roots = torch.where(counted & torch.isfinite(squares), squares, 0).double().pow(_POWER)
    total, count = processes.sum(torch.stack([roots.sum(), counted.sum().double()]))
    if not float(total):
        return counted.float()
    return (roots * (count / total)).clamp_max(LARGEST).float()


def computed(
    walk: SequentialPipeline, samples: int, seed: int, *, expect: Callable[[Block], None], done: Callable[[], None]
) -> dict[str, Tensor]:
    """First linear of each stage -> the weights of this process's tokens, [S, L] float32 on the CPU. walk: before its first block, and used
    up. samples: of all processes. seed: of the tokens that the model draws. expect, done: as in gradients.py."""
    generator = torch.Generator().manual_seed(seed)  # on the CPU, and a number for each token: the same on every device, in any chunks
    draws = torch.rand((samples, walk.length), generator=generator, dtype=torch.float64)[walk.processes.part_of(samples)]
    counted = walk.is_counted(slice(0, walk.samples))
    found: dict[str, Tensor] = {}
    for squares in squared_gradients(walk, draws, expect=expect, done=done):
        found |= {first: weights_of(square, counted, walk.processes).cpu() for first, square in squares.items()}
    return found


def token_weights(
    job: RunJob, architecture: Architecture, samples: int, seed: int, pipeline: Callable[[], SequentialPipeline], console: Console,
    processes: Processes, *, expect: Callable[[Block], None],
) -> dict[str, Tensor]:  # fmt: skip
    """Linear -> the weights of this process's tokens, [S, L] float32: those that the job keeps, or computed now and kept.

    pipeline: a new one. samples: of all processes.
    """
    kept = job.token_weights() if processes.main else None
    names = [first for block in architecture.blocks for first in stages_of(block)]
    if not processes.share(kept is not None):
        with console.progress("token weights", 2 * len(architecture.blocks)) as progress:
            own = computed(pipeline(), samples, seed, expect=expect, done=progress.advance)
        whole = {name: processes.collect(own[name], samples) for name in names}
        if processes.main:
            job.keep_token_weights({name: weights for name, weights in whole.items() if weights is not None})
    else:
        length = processes.share(next(iter(kept.values())).shape[1] if kept else 0)
        like = torch.empty(len(range(samples)[processes.part_of(samples)]), length)
        own = {name: processes.hand_out(None if kept is None else kept.get(name), like, samples) for name in names}
    return for_all_linears(architecture.blocks, own)


def for_all_linears(blocks: Iterable[Block], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of the first linears of stages -> of all."""
    return {name: weights[first] for block in blocks for first, names in stages_of(block).items() for name in names}
