"""The solver's kernels: what they compute, on the software GPU, against their definition in float64 and against the torch version."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from marlinctl.kernels import jit
from marlinctl.quantize.gptq import SEARCH_MARGIN, SEARCH_RATIOS, SolveSettings, solve
from marlinctl.quantize.grid import round_scales, search_scales
from marlinctl.quantize.scheme import INT4, INT8, Grid
from marlinctl.quantize.solver import factor
from marlinctl.quantize.types import Hessian
from marlinctl.solver_kernels import steps
from marlinctl.solver_kernels.steps import SHARED_BYTES, SOURCES, SolverKernels, mask_defines, scale_defines, sweep_defines
from marlinctl.sparsify.mask import two_largest
from marlinctl.sparsify.masked_ls import improve_mask
from marlinctl.sparsify.sparsegpt import PruneSettings, prune, prune_and_quantize
from marlinctl.sparsify.types import check_mask
from tests.kernels.built import CUBINS
from tests.kernels.machine_code import usage_of
from tests.kernels.test_compile import RESERVED_BYTES
from tests.quantize.test_solver import hessian
from tests.solver_kernels.software import install

K, ROWS = 204, 150  # neither fills its last block of columns, its last run of 32, or its last CTA
TIE = 1e-4  # distance from a half, in steps of the grid, below which either code may come out


def problem(k: int = K, rows: int = ROWS, seed: int = 0) -> tuple[Tensor, Tensor]:
    """weight [K, R] and a matrix [K, K]."""
    return torch.randn(k, rows, generator=torch.Generator().manual_seed(seed)), hessian(k, seed)


def check_sweep(
    base: Tensor, anchor: Tensor, feedback: Tensor, scales: Tensor | None, group_of: Tensor, keep: Tensor | None,
    found: tuple[Tensor, Tensor], grid: Grid = INT4,
) -> None:  # fmt: skip
    """Every column is the projection of base and the feedback of the errors before it, in float64; the errors are what was left."""
    codes, errors = (tensor.double() for tensor in found)
    target = base.double() + torch.tril(feedback.double().T, -1) @ errors
    kept = torch.ones_like(codes) if keep is None else keep.double()
    if scales is None:
        assert torch.allclose(codes, target * kept, atol=1e-5)
        assert torch.allclose(errors, anchor.double() - codes, atol=1e-5)
        return
    s = scales.double()[group_of]
    t = target / s
    right = t.round().clamp(grid.lowest, grid.highest) * kept
    tie = ((t - t.floor() - 0.5).abs() < TIE) & ((codes - right).abs() <= 1)
    assert bool(((codes == right) | tie).all()), "a code is not the nearest one of its target"
    assert float(tie.float().mean()) < 1e-2
    assert torch.allclose(errors, anchor.double() - codes * s, atol=1e-6)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("rounds", "grid"), [(False, INT4), (True, INT4), (True, INT8)])
def test_every_column_gets_the_feedback_of_those_before_it(
    rounds: bool, grid: Grid, masked: bool, backwards: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this failed, a run on a GPU would round other targets than GPTQ's."""
    w, matrix = problem()
    factored = factor(matrix, 0.01)
    order = torch.randperm(K, generator=torch.Generator().manual_seed(5))
    group_of = order // 68
    given_scales = search_scales(
        w.T.contiguous(), None, group_size=68, both_signs=True, bfloat16_exact=True, ratios=(1.0,), grid=grid
    )  # fmt: skip
    scales = given_scales.T.contiguous()
    keep = two_largest(w.abs()) if masked else None
    base = w + 0.01 * w.flip(0)  # as coordinate descent has it: not the anchor
    given = (base, w, factored.feedback, scales if rounds else None, group_of, keep)
    found = install(monkeypatch, tmp_path, backwards=backwards).sweep(*given, grid=grid)
    check_sweep(*given, found, grid)
    assert not rounds or int(found[0].min()) == grid.lowest


