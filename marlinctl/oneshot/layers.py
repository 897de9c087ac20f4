"""What happens to each linear of the sequential pipeline: prune, quantize or both, and what is written and noted about it.

weights of linears that share an input, their Hessian
    ─► members with equal group size, equal grid and equal source of the mask are stacked into one solve
    ─► stacks of equal shape, of the experts of a block, are solved together
    ─► codes (+ mask) + scales, or pruned 16-bit weights + mask
    ─► tensors of the interchange form, mask, LayerRecord;   the final weight goes back to the pipeline
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from marlinctl.checkpoint.formats.registry import INTERCHANGE, linear_tensors
from marlinctl.checkpoint.orders import Orders, is_exponents, read_orders
from marlinctl.checkpoint.reader import torch_dtype
from marlinctl.checkpoint.writer import StagedCheckpoint
from marlinctl.errors import NumericalProblem, number_of
from marlinctl.models.architectures import Block
from marlinctl.models.config import sizes_of
from marlinctl.models.folds import foldable
from marlinctl.oneshot.equalization import Equalization
from marlinctl.oneshot.folded import Folded
from marlinctl.oneshot.gram import StageInput
from marlinctl.oneshot.input_rounding import InputFacts, measure, stays
from marlinctl.oneshot.open import Options, RunInputs
from marlinctl.oneshot.permutation import ChannelOrders
from marlinctl.oneshot.reading import Reader
from marlinctl.oneshot.rows import solve_stacks
from marlinctl.oneshot.sequential import SequentialPipeline, TunedBlock
from marlinctl.oneshot.solve import Outcome, StackedSolver, StackOutcome
from marlinctl.oneshot.tuning import Tuned, TuneSettings, holds_out, tunable, tune_block
from marlinctl.planning.memory import Work, experts_together
from marlinctl.quantize.integer_fit import has_form
from marlinctl.quantize.scheme import INT4, SIXTEEN_BIT, Activations, Grid, Rounding
from marlinctl.quantize.types import Hessian, QuantizedLinear
from marlinctl.recipes.schema import Recipe
from marlinctl.sparsify.steps import PruneSteps
from marlinctl.sparsify.types import SparseQuantizedLinear
from marlinctl.system.console import Console, Progress
from marlinctl.system.digests import sha256_of_tensors
from marlinctl.system.page_locked import to_host
from marlinctl.system.phases import Phases
from marlinctl.system.processes import ALONE, Processes


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """What happened to one linear. `seconds` goes to the report and not to the manifest."""

    name: str
    shape: tuple[int, int]
    group_size: int | None  # None: 16-bit
    pattern: str | None  # "2:4" or None
    error: float  # share of the output energy that is lost: tr(δ H δᵀ) / tr(W H Wᵀ); with drift correction, W is the corrected target
    damping: float
    tokens: int
    dead: int
    fallback: str | None
    remark: str
    digest: str  # SHA-256 of what was solved: codes and scales, or the 16-bit weight; then mask
    bytes_in: int
    bytes_out: int
    seconds: float
    bits: int = 4  # of a code; 16: not quantized. Earlier versions noted none
    symmetric: bool = True  # codes without zero points
    activations: Activations = "16-bit"  # that the weight is multiplied with
    rounding: Rounding = "none"  # of these activations, that programs may do when they run 4-bit codes
    rounding_error: float | None = None  # these three: input_rounding.py; None where it is not asked for
    input_mean: float | None = None
    input_spread: float | None = None
    integer_scales: bool | None = None  # whether scales have this form (quantize/integer_scales.py); None where it is not asked for

    @property
    def grid(self) -> Grid:
        """Of a linear that was quantized."""
        return Grid(self.bits, self.symmetric, self.activations)


@dataclass(frozen=True, slots=True)
class SolvedLinear:
    """One linear that is solved and not yet noted. Its tensors lie where they were solved."""

    name: str
    result: Tensor | QuantizedLinear  # the 16-bit weight in the dtype that is stored, or codes and scales
    mask: Tensor | None  # [N, K] bool
    error: Tensor  # of the linear, float64
    energy: Tensor
    damping: float
    dead: int
    fallback: str | None
    tokens: int
    remark: str
    seconds: float
    rounding: Rounding = "none"
    inputs: InputFacts | None = None

    @property
    def nbytes(self) -> int:
        tensors = (self.result,) if isinstance(self.result, Tensor) else tensors_of(self.result)
        return sum(tensor.nbytes for tensor in tensors) + (0 if self.mask is None else self.mask.nbytes)


@dataclass(frozen=True, slots=True)
class Finished:
    """What a block leaves to be written: the tensors of a shard, and what is noted of each linear. Masks are written already."""

    tensors: dict[str, Tensor]
    records: list[LayerRecord]
    orders: Orders = field(default_factory=dict)  # in which the linears' rows and columns are written
    tuning: Mapping[str, float] | None = None  # error of the block on held-out samples, before and after


class LayerQuantizer:
    """The pipeline's other half. `stage` and `stages` are its SolveStage and SolveStages; `take` hands out what was solved, `note` makes of
    it what is written. Of several processes, only the main one notes what is solved.

    On a GPU a block is noted while the next one is computed (commits.py); on a CPU each linear at once.
    """

    def __init__(
        self, opened: RunInputs, recipe: Recipe, options: Options, staged: StagedCheckpoint, console: Console, weights: Reader,
        steps: PruneSteps, phases: Phases, processes: Processes = ALONE,
    ) -> None:  # fmt: skip
        self._worst = (0.0, "")  # layer error so far, and whose it is
        self.opened, self.options, self.staged, self.console, self.weights = opened, options, staged, console, weights
        self.phases, self.processes = phases, processes
        self.records: list[LayerRecord] = []
        self.recipe, self.scheme = recipe, recipe.scheme
        self.solver = StackedSolver.of(recipe, corrects_drift=opened.corrects_drift, bfloat16_exact=bfloat16_exact(opened), steps=steps)
        self.at_once = opened.device.type == "cpu" and not recipe.tunes
        on_device = opened.device.type != "cpu"
        work = Work.of(recipe, element=opened.dtype.itemsize, corrects_drift=opened.corrects_drift, on_device=on_device)
        self.experts_together = experts_together(opened.architecture, opened.plan.group_sizes, work)  # how many `stages` may be given
        self._run_order = {name: i for i, name in enumerate(opened.architecture.linears)}
        self._waiting: list[SolvedLinear] = []
        self._finished = Finished({}, [])
        self.progress: Progress | None = None
        self.folded = Folded(weights)
        before = read_orders(opened.checkpoint.folder)
        self.equalization = _equalization(opened, recipe, self.folded, before, processes)
        self.orders = _channel_orders(opened, recipe, self.folded, before, processes)
        self._tuned: dict[int, Tuned] = {}  # blocks that are not taken yet
        self._said_untuned = False

    def forget(self) -> None:
        """Of a block that could not be finished."""
        self.weights.forget()
        self._waiting, self._finished, self._tuned = [], Finished({}, []), {}

    def take(self) -> list[SolvedLinear]:
        """What was solved since the last call and is not noted, in run order."""
        taken, self._waiting = self._waiting, []
        return sorted(taken, key=lambda linear: self._run_order.get(linear.name, len(self._run_order)))

    def changed(self, block: Block) -> list[str]:
        """Norms and biases that the run may change or reorder: they are written with their block."""
        moved = [] if self.orders is None else self.orders.moved(block.index)
        if self.equalization is not None:
            moved += [name for names in self.equalization.norms(block).values() for name in names]
        tuned = tunable(block) if self.recipe.tunes else []
        return list(dict.fromkeys([*moved, *tuned]))

    def rest_of(self, block: Block) -> Finished:
        """What is written of a block besides its linears."""
        tuned = self._tuned.pop(block.index, None)
        others = {} if tuned is None else dict(tuned.others)
        for name in self.changed(block):
            if name not in others:
                others[name] = self.weights.read(name).to(self._stored_dtype(name))
        tuning = None if tuned is None else {"before": tuned.before, "after": tuned.after}
        return Finished({name: to_host(tensor) for name, tensor in others.items()}, [], self.folded.of(block.index), tuning)

    def tune(self, block: Block, layer: nn.Module, walk: SequentialPipeline) -> TunedBlock | None:
        """The pipeline's TuneBlock: tune the scales of what was solved last, and the norms."""
        if not block.in_one_pass:
            return None
        if not holds_out(walk, self.processes):
            if not self._said_untuned:
                of = f" of each of {self.processes.count} processes" if self.processes.count > 1 else ""
                self.console.warn(f"blocks are not tuned: all samples{of} are taken at once, and some must be held out; use more --samples")
            self._said_untuned = True
            return None
        solved = {linear.name: linear.result for linear in self._waiting if isinstance(linear.result, QuantizedLinear)}
        settings = TuneSettings(self.recipe.quantize.tune_steps, self.recipe.quantize.tune_learning_rate)
        stored = {name: self._stored_dtype(name) for name in tunable(block)}
        with self.phases("tune"):
            exact = self.solver.settings.bfloat16_exact
            tuned = tune_block(block, layer, solved, stored, walk, settings, bfloat16_exact=exact, processes=self.processes)
        if tuned is None:
            return None
        self._waiting = [replace(linear, result=tuned.linears.get(linear.name, linear.result)) for linear in self._waiting]
        self._tuned[block.index] = tuned
        results = {linear.name: linear.result for linear in self._waiting}

        def stage(names: tuple[str, ...], _hessian: Hessian | None, _remark: str) -> dict[str, Tensor]:
            found: dict[str, Tensor] = {}
            for name in names:
                result = results[name] if name in results else self.weights.read(f"{name}.weight")
                found[name] = result.dequantize() if isinstance(result, QuantizedLinear) else result.float()
            return found

        return TunedBlock(stage, tuned.others)

    def _stored_dtype(self, name: str) -> torch.dtype:
        return torch_dtype(self.opened.checkpoint.tensors[name])

    def note(self, solved: Sequence[SolvedLinear], rest: Finished | None = None) -> Finished:
        """Everything that is written of a block, whose last linears are `solved`. rest: what `rest_of` said of it."""
        for linear in solved:
            self._note(linear)
        finished, self._finished = self._finished, Finished({}, [])
        if rest is not None:
            finished = replace(rest, tensors=finished.tensors | rest.tensors, records=finished.records)
        self.records += finished.records
        return finished

    def stage(self, names: tuple[str, ...], hessian: Hessian | None, remark: str) -> dict[str, Tensor]:
        """Final weights of linears that share an input, on the device; skipped ones as they are."""
        return self.stages([StageInput(names, hessian, remark)])[0]

    def stages(self, inputs: Sequence[StageInput]) -> list[dict[str, Tensor]]:
        """The same for linears with several inputs."""
        hessians = [stage.hessian for stage in inputs if stage.hessian is not None]
        assert len(hessians) == len(inputs), "only stored weights come without a Hessian"
        device = hessians[0].matrix.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # so that work enqueued before is not timed as the solve
        with self.phases("read"):
            weights = [{name: self.weights.read(f"{name}.weight").to(device).float() for name in stage.names} for stage in inputs]
        with self.phases("solve"):
            self._solve_stages(inputs, weights, hessians)
            if device.type == "cuda" and len(inputs) > 1:
                torch.cuda.synchronize(device)
        return weights

    def _solve_stages(self, inputs: Sequence[StageInput], weights: list[dict[str, Tensor]], hessians: Sequence[Hessian]) -> None:
        """Put final weights into `weights`."""
        sizes, pattern = self.opened.plan.group_sizes, self.opened.pattern
        facts = [self._input_facts(stage, weights[i]) for i, stage in enumerate(inputs)]
        # Stacks of one kind and shape: input, members.
        alike: dict[tuple[int, Grid, str | None, torch.Size], list[tuple[int, list[str]]]] = {}
        for i, stage in enumerate(inputs):
            for name in stage.names:
                if name not in sizes and self.progress is not None:
                    self.progress.advance()
            kinds = {name: (sizes[name], self.opened.plan.grid(name), pattern.origin(name)) for name in stage.names if name in sizes}
            for kind in dict.fromkeys(kinds.values()):
                members = [name for name in stage.names if kinds.get(name) == kind]
                rows, k = sum(weights[i][name].shape[0] for name in members), weights[i][members[0]].shape[1]
                alike.setdefault((*kind, torch.Size((rows, k))), []).append((i, members))
        for (group_size, grid, origin, shape), stacks in alike.items():
            started = time.monotonic()
            stack = torch.cat([weights[i][name] for i, members in stacks for name in members]).view(len(stacks), *shape)
            masks = None
            if origin:
                masks = torch.cat([pattern.mask(name, weights[i][name]).to(stack.device) for i, members in stacks for name in members])
                masks = masks.view(len(stacks), *shape)
            solver, given = self.solver.on(grid), [hessians[i] for i, _ in stacks]
            solved = self._solve(solver, [members for _, members in stacks], stack, masks, given, group_size)
            seconds = (time.monotonic() - started) / len(stacks)
            for (i, members), (outcome, final, kept) in zip(stacks, solved, strict=True):
                first = 0
                for name in members:
                    part = slice(first, first + weights[i][name].shape[0])
                    first = part.stop
                    share = seconds * weights[i][name].shape[0] / shape[0]
                    tokens, remark = hessians[i].tokens, inputs[i].remark
                    weights[i][name] = self._keep(name, outcome, final(part), kept, part, tokens, remark, share, facts[i])

    def _input_facts(self, stage: StageInput, weights: Mapping[str, Tensor]) -> dict[str, InputFacts]:
        """Of the linears of a stage that are solved, before they are. Nothing where no inputs were kept."""
        rounding = self.scheme.rounding
        if stage.hessian is None or stage.hessian.inputs is None or rounding == "none" or not self.processes.main:
            return {}
        return measure(stage.hessian.inputs, {n: w for n, w in weights.items() if n in self.opened.plan.group_sizes}, rounding)

    def _solve(
        self,
        solver: StackedSolver,
        members: list[list[str]],
        stacks: Tensor,
        masks: Tensor | None,
        hessians: Sequence[Hessian],
        group_size: int,
    ) -> list[StackOutcome]:
        """members: the linears of each stack [R, K] of `stacks` [E, R, K]."""
        try:
            return solve_stacks(solver, stacks, masks, hessians, group_size, self.processes)
        except ValueError as error:
            fault, message = 0, str(error)
            for e in range(len(members)) if len(members) > 1 else ():  # one by one: the one at fault is named
                try:
                    solver.solve(stacks[e], None if masks is None else masks[e], hessians[e], group_size)
                except ValueError as found:
                    fault, message = e, str(found)
                    break
            raise NumericalProblem(
                "E620", message, where=", ".join(members[fault]), fix="check the model with its own weights; try --dtype float32"
            ) from error

    def _keep(
        self, name: str, outcome: Outcome, result: Tensor | QuantizedLinear, mask: Tensor | None,
        rows: slice, tokens: int, remark: str, seconds: float, facts: Mapping[str, InputFacts],
    ) -> Tensor:  # fmt: skip
        """Queue one linear; returns the weight [N, K] that the published model computes with. facts: of all that share its input."""
        if outcome.fallback and self.options.strict:
            raise NumericalProblem(
                "E605", f"the Hessian cannot be used as it is ({outcome.fallback}), and --strict forbids a fallback", where=name,
                fix="more or other calibration text, a higher --damping, or no --strict",
            )  # fmt: skip
        if self.options.strict and outcome.dead:
            raise NumericalProblem(
                "E605", f"{number_of(outcome.dead, 'input was', 'inputs were')} zero in all of calibration, and --strict forbids that",
                where=name,
                fix="more or other calibration text, --skip this linear, or no --strict",
            )  # fmt: skip
        stored = result if isinstance(result, QuantizedLinear) else result.to(self._stored_dtype(f"{name}.weight"))
        kept = None if mask is None else mask[rows]
        error, energy = outcome.error[rows].sum(), outcome.output_energy[rows].sum()
        solved = SolvedLinear(
            name, stored, kept, error, energy, outcome.damping, outcome.dead, outcome.fallback, tokens, remark, seconds,
            "none" if not facts or stays(facts) else self.scheme.rounding, facts.get(name),
        )  # fmt: skip
        weight = stored.dequantize() if isinstance(stored, QuantizedLinear) else stored.float()
        if not self.at_once:  # a process that writes nothing tunes it all the same
            self._waiting.append(solved)
        elif self.processes.main:
            self._note(solved)
        return weight

    def _note(self, solved: SolvedLinear) -> None:
        """One linear: its tensors in the interchange form, its mask, its record and its line."""
        name, result = solved.name, solved.result
        energy = float(solved.energy)
        mask = solved.mask
        if isinstance(result, QuantizedLinear):
            if result.grid.symmetric and not bool(result.codes.any()) and energy > 0:
                raise NumericalProblem(
                    "E604", "every weight rounds to zero: they are smaller than the smallest scale that float16 holds", where=name,
                    fix=f"leave this linear 16-bit: --skip {name}",
                )  # fmt: skip
            packed = linear_tensors(INTERCHANGE, name, result)  # a GPU packs in a millisecond what takes a core 0.2 s
            tensors, digest = {key: to_host(tensor) for key, tensor in packed.items()}, linear_digest(result)
            shape, group_size = (result.out_features, result.in_features), result.group_size
        else:
            tensors, digest = {f"{name}.weight": to_host(result)}, weight_digest(result, mask)
            shape, group_size = (result.shape[0], result.shape[1]), None
        self._finished.tensors.update(tensors)
        if mask is not None:
            self.staged.write_mask(name, mask)
        info = self.opened.checkpoint.tensors[f"{name}.weight"]
        record = LayerRecord(
            name=name,
            shape=shape,
            group_size=group_size,
            pattern=None if mask is None else "2:4",
            error=float(solved.error) / energy if energy > 0 else 0.0,
            damping=solved.damping,
            tokens=solved.tokens,
            dead=solved.dead,
            fallback=solved.fallback,
            remark=solved.remark,
            digest=digest,
            bytes_in=info.nbytes,
            bytes_out=sum(t.numel() * t.element_size() for t in tensors.values()),
            seconds=round(solved.seconds, 4),
            bits=result.grid.bits if isinstance(result, QuantizedLinear) else SIXTEEN_BIT,
            symmetric=not isinstance(result, QuantizedLinear) or result.grid.symmetric,
            activations=result.grid.activations if isinstance(result, QuantizedLinear) else "16-bit",
            rounding=solved.rounding,
            rounding_error=None if solved.inputs is None else solved.inputs.rounding_error,
            input_mean=None if solved.inputs is None else solved.inputs.mean,
            input_spread=None if solved.inputs is None else solved.inputs.spread,
            integer_scales=self._integer_scales(result),
        )
        self._finished.records.append(record)
        if solved.fallback:
            self.console.warn(f"{name}: {solved.fallback}")
        if self.progress is not None:
            exact = "16-bit inputs" if solved.inputs is not None and solved.rounding == "none" else ""
            extra = "".join(f"  {text}" for text in (f"{solved.dead} dead inputs" if solved.dead else "", exact, solved.remark) if text)
            note = f"{name:<44} error {record.error:.5f}  damping {solved.damping:g}  {solved.seconds:6.2f} s{extra}"
            self._worst = max(self._worst, (record.error, name))
            error, worst = self._worst
            self.progress.advance(1, note, f"worst error {error:.4f}, {worst.removeprefix('model.')}")

    def _integer_scales(self, result: Tensor | QuantizedLinear) -> bool | None:
        if not (self.solver.settings.integer_scales and self.scheme.quantizes):
            return None
        if not isinstance(result, QuantizedLinear) or result.grid != INT4:
            return False
        return None if result.scales.shape[-1] == 1 else has_form(result.scales)  # one scale for each row is of the form whatever it is


