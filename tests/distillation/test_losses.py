"""The losses against their definitions in float64, written out token by token."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from marlinctl.distillation import losses
from marlinctl.distillation.losses import Signals, Top, Weights, loss_sums, squarehead, top_of

B, L, V, H, BLOCKS = 3, 7, 11, 5, 4
ALL = Weights(1.0, 1.0, 1.0, 1.5)


def example(seed: int = 0) -> tuple[Tensor, list[Tensor], Tensor, Tensor, Tensor, list[Tensor]]:
    """Logits and hidden states of the student, ids, counted, and those of the teacher."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    counted = torch.arange(L) < torch.tensor([[L], [4], [2]])  # rows of 7, 4 and 2 tokens
    ids = torch.randint(V, (B, L), generator=generator)
    hidden = [normal(B, L, H) for _ in range(BLOCKS)]
    return normal(B, L, V), hidden, ids, counted, normal(B, L, V), [h + 0.3 * normal(B, L, H) for h in hidden]


def by_hand(temperature: float) -> tuple[float, float, float]:
    """Cross entropy, SquareHead times counted tokens, and divergence, in float64, one token after the other."""
    logits, hidden, ids, counted, teacher, target = example()
    s, t = logits.double(), teacher.double()
    ce = kl = 0.0
    for row in range(B):
        for place in range(int(counted[row].sum()) - 1):
            z = s[row, place]
            ce -= float(z[ids[row, place + 1]]) - math.log(sum(math.exp(float(v)) for v in z))
            p = [math.exp(float(v) / temperature) for v in t[row, place]]
            q = [math.exp(float(v) / temperature) for v in z]
            p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
            kl += temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    ratios = []
    for student, original in zip(hidden, target, strict=True):
        a, b = student.double()[counted], original.double()[counted]
        ratios.append(float(((a - b) ** 2).mean() / ((b**2).mean() + losses.EPSILON)))
    return ce, sum(ratios) / len(ratios) * int(counted.sum()), kl


@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_each_loss_is_its_definition(temperature: float) -> None:
    """A wrong shift, sign, mean or power of T would train towards something else, and the loss would still fall."""
    logits, hidden, ids, counted, teacher, target = example()
    found = loss_sums(logits, hidden, ids, counted, Signals(target, teacher), Weights(1.0, 1.0, 1.0, temperature))
    torch.testing.assert_close(found.double(), torch.tensor(by_hand(temperature), dtype=torch.float64), rtol=2e-6, atol=0)


def test_padding_has_no_influence() -> None:
    """Whatever stands behind a short row (ids, logits, hidden states) must change neither losses nor gradients."""
    results = []
    for noise in (0.0, 1e4):
        logits, hidden, ids, counted, teacher, target = example()
        padding = ~counted
        ids = ids.masked_fill(padding, 3 if noise else 0)
        logits = (logits + noise * padding.unsqueeze(-1)).requires_grad_()
        hidden = [(h - noise * padding.unsqueeze(-1)).requires_grad_() for h in hidden]
        signals = Signals([h + 2 * noise * padding.unsqueeze(-1) for h in target], teacher + noise * padding.unsqueeze(-1))
        sums = loss_sums(logits, hidden, ids, counted, signals, ALL)
        sums.sum().backward()
        results.append((sums.detach(), logits.grad, hidden[0].grad))
    for quiet, noisy in zip(*results, strict=True):
        assert torch.equal(quiet, noisy)
    assert results[0][1] is not None and not results[0][1][1, 4:].any()


def test_parts_add_up_to_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cross entropy and divergence of two halves, or of small chunks, must be those of the whole: splitting is not a choice of numbers."""
    logits, hidden, ids, counted, teacher, target = example()
    weights = Weights(1.0, 0.0, 1.0, 1.0)
    whole = loss_sums(logits, hidden, ids, counted, Signals(target, teacher), weights)
    halves = sum(
        loss_sums(logits[rows], [], ids[rows], counted[rows], Signals((), teacher[rows]), weights) for rows in (slice(0, 1), slice(1, B))
    )
    torch.testing.assert_close(halves, whole)
    monkeypatch.setattr(losses, "CHUNK", 2)
    torch.testing.assert_close(loss_sums(logits, hidden, ids, counted, Signals(target, teacher), weights), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_the_divergence_written_out_is_that_of_torch_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, temperature: float
) -> None:
    """Its gradient has the same formula: a job that was begun with autograd's continues with the same numbers."""
    monkeypatch.setattr(losses, "CHUNK", 4)
    logits, _, _, counted, teacher, _ = example()
    student, target = logits.to(dtype).flatten(0, 1).requires_grad_(), teacher.to(dtype).flatten(0, 1)
    predicted = torch.nn.functional.pad(counted[:, 1:], (0, 1), value=False).flatten()
    sums = []
    for s, t, mask in zip(student.split(4), target.split(4), predicted.split(4), strict=True):
        q, p = ((z.float() / temperature).log_softmax(-1) for z in (s, t))
        sums.append(torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).masked_fill(~mask, 0.0).sum())
    expected = torch.stack(sums).sum() * temperature**2
    (gradient,) = torch.autograd.grad(3.0 * expected, student)
    before = (student.detach().clone(), target.clone())
    found = losses._divergence_sum(student, Signals(logits=target.unsqueeze(0)), predicted, temperature)
    (ours,) = torch.autograd.grad(3.0 * found, student)
    assert torch.equal(found, expected) and torch.equal(ours, gradient) and ours.dtype == dtype
    assert torch.equal(student, before[0]) and torch.equal(target, before[1])  # nothing is worked on in place


