"""The job that walks a model: from a checkpoint to a published one whose linears are quantized, pruned, or both.

    look at everything ─► calibration ─► walk the blocks, one shard each ─► copy the rest ─► verify from disk ─► (measure) ─► publish
    (nothing written)                    (solve, pack, unpack == codes)
                                         └─► OUT.job/ after each block, to resume from (resume.py)

Everything that can be refused is refused in the first step. Quantized linears come out in the interchange form (compressed-tensors), from
which `pack` makes the other formats; linears that are pruned and not quantized stay 16-bit. A mask lies beside them in its own file.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from marlinctl.checkpoint import findings
from marlinctl.checkpoint.contents import Contents
from marlinctl.checkpoint.formats.base import Format
from marlinctl.checkpoint.formats.registry import working_format
from marlinctl.checkpoint.reader import Checkpoint
from marlinctl.checkpoint.source import Source, resolve_model
from marlinctl.checkpoint.writer import StagedCheckpoint, check_output
from marlinctl.data.calibration import CalibrationSet, load_calibration, require_files_unchanged
from marlinctl.data.default_set import settled
from marlinctl.data.tokens import Tokens
from marlinctl.errors import GateRefused, ResourceProblem
from marlinctl.evaluation.gate import Measurement
from marlinctl.jobs.journal import Request
from marlinctl.models.architectures import Block
from marlinctl.models.meta_model import build
from marlinctl.oneshot import ranks
from marlinctl.oneshot.commits import Commits, Pace
from marlinctl.oneshot.documents import manifest_of, model_config, published_report, report_of, versions, write_reports
from marlinctl.oneshot.layers import Finished, LayerQuantizer, LayerRecord, SolvedLinear
from marlinctl.oneshot.open import Options, RunInputs, check_request, open_model
from marlinctl.oneshot.probe import probe_before
from marlinctl.oneshot.reading import Reader
from marlinctl.oneshot.resume import RunJob
from marlinctl.oneshot.sequential import SequentialPipeline
from marlinctl.oneshot.solve import steps_on
from marlinctl.oneshot.token_weights import token_weights
from marlinctl.oneshot.tuning import tunable
from marlinctl.oneshot.written import expected_pieces, verify_written
from marlinctl.planning.memory import CHUNK_TOKENS, CHUNK_TOKENS_ON_DEVICE, Work, predicted_device_peak
from marlinctl.planning.preflight import check_lengths, require_samples
from marlinctl.planning.tokens_per_input import fewest
from marlinctl.recipes.schema import Recipe
from marlinctl.sparsify.steps import TORCH, PruneSteps
from marlinctl.system.background import begun
from marlinctl.system.console import Console
from marlinctl.system.devices import limit_device_memory, say_choice, threads
from marlinctl.system.host import available_memory, release_heap
from marlinctl.system.offload import Scratch
from marlinctl.system.phases import Phases
from marlinctl.system.processes import Processes
from marlinctl.system.signals import Stopping


def run_job(
    model: str,
    out: Path,
    recipe: Recipe,
    options: Options,
    console: Console,
    measure: Measurement | None = None,
    *,
    measured: Mapping[str, Any] | None = None,
    published: Sequence[Format] | None = None,
    joined: Processes | None = None,
) -> tuple[dict[str, Any], Source]:
    """Quantize, prune or both: `model` (folder, hub id or GGUF file) into `out`.

    Returns the report as a JSON document, and where the model was found. Where `measure` raises GateRefused the finished folder is kept
    beside `out`, as OUT.rejected; where it raises anything else, in the job. measured: what `resume` needs to make `measure` again.
    published: the formats that the person gets in the end, where this walk is a stage of `compress`; who will refuse them is said before
    the work. joined: the processes of the run that this is a stage of.
    """
    local = [Path(model)] if Path(model).exists() else []
    job = RunJob(out)
    with Processes(options.device, joined) as processes, ExitStack() as stack:
        recipe = processes.share(settled(recipe, console, offline=options.offline) if processes.main else recipe)
        asked = {"model": model, "recipe": recipe.model_dump(mode="json"), "options": options.document(), "measured": measured}
        request = Request("quantize" if recipe.sparsify.pattern == "none" else "sparsify", asked)

        def check(texts_known: bool = False) -> None:
            check_output(out, overwrite=options.overwrite, sources=local, rejects=measure is not None)
            check_request(recipe, options, measure, distils=False, texts_known=texts_known)

        if processes.main:
            if not options.resume:
                check()
                if joined is None:
                    say_choice(options.device, processes.device.type, console)
                require_samples(recipe.calibration.samples, processes.count)
            stack.enter_context(job.held(request, resume=options.resume, console=console, launcher=processes.launcher))
            console.log_to(job.log)
        if processes.share(job.publishing is not None and options.redo_from is None):
            if processes.main:
                job.publish_again(overwrite=options.overwrite, keep=options.keep_job)
            return processes.part(published_report(out) if processes.main else {}), _found(model, options, console)
        if options.resume and processes.main:  # there may be an output by now
            check(texts_known=job.begun)
        if processes.count > 1:
            options = replace(options, device=str(processes.device))
        report, source = _run(job, model, out, recipe, options, console, measure, published, processes)
        return processes.part(report), source


def _run(
    job: RunJob, model: str, out: Path, recipe: Recipe, options: Options, console: Console, measure: Measurement | None,
    published: Sequence[Format] | None, processes: Processes,
) -> tuple[dict[str, Any], Source]:  # fmt: skip
    """The report is the main process's: the others leave after the last block."""
    started = time.monotonic()
    phases = Phases(start=started - console.started)
    texts = [kept] if (kept := _kept_calibration(job, console)) is not None else []

    def before_weights(source: Source, checkpoint: Checkpoint) -> None:
        """What the model's config and tokenizer refuse; the calibration text is read for it, unless the model shall write it."""
        if not texts:
            check_lengths(recipe, checkpoint.config, distils=False)
        if measure is not None:
            measure.check_model(source.folder, checkpoint.config)
        if not texts and recipe.calibration.source != "self":
            with phases("text"):
                texts.append(load_calibration(recipe.calibration, source.folder, checkpoint.config, console=console, load_model=_no_model))

    fmt = working_format(recipe.scheme)
    published = (fmt,) if published is None else published

    def look(known: Contents | None) -> RunInputs:
        if not processes.main:
            return open_model(model, out, recipe, options, console, shared=known, writes=False)
        return open_model(model, out, recipe, options, console, published, lambda: job.noted("model", console), before_weights)

    with phases("look at the model"):
        opened = ranks.open_on_all(processes, look)
    job.watch(opened.contents)
    device_memory = None
    if opened.device.type == "cuda":  # before the first solve is tried, and before a model writes its text
        device_memory = limit_device_memory(opened.device, options.device_memory)
    with threads(options.threads), torch.no_grad():
        with phases("probe"):
            steps = steps_on(opened.device, console)
            if opened.device.type == "cuda" and recipe.scheme.quantizes and (slow := _without_kernels(opened, recipe)):
                console.warn(f"{slow} codes are solved by torch operators, which take about twenty times as long as the kernels")
            probe_before(opened, recipe, steps, console, device_memory=device_memory, ranks=processes.count)
        calibration = ranks.share_calibration(processes, lambda: _calibration(job, opened, recipe, texts, steps, console, processes))
        told = _tokens_per_input(opened, recipe, calibration, console)
        with ExitStack() as stack:
            staged = StagedCheckpoint(
                out, overwrite=options.overwrite, fmt=fmt, pieces=job.staged, resumable=True, max_shard_bytes=options.max_shard_bytes
            )
            if processes.main:
                stack.enter_context(staged)
            reader = stack.enter_context(Reader(opened.checkpoint, opened.device, ahead=opened.device.type == "cuda"))
            solving = LayerQuantizer(opened, recipe, options, staged, console, reader, steps, phases, processes)
            solved = {f"{name}.weight" for name in opened.plan.group_sizes}
            solved.update(name for block in opened.architecture.blocks for name in solving.changed(block))
            rest = [name for name in opened.tensors if name not in solved]
            if processes.main:
                staged.copy_tensors(opened.checkpoint, rest)
                staged.expect(expected_pieces(opened, fmt, solving.changed))
            with begun(staged.copy_ahead) if processes.main and opened.device.type == "cuda" else nullcontext() as copied:
                _run_blocks(calibration.tokens, job, solving)
                processes.disband()
                if not processes.main:
                    return {}, opened.source
                if copied is not None:
                    with phases("copy"):
                        copied()
            staged.copy_companions(opened.source.folder)
            job.write_orders(staged, opened.checkpoint.folder, opened.rotation)
            tuning = job.tuning()
            tuned = [name for block in tuning for name in tunable(opened.architecture.blocks[block["block"]])]
            staged.write_file("recipe.yaml", recipe.to_yaml().encode())
            warnings = [*_warnings(opened, calibration, solving.records, console), *told]
            report = report_of(
                opened, recipe, options, calibration.facts, solving.records, warnings, time.monotonic() - started, processes.count,
                device_memory,
            )  # fmt: skip
            with phases("check"):
                staged.finish(
                    model_config(opened, recipe, solving.records),
                    manifest=manifest_of(opened, recipe, calibration.facts, solving.records, tuned),
                    verify=lambda folder: verify_written(folder, solving.records, console, opened.device),
                    report_files={},
                )
            report |= {"phases": phases.seconds(), "tuning": tuning}
            if measure is not None:
                try:
                    with job.measuring():
                        report["evaluation"] = measure(staged.path, opened.source)
                except GateRefused:
                    write_reports(staged, report, opened, fmt)
                    console.warn(f"not published; the result is kept in {staged.set_aside()}")
                    job.remove()
                    raise
            write_reports(staged, report, opened, fmt)
            job.publish([staged], keep=options.keep_job)
    return report, opened.source


