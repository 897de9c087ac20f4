"""benchmarks/sanitize_marlin.py: what it lays before compute-sanitizer on a rented GPU, without failing there or leaving a kernel out."""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import sanitize_marlin as subject
from marlinctl.kernels.activations import round_activations_for_tiles
from marlinctl.kernels.configurations import (
    A8_FACTORED_SM80,
    A8_FACTORED_SM90,
    A8_SM80,
    A8_SM90,
    GROUP_SIZES,
    SPARSE_A8_FACTORED_SM90,
    Configuration,
    Grid,
    group_shift,
)
from marlinctl.kernels.dispatch import configurations

HOPPER = "sm_90a"
SUMS, FACTORED = (*A8_SM80, *A8_SM90), (*A8_FACTORED_SM80, *A8_FACTORED_SM90, *SPARSE_A8_FACTORED_SM90)


@pytest.mark.parametrize("quick", [False, True])
def test_every_kernel_for_int8_activations_is_there(quick: bool) -> None:
    """If a configuration, a group size or a kind of token scales were left out, its errors in memory would never be seen."""
    found = subject.cases("a8", HOPPER, quick=quick)
    kinds = {(one.configuration, one.token_groups, size) for one in found for _, _, size in one.shapes}
    factored = set(itertools.product(FACTORED, (False,), (*GROUP_SIZES, -1)))
    assert kinds == set(itertools.product(SUMS, (False, True), (*GROUP_SIZES, -1))) | factored
    shifts = {
        size: {group_shift(k if size == -1 else size, k) for one in found for _, k, s in one.shapes if s == size} for _, _, size in kinds
    }
    assert shifts == {32: {1}, 64: {2}, 128: {3}, -1: {-1}}, "a group of all of K is channel-wise"
    dtypes = Counter((one.configuration, one.token_groups, one.dtype) for one in found)
    with_both = {*itertools.product(SUMS, (False, True)), *itertools.product(FACTORED, (False,))}
    assert set(dtypes) == {(*one, dtype) for one in with_both for dtype in subject.DTYPES} and set(dtypes.values()) == {2}
    for one in found:
        assert all(n % 8 == 0 and k % 8 == 0 and (size == -1 or k % size == 0) for n, k, size in one.shapes)
        assert max(k for _, k, _ in one.shapes) > one.configuration.k_step * one.configuration.stages, "stages are filled again"
        assert max(one.tokens) > 1 and (quick or max(one.tokens) > one.configuration.tokens), "tiles of M"


@pytest.mark.parametrize(
    ("kernels", "quick", "most"), [("a8", False, 3600), ("a8", True, 800), ("dense", True, 1500), ("sparse", True, 1500)]
)
def test_a_run_has_few_launches(kernels: str, quick: bool, most: int) -> None:
    """A launch takes ten milliseconds and more under a sanitizer: a run of hours would not be made."""
    launches = sum(
        len(subject.grids(one.configuration, m, n, k, one.configuration.grid(m, n, k, 132)))
        for one in subject.cases(kernels, HOPPER, quick=quick)
        for n, k, _ in one.shapes
        for m in one.tokens
    )
    assert launches <= most


def test_16_bit_products_and_roundings() -> None:
    """If dense or sparse configurations went missing with the new ones, or a number of pieces of a thread, it would stay unseen."""
    for kernels in ("dense", "sparse"):
        found = {(one.configuration, one.dtype) for one in subject.cases(kernels, HOPPER, quick=True)}
        assert found == set(itertools.product((c for c in configurations(kernels) if c.fits(HOPPER)), subject.DTYPES))
    whole = subject.roundings(quick=False)
    assert len(whole) == len(set(whole)) == 36
    assert {dict(d.split("=") for d in defines)["PIECES"] for one in whole for _, defines in one.sources} == {"2", "4"}


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The script with stand-ins for compiler and kernels: what a launch is given, and what it leaves."""

    def run(*flags: str, leaves: float = 0.0) -> int:
        def load(c: Configuration, dtype: torch.dtype, device: torch.device, folder: Any, shift: int, groups: bool) -> Any:
            return SimpleNamespace(grid=lambda m, n, k, residents: c.grid(m, n, k, 132 * residents), resident=1, configuration=c)

        def launch(kernel: Any, x: Tensor, p: Any, bias: Tensor, out: Tensor, grid: Grid) -> None:
            assert not kernel.configuration.int8 and x.shape[1] == p.in_features
            out.fill_(leaves)

        def multiply(kernel: Any, x: Tensor, weights: Any, scales: Tensor, bias: Tensor, out: Tensor, shift: int, grid: Grid) -> None:
            assert kernel.configuration.int8 and x.dtype == torch.int8 and weights[-1].dtype == torch.float32
            assert len(weights) == (3 if kernel.configuration.sparse else 2)
            assert grid.ctas <= kernel.configuration.units(*out.shape, x.shape[1])
            out.fill_(leaves)

        def round_on_gpu(x: Tensor, group: int | None, *, sparse: bool) -> Any:
            return round_activations_for_tiles(x + leaves, group, sparse)

        monkeypatch.setattr(subject, "DEVICE", torch.device("cpu"))
        monkeypatch.setattr(subject, "architecture_of", lambda device: HOPPER)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(subject.jit, "cubin", lambda *given: b"")
        monkeypatch.setattr(subject, "load_unpack", lambda *given: None)
        monkeypatch.setattr(subject, "unpack", lambda *given: None)
        for replacement in (load, launch, multiply, round_on_gpu):
            monkeypatch.setattr(subject, replacement.__name__, replacement)
        monkeypatch.setattr(subject, "A8_SHAPES", {size: [(64, 2 * size if size > 0 else 72)] * 2 for size in (32, 128, -1)})
        monkeypatch.setattr(subject, "QUICK_SHAPES", [(64, 48)])
        monkeypatch.setattr(subject, "ROUNDED_K", (8, 200))
        monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "")  # taken back afterwards
        monkeypatch.setattr(sys, "argv", ["sanitize_marlin.py", *flags])
        return subject.main()

    return run


@pytest.mark.parametrize("kernels", subject.KERNELS)
def test_the_exit_code_says_whether_something_is_wrong(kernels: str, on_the_cpu: Callable[..., int]) -> None:
    """If an output that was not written left the exit code at 0, a kernel that does nothing would be found free of errors."""
    flags = ["--kernels", kernels, "--quick", "--part", "1/8"]
    assert on_the_cpu(*flags) == 0
    assert on_the_cpu(*flags, leaves=torch.nan) == 1
    assert on_the_cpu(*flags, "--build", leaves=torch.nan) == 0


def test_a_name_that_is_none_is_an_error(on_the_cpu: Callable[..., int]) -> None:
    """A misspelt configuration would be found free of errors too."""
    with pytest.raises(SystemExit):
        on_the_cpu("--kernels", "a8", "--only", "a8-m1")


def test_parts_make_a_whole(on_the_cpu: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    """If two parts left a kernel out, or both had it, a whole run in pieces would not be one."""
    counts = []
    for part in ("1/1", "1/3", "2/3", "3/3"):
        assert on_the_cpu("--kernels", "rounding", "--part", part) == 0
        counts.append(int(capsys.readouterr().out.split()[1]))
    assert counts[0] == sum(counts[1:]) == 12
    with pytest.raises(SystemExit):
        on_the_cpu("--part", "4/3")