def test_rows_without_padding_need_no_mask() -> None:
    """`padded` saves passes over memory and must not change a bit, of the losses or of their gradients."""
    logits, hidden, ids, _, teacher, target = example()
    full = torch.ones(B, L, dtype=torch.bool)
    results = []
    for padded in (True, False):
        states = [h.clone().requires_grad_() for h in hidden]
        sums = loss_sums(logits, states, ids, full, Signals(target, teacher), ALL, padded=padded)
        results.append((sums.detach(), *torch.autograd.grad(sums.sum(), states)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradients_in_chunks_are_those_of_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second computation of a chunk, in the backward pass, must be of the same numbers."""
    monkeypatch.setattr(losses, "CHUNK", 4)
    logits, hidden, ids, counted, teacher, target = example()
    logits = logits.double().requires_grad_()
    sums = loss_sums(logits, hidden, ids, counted, Signals(target, teacher.double()), Weights(1.0, 0.0, 1.0, 2.0))
    (found,) = torch.autograd.grad(sums.sum(), logits)
    # by hand: softmax(z) - onehot for the cross entropy, T (softmax(z / T) - p) for T^2 KL
    z = logits.detach()
    onehot = torch.nn.functional.one_hot(ids.roll(-1, 1), V)
    expected = z.softmax(-1) - onehot + 2.0 * ((z / 2).softmax(-1) - (teacher.double() / 2).softmax(-1))
    predicted = torch.zeros(B, L, 1, dtype=torch.bool)
    predicted[:, :-1, 0] = counted[:, 1:]
    torch.testing.assert_close(found, expected.masked_fill(~predicted, 0.0), rtol=1e-5, atol=1e-6)


def test_top_of_the_whole_vocabulary_is_no_approximation() -> None:
    """With k = V a cache must give what the teacher itself gives."""
    logits, hidden, ids, counted, teacher, _ = example()
    weights = Weights(0.0, 0.0, 1.0, 1.5)
    expected = loss_sums(logits, hidden, ids, counted, Signals((), teacher), weights)
    found = loss_sums(logits, hidden, ids, counted, Signals(top=top_of(teacher, V, 1.5)), weights)
    torch.testing.assert_close(found, expected)


def test_tokens_beyond_the_top_count_as_one() -> None:
    """If the rest were dropped, a student that puts all its mass there would pay nothing; an empty rest must give finite gradients."""
    logits, hidden, ids, counted, teacher, _ = example()
    teacher[0, 0] = torch.tensor([200.0] + [-200.0] * (V - 1))  # a rest without any probability
    logits.requires_grad_()
    top = top_of(teacher, 3, 1.0)
    assert torch.isneginf(top.rest.exp().log()[0, 0])
    found = loss_sums(logits, hidden, ids, counted, Signals(top=top), Weights(0.0, 0.0, 1.0, 1.0))
    p, q = teacher.double().softmax(-1), logits.detach().double().softmax(-1)
    expected = 0.0
    for row, place in ((r, j) for r in range(B) for j in range(int(counted[r].sum()) - 1)):
        named = top.ids[row, place].tolist()
        pairs = [(float(p[row, place, i]), float(q[row, place, i])) for i in named]
        rest = tuple(1.0 - sum(column) for column in zip(*pairs, strict=True))
        expected += sum(a * math.log(a / b) for a, b in [*pairs, rest] if a > 1e-12)
    assert float(found[2].detach()) == pytest.approx(expected, rel=1e-5)
    found.sum().backward()
    assert logits.grad is not None and bool(torch.isfinite(logits.grad).all())


def test_squarehead_wants_as_many_blocks_on_both_sides() -> None:
    """Comparing block 3 with block 4 would be silent nonsense."""
    _, hidden, _, counted, _, target = example()
    with pytest.raises(ValueError, match="the student has 4 hidden states, the teacher 3"):
        squarehead(hidden, target[:-1], counted)


def test_a_loss_without_weight_is_not_computed() -> None:
    """The teacher need not answer what nobody asks."""
    logits, hidden, ids, counted, _, _ = example()
    found = loss_sums(logits, hidden, ids, counted, Signals(), Weights(1.0, 0.0, 0.0, 1.0))
    assert found[0] > 0 and not found[1:].any()
    with pytest.raises(ValueError, match="needs the teacher's logits"):
        loss_sums(logits, hidden, ids, counted, Signals(), Weights(0.0, 0.0, 1.0, 1.0))


def test_top_is_sorted_out_by_the_teacher() -> None:
    """The kept tokens must be the most likely ones, with their probabilities and what is left."""
    logits = example()[4]
    top: Top = top_of(logits, 2, 1.0)
    p = logits.double().softmax(-1)
    assert torch.equal(top.ids, p.topk(2, -1).indices)
    torch.testing.assert_close(top.logp.double().exp().sum(-1) + top.rest.double().exp(), torch.ones(B, L, dtype=torch.float64))