def _without_kernels(opened: RunInputs, recipe: Recipe) -> str:
    """The codes of the run that the solver's kernels do not know; nothing where they know all."""
    if not recipe.scheme.symmetric:
        return "asymmetric"
    return "FP8" if any(grid.floating for grid in opened.plan.grids.values()) else ""


def _found(model: str, options: Options, console: Console) -> Source:
    return resolve_model(model, revision=options.revision, cache_dir=options.cache_dir, offline=options.offline, console=console)


# ---- the work ------------------------------------------------------------------------------------------------------------------------


def _kept_calibration(job: RunJob, console: Console) -> CalibrationSet | None:
    """The job's own text, where it has one."""
    begun, kept = job.begun, job.calibration()
    if begun and kept is None:
        console.warn("the calibration tokens of the job are damaged or missing: it starts anew")
    if kept is not None:
        require_files_unchanged(kept.facts)
    return kept


def _calibration(
    job: RunJob, opened: RunInputs, recipe: Recipe, texts: list[CalibrationSet], steps: PruneSteps, console: Console,
    processes: Processes,
) -> CalibrationSet:  # fmt: skip
    """What was read before, or what the model writes now. It begins the job, or is compared with what the job was begun with."""
    folder = opened.source.folder
    made = (
        texts[0]
        if texts
        else load_calibration(
            recipe.calibration,
            folder,
            opened.checkpoint.config,
            console=console,
            load_model=lambda: _whole_model(folder, opened.dtype, opened.device),
        )
    )
    require_samples(len(made.tokens.ids), processes.count)
    facts = _fingerprint(opened, recipe, made, steps)
    if job.begun:
        job.check(facts)
    else:
        job.begin_blocks(facts, made, opened.contents)
    return made


