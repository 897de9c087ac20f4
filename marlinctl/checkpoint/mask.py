"""The weights that pruning kept, as a file beside the weights: marlinctl_mask.safetensors.

    P.keep   [N, K/8 rounded up] uint8     bit k % 8 of byte [n, k // 8] is 1 where weight[n, k] of linear P is kept

A kept weight may be zero, or round to code 0, so zeros do not determine the pattern: the mask is data and travels with the weights, from
the solver to the packer. Native Sparse-MARLIN needs no such file, its metadata is the mask. Clients follow the index of the weights,
which does not name this file, so they load the folder as if it were not there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from marlinctl.checkpoint.model_files import MASK_FILE as NAME
from marlinctl.checkpoint.reader import Checkpoint
from marlinctl.checkpoint.safetensors_header import read_header
from marlinctl.errors import BadInput, Problem
from marlinctl.system.files import exists

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SUFFIX = ".keep"
_AGAIN = "fetch or write the checkpoint again; without the file the pattern is found from the zeros of the weights"


def pack_bits(mask: Tensor) -> Tensor:
    """mask [N, K] bool -> [N, ceil(K/8)] uint8, lowest bit first; bits beyond K are 0."""
    import torch
    from torch.nn.functional import pad

    n, k = mask.shape
    bits = pad(mask, (0, -k % 8)).reshape(n, -1, 8).to(torch.uint8)
    places = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=mask.device)
    return (bits * places).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, k: int) -> Tensor:
    """The inverse of pack_bits: [N, ceil(k/8)] uint8 -> [N, k] bool."""
    import torch

    places = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) & places) != 0).reshape(packed.shape[0], -1)[:, :k].contiguous()


class Masks:
    """The masks of a checkpoint folder, read one linear at a time. Close with the `opened` context manager."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self.layers = tuple(name.removesuffix(SUFFIX) for name in checkpoint.tensors)
        self.where = str(checkpoint.folder / NAME)

    def __contains__(self, layer: str) -> bool:
        return layer + SUFFIX in self._checkpoint.tensors

    def keep(self, layer: str, n: int, k: int) -> Tensor:
        """[n, k] bool, exactly two True in each aligned four. BadInput names the linear whose mask does not fit or is not 2:4."""
        from marlinctl.sparsify.types import check_mask

        info = self._checkpoint.tensors[layer + SUFFIX]
        where = f"{info.file}, tensor {info.name}"
        if info.dtype != "U8" or info.shape != (n, -(-k // 8)):
            what = f"the mask of {layer} is {info.dtype} {list(info.shape)}, its weight [{n}, {k}] asks for U8 [{n}, {-(-k // 8)}]"
            raise BadInput("E356", what, where=where, fix="mask and weights do not belong together; " + _AGAIN)
        mask = unpack_bits(self._checkpoint.read(info.name), k)
        try:
            check_mask(mask)
        except ValueError as problem:
            raise BadInput("E356", f"the mask of {layer} is not 2:4: {problem}", where=where, fix=_AGAIN) from None
        return mask

    def checked_keep(self, layer: str, weight: Tensor) -> Tensor:
        """The mask of weights or codes [N, K]. BadInput where they are not zero although the mask says that they were pruned."""
        mask = self.keep(layer, *weight.shape)
        pruned = (weight != 0) & ~mask
        if bool(pruned.any()):
            row, column = pruned.nonzero()[0].tolist()
            raise BadInput(
                "E356",
                f"{layer}: row {row}, column {column} was pruned, says the mask, and yet is {weight[row, column].item()} "
                f"({int(pruned.sum()):,} such weights)",
                where=self.where,
                fix="mask and weights do not belong together; " + _AGAIN,
            )
        return mask


@contextmanager
def open_masks(folder: Path, *, device: torch.device | None = None) -> Iterator[Masks | None]:
    """The folder's masks, or None where it has no mask file. Headers are checked here, each mask when it is read, on `device`."""
    if not exists(folder, NAME):
        yield None
        return
    tensors, problems = read_header(folder, NAME)
    problems += [
        Problem(f"{name} is not a mask: its name does not end in {SUFFIX}", str(folder / NAME), _AGAIN)
        for name in tensors
        if not name.endswith(SUFFIX)
    ]
    if problems:
        raise BadInput.from_problems("E356", problems)
    with Checkpoint(folder, {}, tensors, (folder / NAME,), device=device) as checkpoint:
        yield Masks(checkpoint)
