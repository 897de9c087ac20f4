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
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from marlinctl import __version__
from marlinctl.checkpoint import findings
from marlinctl.checkpoint.contents import Contents
from marlinctl.checkpoint.formats.base import Format, FormatInfo
from marlinctl.checkpoint.formats.registry import (
    INTERCHANGE,
    detect,
    quantization_config,
    read_linear,
    without_quantization,
    working_format,
)
from marlinctl.checkpoint.licence import licence_of
from marlinctl.checkpoint.manifest import made_from
from marlinctl.checkpoint.mask import Masks, open_masks
from marlinctl.checkpoint.reader import Checkpoint, open_checkpoint
from marlinctl.checkpoint.source import Source, resolve_model
from marlinctl.checkpoint.writer import StagedCheckpoint, check_output
from marlinctl.data.calibration import CalibrationSet, load_calibration
from marlinctl.data.tokens import Tokens
from marlinctl.errors import CheckFailed, GateRefused, ResourceProblem
from marlinctl.evaluation.gate import Measurement
from marlinctl.jobs.journal import Request
from marlinctl.models.meta_model import build
from marlinctl.models.switches import without
from marlinctl.oneshot import ranks
from marlinctl.oneshot.commits import Commits, Pace
from marlinctl.oneshot.layers import LayerQuantizer, LayerRecord, SolvedLinear, linear_digest, weight_digest
from marlinctl.oneshot.open import Options, RunInputs, check_request, open_model
from marlinctl.oneshot.probe import probe_before
from marlinctl.oneshot.reading import Reader
from marlinctl.oneshot.resume import RunJob
from marlinctl.oneshot.sequential import SequentialPipeline
from marlinctl.oneshot.solve import steps_on
from marlinctl.planning.memory import CHUNK_TOKENS, CHUNK_TOKENS_ON_DEVICE
from marlinctl.planning.preflight import check_lengths, sixteen_bit
from marlinctl.recipes.schema import Recipe, recipe_hash
from marlinctl.report.files import report_files
from marlinctl.report.rewrite import read_report
from marlinctl.sparsify.steps import TORCH, PruneSteps
from marlinctl.sparsify.types import SparseQuantizedLinear
from marlinctl.system.console import Console
from marlinctl.system.devices import device_peaks, threads
from marlinctl.system.host import peak_rss, release_heap
from marlinctl.system.offload import Scratch
from marlinctl.system.phases import Phases
from marlinctl.system.processes import Processes
from marlinctl.system.signals import Stopping

ALGORITHM_VERSION = 3  # goes up when the same recipe on the same input gives other codes
_DEVICE_SHARE = 0.5  # of free device memory that activations may take


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
    asked = {"model": model, "recipe": recipe.model_dump(mode="json"), "options": options.document(), "measured": measured}
    request = Request("quantize" if recipe.sparsify.pattern == "none" else "sparsify", asked)

    def check(texts_known: bool = False) -> None:
        check_output(out, overwrite=options.overwrite, sources=local, rejects=measure is not None)
        check_request(recipe, options, measure, distils=False, texts_known=texts_known)

    with Processes(options.device, joined) as processes, ExitStack() as stack:
        if processes.main:
            if not options.resume:
                check()
                ranks.require_samples(recipe.calibration.samples, processes)
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
    texts = [kept] if (kept := _kept_calibration(job, console)) is not None else []

    def before_weights(source: Source, checkpoint: Checkpoint) -> None:
        """What the model's config and tokenizer refuse; the calibration text is read for it, unless the model shall write it."""
        if not texts:
            check_lengths(recipe, checkpoint.config, distils=False)
        if measure is not None:
            measure.check_model(source.folder, checkpoint.config)
        if not texts and recipe.calibration.source != "self":
            texts.append(load_calibration(recipe.calibration, source.folder, checkpoint.config, console=console, load_model=_no_model))

    fmt = working_format(recipe.scheme)
    published = (fmt,) if published is None else published

    def look(known: Contents | None) -> RunInputs:
        if not processes.main:
            return open_model(model, out, recipe, options, console, shared=known, writes=False)
        return open_model(model, out, recipe, options, console, published, lambda: job.noted("model", console), before_weights)

    opened = ranks.open_on_all(processes, look)
    job.watch(opened.contents)
    phases = Phases()
    workers = min(4, len(os.sched_getaffinity(0))) if opened.device.type == "cuda" else 1  # a CPU's memory holds one linear at a time
    with threads(options.threads), torch.no_grad():
        with phases("probe"):
            steps = steps_on(opened.device, console)
            probe_before(opened, recipe, steps, console)
        calibration = ranks.share_calibration(processes, lambda: _calibration(job, opened, recipe, texts, steps, console, processes))
        with ExitStack() as stack:
            staged = StagedCheckpoint(out, overwrite=options.overwrite, fmt=fmt, path=job.staged)
            if processes.main:
                stack.enter_context(staged)
            reader = stack.enter_context(Reader(opened.checkpoint, ahead=opened.device.type == "cuda"))
            solving = LayerQuantizer(opened, recipe, options, staged, console, reader, steps, phases, processes)
            _run_blocks(calibration.tokens, job, solving)
            processes.disband()
            if not processes.main:
                return {}, opened.source
            solved = {f"{name}.weight" for name in opened.plan.group_sizes}
            with phases("copy"):
                staged.copy_tensors(opened.checkpoint, [n for n in opened.tensors if n not in solved])
                staged.copy_companions(opened.source.folder)
            staged.write_file("recipe.yaml", recipe.to_yaml().encode())
            warnings = _warnings(opened, calibration, solving.records, console)
            report = _report(
                opened, recipe, options, calibration.facts, solving.records, warnings, time.monotonic() - started, processes.count
            )
            with phases("check"):
                staged.finish(
                    _config(opened, recipe),
                    manifest=_manifest(opened, recipe, calibration.facts, solving.records),
                    verify=lambda folder: _verify_written(folder, solving.records, console, workers),
                    report_files={},
                )
            report["phases"] = phases.seconds()
            if measure is not None:
                try:
                    with job.measuring():
                        report["evaluation"] = measure(staged.path, opened.source)
                except GateRefused:
                    _write_reports(staged, report, opened, fmt)
                    console.warn(f"not published; the result is kept in {staged.set_aside()}")
                    job.remove()
                    raise
            _write_reports(staged, report, opened, fmt)
            job.publish([staged], keep=options.keep_job)
    return report, opened.source


