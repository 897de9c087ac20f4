"""Scales of groups as the kernels for factored weights take them (csrc/marlin_a8_factored_sm90.cu, sparse_marlin_a8_factored_sm90.cu).

    scales [G', N'] ─► factor x channel scale (quantize/integer_scales.py) ─► [G' + 1, N'] int16:
                       rows 0 .. G'-1  factors, -15 .. 16, in the order of scales of groups
                       row  G'         channel scales, the bits of float16, in the order of channel-wise scales

Channel-wise scales are of that form as they are: no factors, and one row. Outputs whose scales are all 0, with which servers fill the gaps
between linears that they join, have a channel scale of 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from marlinctl.pack.tile import channel_slot, grouped_slot, sparse_grouped_slot
from marlinctl.pack.types import PackedLinear, PackedSparseLinear
from marlinctl.quantize.integer_scales import split

MOST_IN_FEATURES = 131072  # 128 * 127 * K < 2^31: sums over all of K are int32


def factored_scales(p: PackedLinear | PackedSparseLinear) -> Tensor | None:
    """int16 [G' + 1, N'], or [1, N'] channel-wise; None where scales are not of that form, or K is above MOST_IN_FEATURES.

    Reads all scales, on their device: for when weights are loaded.
    """
    if p.in_features > MOST_IN_FEATURES:
        return None
    if p.channel_wise:
        return p.scales.view(torch.int16)
    columns = torch.arange(p.out_features, device=p.scales.device)
    sparse = isinstance(p, PackedSparseLinear)
    slots = sparse_grouped_slot(columns) if sparse else grouped_slot(columns)
    scales = p.scales[: p.groups, slots].T  # [N, G]
    zero = ~scales.any(-1, keepdim=True)
    found = split(scales.masked_fill(zero, 1.0))
    if found is None:
        return None
    factors, channel_scales = found  # [N, G], [N]
    channel_scales = channel_scales.masked_fill(zero.squeeze(-1), 0.0)
    rows = torch.ones(p.padded_groups, p.scales.shape[1], dtype=torch.int16, device=p.scales.device)  # padding: times activations of 0
    rows[: p.groups, slots] = factors.T.to(torch.int16)
    last = torch.zeros_like(rows[:1])
    last[0, columns if sparse else channel_slot(columns)] = channel_scales.view(torch.int16)
    return torch.cat([rows, last])
