"""Rounded activations as the 8-bit kernels take them: int8 codes in the order of the tiles, and float32 scales.

    x [M, K] ─► codes q = round(x / s), s = max |x| / 127 over a token or over each 128 of its K (quantize/activations.py)

    codes   int8 [M, K']      K' is K rounded up to 64, 0 beyond K; inside of each 32 of k in tile order (pack/tile.py, activation_place),
                              and for 2:4 weights inside of each 64 (sparse_activation_place)
    scales  float32 [G, M']   G is 1 (token) or ceil(K / 128) (groups); M' is M rounded up to 4, 0 beyond M

Scales are [G, M'] so that a kernel copies those of its tokens in rows of 16 bytes. Here everything is plain torch, on any device;
csrc/round_activations.cu makes the same on a GPU (rounding.py).

A token with an infinity or a NaN, or of groups the group that holds it, has codes 0 and scale NaN: every output of the token is NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from marlinctl.pack.tile import activation_column, activation_place, sparse_activation_column, sparse_activation_place
from marlinctl.pack.types import padded
from marlinctl.quantize.activations import rounded
from marlinctl.quantize.scheme import ACTIVATION_GROUP, Rounding

KINDS = get_args(Rounding)
SCALES_IN_16_BYTES = 4  # M' is a multiple of it


@dataclass(frozen=True, slots=True)
class RoundedActivations:
    codes: Tensor  # [M, K'] int8, in tile order
    scales: Tensor  # [G, M'] float32


def round_activations_for_tiles(x: Tensor, group: int | None, sparse: bool = False) -> RoundedActivations:
    """x [M, K] of any float type, rounded.

    group: None for one scale a token, or 128. sparse: in the order of 2:4 tiles. ValueError for other groups and shapes.
    """
    check_group(group)
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"activations must be [M, K] with M and K > 0, got {list(x.shape)}")
    m = x.shape[0]
    codes, scales = rounded(x, "int8", group)  # [M, K], [M, G]
    scales = torch.where(scales.isfinite(), scales, torch.nan)
    # Of x / infinity are left 0 and, where x is infinite too, NaN.
    codes = in_tile_order(codes.nan_to_num(0.0), sparse)
    return RoundedActivations(codes, pad(scales, (0, 0, 0, -m % SCALES_IN_16_BYTES)).T.contiguous())


def check_group(group: int | None) -> None:
    if group not in (None, ACTIVATION_GROUP):
        raise ValueError(f"activations are rounded for each token (None) or each {ACTIVATION_GROUP} of its K, not for each {group}")


def check_rounding(rounding: str) -> None:
    """ValueError for what the operators do not have, fp8 among it, which quantize/activations.py computes for other formats."""
    if rounding not in KINDS:
        raise ValueError(f"rounding must be one of {', '.join(KINDS)}, got {rounding!r}")


def in_tile_order(codes: Tensor, sparse: bool = False) -> Tensor:
    """codes [M, K] of any type -> int8 [M, K'], zeros beyond K."""
    k = codes.shape[1]
    places = torch.arange(padded(k), device=codes.device)
    columns = sparse_activation_column(places) if sparse else activation_column(places)
    return pad(codes.to(torch.int8), (0, padded(k) - k))[:, columns]


def in_column_order(codes: Tensor, in_features: int, sparse: bool = False) -> Tensor:
    """int8 [M, K'] in tile order -> [M, K]: the inverse of in_tile_order."""
    columns = torch.arange(in_features, device=codes.device)
    return codes[:, sparse_activation_place(columns) if sparse else activation_place(columns)]
