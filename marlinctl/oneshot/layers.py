"""What happens to each linear that the walk hands over: prune, quantize or both, and what is written and noted about it.

weights of linears that share an input, their Hessian
    ─► members with equal group size and equal source of the mask are stacked into one solve
    ─► codes (+ keep) + scales, or pruned 16-bit weights + keep
    ─► tensors of the interchange form, mask, LayerRecord;   the final weight goes back to the walk
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from marlinctl.checkpoint.formats.registry import INTERCHANGE, linear_tensors
from marlinctl.checkpoint.reader import torch_dtype
from marlinctl.checkpoint.writer import StagedCheckpoint
from marlinctl.errors import NumericalProblem
from marlinctl.oneshot.open import Options, RunInputs
from marlinctl.oneshot.solve import Outcome, StackedSolver, steps_on
from marlinctl.quantize.types import Hessian, QuantizedLinear
from marlinctl.recipes.schema import Recipe
from marlinctl.sparsify.types import SparseQuantizedLinear
from marlinctl.system.console import Console, Progress


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """What happened to one linear. `seconds` goes to the report and not to the manifest."""

    name: str
    shape: tuple[int, int]
    group_size: int | None  # None: 16-bit
    pattern: str | None  # "2:4" or None
    error: float  # share of the output energy that is lost: tr(δ H δᵀ) / tr(W H Wᵀ); with `match`, W is what would match the original
    damping: float
    tokens: int
    dead: int
    fallback: str | None
    remark: str
    digest: str  # SHA-256 of what was solved: codes and scales, or the 16-bit weight; then keep
    bytes_in: int
    bytes_out: int
    seconds: float


class LayerQuantizer:
    """The walk's other half. `stage` is its SolveStage; `flush` writes a shard when a block is done."""

    def __init__(self, opened: RunInputs, recipe: Recipe, options: Options, staged: StagedCheckpoint, console: Console) -> None:
        self.opened, self.options, self.staged, self.console = opened, options, staged, console
        self.records: list[LayerRecord] = []
        self.scheme = recipe.scheme
        steps = steps_on(opened.device, console)
        self.solver = StackedSolver.of(recipe, matches=opened.matches, bfloat16_exact=bfloat16_exact(opened), steps=steps)
        self.pending: dict[str, Tensor] = {}
        self.progress: Progress | None = None

    def flush(self) -> str | None:
        """Write what is finished as a shard; returns its name, None where nothing was solved."""
        if not self.pending:
            return None
        shard = self.staged.write_shard(self.pending)
        self.pending = {}
        return shard

    def stage(self, names: tuple[str, ...], hessian: Hessian, remark: str) -> dict[str, Tensor]:
        """Final weights of linears that share an input; skipped ones as they are."""
        device = hessian.matrix.device
        weights = {name: self.opened.checkpoint.read(f"{name}.weight").to(device, torch.float32) for name in names}
        sizes, pattern = self.opened.plan.group_sizes, self.opened.pattern
        for name in names:
            if name not in sizes and self.progress is not None:
                self.progress.advance()
        kinds = {name: (sizes[name], pattern.origin(name)) for name in names if name in sizes}
        for kind in dict.fromkeys(kinds.values()):
            members = [name for name in names if kinds.get(name) == kind]
            started = time.monotonic()
            stack = torch.cat([weights[name] for name in members])
            keep = torch.cat([pattern.keep(name, weights[name]).to(device) for name in members]) if kind[1] else None
            outcome, final, kept = self._solve(members, stack, keep, hessian, kind[0])
            seconds = time.monotonic() - started
            first = 0
            for name in members:
                rows = slice(first, first + weights[name].shape[0])
                first = rows.stop
                share = seconds * weights[name].shape[0] / stack.shape[0]
                weights[name] = self._keep(name, outcome, final(rows), kept, rows, hessian.tokens, remark, share).to(device)
        return weights

    def _solve(
        self, members: list[str], stack: Tensor, keep: Tensor | None, hessian: Hessian, group_size: int
    ) -> tuple[Outcome, Callable[[slice], Tensor | QuantizedLinear], Tensor | None]:
        try:
            return self.solver.solve(stack, keep, hessian, group_size)
        except ValueError as error:
            raise NumericalProblem(
                "E620", str(error), where=", ".join(members), fix="check the model with its own weights; try --dtype float32"
            ) from error

    def _keep(
        self, name: str, outcome: Outcome, result: Tensor | QuantizedLinear, keep: Tensor | None,
        rows: slice, tokens: int, remark: str, seconds: float,
    ) -> Tensor:  # fmt: skip
        """Note and queue one linear; returns the weight [N, K] that the published model computes with."""
        if outcome.fallback and self.options.strict:
            raise NumericalProblem(
                "E605", f"the Hessian cannot be used as it is ({outcome.fallback}), and --strict forbids a fallback", where=name,
                fix="more or other calibration text, a higher --damping, or no --strict",
            )  # fmt: skip
        if self.options.strict and outcome.dead:
            raise NumericalProblem(
                "E605", f"{outcome.dead} inputs were zero in all of calibration, and --strict forbids that", where=name,
                fix="more or other calibration text, --skip this linear, or no --strict",
            )  # fmt: skip
        info = self.opened.checkpoint.tensors[f"{name}.weight"]
        if isinstance(result, QuantizedLinear) and not bool(result.codes.any()) and float(outcome.energy[rows].sum()) > 0:
            raise NumericalProblem(
                "E604", "every weight rounds to zero: they are smaller than the smallest scale that float16 holds", where=name,
                fix=f"leave this linear 16-bit: --skip {name}",
            )  # fmt: skip
        if isinstance(result, QuantizedLinear):
            tensors = linear_tensors(INTERCHANGE, name, result)
            weight, digest = result.dequantize(), linear_digest(result)
        else:
            stored = result.to("cpu", torch_dtype(info))
            tensors = {f"{name}.weight": stored}
            weight, digest = stored.float(), weight_digest(stored, keep[rows] if keep is not None else None)
        self.pending |= tensors
        if keep is not None:
            self.staged.write_mask(name, keep[rows])
        energy = float(outcome.energy[rows].sum())
        record = LayerRecord(
            name=name,
            shape=(weight.shape[0], weight.shape[1]),
            group_size=result.group_size if isinstance(result, QuantizedLinear) else None,
            pattern=None if keep is None else "2:4",
            error=float(outcome.error[rows].sum()) / energy if energy > 0 else 0.0,
            damping=outcome.damping,
            tokens=tokens,
            dead=outcome.dead,
            fallback=outcome.fallback,
            remark=remark,
            digest=digest,
            bytes_in=info.end - info.begin,
            bytes_out=sum(t.numel() * t.element_size() for t in tensors.values()),
            seconds=round(seconds, 4),
        )
        self.records.append(record)
        if outcome.fallback:
            self.console.warn(f"{name}: {outcome.fallback}")
        if self.progress is not None:
            extra = "".join(f"  {text}" for text in (f"{outcome.dead} dead inputs" if outcome.dead else "", remark) if text)
            self.progress.advance(1, f"{name:<44} error {record.error:.5f}  damping {outcome.damping:g}  {seconds:6.2f} s{extra}")
        return weight


def bfloat16_exact(opened: RunInputs) -> bool:
    """Whether scales shall be exact in bfloat16 too: where the source has such weights."""
    return any(opened.checkpoint.tensors[f"{name}.weight"].dtype == "BF16" for name in opened.plan.group_sizes)


def linear_digest(linear: QuantizedLinear) -> str:
    """SHA-256 of codes, scales and, where there is one, the mask."""
    digest = hashlib.sha256(linear.codes.contiguous().numpy().tobytes())
    digest.update(linear.scales.contiguous().numpy().tobytes())
    if isinstance(linear, SparseQuantizedLinear):
        digest.update(linear.keep.contiguous().numpy().tobytes())
    return digest.hexdigest()


def weight_digest(weight: Tensor, keep: Tensor | None) -> str:
    """SHA-256 of a 16-bit weight and its mask."""
    digest = hashlib.sha256(weight.contiguous().view(torch.uint8).numpy().tobytes())
    if keep is not None:
        digest.update(keep.contiguous().numpy().tobytes())
    return digest.hexdigest()
