"""Which arguments of blocks are of the tokens alone: what the pipeline may compute once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from marlinctl.errors import BadInput
from marlinctl.models.token_arguments import OfTokens, of_tokens
from marlinctl.models.tracing import traced

BLOCKS = ["first", "second"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, hidden: Tensor, beside: Tensor | None = None, left: dict[str, Any] | None = None) -> Tensor:
        if left is not None and not left:
            left["keys"] = self.up(hidden).unsqueeze(1), hidden
        added: Tensor = self.up(hidden)
        return hidden + added if beside is None else hidden + added * beside.mean()


class Model(nn.Module):
    """beside: what the second block is given, of the embeddings and of the hidden states that enter it."""

    def __init__(self, beside: Any, left: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.first, self.second, self.embedding = Block(), Block(), nn.Embedding(50, 8)
        self.beside, self.left = beside, left

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        embedded = self.embedding(input_ids)
        hidden = self.first(embedded, left=self.left)
        last: Tensor = self.second(hidden, beside=self.beside(embedded, hidden), left=self.left)
        return last


def found(beside: Any, left: Any = lambda: None) -> OfTokens:
    def trace(first: int, shifted: bool = False) -> Any:
        return traced(Model(beside, left()), "model", BLOCKS, (), first=first, shifted=shifted)

    return of_tokens("model", BLOCKS, trace(1), trace(2), lambda: trace(1, True))


def test_what_is_of_the_embeddings_is_kept() -> None:
    """If it were refused, Gemma 4 E2B would be; the same tensor for several blocks is kept once."""
    kept = found(lambda embedded, hidden: embedded[..., :4])
    assert kept.given == {"second": {"beside": "beside of second"}} and kept.per_token == {"beside of second": 4}
    assert found(lambda embedded, hidden: torch.ones(3)) == OfTokens()


@pytest.mark.parametrize("beside", [lambda _, hidden: hidden, lambda _, hidden: nn.functional.layer_norm(hidden, [8])])
def test_what_comes_out_of_other_blocks_is_refused(beside: Any) -> None:
    """It is computed with blocks that pass their input on: a block would be given what no model computes."""
    with pytest.raises(BadInput, match="beside, which depends on what other blocks return"):
        found(beside)


def test_what_blocks_leave_is_told_from_what_they_are_handed() -> None:
    """If others filled it, the pipeline would hand out what nothing wrote."""
    kept = found(lambda embedded, hidden: None, dict)
    assert kept.shares == {"first": "left", "second": "left"} and kept.shared == {"keys": ((1, 0, 8), (0, 8))}
    with pytest.raises(BadInput, match="left, which is filled by others than the blocks"):
        found(lambda embedded, hidden: None, lambda: {"keys": torch.zeros(2, 3, 8)})