def _tokens_per_input(opened: RunInputs, recipe: Recipe, calibration: CalibrationSet, console: Console) -> list[str]:
    """Said before the work; what is to be warned of is returned for the report."""
    found = fewest(opened.architecture, opened.plan.group_sizes, recipe.calibration, int(calibration.tokens.counted.sum()))
    if found is None:
        return []
    (console.warn if found.few else console.say)(str(found))
    return [str(found)] if found.few else []


def _fingerprint(opened: RunInputs, recipe: Recipe, calibration: CalibrationSet, steps: PruneSteps) -> dict[str, Any]:
    """Everything that decides the numbers. Where any of it differs, going on would mix two jobs."""
    # Codes differ where rounding decides. A CPU has one solver.
    solver = {} if opened.device.type == "cpu" else {"solver": "torch" if steps is TORCH else "kernels"}
    # Earlier versions corrected no drift in mixtures of experts and in the output head. ALGORITHM_VERSION stays: the codes of all other
    # runs are as before.
    corrected = opened.corrects_drift and any(block.experts for block in opened.architecture.blocks)
    experts = {"experts": "drift correction"} if corrected else {}
    head = {"head": "drift correction"} if opened.corrects_drift and opened.plan.head is not None else {}
    return {
        "model": opened.contents.fingerprint,
        "recipe": recipe.canonical(),
        "calibration_sha256": calibration.facts["sha256"],
        "versions": versions(),
        "device": opened.device.type,
        "dtype": str(opened.dtype).removeprefix("torch."),
        **solver,
        **experts,
        **head,
    }