def _found(model: str, options: Options, console: Console) -> Source:
    return resolve_model(model, revision=options.revision, cache_dir=options.cache_dir, offline=options.offline, console=console)


# ---- the work ------------------------------------------------------------------------------------------------------------------------


def _kept_calibration(job: RunJob, console: Console) -> CalibrationSet | None:
    """The job's own text, where it has one."""
    begun, kept = job.begun, job.calibration()
    if begun and kept is None:
        console.warn("the calibration tokens of the job are damaged or missing: it starts anew")
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
    ranks.require_samples(len(made.tokens.ids), processes)
    facts = _fingerprint(opened, recipe, made, steps)
    if job.begun:
        job.check(facts)
    else:
        job.begin_blocks(facts, made, opened.contents)
    return made


def _fingerprint(opened: RunInputs, recipe: Recipe, calibration: CalibrationSet, steps: PruneSteps) -> dict[str, Any]:
    """Everything that decides the numbers. Where any of it differs, going on would mix two jobs."""
    # Codes differ where rounding decides. A CPU has one solver.
    solver = {} if opened.device.type == "cpu" else {"solver": "torch" if steps is TORCH else "kernels"}
    return {
        "model": opened.contents.fingerprint,
        "recipe": recipe.canonical(),
        "calibration_sha256": calibration.facts["sha256"],
        "versions": versions(),
        "device": opened.device.type,
        "dtype": str(opened.dtype).removeprefix("torch."),
        **solver,
    }


@dataclass(frozen=True, slots=True)
class _Attempt:
    """One way through the blocks: what differs when the device's memory ran out before."""

    chunk_tokens: int  # tokens in flight
    budget: int  # bytes of device memory for activations between two passes; the others lie in host memory or on the disk
    redo_from: int | None = None  # the first block to solve again


