"""The check before anything is timed: it lets right products pass and every kind of wrong one fail."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from marlinctl.benchmarking import accuracy
from marlinctl.benchmarking.cases import Shape
from marlinctl.errors import CheckFailed
from tests.benchmarking.software import Pretended

CPU = torch.device("cpu")
LARGE = Shape(1024, 128, 32)  # more columns than are compared in one window


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small enough for a CPU."""
    monkeypatch.setattr(accuracy, "ODD_SHAPES", ((64, 48, -1), (80, 64, -1), (192, 160, 32)))
    monkeypatch.setattr(accuracy, "ODD_TOKENS", (1, 7))
    monkeypatch.setattr(accuracy, "IDENTITY", (64, 128))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_right_products_pass(kind: str, dtype: torch.dtype) -> None:
    """If this failed, nothing could ever be timed. A product rounded once is within half of the gate."""
    found, problems = accuracy.check([Pretended(kind, dtype)], [(LARGE, [1, 5])], CPU, thorough=True)  # type: ignore[arg-type]
    assert problems == []
    (worst,) = found.worst
    assert 0 < worst.relative < worst.gate / 2
    assert found.checks == worst.checks == 3 * 2 * 2 + 4 + 2 * 3


def one_column(product: Tensor) -> Tensor:
    wrong = product.clone()
    wrong[:, -1] = 0
    return wrong


def not_written(product: Tensor) -> Tensor:
    wrong = product.clone()
    wrong[-1, -1] = torch.nan
    return wrong


_turn = itertools.count()


def another_each_time(product: Tensor) -> Tensor:
    return product * (1 + 2**-10 * (next(_turn) % 2))


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (one_column, "relative error"),
        (not_written, "relative error nan"),
        (lambda product: product.flip(1), "relative error"),
        (lambda product: product * 1.002, "relative error 2.0"),
        (another_each_time, "three launches differ"),
    ],
    ids=["a column", "not written", "order", "two thousandths", "not the same twice"],
)
def test_wrong_products_fail(wrong: Callable[[Tensor], Tensor], what: str) -> None:
    """If this failed, a kernel that is wrong would get a speed-up."""
    _, problems = accuracy.check([Pretended(wrong=wrong)], [(LARGE, [1, 5])], CPU, thorough=True)
    assert any(what in problem.what for problem in problems)
    with pytest.raises(CheckFailed) as caught:
        accuracy.refuse(problems)
    assert caught.value.error_id == "E113"


def test_a_write_beyond_the_output_fails() -> None:
    """If this failed, a kernel that overwrites its neighbour would pass."""

    class Spills(Pretended):
        def run(self, activations: Tensor, p: object, bias: Tensor | None, out: Tensor) -> Tensor:
            super().run(activations, p, bias, out)  # type: ignore[arg-type]
            whole = out.as_strided((1,), (1,), out.storage_offset() + out.numel())
            whole.zero_()
            return out

    _, problems = accuracy.check([Spills()], [], CPU, thorough=True)
    assert all("written outside of the output" in problem.what for problem in problems) and problems


def test_a_wrong_column_in_the_middle_of_a_large_linear_fails() -> None:
    """If this failed, an index that overflows at half of the columns would go unseen."""

    def middle(product: Tensor) -> Tensor:
        wrong = product.clone()
        wrong[:, wrong.shape[1] // 2] = 0
        return wrong

    _, problems = accuracy.check([Pretended(wrong=middle)], [(LARGE, [1])], CPU, thorough=False)
    assert [problem.what.rpartition("columns from ")[2].partition(":")[0] for problem in problems] == ["384"]


def test_only_what_is_timed_is_compared_where_the_rest_was() -> None:
    """If this failed, a run would check the odd shapes again and again."""
    found, _ = accuracy.check([Pretended()], [(LARGE, [1])], CPU, thorough=False)
    assert found.checks == 3