@pytest.mark.parametrize("rounds", [False, True])
def test_the_best_two_of_four_are_kept_as_the_sweep_comes_there(rounds: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, SparseGPT on a GPU would prune other weights than SparseGPT."""
    w, matrix = problem(seed=1)
    factored = factor(matrix, 0.01)
    pivots = factored.pivots.clone()
    pivots[8] = 0.0  # a dead input
    group_of = torch.arange(K) // 68
    scales = search_scales(w.T.contiguous(), None, group_size=68, both_signs=True, bfloat16_exact=True, ratios=(1.0,)).T.contiguous()
    kernels = install(monkeypatch, tmp_path)
    seen: dict[str, Tensor] = {}
    monkeypatch.setattr(SolverKernels, "_sweep", noting(SolverKernels._sweep, seen))
    values, keep = kernels.sparsegpt_sweep(w, pivots, factored.feedback, scales if rounds else None, group_of)
    check_mask(keep.T.contiguous())
    assert not bool(keep[8].any()) or bool((keep[8:12].sum(0) == 2).all())
    check_sweep(w, w, factored.feedback, scales if rounds else None, group_of, keep, (values, seen["errors"]))
    feedback, errors = factored.feedback.double(), seen["errors"].double()
    before = torch.tril(feedback.T, -1)
    for first in range(0, K, 4):
        four = (w.double() + before[:, :first] @ errors[:first])[first : first + 4]
        for i in range(3):
            four[i + 1 :] += feedback[first + i, first + i + 1 : first + 4].unsqueeze(1) * (w[first + i].double() - four[i])
        score = (four * pivots[first : first + 4].double().unsqueeze(1)).abs()
        kept, pruned = score.masked_fill(~keep[first : first + 4], torch.inf), score.masked_fill(keep[first : first + 4], 0.0)
        assert bool((kept.min(0).values >= pruned.max(0).values * (1 - 1e-5)).all()), f"columns {first}..{first + 3}"


def noting(sweep: Callable[..., tuple[Tensor, Tensor]], seen: dict[str, Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    def noted(*args: object) -> tuple[Tensor, Tensor]:
        values, seen["errors"] = sweep(*args)
        return values, seen["errors"]

    return noted


@pytest.mark.parametrize("backwards", [False, True])
def test_a_better_mask_is_that_of_the_torch_version(backwards: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, masks would be refined towards something else on a GPU."""
    w, matrix = problem(seed=2)
    matrix.diagonal().add_(0.01 * matrix.diagonal().mean())
    keep = two_largest(w.abs())
    kernels = install(monkeypatch, tmp_path, backwards=backwards)
    values, better = kernels.improve_mask(w, w * keep, keep, matrix)
    expected, mask = improve_mask(w, w * keep, keep, matrix)
    check_mask(better.T.contiguous())
    assert not bool(values[~better].any())
    same = (better == mask).all(0)  # rows: a pair that wins by rounding alone changes all that follows
    assert float(same.float().mean()) > 0.98
    assert torch.allclose(values[:, same], expected[:, same], atol=1e-3)

    def loss(v: Tensor) -> Tensor:
        delta = (w - v).double()
        return (delta * (matrix.double() @ delta)).sum(0)

    assert torch.allclose(loss(values), loss(expected), rtol=1e-3)
    assert not torch.equal(better, keep)


@pytest.mark.parametrize("group_size", [32, 204])
@pytest.mark.parametrize("both_signs", [False, True])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("weighed", [False, True])
def test_scales_are_those_of_the_torch_version(
    group_size: int, both_signs: bool, exact: bool, weighed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this failed, a checkpoint's scales would depend on the machine, or would be none that it can hold."""
    k = 204 if group_size == 204 else 192
    w = torch.randn(ROWS, k, generator=torch.Generator().manual_seed(3)) * torch.logspace(-6, 3, ROWS).unsqueeze(1)
    w[0] = 0.0
    w[1] *= 1e-4  # below what float16 holds
    w[-1] *= 1e4  # above it
    importance = torch.rand(k, generator=torch.Generator().manual_seed(4)) ** 4 if weighed else None
    how: dict[str, Any] = {
        "group_size": group_size, "both_signs": both_signs, "bfloat16_exact": exact, "ratios": SEARCH_RATIOS, "margin": SEARCH_MARGIN,
    }  # fmt: skip
    found = install(monkeypatch, tmp_path).search_scales(w, importance, **how)
    expected = search_scales(w, importance, **how)
    assert torch.equal(round_scales(found, exact), found), "a scale that the checkpoint cannot hold"
    assert float((found == expected).float().mean()) > 0.999

    def error(scales: Tensor) -> Tensor:
        t = w.double().reshape(ROWS, -1, group_size) / scales.double().unsqueeze(-1)
        h = 1.0 if importance is None else importance.double().reshape(-1, group_size)
        return ((t.round().clamp(INT4.lowest, INT4.highest) - t).square() * h).sum(-1) * scales.double().square()

    assert torch.allclose(error(found), error(expected), rtol=1e-5)


SETTINGS = SolveSettings(
    group_size=32, both_signs=True, bfloat16_exact=True, act_order="static", scale_search="hessian", damping=0.01, refine=2
)


def test_a_whole_solve_is_as_good_as_with_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, a GPU would publish worse layers than a CPU."""
    w, matrix = problem(k=192)
    given = Hessian(matrix, 1000)
    kernels = install(monkeypatch, tmp_path).steps()
    found, expected = solve(w.T.contiguous(), given, SETTINGS, steps=kernels), solve(w.T.contiguous(), given, SETTINGS)
    assert float(found.error.sum()) == pytest.approx(float(expected.error.sum()), rel=1e-3)
    pruning = PruneSettings(method="iterative", damping=0.01, mask_sweeps=2, iterations=10)
    pruned, other = prune(w.T.contiguous(), given, pruning, kernels), prune(w.T.contiguous(), given, pruning)
    assert float(pruned.error.sum()) == pytest.approx(float(other.error.sum()), rel=1e-3)
    for method in ("sparsegpt", "iterative"):
        pruning = PruneSettings(method=method, damping=0.01, mask_sweeps=1, iterations=5)
        joint, keep = prune_and_quantize(w.T.contiguous(), given, pruning, SETTINGS, kernels)
        reference, _ = prune_and_quantize(w.T.contiguous(), given, pruning, SETTINGS)
        check_mask(keep)
        assert float(joint.error.sum()) == pytest.approx(float(reference.error.sum()), rel=2e-3), method


MEETS = "        __syncthreads();\n#pragma unroll 4\n        for (int i = 0; i < run; ++i) add_row(t"


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("add_row(t, tile, k, error, j + 1)", "add_row(t, tile, k, error, j + 2)"),
        ("for (int i = 0; i < run; ++i) add_row(t", "for (int i = 1; i < run; ++i) add_row(t"),
        ("change[k * THREADS] = error;", "change[k * THREADS] = code;"),
        ("rintf(t[j]", "floorf(t[j]"),
        ("stride + run + lane]", "stride + lane]"),
        (MEETS, MEETS.removeprefix("        __syncthreads();\n")),
    ],
)
def test_the_software_gpu_sees_mistakes(right: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, the tests above could not fail."""
    w, matrix = problem()
    factored = factor(matrix, 0.01)
    group_of = torch.arange(K) // 68
    scales = search_scales(w.T.contiguous(), None, group_size=68, both_signs=True, bfloat16_exact=True, ratios=(1.0,)).T.contiguous()
    hits: list[int] = []

    def edit(text: str) -> str:
        hits.append(text.count(right))
        return text.replace(right, wrong)

    kernels = install(monkeypatch, tmp_path, edit=edit)
    given = (w, w, factored.feedback, scales, group_of, None)
    found = kernels.sweep(*given)
    assert sum(hits) == 1
    with pytest.raises(AssertionError):
        check_sweep(*given, found)


VARIANTS = [
    *[("sweep", sweep_defines(rounds, mask)) for rounds, mask in ((True, 0), (True, 1), (True, 2), (False, 2))],
    ("mask", mask_defines()),
    ("scales", scale_defines(len(SEARCH_RATIOS), True, True)),
]
REST = [
    *[("sweep", sweep_defines(False, mask)) for mask in (0, 1)],
    *[
        ("scales", scale_defines(n, both, exact))
        for n in (1, len(SEARCH_RATIOS))
        for both in (False, True)
        for exact in (False, True)
        if not (n > 1 and both and exact)
    ],
]


def check_machine_code(name: str, defines: tuple[str, ...], architecture: str) -> None:
    code = usage_of(jit.cubin(f"{name}.cu", defines, architecture, CUBINS, SOURCES))
    assert (code.stack, code.local) == (0, 0), "registers are spilled"
    assert code.shared <= RESERVED_BYTES, "all shared memory is asked for by the host"


@pytest.mark.skipif(sys.platform != "linux", reason="NVIDIA's compiler comes for Linux alone here")
@pytest.mark.parametrize(
    ("name", "defines", "architecture"),
    [*((*VARIANTS[i], "sm_90a") for i in (0, 2, 4, 5)), (*VARIANTS[2], "sm_80")],
    ids=lambda value: value if isinstance(value, str) else "-".join(value[:2]),
)
def test_nothing_is_spilled(name: str, defines: tuple[str, ...], architecture: str) -> None:
    """If this failed, a thread's run of columns would lie in local memory, and a sweep take several times as long."""
    check_machine_code(name, defines, architecture)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="NVIDIA's compiler comes for Linux alone here")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_90a", "sm_100", "sm_110", "sm_120"])
@pytest.mark.parametrize(
    ("name", "defines"), [*VARIANTS, *REST], ids=lambda value: value if isinstance(value, str) else "-".join(value[:3])
)
def test_nothing_is_spilled_anywhere(name: str, defines: tuple[str, ...], architecture: str) -> None:
    """The same for every variant and architecture."""
    check_machine_code(name, defines, architecture)


def test_a_tensor_that_lies_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, a kernel would read another matrix than the one it was given."""
    kernels = install(monkeypatch, tmp_path)
    w, matrix = problem()
    group_of = torch.zeros(K, dtype=torch.int64)
    for base, mask in ((w.T.contiguous().T, None), (w, (w.T > 0).contiguous().T)):
        with pytest.raises(ValueError, match="is not contiguous"):
            kernels.sweep(base, w, factor(matrix, 0.01).feedback, None, group_of, mask)
    with pytest.raises(ValueError, match="is not contiguous"):
        kernels.improve_mask(w, w, two_largest(w.abs()), (matrix * torch.arange(K)).T)


def test_every_gpu_since_ampere_has_the_shared_memory() -> None:
    """If this failed, a launch would be refused on cards with 99 KiB."""
    assert SHARED_BYTES <= 99 * 1024
    assert steps.COLUMNS % steps._RUN == 0