def _run_blocks(tokens: Tokens, job: RunJob, solving: LayerQuantizer) -> None:
    """All blocks. Where the device's memory runs out, once more from the last finished block with less of it. ResourceProblem E590 where
    that does not suffice either."""
    device, processes = solving.opened.device, solving.processes
    budget, chunk = 0, CHUNK_TOKENS
    if device.type == "cuda":
        budget, chunk = int(torch.cuda.mem_get_info(device)[0] * _DEVICE_SHARE), CHUNK_TOKENS_ON_DEVICE
    full = ""
    fewer = [less for less in (CHUNK_TOKENS, CHUNK_TOKENS // 2) if less < chunk and processes.count == 1]  # the others do not wait for it
    for attempt in (_Attempt(chunk, budget, solving.options.redo_from), *(_Attempt(less, budget=0) for less in fewer)):
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
        fix="free memory of the GPU, or a smaller --sequence-length, or --device cpu; what is finished is kept",
    )  # fmt: skip


def _every_block(tokens: Tokens, job: RunJob, solving: LayerQuantizer, attempt: _Attempt) -> None:
    """From the first block that is not finished to the last, and the head."""
    opened, console = solving.opened, solving.console
    architecture, head, processes = opened.architecture, opened.plan.head, solving.processes
    pieces = len(architecture.blocks) + (head is not None)
    if processes.main:
        solving.records = job.take_up(solving.staged, console, redo_from=attempt.redo_from, pieces=pieces)
    model = build(opened.checkpoint.config, opened.dtype)
    linears = len(architecture.linears) + (head is not None)
    with (
        console.progress("quantize" if solving.scheme.quantizes else "prune", linears) as solving.progress,
        _deterministic(solving.options.deterministic),
    ):
        first = processes.share(job.finished)
        solving.progress.advance(sum(len(block.linears) for block in architecture.blocks[:first]))
        if first == pieces:
            return
        with solving.phases("embed"):
            pipeline = SequentialPipeline(
                model, architecture, solving.weights, ranks.own_samples(tokens, processes),
                device=opened.device, dtype=opened.dtype, scratch=Scratch(ranks.scratch_folder(job.path), opened.device, attempt.budget),
                chunk_tokens=attempt.chunk_tokens, corrects_drift=opened.corrects_drift, resident=True, processes=processes,
            )  # fmt: skip
        samples = len(tokens.ids)
        _replay(pipeline, job, solving, console, samples)
        on_gpu = opened.device.type == "cuda"
        pace = Pace(processes.count * sum(tensor.nbytes for tensor in pipeline.states().values()))
        with Commits(opened.device) as commits:
            for block, following in zip_longest(architecture.blocks[first:], architecture.blocks[first + 1 :]):
                with Stopping("block") as stopping:
                    if following is not None:
                        solving.weights.expect([*following.others, *(f"{name}.weight" for name in following.linears)])
                    with solving.phases("forward and Gram"):
                        pipeline.run_block(block, solving.stage)
                        if on_gpu:
                            torch.cuda.synchronize(opened.device)
                    if pace.overdue:
                        commits.wait()
                    kept = processes.share(block.index + 1 < pieces and (not on_gpu or (pace.due and commits.idle)))
                    states = ranks.kept_states(pipeline, samples, processes) if kept else {}
                    with solving.phases("wait for the disk"):
                        solved = solving.take()
                        size = sum(linear.nbytes for linear in solved) + sum(tensor.nbytes for tensor in states.values())
                        if processes.main:
                            commits.submit(partial(_commit, job, solving, "block", block.index, solved, states, pace), size)
                    release_heap()
                if asked := processes.largest(stopping.asked):
                    commits.wait()
                    console.say(f"block {block.index} is finished and kept")
                    stopping.asked = asked
                    stopping.raise_again()
            if head is not None:
                pipeline.run_head(head.name, solving.stage)
                if processes.main:
                    commits.submit(partial(_commit, job, solving, "head", len(architecture.blocks), solving.take(), {}, pace))


def _commit(
    job: RunJob, solving: LayerQuantizer, step: str, index: int, solved: Sequence[SolvedLinear], states: Mapping[str, Tensor], pace: Pace
) -> None:
    with pace.timed() if states else nullcontext():
        job.commit(step, index, solving.note(solved), solving.staged, states)


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
    with closing(job.stored_weights(solving.records, solving.weights)) if processes.main else nullcontext() as stored:
        stage = ranks.stored_by_main(stored.stage if stored is not None else None, processes)
        for block in blocks:
            pipeline.run_block(block, stage, replay=True)


def _verify_written(folder: Path, records: list[LayerRecord], console: Console, workers: int) -> None:
    """Read the staged checkpoint back: every linear holds what was solved, and its mask. workers: linears at a time."""
    with (
        open_checkpoint(folder) as written,
        open_masks(folder) as masks,
        console.progress("check from disk", len(records)) as progress,
        ThreadPoolExecutor(workers) as pool,
    ):
        info = detect(written.config, written.tensors)
        for record, digest in zip(records, pool.map(lambda record: _digest_on_disk(written, info, masks, record), records), strict=True):
            if digest != record.digest:
                raise CheckFailed(
                    "E103",
                    "weights, scales or mask on disk differ from those that were solved",
                    where=record.name,
                    fix="check the disk, then run again",
                )
            progress.advance()


def _digest_on_disk(written: Checkpoint, info: FormatInfo, masks: Masks | None, record: LayerRecord) -> str:
    keep: Tensor | None = None
    if record.pattern is not None:
        if masks is None:
            return "no mask file"
        keep = masks.keep(record.name, *record.shape)
    if record.group_size is None:
        return weight_digest(written.read(f"{record.name}.weight"), keep)
    linear = read_linear(written, info, record.name)
    if keep is not None:
        linear = SparseQuantizedLinear(linear.codes, linear.scales, linear.group_size, keep)
    return linear_digest(linear)


def _warnings(opened: RunInputs, calibration: CalibrationSet, records: list[LayerRecord], console: Console) -> list[str]:
    """All of the run, for the report; those of the inputs are known, and said, at its end."""
    inputs = findings.of_inputs({record.name: record.dead for record in records})
    for warning in inputs:
        console.warn(warning)
    return [*opened.warnings, *findings.of_text(calibration.facts, "--sequence-length"), *inputs]


# ---- what is written about it --------------------------------------------------------------------------------------------------------


def _config(opened: RunInputs, recipe: Recipe) -> dict[str, Any]:
    config: dict[str, Any] = without(without_quantization(opened.checkpoint.config))
    if not recipe.scheme.quantizes:
        return config
    layers = dict(opened.plan.group_sizes)
    config["quantization_config"] = quantization_config(
        INTERCHANGE, layers, sixteen_bit(opened.checkpoint, layers), {"version": __version__, "recipe_sha256": recipe_hash(recipe)}
    )
    return config


def published_report(out: Path) -> dict[str, Any]:
    """The report of a folder that is published already."""
    return {key: value for key, value in read_report(out).items() if key != "schema_version"}


def _write_reports(staged: StagedCheckpoint, report: Mapping[str, Any], opened: RunInputs, fmt: Format) -> None:
    """They name the digest of the manifest, so they come after it."""
    layers = opened.plan.group_sizes if fmt.quantized else {}
    for name, data in report_files(report, staged.path, fmt=fmt, layers=layers).items():
        staged.write_file(name, data)


def versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("torch", "transformers", "safetensors", "tokenizers", "accelerate")
    return {"marlinctl": __version__, "algorithm": str(ALGORITHM_VERSION), **{name: version(name) for name in names}}


def _source_facts(opened: RunInputs) -> dict[str, Any]:
    source = opened.source
    return {"kind": source.kind, "name": Path(source.name).name if source.kind != "hub" else source.name, "revision": source.revision}


def _manifest(opened: RunInputs, recipe: Recipe, calibration: Mapping[str, Any], records: list[LayerRecord]) -> dict[str, Any]:
    layers = [{k: v for k, v in asdict(record).items() if k != "seconds"} for record in records]
    source = {key: value for key, value in calibration.items() if key != "source"}
    earlier = made_from(opened.source.folder)
    return {
        "format": working_format(recipe.scheme).name,
        "recipe": {"sha256": recipe_hash(recipe)},
        "source": {**_source_facts(opened), "fingerprint": opened.contents.fingerprint, **({"made_from": earlier} if earlier else {})},
        "calibration": source,
        "versions": versions(),
        "device": opened.device.type,
        "dtype": str(opened.dtype).removeprefix("torch."),
        "layers": layers,
        "finished": True,
    }


def _report(
    opened: RunInputs, recipe: Recipe, options: Options, calibration: Mapping[str, Any], records: list[LayerRecord],
    warnings: list[str], seconds: float, processes: int,
) -> dict[str, Any]:  # fmt: skip
    device = opened.device
    tensors = opened.checkpoint.tensors
    dense = sum(info.end - info.begin for info in tensors.values())
    saved = sum(r.bytes_in - r.bytes_out for r in records)
    return {
        "kind": "quantize" if recipe.scheme.quantizes else "sparsify",
        "command": options.command,
        "written": time.strftime("%Y-%m-%d", time.gmtime()),
        "source": {**_source_facts(opened), "note": opened.source.note, "license": licence_of(opened.source)},
        "recipe": {"sha256": recipe_hash(recipe), **recipe.model_dump(mode="json")},
        "calibration": dict(calibration),
        "versions": versions(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "processes": processes,
        "dtype": str(opened.dtype).removeprefix("torch."),
        "bits": recipe.scheme.bits,
        "sparse": sum(r.pattern is not None for r in records),
        "bytes": {"source": dense, "result": dense - saved},
        "kept": [{"name": name, "reason": reason} for name, reason in opened.plan.kept.items()],
        "fallbacks": [{"name": r.name, "fallback": r.fallback} for r in records if r.fallback],
        "underfed": [{"name": r.name, "tokens": r.tokens, "remark": r.remark} for r in records if r.remark],
        "dead_inputs": [{"name": r.name, "count": r.dead} for r in records if r.dead],
        "warnings": warnings,
        "error": {"mean": sum(r.error for r in records) / len(records), "worst": max(records, key=lambda r: r.error).name},
        "seconds": round(seconds, 1),
        "peak_memory_bytes": peak_rss(),
        **device_peaks(device),
        "layers": [asdict(record) for record in records],
    }


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
