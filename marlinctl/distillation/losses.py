"""What the student is trained on, as sums over tokens, so that parts of a batch add up to the batch.

    cross entropy   -log q(next token)                                        the text itself
    SquareHead      mean over blocks of  mean (s - t)² / mean t²              hidden states after each block, student s and teacher t
    divergence      T² KL(p || q),  p = softmax(teacher / T), q likewise      the teacher's predictions

SquareHead (arXiv 2310.06927) divides by the teacher's energy, so that every block weighs the same. The authors sum over the blocks, which
lets the term grow with depth; the mean does not. Padding is in none of them. T² keeps the size of the gradient when T changes.

The logits are the largest tensors of a training step, [tokens, vocabulary], and each loss needs them in float32, several times over. So
they are worked off in chunks that are computed again in the backward pass. The divergence has its gradient written out: for a chunk of
1,024 x 128,256 autograd would read and write 27 GB, this does 12 (counted; for 8,192 tokens 54 and 25 ms at 4 TB/s).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, log_softmax, pad
from torch.utils.checkpoint import checkpoint

CHUNK = 1024  # predictions worked off at a time
EPSILON = 1e-6  # keeps a block whose hidden states are all zero from dividing by zero
NAMES = ("ce", "squarehead", "kl")  # the order of the sums everywhere


@dataclass(frozen=True, slots=True)
class Weights:
    ce: float
    squarehead: float
    kl: float
    temperature: float

    def of_sums(self) -> tuple[float, float, float]:
        return self.ce, self.squarehead, self.kl


@dataclass(frozen=True, slots=True)
class Top:
    """The teacher's k most likely next tokens at some temperature, and what is left for all others."""

    ids: Tensor  # [B, L, k] int64
    logp: Tensor  # [B, L, k] float32
    rest: Tensor  # [B, L] float32, log of the probability of all other tokens; -inf where k is the whole vocabulary


@dataclass(frozen=True, slots=True)
class Signals:
    """What the teacher says about a batch. Empty parts are not wanted."""

    hidden: Sequence[Tensor] = ()  # after each block, [B, L, H]
    logits: Tensor | None = None  # [B, L, V]
    top: Top | None = None


def loss_sums(
    logits: Tensor,  # [B, L, V], the student's
    hidden: Sequence[Tensor],  # after each block, [B, L, H]
    ids: Tensor,  # [B, L]
    counted: Tensor,  # [B, L] bool, False for padding, which lies on the right
    teacher: Signals,
    weights: Weights,
    *,
    padded: bool = True,
) -> Tensor:
    """[3] float32: sums over tokens of cross entropy, SquareHead and divergence; 0 for one whose weight is 0.

    padded: False where all of `counted` is known to be True, which saves passes over the hidden states. Cross entropy and divergence belong
    to predicted tokens, of which a row of n counted tokens has n - 1; SquareHead to counted ones.
    """
    zero = torch.zeros((), device=ids.device)
    # The last position of a row predicts nothing. It is masked rather than cut off, because cutting copies all logits.
    predicted = pad(counted[:, 1:], (0, 1), value=False).flatten()
    ce = _in_chunks(_cross_entropy, (logits.flatten(0, 1), pad(ids[:, 1:], (0, 1)).flatten()), predicted) if weights.ce else zero
    square = squarehead(hidden, teacher.hidden, counted, padded=padded) * counted.sum() if weights.squarehead else zero
    kl = _divergence_sum(logits.flatten(0, 1), teacher, predicted, weights.temperature) if weights.kl else zero
    return torch.stack([ce, square, kl])


def squarehead(student: Sequence[Tensor], teacher: Sequence[Tensor], counted: Tensor, *, padded: bool = True) -> Tensor:
    """Mean over blocks of mean (s - t)² / mean t², both means over counted tokens."""
    if len(student) != len(teacher):
        raise ValueError(f"the student has {len(student)} hidden states, the teacher {len(teacher)}")
    padding = ~counted.unsqueeze(-1)
    return torch.stack([relative_error(s, t, padding, padded=padded) for s, t in zip(student, teacher, strict=True)]).mean()


def relative_error(student: Tensor, teacher: Tensor, padding: Tensor, *, padded: bool = True) -> Tensor:
    """mean (s - t)² / mean t² over what is not padding. padded: whether there is any."""
    target = teacher.float()
    counted = (~padding).sum() * target.shape[-1]
    energies, errors = target.square(), (student.float() - target).square()
    if padded:
        energies, errors = energies.masked_fill(padding, 0.0), errors.masked_fill(padding, 0.0)
    return (errors.sum() / counted) / (energies.sum() / counted + EPSILON)


