"""What was folded into the weights of a folder before it was compressed (--permute, --equalize, --rotate): marlinctl/order.safetensors.

    P.rows              [N] int32    row n of P, weight and bias, is the original's row P.rows[n]
    P.columns           [K] int32    column k of its weight is the original's column P.columns[k]
    P.row_exponents     [N] int32    row n, weight and bias, is then multiplied by 2 to the power of P.row_exponents[n]
    P.column_exponents  [K] int32    column k is multiplied by 2 to the power of P.column_exponents[k]

    rotation.*                     of the whole model, before all of these (rotated.py)

P is a linear, or a norm, whose weight has rows alone. The model computes the same (models/folds.py, oneshot/equalization.py); whoever
compares weights with the original's, or fits an adapter that was made for it, needs the file.
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

ROTATION = "rotation."
ROWS, COLUMNS = ".rows", ".columns"
ROW_EXPONENTS, COLUMN_EXPONENTS = ".row_exponents", ".column_exponents"
MOST_EXPONENT = 30  # of either sign, that a file may hold

Orders = Mapping[str, "Tensor"]


def read_orders(folder: Path) -> Orders:
    """What was folded into a folder's weights; {} where nothing was. BadInput E301 for a damaged file."""
    import torch

    if not exists(folder, ORDER_FILE):
        return {}
    infos, problems = read_header(folder, ORDER_FILE)
    infos = {name: info for name, info in infos.items() if not name.startswith(ROTATION)}
    fix = "fetch or write the checkpoint again; the model itself does not need this file"
    where = str(folder / ORDER_FILE)
    problems += [
        Problem(f"{name} is not of rows or columns", where, fix)
        for name, info in infos.items()
        if not name.endswith((ROWS, COLUMNS, ROW_EXPONENTS, COLUMN_EXPONENTS)) or info.dtype != "I32" or len(info.shape) != 1
    ]
    if problems:
        raise BadInput.from_problems("E301", problems)
    with Checkpoint(folder, {}, infos, (folder / ORDER_FILE,)) as checkpoint:
        orders = {name: checkpoint.read(name).long() for name in infos}
    for name, order in orders.items():
        if is_exponents(name):
            if bool((order.abs() > MOST_EXPONENT).any()):
                raise BadInput("E301", f"{name} holds exponents beyond {MOST_EXPONENT}", where=where, fix=fix)
        elif not torch.equal(order.sort().values, torch.arange(len(order))):
            raise BadInput("E301", f"{name} is not a permutation", where=where, fix=fix)
    return orders


def folded(folder: Path) -> tuple[str, ...]:
    """Which of "orders", "exponents" and "rotation" a folder's weights have in them. () for a damaged file, which `read_orders` refuses."""
    names = read_header(folder, ORDER_FILE)[0] if exists(folder, ORDER_FILE) else {}
    kinds = {"rotation" if name.startswith(ROTATION) else "exponents" if is_exponents(name) else "orders" for name in names}
    return tuple(sorted(kinds))


def is_exponents(name: str) -> bool:
    return name.endswith((ROW_EXPONENTS, COLUMN_EXPONENTS))


def relative(ours: Orders, theirs: Orders) -> Orders:
    """What was folded into ours and not into theirs, both given by the same original. {} where they are alike."""
    import torch

    found: dict[str, Tensor] = {}
    for name in sorted({*ours, *theirs}, key=is_exponents):  # orders first: exponents are of rows and columns in their order
        known = ours.get(name, theirs.get(name))
        assert known is not None
        if is_exponents(name):
            nothing = torch.zeros_like(known)
            before = theirs.get(name, nothing)
            moved = found.get(name.removesuffix("_exponents") + "s")
            exponents = ours.get(name, nothing) - (before if moved is None else before[moved])
            if bool(exponents.any()):
                found[name] = exponents
            continue
        identity = torch.arange(len(known))
        order = theirs.get(name, identity).argsort()[ours.get(name, identity)]
        if not torch.equal(order, identity):
            found[name] = order
    return found


def reordered(name: str, tensor: Tensor, orders: Orders) -> Tensor:
    """The original's tensor `name` with these folded into it. ValueError where one has another length."""
    linear = name.rpartition(".")[0]
    for axis, what in enumerate((ROWS, COLUMNS)[: tensor.ndim]):
        order = orders.get(linear + what)
        if order is not None:
            _require_length(linear + what, order, tensor, axis)
            tensor = tensor.index_select(axis, order.to(tensor.device))
    for axis, what in enumerate((ROW_EXPONENTS, COLUMN_EXPONENTS)[: tensor.ndim]):
        exponents = orders.get(linear + what)
        if exponents is not None:
            _require_length(linear + what, exponents, tensor, axis)
            tensor = shifted(tensor, exponents, axis)
    return tensor


def shifted(tensor: Tensor, exponents: Tensor, axis: int) -> Tensor:
    """tensor, of at most 32 bits, times 2 to the power of `exponents` along an axis. Exact where nothing overflows or underflows."""
    shape = [-1 if i == axis else 1 for i in range(tensor.ndim)]
    return (tensor.float() * exponents.to(tensor.device).float().exp2().reshape(shape)).to(tensor.dtype)


def _require_length(name: str, order: Tensor, tensor: Tensor, axis: int) -> None:
    if len(order) != tensor.shape[axis]:
        raise ValueError(f"{name} is of {len(order)} rows or columns, and the tensor has {tensor.shape[axis]}")
