"""The learning rate, the optimiser and the step, against their definitions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from marlinctl.distillation import loop as subject
from marlinctl.distillation.student import Student
from tests.distillation.runs import distill, recipe, write_text
from tests.pruned import prune
from tests.tiny import make_tiny


def test_the_learning_rate_rises_and_falls_linearly() -> None:
    """A warm-up that is off, or a rate that does not end near 0, changes every result a little and is seen by nobody."""
    asked = recipe("self", learning_rate=0.01, warmup=0.1).distill
    rates = [subject.learning_rate(step, 100, asked) for step in range(100)]
    assert rates[:10] == pytest.approx([0.001 * (i + 1) for i in range(10)])
    assert rates[10:] == pytest.approx([0.01 * (100 - i) / 90 for i in range(10, 100)])
    none = recipe("self", learning_rate=0.01, warmup=0.0).distill
    assert subject.learning_rate(0, 1, none) == 0.01
    assert subject.learning_rate(0, 1, recipe("self", learning_rate=0.01, warmup=1.0).distill) == 0.01


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("loop")
    make_tiny(root / "teacher")
    prune(root / "teacher", root / "student")
    write_text(root / "text.txt")
    return root


def test_a_step_is_adamw_in_float64(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradient of the mean over the step's tokens, Adam's update with bias correction, then the mask: written out once more."""
    from marlinctl.checkpoint.transformers_model import load_dense

    after: list[dict[str, torch.Tensor]] = []
    rows: list[torch.Tensor] = []
    settle, order = Student.settle, subject.rows_of_step

    def keep_weights(self: Student, opened: Any) -> None:
        after.append({name: parameter.detach().clone() for name, parameter in self.trained.items()})
        settle(self, opened)

    def keep_rows(*args: Any) -> torch.Tensor:
        rows.append(order(*args))
        return rows[-1]

    monkeypatch.setattr(Student, "settle", keep_weights)
    monkeypatch.setattr(subject, "rows_of_step", keep_rows)
    seen: list[torch.Tensor] = []
    train = subject.Loop.run

    def keep_ids(self: subject.Loop, resumed: Any) -> None:
        seen.append(self.rows.ids)
        train(self, resumed)

    monkeypatch.setattr(subject.Loop, "run", keep_ids)
    chosen = recipe(place / "text.txt", tokens=512, warmup=0.0, squarehead=0.0, ce=0.25, kl=1.0, temperature=2.0)
    distill(place / "student", tmp_path / "out", place / "teacher", chosen)

    student, teacher = (load_dense(place / name, dtype=torch.float64) for name in ("student", "teacher"))
    trained = {name: student.get_parameter(name) for name in after[0]}
    alive = {name: parameter != 0 for name, parameter in trained.items()}
    first = {name: torch.zeros_like(parameter) for name, parameter in trained.items()}
    second = {name: torch.zeros_like(parameter) for name, parameter in trained.items()}
    for step in range(2):
        ids = seen[0][rows[step]]
        s, t = (model(input_ids=ids).logits[:, :-1] for model in (student, teacher))
        ce = torch.nn.functional.cross_entropy(s.flatten(0, 1), ids[:, 1:].flatten())
        p, q = (z / 2.0 for z in (t.detach(), s))
        kl = 4.0 * (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1).mean()
        gradients = torch.autograd.grad(0.25 * ce + kl, list(trained.values()))
        rate = 1e-3 * (2 - step) / 2
        with torch.no_grad():
            for (name, parameter), gradient in zip(trained.items(), gradients, strict=True):
                first[name] = 0.9 * first[name] + 0.1 * gradient
                second[name] = 0.999 * second[name] + 0.001 * gradient**2
                m, v = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.999 ** (step + 1))
                parameter -= rate * m / (v.sqrt() + 1e-8)
                parameter *= alive[name]
    # Adam divides by |gradient|: where a gradient is all rounding, so is its step. Everywhere else the weights agree.
    for name, parameter in trained.items():
        difference = (after[0][name].double() - parameter.detach()).abs()
        assert float(difference.max()) <= 2e-3, name
        assert float((difference > 2e-5).double().mean()) < 0.01, name
        assert torch.equal(after[0][name] != 0, parameter != 0), name
    assert len(rows) == 2
