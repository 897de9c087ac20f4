"""The plain reference: what a kernel over MARLIN or Sparse-MARLIN tiles must compute, written so that nobody can doubt it.

It finds every weight through the maps in pack/tile.py, one index per nibble, and shares no step with the packer's fast
path; the sum runs in fp32. It is slow and meant to be: emulator and kernels are compared with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from marlinctl.pack.tile import (
    OFFSET,
    channel_slot,
    grouped_slot,
    marlin_place,
    meta_columns,
    meta_place,
    sparse_grouped_slot,
    sparse_place,
)
from marlinctl.pack.types import PackedLinear, PackedSparseLinear
from marlinctl.quantize.activations import rounded

ROWS_AT_ONCE = 256  # index tensors take 8 bytes per weight; this bounds them to tens of megabytes


def dequantize(p: PackedLinear) -> Tensor:
    """The weight [N, K] fp32 that the tiles and scales of `p` stand for."""
    columns = torch.arange(p.out_features, device=p.qweight.device)
    return torch.cat([_rows(p, n) for n in torch.split(columns, ROWS_AT_ONCE)])


def dequantize_sparse(p: PackedSparseLinear) -> Tensor:
    """The weight [N, K] fp32, zero where pruned, that survivors, metadata and scales of `p` stand for."""
    rows = torch.arange(p.out_features, device=p.qweight.device)
    return torch.cat([_sparse_rows(p, n) for n in torch.split(rows, ROWS_AT_ONCE)])


def gemm(
    activations: Tensor,  # [M, K], any float
    p: PackedLinear | PackedSparseLinear,
    bias: Tensor | None = None,  # [N]
) -> Tensor:  # [M, N] fp32
    _check(activations, p, bias)
    weight = dequantize_sparse(p) if isinstance(p, PackedSparseLinear) else dequantize(p)
    product = activations.to(torch.float32) @ weight.T
    return product if bias is None else product + bias.to(torch.float32)


def gemm_rounded(
    activations: Tensor,  # [M, K], any float
    p: PackedLinear | PackedSparseLinear,
    group: int | None,  # of K that shares a scale of activations; None: a whole token
    bias: Tensor | None = None,  # [N]
) -> Tensor:  # [M, N] fp32
    """The product with activations rounded to int8 (quantize/activations.py). With both scales constant inside of a group g of K it is

        sum over g of  scale of activations[m, g] * scale of weights[n, g] * sum over k in g of code * code

    Here each code meets its scale first: in float64 that is exact, as is each product of the two; their sum is rounded in its last bits.
    """
    _check(activations, p, bias)
    codes, scales = rounded(activations, "int8", group)  # [M, K], [M, groups]
    groups = torch.arange(p.in_features, device=codes.device) // (p.in_features if group is None else group)  # [K]
    x = codes.double() * scales.double()[:, groups]
    outputs = torch.arange(p.out_features, device=codes.device)
    parts = (_sparse_rows(p, n) if isinstance(p, PackedSparseLinear) else _rows(p, n) for n in torch.split(outputs, ROWS_AT_ONCE))
    product = torch.cat([x @ weight.double().T for weight in parts], 1)  # code * scale of weights is exact in float32 too
    return (product if bias is None else product + bias.double()).to(torch.float32)


def _check(activations: Tensor, p: PackedLinear | PackedSparseLinear, bias: Tensor | None) -> None:
    if activations.ndim != 2 or activations.shape[1] != p.in_features:
        raise ValueError(f"activations must be [M, {p.in_features}], got {list(activations.shape)}")
    if bias is not None and tuple(bias.shape) != (p.out_features,):
        raise ValueError(f"bias must be [{p.out_features}], got {list(bias.shape)}")


def _rows(p: PackedLinear, n: Tensor) -> Tensor:
    """Rows `n` of the weight: [len(n), K] fp32."""
    n = n.unsqueeze(1)  # [rows, 1]
    k = torch.arange(p.in_features, device=n.device)  # [K], broadcasts to [rows, K]
    place = marlin_place(k, n)
    words = p.qweight[place.row, place.column]
    codes = (words >> (4 * place.nibble) & 15) - OFFSET
    slot = channel_slot(n) if p.channel_wise else grouped_slot(n)
    return codes.to(torch.float32) * p.scales[k // p.group_size, slot].to(torch.float32)


def _sparse_rows(p: PackedSparseLinear, n: Tensor) -> Tensor:
    """Rows `n` of the weight: [len(n), K] fp32."""
    n = n.unsqueeze(1)  # [rows, 1]
    quads = torch.arange(p.in_features // 4, device=n.device)  # [K/4], broadcasts to [rows, K/4]
    places = meta_place(quads, n)
    nibbles = p.meta[places.row, places.column].to(torch.int64) >> (4 * places.nibble) & 15
    slot = n if p.channel_wise else sparse_grouped_slot(n)
    weight = torch.zeros(len(n), p.in_features, dtype=torch.float32, device=n.device)
    for odd, column in enumerate(meta_columns(nibbles)):
        k = 4 * quads + column  # [rows, K/4]
        place = sparse_place(2 * quads + odd, n)
        codes = (p.qweight[place.row, place.column] >> (4 * place.nibble) & 15) - OFFSET
        weight.scatter_(1, k, codes.to(torch.float32) * p.scales[k // p.group_size, slot].to(torch.float32))
    return weight
