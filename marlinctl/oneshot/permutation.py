"""Orders of channels that are chosen for a block before its linears are solved (models/folds.py, sparsify/permute.py).

    inputs of o and down, with the original weights ─► scores |W| sqrt(H_kk) ─► an order ─► tried: the same output? ─► Reader.reorder

From then on the run reads the block's weights and biases in that order: the original model, every solve and what is written agree, and a
replay takes weights and biases as they are stored. Each order is data of the job and of the result
(checkpoint/orders.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from marlinctl.checkpoint.orders import COLUMNS, ROWS
from marlinctl.errors import UsageError
from marlinctl.models.architectures import Block
from marlinctl.models.folds import Fold
from marlinctl.oneshot.folded import Folded
from marlinctl.sparsify.permute import channel_order
from marlinctl.system.processes import ALONE, Processes

_SAME_OUTPUT = 0.01  # relative difference of what a consumer makes of the first tokens: sums in another order. Otherwise about 1


class Walk(Protocol):
    """What is asked of the pipeline (sequential.py)."""

    def energies(self, block: Block, layer: nn.Module, modules: Sequence[str]) -> dict[str, Tensor]: ...

    def first_input(self, block: Block, layer: nn.Module, module: str) -> Tensor: ...

    def first_left(self, block: Block) -> list[Tensor]: ...

    def install(self, block: Block, layer: nn.Module, tensors: Iterable[str]) -> None: ...


class ChannelOrders:
    """The orders of a model's blocks."""

    def __init__(
        self, folds: Sequence[Mapping[str, tuple[Fold, ...]]], folded: Folded, *, required: bool = False, processes: Processes = ALONE
    ) -> None:
        """folds: of each block, consumer -> what may hold. required: a block in which nothing holds ends the run."""
        self.folds, self.folded, self.required, self.processes = folds, folded, required, processes

    def moved(self, block: int) -> list[str]:
        """Tensors besides weights that an order of the block may move, by their names in the checkpoint."""
        producers = (producer for folds in self.folds[block].values() for fold in folds for producer in fold.producers)
        return list(dict.fromkeys(f"{producer.name}.bias" for producer in producers if producer.bias))

    def choose(self, block: Block, layer: nn.Module, walk: Walk) -> dict[str, Tensor]:
        """Choose the orders of a block, whose module holds its original weights. Returns the columns of each consumer that has one, by its
        name in the block. UsageError E288 where an order is required and nothing holds."""
        before = self.folded.of(block.index)
        folds = self.folds[block.index]
        modules = {consumer: found[0].module for consumer, found in folds.items()}
        energies = walk.energies(block, layer, list(modules.values())) if folds else {}
        found: dict[str, Tensor] = {}
        columns: dict[str, Tensor] = {}
        for consumer, possible in folds.items():
            module = modules[consumer]
            weight = self.folded.weights.read(f"{consumer}.weight").to(energies[module].device).float()
            expected = walk.first_input(block, layer, module).float() @ weight.T
            left = walk.first_left(block)
            for fold in possible:
                order = self.processes.share_tensor(_order(weight, energies[module], fold).cpu())
                orders = orders_of(block, fold, order)
                names = _tensors(fold)
                self.folded.put(block.index, {**before, **found, **orders})
                walk.install(block, layer, names)
                made = walk.first_input(block, layer, module).float() @ weight[:, orders[consumer + COLUMNS].to(weight.device)].T
                holds = float((made - expected).norm()) <= _SAME_OUTPUT * float(expected.norm())
                # Later blocks that read these values (Gemma 4) have an o of their own, whose columns stay.
                holds &= all(map(torch.equal, walk.first_left(block), left))
                if self.processes.share(holds):
                    found |= orders
                    columns[module] = orders[consumer + COLUMNS]
                    break
                self.folded.put(block.index, {**before, **found})
                walk.install(block, layer, names)
        if self.required and not columns:
            raise UsageError(
                "E288", "no linear of this block reads channels whose order can be undone", where=f"--permute always, {block.prefix}",
                fix="use --permute auto, which leaves such blocks as they are",
            )  # fmt: skip
        return columns


def orders_of(block: Block, fold: Fold, order: Tensor) -> dict[str, Tensor]:
    """order: [channels], the channel that comes to each place. Rows of the producers and columns of the consumer, int64 on the CPU."""
    found: dict[str, Tensor] = {}
    for producer in fold.producers:
        name = producer.name + ROWS
        rows = found.setdefault(name, torch.arange(block.linears[producer.name].out_features))
        rows[producer.first : producer.first + fold.channels] = producer.first + order
    within = order.reshape(fold.segments, fold.width) % fold.width
    copies = torch.arange(fold.segments * fold.repeats).reshape(fold.segments, fold.repeats, 1) * fold.width
    found[fold.consumer + COLUMNS] = (copies + within.unsqueeze(1)).flatten()
    return found


def _order(weight: Tensor, energies: Tensor, fold: Fold) -> Tensor:
    """[channels] int64 by the weight [N, K] of the consumer and the sums of squares of its inputs [K]."""
    scores = (weight.abs() * energies.sqrt()).reshape(len(weight), fold.segments, fold.repeats, fold.width)
    parts = [channel_order(part.flatten(0, 1)) + i * fold.width for i, part in enumerate(scores.unbind(1))]
    return torch.cat(parts)


def _tensors(fold: Fold) -> list[str]:
    """What the producers hold, by its names in the checkpoint."""
    producers = dict.fromkeys(fold.producers)
    return [f"{p.name}.weight" for p in producers] + [f"{p.name}.bias" for p in producers if p.bias]
