"""A text becomes windows: which tokens, how many, and with what before them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from marlinctl.data.text import Text
from marlinctl.errors import BadInput, UsageError
from marlinctl.evaluation import windows
from tests.tiny import tiny_tokenizer


class Tokenizer:
    """The tiny tokenizer with the call that transformers' tokenizers have; counts what it was given."""

    bos_token_id = 1

    def __init__(self) -> None:
        self.inner, self.lengths = tiny_tokenizer(), []  # type: tuple[Any, list[int]]

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        self.lengths.append(len(text))
        return {"input_ids": self.inner.encode(text, add_special_tokens=add_special_tokens).ids}


def text(content: str) -> Text:
    return Text("t", content, "", "a note")


PROSE = "The rain in Spain stays mainly in the plain, and then on the other side. " * 400


def cut(content: str, **changes: Any) -> torch.Tensor:
    asked: dict[str, Any] = {"tokens": 1000, "window": 64, "start": None, "longest": 512} | changes
    return windows.cut_windows(text(content), Tokenizer(), **asked)


def test_the_first_tokens_in_order() -> None:
    """Perplexity would be measured on other tokens than documented: shuffled, with special tokens, or with a torn last window."""
    rows = cut(PROSE)
    assert rows.shape == (15, 64)  # 1000 // 64
    assert rows.flatten().tolist() == tiny_tokenizer().encode(PROSE).ids[: 15 * 64]


def test_a_start_token_in_every_window() -> None:
    """Gemma would be measured without its start token, or would lose a token of text at each window."""
    rows = cut(PROSE, start=1)
    assert rows.shape == (15, 64)
    assert rows[:, 0].tolist() == [1] * 15
    assert rows[:, 1:].flatten().tolist() == tiny_tokenizer().encode(PROSE).ids[: 15 * 63]


@pytest.mark.parametrize(("model_type", "start"), [("gemma2", 1), ("gemma3_text", 1), ("llama", None), ("qwen3", None)])
def test_who_needs_a_start_token(model_type: str, start: int | None) -> None:
    """Gemma's perplexity would be in the thousands; Llama's would not be comparable with the published one."""
    assert windows.window_start(Tokenizer(), model_type) == start


def test_a_short_text_gives_what_there_is() -> None:
    """A text of some windows would be refused, or padded with repetitions."""
    ids = tiny_tokenizer().encode(PROSE[:800]).ids
    assert cut(PROSE[:800]).shape == (len(ids) // 64, 64)
    with pytest.raises(BadInput, match="one window needs 64") as caught:
        cut("far too short")
    assert caught.value.error_id == "E393"


def test_only_the_start_of_a_long_text_is_tokenized() -> None:
    """A gigabyte of text would be tokenized for 1,000 tokens of it."""
    tokenizer = Tokenizer()
    dense = "the in er on re an " * 20_000
    rows = windows.cut_windows(text(dense), tokenizer, tokens=1000, window=64, start=None, longest=None)
    assert sum(tokenizer.lengths) < len(dense) / 10
    assert rows.flatten().tolist() == tiny_tokenizer().encode(dense).ids[: 15 * 64]


def test_reads_on_when_tokens_are_long() -> None:
    """Where a token is longer than the first guess, the run would end with fewer windows than there are."""
    tokenizer = Tokenizer()
    rows = windows.cut_windows(text("the the " * 2000), tokenizer, tokens=3000, window=1000, start=None, longest=None)
    assert rows.shape == (3, 1000)


def test_windows_beyond_the_context_are_refused() -> None:
    """Positions that the model has never seen would be measured as if it were bad."""
    with pytest.raises(UsageError, match="longer than the 512 positions") as caught:
        cut(PROSE, window=513, tokens=2000)
    assert caught.value.error_id == "E246"
