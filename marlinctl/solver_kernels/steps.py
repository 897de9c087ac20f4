"""The inner loops of the solver as CUDA kernels, compiled at first use by the JIT of marlinctl/kernels.

    csrc/scales.cu   search_scales                     a thread has a row of a group and all candidates in registers
    csrc/sweep.cu    sweep, sparsegpt_sweep            128 columns at a time; between them one matrix product, as in the torch version
    csrc/mask.cu     improve_mask                      the same

Each takes one problem, or a stack of problems with a leading dimension E, as the experts of a block are: CTAs of its own for each.

torch runs these loops as some thousand launches of small kernels for each linear: 14 s of 19 for two blocks of Llama-3-8B on an H200. The
results agree but for rounding: the sums are the same, in another order, so a target within rounding of a half may get the neighbouring
code, and of two scales whose errors are equal to rounding either may be taken.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from marlinctl.kernels.functions import Arguments, Function, architecture_of, enqueue, load_function, require_driver
from marlinctl.quantize.products import Halves, split, split_mm
from marlinctl.quantize.scheme import INT4, Grid
from marlinctl.sparsify.masked_ls import MARGIN, mask_of, pair_inverses, pair_of
from marlinctl.sparsify.steps import PruneSteps

SOURCES = Path(__file__).parent / "csrc"
THREADS = 128  # rows of a CTA
COLUMNS = 128  # of a call
# Columns that one product over everything before them serves: its tiles are as wide as the matrix units like them, where a product for
# each call reads all errors for 128 columns. What lies between is added by small products.
_GATHERED = 512
_RUN = 32
SHARED_BYTES = 4 * (COLUMNS * _RUN + COLUMNS * THREADS)  # of sweep and mask, as columns.cuh says

_GIVEN, _CHOSEN = 1, 2  # MASK of sweep.cu


@dataclass(frozen=True, slots=True)
class SolverKernels:
    """On one device. The methods are those of quantize.steps and sparsify.steps, with their shapes and dtypes."""

    device: torch.device  # with its index
    folder: Path  # of the cache

    def steps(self) -> PruneSteps:
        return PruneSteps(self.search_scales, self.sweep, self.sparsegpt_sweep, self.improve_mask, stacks=True)

    def require(self) -> None:
        """Compiles and loads what a default recipe needs. Raises what kernels.functions.load_function raises."""
        self._load("sweep", sweep_defines(True, 0), SHARED_BYTES)

    def search_scales(
        self,
        weight: Tensor,
        importance: Tensor | None,
        *,
        group_size: int,
        both_signs: bool,
        bfloat16_exact: bool,
        ratios: tuple[float, ...],
        margin: float = 0.0,
        grid: Grid = INT4,
    ) -> Tensor:
        *stack, rows, k = weight.shape
        columns = weight.mT.contiguous()  # neighbouring threads read neighbouring rows
        h = torch.ones(*stack, k, device=weight.device) if importance is None else importance.contiguous()
        given = torch.tensor([*ratios, 1.0 - margin], device=weight.device)
        found = torch.empty(*stack, k // group_size, rows, device=weight.device)
        function = self._load("scales", scale_defines(len(ratios), both_signs, bfloat16_exact, grid), 0)
        self._launch(function, _ctas(rows, found.numel() // rows), (columns, h, given, found), (rows, group_size))
        return found.mT.contiguous()

    def sweep(
        self, base: Tensor, anchor: Tensor, feedback: Tensor, scales: Tensor | None, group_of: Tensor, mask: Tensor | None = None,
        *, grid: Grid = INT4, zeros: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        if zeros is not None:
            raise ValueError("the kernels have no zero points")
        return self._sweep(base, anchor, feedback, scales, group_of, mask, None, grid)

    def sparsegpt_sweep(
        self, w: Tensor, pivots: Tensor, feedback: Tensor, scales: Tensor | None, group_of: Tensor, *, grid: Grid = INT4
    ) -> tuple[Tensor, Tensor]:
        mask = torch.empty(w.shape, dtype=torch.bool, device=w.device)
        values, _ = self._sweep(w, w, feedback, scales, group_of, mask, pivots, grid)
        return values, mask

    def _sweep(
        self, base: Tensor, anchor: Tensor, feedback: Tensor, scales: Tensor | None, group_of: Tensor, mask: Tensor | None,
        pivots: Tensor | None, grid: Grid,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        k, rows = base.shape[-2:]
        problems = base.numel() // (k * rows)
        _require_contiguous(base, mask, pivots)
        anchor, feedback, group = anchor.contiguous(), feedback.contiguous(), group_of.to(torch.int32).contiguous()
        codes, errors = torch.empty_like(anchor), torch.empty_like(anchor)
        halves = torch.empty_like(anchor), torch.empty_like(anchor)  # of the errors, for the matrix units
        nothing = torch.empty(0, device=base.device)
        s = nothing if scales is None else scales.contiguous()
        kind = 0 if mask is None else _GIVEN if pivots is None else _CHOSEN
        function = self._load("sweep", sweep_defines(scales is not None, kind, grid), SHARED_BYTES)
        for first in range(0, k, _GATHERED):
            last = min(first + _GATHERED, k)
            panel = split(feedback[..., :last, first:last].mT.contiguous())  # [.., columns of this group, all before its last]
            gathered = base if not first else _behind(base[..., first:last, :], panel, slice(None), halves, slice(first))
            for start in range(first, last, COLUMNS):
                stop = min(start + COLUMNS, last)
                here = (..., slice(start, stop), slice(None))
                target = gathered[..., start - first : stop - first, :]
                columns = gathered.shape[-2]
                if start > first:
                    columns = stop - start
                    target = _behind(target, panel, slice(start - first, stop - first), halves, slice(first, start))
                kept = nothing if mask is None else mask[here]
                weighs = nothing if pivots is None else pivots[..., start:]
                tensors = (
                    target, anchor[here], feedback[..., start:, start:], s, group[..., start:], kept, weighs, codes[here], errors[here],
                    *(half[here] for half in halves),
                )  # fmt: skip
                sizes = (stop - start, rows, k, 0 if scales is None else scales.shape[-2], columns)
                self._launch(function, _ctas(rows, problems), tensors, sizes)
        return codes, errors

    def improve_mask(self, weight: Tensor, values: Tensor, mask: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
        k, rows = weight.shape[-2:]
        problems = weight.numel() // (k * rows)
        _require_contiguous(weight, matrix)
        tables, pairs = pair_inverses(matrix).float().contiguous(), pair_of(mask).to(torch.uint8).contiguous()
        v = (values * mask).contiguous()
        errors = (weight - v).contiguous()
        halves, (high, low) = split(errors), split(matrix)
        function = self._load("mask", mask_defines(), SHARED_BYTES)
        for start in range(0, k, COLUMNS):
            stop = min(start + COLUMNS, k)
            here = (..., slice(start, stop), slice(None))
            pull = split_mm((high[here], low[here]), halves)
            fours = (..., slice(start // 4, None), slice(None))
            tensors = (
                pull, matrix[..., start:, start:], tables[..., start // 4 :, :, :], v[here], errors[here], *(half[here] for half in halves),
                pairs[fours],
            )  # fmt: skip
            self._launch(function, _ctas(rows, problems), tensors, (stop - start, rows, k))
        return v, mask_of(pairs.long())

    def _load(self, name: str, defines: tuple[str, ...], shared_bytes: int) -> Function:
        key = (name, defines, self.device.index)
        with _lock:
            if key not in _loaded:
                _loaded[key] = load_function(SOURCES, name, defines, solver_architecture, THREADS, shared_bytes, self.device, self.folder)
            return _loaded[key]

    def _launch(self, function: Function, ctas: int, tensors: tuple[Tensor, ...], sizes: tuple[int, ...]) -> None:
        """On torch's current stream."""
        arguments = Arguments(len(tensors), len(sizes) - 1)
        arguments.pack(*(tensor.data_ptr() for tensor in tensors), *sizes)
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream(self.device).cuda_stream
            enqueue(function, ctas, stream, arguments, overlap=False)


