"""What planning counts for each step of the solver against what torch allocates in it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from marlinctl.quantize import drift, gptq, hessian, memory, solver
from marlinctl.quantize.types import Hessian
from marlinctl.sparsify import memory as pruning
from marlinctl.sparsify import sparsegpt

ROWS, K, GROUP = 1024, 512, 64
STACK, SQUARE = 4 * ROWS * K, 4 * K * K


def allocated(work: Callable[[], object]) -> int:
    """Bytes alive at the peak of `work`, without what was there before."""
    work()  # libraries allocate once
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most


def settings(refine: int) -> gptq.SolveSettings:
    return gptq.SolveSettings(
        group_size=GROUP, both_signs=True, bfloat16_exact=False, act_order="static", scale_search="hessian", damping=0.01, refine=refine
    )  # fmt: skip


def steps() -> dict[str, tuple[memory.Arrays, int, Callable[[], object]]]:
    """What is counted, what of it is there before the step, and the step."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2 * K, K, generator=generator), torch.randn(ROWS, K, generator=generator)
    plain = Hessian(x.T @ x / len(x), len(x))
    drifted = Hessian(plain.matrix, len(x), 0.01 * torch.randn(K, K, generator=generator))
    refined = max(memory.descend(ROWS, K), memory.refit_scales(ROWS, K, K // GROUP), key=lambda arrays: sum(n * b for n, b in arrays))
    pruned = sparsegpt.PruneSettings(method="iterative", damping=0.01, mask_sweeps=1, iterations=2)
    return {
        "mirror": (memory.mirror(K), SQUARE, lambda: hessian.mirror(plain.matrix)),
        "drift": (
            memory.corrected_target(ROWS, K),
            STACK + SQUARE,
            lambda: drift.corrected_target(weight, drifted, drift.DriftSettings(0.5, 0.01)),
        ),
        "factor": (memory.factor(ROWS, K, 0.01), 2 * STACK + 2 * SQUARE, lambda: solver.factor(plain.matrix, 0.01)),
        "factor in float64": (memory.factor(ROWS, K, 1e-3), 2 * STACK + 2 * SQUARE, lambda: solver.factor(plain.matrix, 1e-3)),
        "solve": (memory.solve(ROWS, K), STACK + SQUARE, lambda: gptq.solve(weight, plain, settings(0))),
        "refine": (refined, STACK + SQUARE, lambda: gptq.solve(weight, plain, settings(1))),
        "prune": (pruning.prune(ROWS, K), STACK + SQUARE, lambda: sparsegpt.prune(weight, plain, pruned)),
    }


@pytest.mark.parametrize("step", ["mirror", "drift", "factor", "factor in float64", "solve", "refine", "prune"])
@torch.no_grad()
def test_the_count_is_what_is_allocated(step: str) -> None:
    """A step that came to hold one more copy of the weights would end large runs at their first block, after `plan` had promised memory."""
    counted, there, work = steps()[step]
    total = sum(number * size for number, size in counted)
    assert 0.95 * (there + allocated(work)) <= total <= 1.2 * (there + allocated(work))
