"""Which of the original's rows and columns lie where in a folder that was pruned with --permute: marlinctl/order.safetensors.

    P.rows      [N] int32    row n of linear P, weight and bias, is the original's row P.rows[n]
    P.columns   [K] int32    column k of its weight is the original's column P.columns[k]

The model computes the same in either order (models/folds.py); whoever compares weights with the original's, or fits an adapter that was
made for it, needs the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from marlinctl.checkpoint.model_files import ORDER_FILE
from marlinctl.checkpoint.reader import Checkpoint
from marlinctl.checkpoint.safetensors_header import read_header
from marlinctl.errors import BadInput, Problem
from marlinctl.system.files import exists

if TYPE_CHECKING:
    from torch import Tensor

ROWS, COLUMNS = ".rows", ".columns"

Orders = Mapping[str, "Tensor"]


def read_orders(folder: Path) -> Orders:
    """Those of a folder, each a permutation; {} where it has none. BadInput E301 for a damaged file."""
    import torch

    if not exists(folder, ORDER_FILE):
        return {}
    infos, problems = read_header(folder, ORDER_FILE)
    fix = "fetch or write the checkpoint again; the model itself does not need this file"
    where = str(folder / ORDER_FILE)
    problems += [
        Problem(f"{name} is not an order of rows or columns", where, fix)
        for name, info in infos.items()
        if not name.endswith((ROWS, COLUMNS)) or info.dtype != "I32" or len(info.shape) != 1
    ]
    if problems:
        raise BadInput.from_problems("E301", problems)
    with Checkpoint(folder, {}, infos, (folder / ORDER_FILE,)) as checkpoint:
        orders = {name: checkpoint.read(name).long() for name in infos}
    for name, order in orders.items():
        if not torch.equal(order.sort().values, torch.arange(len(order))):
            raise BadInput("E301", f"{name} is not a permutation", where=where, fix=fix)
    return orders


def relative(ours: Orders, theirs: Orders) -> Orders:
    """Which of their rows and columns lie where in ours, both given by those of one original. {} where they are alike."""
    import torch

    found = {}
    for name in {*ours, *theirs}:
        known = ours.get(name, theirs.get(name))
        assert known is not None
        identity = torch.arange(len(known))
        order = theirs.get(name, identity).argsort()[ours.get(name, identity)]
        if not torch.equal(order, identity):
            found[name] = order
    return found


def reordered(name: str, tensor: Tensor, orders: Orders) -> Tensor:
    """The original's tensor `name` in these orders. ValueError where one has another length."""
    linear = name.rpartition(".")[0]
    for axis, what in enumerate((ROWS, COLUMNS)[: tensor.ndim]):
        order = orders.get(linear + what)
        if order is not None:
            if len(order) != tensor.shape[axis]:
                raise ValueError(f"{linear}{what} orders {len(order)} of {tensor.shape[axis]}")
            tensor = tensor.index_select(axis, order.to(tensor.device))
    return tensor