_loaded: dict[tuple[str, tuple[str, ...], int | None], Function] = {}
_lock = threading.Lock()


def _behind(base: Tensor, panel: Halves, columns: slice, errors: Halves, past: slice) -> Tensor:
    """base [..., C, R] of some columns and the feedback of the errors of past ones. panel: feedback [..., columns, all before]."""
    of_columns = panel[0][..., columns, past], panel[1][..., columns, past]
    return split_mm(of_columns, (errors[0][..., past, :], errors[1][..., past, :]), base)


def _ctas(rows: int, problems: int) -> int:
    """Each problem, or group of one, has CTAs for all of its rows."""
    return problems * -(-rows // THREADS)


def _require_contiguous(*tensors: Tensor | None) -> None:
    """The kernels are given addresses: ValueError for a tensor whose elements do not lie as its shape says."""
    for tensor in tensors:
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"a tensor {list(tensor.shape)} with strides {list(tensor.stride())} is not contiguous")


def solver_architecture(device: torch.device) -> str:
    """What the kernels are compiled for on this GPU. Raises what architecture_of and require_driver raise."""
    architecture = architecture_of(device)
    require_driver()
    return architecture


def scale_defines(ratios: int, both_signs: bool, bfloat16_exact: bool, grid: Grid = INT4) -> tuple[str, ...]:
    return (f"RATIOS={ratios}", f"BOTH_SIGNS={int(both_signs)}", f"BFLOAT16_EXACT={int(bfloat16_exact)}", *_of_grid(grid))


def sweep_defines(rounds: bool, mask: int, grid: Grid = INT4) -> tuple[str, ...]:
    """mask: 0 for none, 1 for one that is given, 2 for one that the sweep decides on."""
    return (f"ROUND={int(rounds)}", f"MASK={mask}", f"SHARED_BYTES={SHARED_BYTES}", *_of_grid(grid))


def mask_defines() -> tuple[str, ...]:
    return (f"MARGIN={MARGIN}f", f"SHARED_BYTES={SHARED_BYTES}")


def _of_grid(grid: Grid) -> tuple[str, ...]:
    return (f"LOWEST={grid.lowest}.0f", f"HIGHEST={grid.highest}.0f")
