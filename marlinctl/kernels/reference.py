"""The plain reference: what a kernel over MARLIN tiles must compute, written so that nobody can doubt it.

It finds every weight through the map in pack/tile.py, one index per nibble, and shares no step with the packer's fast
path; the sum runs in fp32. It is slow and meant to be: emulator and kernels are compared with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from marlinctl.pack.tile import OFFSET, channel_slot, grouped_slot, marlin_place
from marlinctl.pack.types import PackedLinear

ROWS_AT_ONCE = 256  # index tensors take 8 bytes per weight; this bounds them to tens of megabytes


def dequantize(p: PackedLinear) -> Tensor:
    """The weight [N, K] fp32 that the tiles and scales of `p` stand for."""
    columns = torch.arange(p.out_features, device=p.qweight.device)
    return torch.cat([_rows(p, n) for n in torch.split(columns, ROWS_AT_ONCE)])


def gemm(
    activations: Tensor,  # [M, K], any float
    p: PackedLinear,
    bias: Tensor | None = None,  # [N]
) -> Tensor:  # [M, N] fp32
    if activations.ndim != 2 or activations.shape[1] != p.in_features:
        raise ValueError(f"activations must be [M, {p.in_features}], got {list(activations.shape)}")
    if bias is not None and tuple(bias.shape) != (p.out_features,):
        raise ValueError(f"bias must be [{p.out_features}], got {list(bias.shape)}")
    product = activations.to(torch.float32) @ dequantize(p).T
    return product if bias is None else product + bias.to(torch.float32)


def _rows(p: PackedLinear, n: Tensor) -> Tensor:
    """Rows `n` of the weight: [len(n), K] fp32."""
    n = n.unsqueeze(1)  # [rows, 1]
    k = torch.arange(p.in_features, device=n.device)  # [K], broadcasts to [rows, K]
    place = marlin_place(k, n)
    words = p.qweight[place.row, place.column]
    codes = (words >> (4 * place.nibble) & 15) - OFFSET
    slot = channel_slot(n) if p.channel_wise else grouped_slot(n)
    return codes.to(torch.float32) * p.scales[k // p.group_size, slot].to(torch.float32)