@dataclass(frozen=True, slots=True)
class _Attempt:
    """One way through the blocks: what differs when the device's memory ran out before."""

    chunk_tokens: int  # tokens in flight
    budget: int  # bytes of device memory for activations between two passes; the others lie in host memory or on the disk
    redo_from: int | None = None  # the first block to solve again
    batches: bool = True  # experts are solved many together


def _run_blocks(tokens: Tokens, job: RunJob, solving: LayerQuantizer) -> None:
    """All blocks. Where the device's memory runs out, once more from the last finished block with less of it. ResourceProblem E590 where
    that does not suffice either."""
    device, processes = solving.opened.device, solving.processes
    budget, chunk = 0, CHUNK_TOKENS
    if device.type == "cuda":
        budget, chunk = _left_on_device(solving), CHUNK_TOKENS_ON_DEVICE
    full = ""
    fewer = [less for less in (CHUNK_TOKENS, CHUNK_TOKENS // 2) if less < chunk and processes.count == 1]  # the others do not wait for it
    for attempt in (_Attempt(chunk, budget, solving.options.redo_from), *(_Attempt(less, budget=0, batches=False) for less in fewer)):
        if full:
            solving.console.warn(f"{full}; once more from block {job.finished}, with {attempt.chunk_tokens:,} tokens in flight")
        try:
            _every_block(tokens, job, solving, attempt)
            return
        except torch.OutOfMemoryError as error:
            full = str(error).splitlines()[0]  # its traceback would keep the tensors of the attempt alive
        solving.forget()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    raise ResourceProblem(
        "E590", f"{full}, again" if fewer else full, where=f"block {job.finished}" if processes.main else f"process {processes.index}",
        fix="free memory of the GPU, a larger --device-memory, a smaller --sequence-length, or --device cpu; what is finished is kept",
    )  # fmt: skip


def _left_on_device(solving: LayerQuantizer) -> int:
    """Bytes of device memory that the fullest solve and what is on its way to the disk leave to activations."""
    opened = solving.opened
    torch.cuda.empty_cache()
    free = limit_device_memory(opened.device, solving.options.device_memory)
    work = Work.of(solving.recipe, element=opened.dtype.itemsize, corrects_drift=opened.corrects_drift, on_device=True)
    return max(0, free - predicted_device_peak(opened.architecture, opened.plan.group_sizes, work))


def _every_block(tokens: Tokens, job: RunJob, solving: LayerQuantizer, attempt: _Attempt) -> None:
    """From the first block that is not finished to the last, and the head."""
    opened, console = solving.opened, solving.console
    architecture, head, processes = opened.architecture, opened.plan.head, solving.processes
    pieces = len(architecture.blocks) + (head is not None)
    if processes.main:
        solving.records = job.take_up(
            solving.staged, console, redo_from=attempt.redo_from, pieces=pieces, weighted=solving.recipe.weighs_tokens
        )
    model = build(opened.checkpoint.config, opened.dtype)
    new = partial(
        SequentialPipeline,
        model, architecture, solving.weights, ranks.own_samples(tokens, processes),
        device=opened.device, dtype=opened.dtype, chunk_tokens=attempt.chunk_tokens, resident=True, processes=processes,
    )  # fmt: skip
    samples = len(tokens.ids)
    linears = len(architecture.linears) + (head is not None)
    solving.folded.forget()
    weights = _token_weights(job, solving, attempt, new, samples) if solving.recipe.weighs_tokens else {}
    with (
        console.progress("quantize" if solving.scheme.quantizes else "prune", linears) as solving.progress,
        _deterministic(solving.options.deterministic),
    ):
        first = processes.share(job.finished)
        solving.progress.advance(sum(len(block.linears) for block in architecture.blocks[:first]))
        if first == pieces:
            return
        if first < len(architecture.blocks):
            _expect(architecture.blocks[first], solving)
        with solving.phases("embed"):
            pipeline = new(
                scratch=_scratch(job, solving, attempt.budget), corrects_drift=opened.corrects_drift, token_weights=weights,
                experts_together=solving.experts_together if attempt.batches else 1, solve_experts=solving.stages,
                equalization=solving.equalization, orders=solving.orders, tune=solving.tune if solving.recipe.tunes else None,
                keeps_inputs=solving.scheme.rounding != "none",
            )  # fmt: skip
        _replay(pipeline, job, solving, console, samples)
        on_gpu = opened.device.type == "cuda"
        pace = Pace(processes.count * sum(tensor.nbytes for tensor in pipeline.states().values()))
        with Commits(opened.device) as commits:
            for block, following in zip_longest(architecture.blocks[first:], architecture.blocks[first + 1 :]):
                with Stopping("block") as stopping:
                    if following is not None:
                        _expect(following, solving)
                    with solving.phases("forward and Gram"):
                        pipeline.run_block(block, solving.stage)
                        if on_gpu:
                            torch.cuda.synchronize(opened.device)
                    if pace.overdue:
                        commits.wait()
                    kept = processes.share(block.index + 1 < pieces and (not on_gpu or (pace.due and commits.idle)))
                    states = ranks.kept_states(pipeline, samples, processes) if kept else {}
                    with solving.phases("wait for the disk"):
                        solved, rest = solving.take(), solving.rest_of(block)
                        size = sum(linear.nbytes for linear in solved) + sum(tensor.nbytes for tensor in states.values())
                        if processes.main:
                            commits.submit(partial(_commit, job, solving, "block", block.index, solved, states, pace, rest), size)
                    release_heap()
                if asked := processes.largest(stopping.asked):
                    commits.wait()
                    processes.wait()
                    console.say(f"block {block.index} is finished and kept")
                    stopping.asked = asked
                    stopping.raise_again()
            if head is not None:
                pipeline.run_head(head.name, solving.stage)
                if processes.main:
                    commits.submit(partial(_commit, job, solving, "head", len(architecture.blocks), solving.take(), {}, pace))


def _token_weights(
    job: RunJob, solving: LayerQuantizer, attempt: _Attempt, new: Callable[..., SequentialPipeline], samples: int
) -> dict[str, Tensor]:
    def expect(block: Block) -> None:
        solving.weights.expect([*block.others, *(f"{name}.weight" for name in block.linears)])

    with solving.phases("token weights"), _deterministic(solving.options.deterministic):
        return token_weights(
            job, solving.opened.architecture, samples, solving.recipe.calibration.seed,
            lambda: new(scratch=_scratch(job, solving, attempt.budget)), solving.console, solving.processes, expect=expect,
        )  # fmt: skip


def _scratch(job: RunJob, solving: LayerQuantizer, budget: int) -> Scratch:
    """For activations: beside a GPU, half of the host's free memory comes before the disk."""
    device, processes = solving.opened.device, solving.processes
    host_budget = available_memory() // (2 * processes.count) if device.type == "cuda" else 0
    return Scratch(ranks.scratch_folder(job.path), device, budget, host_budget)


def _expect(block: Block, solving: LayerQuantizer) -> None:
    """Have its weights read ahead: linears are read by the reference model and to even out their columns, too."""
    solving.weights.expect(block.others)
    reads = 1 + solving.opened.corrects_drift
    if solving.equalization is not None:
        solving.weights.expect([f"{name}.weight" for name in solving.equalization.linears(block)], reads=reads + 1)
    solving.weights.expect([f"{name}.weight" for name in block.linears], reads=reads)


def _commit(
    job: RunJob, solving: LayerQuantizer, step: str, index: int, solved: Sequence[SolvedLinear], states: Mapping[str, Tensor], pace: Pace,
    rest: Finished | None = None,
) -> None:  # fmt: skip
    with pace.timed() if states else nullcontext():
        job.commit(step, index, solving.note(solved, rest), solving.staged, states)


def _replay(pipeline: SequentialPipeline, job: RunJob, solving: LayerQuantizer, console: Console, samples: int) -> None:
    """Hidden states behind the last finished block: those that are kept, taken through the blocks behind them with the stored weights."""
    processes = solving.processes
    found, states = job.last_states()
    index, finished = processes.share((found, job.finished))
    if index:
        ranks.restore(pipeline, states, samples, processes)
    blocks = pipeline.architecture.blocks[index:finished]
    if not blocks:
        return
    console.say(f"hidden states are kept up to block {index}: {len(blocks)} finished blocks run once more with their stored weights")
    device = solving.opened.device if processes.count == 1 else torch.device("cpu")  # where they are shared
    with closing(job.stored_weights(solving.records, solving.weights, device)) if processes.main else nullcontext() as stored:
        stage = ranks.stored_by_main(stored.stage if stored is not None else None, processes)
        for block in blocks:
            others = processes.share(stored.others(block) if stored is not None else {})
            pipeline.run_block(block, stage, replay=True, others=others)


def _warnings(opened: RunInputs, calibration: CalibrationSet, records: list[LayerRecord], console: Console) -> list[str]:
    """All of the run, for the report; those of the inputs are known, and said, at its end."""
    inputs = findings.of_inputs({record.name: record.dead for record in records})
    for warning in inputs:
        console.warn(warning)
    return [*opened.warnings, *findings.of_text(calibration.facts, "--sequence-length"), *inputs]


# ---- process settings ----------------------------------------------------------------------------------------------------------------


def _whole_model(folder: Path, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    from marlinctl.checkpoint.transformers_model import load_dense

    return load_dense(folder, dtype=dtype, device=device).eval()


def _no_model() -> torch.nn.Module:
    raise AssertionError("a text is read without the model")


class _deterministic:
    """The same bytes on the same CUDA machine. The CPU path is deterministic without it."""

    def __init__(self, on: bool) -> None:
        self.on, self.before = on, torch.are_deterministic_algorithms_enabled()

    def __enter__(self) -> None:
        if self.on:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when its first handle is made
            torch.use_deterministic_algorithms(True)

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(self.before)
