"""A text as windows of token ids, the way published perplexities are measured.

The text is tokenized once, without special tokens, cut into windows of equal length, and each window is read by itself: its first
token is given, every later one is predicted, so a window of 1,024 tokens makes 1,023 predictions. What does not fill a window at
the end is left out.

Gemma is the exception: without the beginning-of-sequence token its activations leave the range it was trained in and perplexity
rises a thousandfold. Its windows start with that token, followed by window - 1 tokens of text, which are all predicted. Llama's
tokenizers would add the token too, but its published figures are made without, and so are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from marlinctl.data.tokens import first_ids
from marlinctl.errors import BadInput, UsageError
from marlinctl.evaluation.settings import EvalSettings, refuse_longer

if TYPE_CHECKING:
    from torch import Tensor

    from marlinctl.data.text import Text
    from marlinctl.evaluation.loading import Subject


def window_start(tokenizer: Any, model_type: str) -> int | None:
    """The id that every window must start with, if the model cannot do without."""
    return tokenizer.bos_token_id if model_type.startswith("gemma") else None


def of_models(text: Text, models: Sequence[Subject], settings: EvalSettings) -> tuple[Tensor, int | None]:
    """The windows, [W, window] int64, and the id they start with. UsageError E261 where the models do not read the same tokens."""
    import torch

    from marlinctl.evaluation.loading import load_tokenizer

    window = settings.window_for(*(model.longest for model in models))
    cut = []
    for model in models:
        tokenizer = load_tokenizer(model)
        start = window_start(tokenizer, model.model_type)
        cut.append(cut_windows(text, tokenizer, tokens=settings.tokens, window=window, start=start, longest=model.longest))
    if not all(torch.equal(cut[0], other) for other in cut[1:]):
        raise UsageError(
            "E261",
            "the models cannot be compared: their tokenizers cut the text differently",
            where="--against",
            fix="name the model that this one was made from",
        )
    return cut[0], start


def cut_windows(text: Text, tokenizer: Any, *, tokens: int, window: int, start: int | None, longest: int | None) -> Tensor:
    """[windows, window] int64: the first `tokens` tokens of the text. `longest` is the model's own limit."""
    import torch

    refuse_longer(window, longest)
    count = tokens // window
    body = window if start is None else window - 1  # tokens of text in each window
    ids = first_ids(text.text, tokenizer, count * body)
    if len(ids) < body:
        raise BadInput(
            "E393",
            f"the text has {len(ids)} tokens, one window needs {body}",
            where=text.note,
            fix=f"give a longer text, or --window {max(2, len(ids))} or less",
        )
    count = min(count, len(ids) // body)
    rows = torch.tensor(ids[: count * body], dtype=torch.int64).reshape(count, body)
    return rows if start is None else torch.cat([torch.full((count, 1), start, dtype=torch.int64), rows], dim=1)
