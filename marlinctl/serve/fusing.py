"""Linears of a served model that read the same activations, as one: q, k and v; gate and up.

    q_proj ─┐                      q_proj: LinearPart ─┐
    k_proj ─┼─ three launches  ─►  k_proj: LinearPart ─┼─ SharedLinear: one launch, when the first of them is called
    v_proj ─┘                      v_proj: LinearPart ─┘

A small linear costs some microseconds before it reads a weight. transformers calls them one by one; the model keeps its own code, and what
stands for a linear hands out its part of a product that another may have asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from marlinctl.models.architectures import Experts
from marlinctl.models.lookup import architecture_of

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from marlinctl.kernels.linear import MarlinLinear, SparseMarlinLinear


def fuse_linears(model: PreTrainedModel) -> int:
    """Fuses in place what can be fused, for inference; returns how many SharedLinears there are now.

    Linears stay as they are where they are not packed alike (kind, group size, rounding of activations), where one is not packed at all,
    or where its outputs are no multiple of 64. Weights are copied, one group at a time. BadInput E390 for a model that marlinctl cannot
    compress.
    """
    from marlinctl.kernels.linear import MarlinLinear, SparseMarlinLinear

    modules = dict(model.named_modules())
    fused = 0
    for block in architecture_of(model.config.to_dict(), model.state_dict().keys()).blocks:
        for stage in (stage for part in block.parts if not isinstance(part, Experts) for stage in part.stages):
            names = [f"{block.path}.{name}" for name in stage]
            packed = [module for name in names if isinstance(module := modules.get(name), MarlinLinear | SparseMarlinLinear)]
            if len(packed) == len(names) > 1 and _alike(packed):
                _fuse(model, names, packed)
                fused += 1
    return fused


def _alike(linears: Sequence[MarlinLinear | SparseMarlinLinear]) -> bool:
    from marlinctl.pack.types import PAD_TO

    kinds = {(type(linear), linear.in_features, linear.group_size, linear.rounding) for linear in linears}
    return len(kinds) == 1 and not any(linear.out_features % PAD_TO for linear in linears[:-1])


def _fuse(model: nn.Module, names: Sequence[str], linears: Sequence[MarlinLinear | SparseMarlinLinear]) -> None:
    import torch

    from marlinctl.kernels.linear import LinearPart, SharedLinear, packed_module
    from marlinctl.pack.types import side_by_side

    biases = [linear.bias for linear in linears]
    bias = None
    if any(one is not None for one in biases):
        like = next(one for one in biases if one is not None)
        zeros = (torch.zeros(linear.out_features, dtype=like.dtype, device=like.device) for linear in linears)
        bias = torch.cat([zero if one is None else one.data for one, zero in zip(biases, zeros, strict=True)])
    prepared = all(linear.cpu_weight is not None for linear in linears)  # before packed() brings their tiles back
    joined = packed_module(side_by_side([linear.packed() for linear in linears]), bias, linears[0].rounding)
    shared = SharedLinear(joined, len(linears))
    shared.linear.overlap = all(linear.overlap for linear in linears)
    shared.linear.keeps_tiles = any(linear.keeps_tiles for linear in linears)
    if joined.s.is_cuda:
        joined.split_scales()  # so that no compiled or captured call has to
    if prepared:
        shared.linear.prepare()
    first = 0
    for part, (name, linear) in enumerate(zip(names, linears, strict=True)):
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, LinearPart(shared, part, first, linear.out_features))
        first += linear.out_features