def top_of(logits: Tensor, k: int, temperature: float) -> Top:
    """The k largest predictions of these logits."""
    logp = log_softmax(logits.float() / temperature, dim=-1)
    found = logp.topk(k, dim=-1)
    return Top(found.indices, found.values, _others(logp, found.indices))


# ---- over the vocabulary -------------------------------------------------------------------------------------------------------------


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(logits.float(), targets, reduction="none")


def _divergence_sum(logits: Tensor, teacher: Signals, predicted: Tensor, temperature: float) -> Tensor:
    if teacher.top is not None:
        top = teacher.top
        given = (top.ids.flatten(0, 1), top.logp.flatten(0, 1), top.rest.flatten())
        return _in_chunks(partial(_top_divergence, temperature=temperature), (logits, *given), predicted) * temperature**2
    if teacher.logits is None:
        raise ValueError("the divergence needs the teacher's logits")
    total: Tensor = _Divergence.apply(logits, teacher.logits.flatten(0, 1), predicted, temperature)
    return total * temperature**2


class _Divergence(torch.autograd.Function):
    """Σ KL(p || q) over the rows [R, V] that are predicted; the gradient goes to the student alone.

    The operations of log_softmax and kl_div and their derivatives, in their order: the same bits as theirs, with fewer passes over memory.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, predicted: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(student, teacher, predicted)
        ctx.temperature = temperature
        sums = []
        for s, t, mask in zip(*(part.split(CHUNK) for part in (student, teacher, predicted)), strict=True):
            logq, logp = _log_softmax(s, temperature), _log_softmax(t, temperature)
            rows = torch.sub(logp, logq, out=logq).mul_(logp.exp_()).sum(-1)
            sums.append(rows.masked_fill_(~mask, 0.0).sum())
        return torch.stack(sums).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        student, teacher, predicted = ctx.saved_tensors
        found = torch.empty_like(student)
        for s, t, mask, out in zip(*(part.split(CHUNK) for part in (student, teacher, predicted, found)), strict=True):
            logq, p = _log_softmax(s, ctx.temperature), _log_softmax(t, ctx.temperature).exp_()
            p.mul_(grad.neg().expand(mask.shape).masked_fill(~mask, 0.0).unsqueeze(-1))  # of KL to log q: -p
            down = torch.ops.aten._log_softmax_backward_data(p, logq, -1, torch.float32)
            out.copy_(down if ctx.temperature == 1.0 else down.div_(ctx.temperature))
        return found, None, None, None


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """float32. Dividing by 1 changes nothing and passes over the memory once more."""
    if temperature == 1.0:
        return log_softmax(logits, dim=-1, dtype=torch.float32)
    return log_softmax(logits.float() / temperature, dim=-1)


def _top_divergence(student: Tensor, ids: Tensor, logp: Tensor, rest: Tensor, temperature: float) -> Tensor:
    """KL(p || q) for each row, where all tokens beyond the top k count as one."""
    logq = log_softmax(student.float() / temperature, dim=-1)
    top = (logp.exp() * (logp - logq.gather(-1, ids))).sum(-1)
    if ids.shape[-1] == student.shape[-1]:
        return top
    others = rest.exp() * (rest - _others(logq, ids))
    return top + torch.where(torch.isfinite(rest), others, 0.0)


def _others(logp: Tensor, ids: Tensor) -> Tensor:
    """Log of the probability of every token but `ids`."""
    return logp.scatter(-1, ids, -torch.inf).logsumexp(-1)


def _in_chunks(loss: Callable[..., Tensor], parts: Sequence[Tensor], predicted: Tensor) -> Tensor:
    """The sum of loss(*parts) over the rows that are predicted; what a chunk computes is not kept for the backward pass."""

    def total(mask: Tensor, *given: Tensor) -> Tensor:
        return loss(*given).masked_fill(~mask, 0.0).sum()

    sums = [
        checkpoint(total, mask, *given, use_reentrant=False, preserve_rng_state=False)
        for mask, *given in zip(predicted.split(CHUNK), *(part.split(CHUNK) for part in parts), strict=True)
    ]
    return torch.stack(sums).sum()
