"""What enters the first block, and what the decoder gives to each block besides: found with the model's own forward pass.

Only the rows of embeddings that occur are read. The forward pass runs over blocks that pass their input through; it sees the tokens as they
are, because some models find padding and positions by them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from marlinctl.models.architectures import Architecture
from marlinctl.models.meta_model import Reached, bound, set_parameter
from marlinctl.oneshot.of_tokens import TokenArguments

FIRST_SAMPLE = slice(0, 1)  # shows what a block computes (equalization.py)


class Tensors(Protocol):
    """What the pipeline needs of a checkpoint."""

    def read(self, name: str) -> Tensor: ...

    def rows(self, name: str, row_ids: Tensor) -> Tensor: ...


def embed(
    model: nn.Module, architecture: Architecture, checkpoint: Tensors, ids: Tensor, parts: Iterable[slice], hidden: Tensor,
    of_tokens: TokenArguments, device: torch.device,
) -> dict[int, list[dict[str, Any]]]:  # fmt: skip
    """Write the hidden states of all samples, which come in `parts`, into `hidden` [S, L, hidden], and what blocks are given of the tokens
    into `of_tokens`. Returns the other keyword arguments of each block, by the number of samples in a part."""
    dtype = hidden.dtype
    decoder = model.get_submodule(architecture.decoder)
    used = torch.unique(ids)
    name = f"{architecture.embedding}.weight"
    set_parameter(model, architecture.module(name), checkpoint.rows(name, used).to(device, dtype))
    for other in architecture.outside:
        if other not in architecture.by_token:
            set_parameter(model, architecture.module(other), checkpoint.read(other).to(device, dtype))
    rows = {name: used.to(device)}  # embedding -> the tokens whose rows it holds
    handles = []
    for weight in (name, *architecture.by_token):
        embedding = cast(nn.Embedding, model.get_submodule(architecture.module(weight.removesuffix(".weight"))))
        embedding.padding_idx = None  # it counts in the whole vocabulary, and a forward pass does not need it
        handles.append(embedding.register_forward_pre_hook(partial(_rows_of_tokens, rows, weight)))
    blocks = [model.get_submodule(block.path) for block in architecture.blocks]
    given: list[dict[str, Any]] = []
    first: list[Tensor] = []

    def passing(block: nn.Module, returns_tuple: bool, *args: Any, **kwargs: Any) -> Any:
        (_, entering), *others = bound(block, args, kwargs).items()
        first.append(entering)
        given.append(dict(others))
        if block is blocks[-1]:  # what comes behind it has no weights yet
            raise Reached(args, kwargs)
        return (entering, None) if returns_tuple else entering

    for block, known in zip(blocks, architecture.blocks, strict=True):
        block.forward = partial(passing, block, known.returns_tuple)
    calls: dict[int, list[dict[str, Any]]] = {}
    try:
        for part in (FIRST_SAMPLE, *parts):
            given.clear()
            first.clear()
            batch = ids[part].to(device)
            for other in architecture.by_token:  # Gemma 4's have a row for each block: of all tokens they would take gigabytes
                occurring = torch.unique(ids[part])
                rows[other] = occurring.to(device)
                set_parameter(model, architecture.module(other), checkpoint.rows(other, occurring).to(device, dtype))
            with suppress(Reached):
                decoder(input_ids=batch, use_cache=False)
            hidden[part] = first[0]
            common = [of_tokens.keep(block, part, arguments) for block, arguments in zip(architecture.blocks, given, strict=True)]
            calls.setdefault(batch.shape[0], common)
    finally:
        for handle in handles:
            handle.remove()
        for block in blocks:
            del block.forward
    for other in (name, *architecture.outside):
        set_parameter(model, architecture.module(other), torch.empty(0, device="meta"))
    return calls


def _rows_of_tokens(rows: Mapping[str, Tensor], name: str, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """An embedding that holds the rows of some tokens is asked for these. rows[name]: the tokens, in order."""
    return torch.searchsorted(rows[name], args[0]), *args[1:]
