"""What a run has folded into each block (checkpoint/orders.py): orders of channels and powers of two. The reader is told of it, so that the
original model, every solve and what is written agree."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from marlinctl.checkpoint.orders import Orders


class Weights(Protocol):
    """What is asked of the reader (reading.py)."""

    def read(self, name: str) -> Tensor: ...

    def reorder(self, orders: Orders) -> None: ...


class Folded:
    """Of a model's blocks."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self._of: dict[int, Orders] = {}

    def of(self, block: int) -> Orders:
        return self._of.get(block, {})

    def put(self, block: int, orders: Orders) -> None:
        """In place of what was folded into the block before."""
        self._of[block] = dict(orders)
        self._inform()

    def forget(self) -> None:
        """All of it. Finished blocks are stored as they are folded, and their original is read as it is."""
        self._of = {}
        self._inform()

    def _inform(self) -> None:
        self.weights.reorder({name: order for orders in self._of.values() for name, order in orders.items()})
