"""One or two models over the same windows: what each token costs, and how far apart the two predictions are.

For each predicted token, with logits a of the original and b of the compressed model, P = softmax(a), Q = softmax(b):

    loss        -log Q[the token that came], nats
    KL(P || Q)  sum over the vocabulary of P (log P - log Q), nats
    top-1       whether a and b are largest at the same token

The log-softmax is taken in fp32 whatever the models' dtype, and sums over tokens are in float64. The models run in turn, window by
window, so one window's logits of each are all that is ever held: 2 x 1,024 x 50,000 in bf16 is 200 MB. The fp32 copies are
made for a few tokens at a time: at Gemma's 262,144 words one whole window would be 1 GB, three times over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from marlinctl.errors import NumericalProblem, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from marlinctl.system.console import Console

CHUNK_ELEMENTS = 2**24  # of logits in fp32 at once: 64 MiB


@dataclass(frozen=True, slots=True)
class Divergence:
    """All [windows, predictions] float64, on the CPU."""

    losses: Tensor  # of the compressed model
    baseline_losses: Tensor
    kl: Tensor
    agrees: Tensor  # 1 where the most probable token is the same, else 0


def measure_losses(model: Any, windows: Tensor, console: Console, *, label: str) -> Tensor:  # [windows, predictions] float64
    import torch

    rows = []
    with torch.inference_mode(), console.progress(f"perplexity of {label}", len(windows)) as progress:
        for place, window in enumerate(windows):
            logits = _logits(model, window)
            targets = window[1:].to(logits.device)
            row = torch.cat([_losses(part.float().log_softmax(-1), targets[begin:end]) for part, begin, end in _chunks(logits)])
            rows.append(_checked(row, place, label))
            progress.advance()
    return torch.stack(rows)


def measure_divergence(model: Any, baseline: Any, windows: Tensor, console: Console) -> Divergence:
    import torch

    columns: list[tuple[Tensor, ...]] = []
    with torch.inference_mode(), console.progress("comparing with the baseline", len(windows)) as progress:
        for place, window in enumerate(windows):
            ours, theirs = _logits(model, window), _logits(baseline, window)
            if ours.shape != theirs.shape:
                raise UsageError(
                    "E261",
                    f"the models cannot be compared: {ours.shape[1]} words against {theirs.shape[1]} in the baseline",
                    where="--against",
                    fix="name the model that this one was made from",
                )
            theirs, targets = theirs.to(ours.device), window[1:].to(ours.device)
            row = compare_logits(ours, theirs, targets)
            _checked(row[1], place, "the baseline")
            _checked(torch.stack(row), place, "the model")
            columns.append(row)
            progress.advance()
    return Divergence(*(torch.stack(column) for column in zip(*columns, strict=True)))


def compare_logits(ours: Tensor, theirs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits [T, vocabulary], targets [T]: (our losses, their losses, KL(theirs || ours), agreement), each [T] float64 on the CPU."""
    import torch

    parts = []
    for part, begin, end in _chunks(ours):
        log_q = part.float().log_softmax(-1)  # [t, vocabulary]
        log_p = theirs[begin:end].float().log_softmax(-1)
        p = log_p.exp()
        # Words that the original rules out (-inf, as in padded vocabularies) weigh nothing; -inf minus -inf would be NaN.
        kl = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1, dtype=torch.float64)
        agrees = part.argmax(-1) == theirs[begin:end].argmax(-1)
        parts.append((_losses(log_q, targets[begin:end]), _losses(log_p, targets[begin:end]), kl.cpu(), agrees.double().cpu()))
    ours_losses, theirs_losses, kl, agrees = (torch.cat(column) for column in zip(*parts, strict=True))
    return ours_losses, theirs_losses, kl, agrees


def _logits(model: Any, window: Tensor) -> Tensor:
    """[window - 1, vocabulary], in the dtype of the model: what the model says after each token but the last."""
    logits: Tensor = model(input_ids=window[None].to(model.device), use_cache=False).logits
    return logits[0, :-1]


def _chunks(logits: Tensor) -> list[tuple[Tensor, int, int]]:
    rows = max(1, CHUNK_ELEMENTS // logits.shape[1])
    return [(logits[begin : begin + rows], begin, min(begin + rows, len(logits))) for begin in range(0, len(logits), rows)]


def _losses(log_probabilities: Tensor, targets: Tensor) -> Tensor:  # [t, vocabulary], [t] -> [t] float64 on the CPU
    return -log_probabilities.gather(1, targets[:, None])[:, 0].double().cpu()


def _checked(row: Tensor, place: int, label: str) -> Tensor:
    if not row.isfinite().all():
        raise NumericalProblem(
            "E620",
            f"{label} predicts NaN or infinity",
            where=f"window {place + 1} of the text",
            fix="try --dtype float32; if that cures it, the activations overflow 16 bits, else the weights are damaged",
        )
    return row