def _equalization(opened: RunInputs, recipe: Recipe, folded: Folded, before: Orders, processes: Processes) -> Equalization | None:
    """Of the norms in front of linears that this run quantizes; not where an earlier run did it, nor where activations are rounded, too:
    what weights lose in spread, activations would gain."""
    if not recipe.scheme.quantizes or recipe.quantize.equalize == "never" or any(map(is_exponents, before)):
        return None
    chosen = {name: size for name, size in opened.plan.group_sizes.items() if not opened.plan.grid(name).rounds_activations}
    return Equalization(chosen, folded, processes=processes)


def _channel_orders(opened: RunInputs, recipe: Recipe, folded: Folded, before: Orders, processes: Processes) -> ChannelOrders | None:
    """Of linears whose 2:4 pattern is chosen in this run. None where none may have one, or an earlier run chose them: one order on another
    has no file of its own."""
    if not recipe.scheme.prunes or recipe.sparsify.permute == "never" or not all(map(is_exponents, before)):
        return None
    chosen = {name for name in opened.plan.group_sizes if opened.pattern.origin(name) is None}
    folds = foldable(opened.architecture.blocks, sizes_of(opened.checkpoint.config), chosen)
    required = recipe.sparsify.permute == "always"
    return ChannelOrders(folds, folded, required=required, processes=processes) if any(folds) or required else None


def bfloat16_exact(opened: RunInputs) -> bool:
    """Whether scales must be exact in bfloat16 too: where the source has such weights."""
    return any(opened.checkpoint.tensors[f"{name}.weight"].dtype == "BF16" for name in opened.plan.group_sizes)


def linear_digest(linear: QuantizedLinear) -> str:
    """SHA-256 of codes, scales, zeros and, where there is one, the mask."""
    masks = (linear.keep,) if isinstance(linear, SparseQuantizedLinear) else ()
    return sha256_of_tensors(*tensors_of(linear), *masks)


def tensors_of(linear: QuantizedLinear) -> tuple[Tensor, ...]:
    return (linear.codes, linear.scales, *(() if linear.zeros is None else (linear.zeros,)))


def weight_digest(weight: Tensor, mask: Tensor | None) -> str:
    """SHA-256 of a 16-bit weight and its mask."""
    return sha256_of_tensors(weight, *(() if mask is None else (mask,)))
