"""Kernels of all linears of a model, compiled together before the first of them is needed.

Servers make all modules, load all weights, and finish module by module. What the modules will multiply is known when they are made, so the
first that is finished has everything compiled, side by side; capture of CUDA graphs and the first request find it in place.
"""

from __future__ import annotations

import logging
import time

import torch

from marlinctl.kernels.prepare import Multiplied, prepare

_expected: set[Multiplied] = set()
_ready: set[tuple[Multiplied, torch.device]] = set()


def expect(product: Multiplied) -> None:
    _expected.add(product)


def compile_expected(device: torch.device, log: logging.Logger) -> None:
    """Raises what launch.load raises. Nothing is compiled for a CPU. log: below the server's own, which decides where lines go."""
    new = [product for product in _expected if (product, device) not in _ready]
    if not new or device.type != "cuda":
        return
    started = time.perf_counter()
    count = prepare(new, device)
    _ready.update((product, device) for product in new)
    log.info("%d kernels for %d shapes of linears are ready, in %.1f s", count, len(new), time.perf_counter() - started)
