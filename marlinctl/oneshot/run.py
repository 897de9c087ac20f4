"""The job that walks a model: from a checkpoint to a published one whose linears are quantized, pruned, or both.

    look at everything ─► calibration ─► walk the blocks, one shard each ─► copy the rest ─► verify from disk ─► (measure) ─► publish
    (nothing written)                    (solve, pack, unpack == codes)
                                         └─► OUT.job/ after each block, to resume from (resume.py)

Everything that can be refused is refused in the first step. Quantized linears come out in the interchange form (compressed-tensors), from
which `pack` makes the other formats; linears that are pruned and not quantized stay 16-bit. A mask lies beside them in its own file.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from marlinctl import __version__
from marlinctl.checkpoint import findings
from marlinctl.checkpoint.formats.base import Format
from marlinctl.checkpoint.formats.registry import (
    INTERCHANGE,
    quantization_config,
    without_quantization,
    working_format,
)
from marlinctl.checkpoint.licence import licence_of
from marlinctl.checkpoint.manifest import made_from
from marlinctl.checkpoint.reader import Checkpoint
from marlinctl.checkpoint.source import Source, resolve_model
from marlinctl.checkpoint.writer import StagedCheckpoint, check_output
from marlinctl.data.calibration import CalibrationSet, load_calibration
from marlinctl.data.tokens import Tokens
from marlinctl.errors import GateRefused, ResourceProblem
from marlinctl.evaluation.gate import Measurement
from marlinctl.jobs.journal import Request
from marlinctl.models.architectures import Block
from marlinctl.models.meta_model import build
from marlinctl.models.switches import without
from marlinctl.oneshot.commits import Commits, Pace
from marlinctl.oneshot.layers import LayerQuantizer, LayerRecord, SolvedLinear
from marlinctl.oneshot.open import Options, RunInputs, check_request, open_model
from marlinctl.oneshot.probe import probe_before
from marlinctl.oneshot.reading import Reader
from marlinctl.oneshot.resume import RunJob
from marlinctl.oneshot.sequential import SequentialPipeline
from marlinctl.oneshot.solve import steps_on
from marlinctl.oneshot.written import verify_written
from marlinctl.planning.memory import CHUNK_TOKENS, CHUNK_TOKENS_ON_DEVICE, Work, predicted_device_peak
from marlinctl.planning.preflight import check_lengths, sixteen_bit
from marlinctl.recipes.schema import Recipe, recipe_hash
from marlinctl.report.files import report_files
from marlinctl.report.rewrite import read_report
from marlinctl.sparsify.steps import TORCH, PruneSteps
from marlinctl.system.background import begun
from marlinctl.system.console import Console
from marlinctl.system.devices import device_peaks, limit_device_memory, threads
from marlinctl.system.host import available_memory, peak_rss, release_heap
from marlinctl.system.offload import Scratch
from marlinctl.system.phases import Phases
from marlinctl.system.signals import Stopping

ALGORITHM_VERSION = 3  # goes up when the same recipe on the same input gives other codes


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
) -> tuple[dict[str, Any], Source]:
    """Quantize, prune or both: `model` (folder, hub id or GGUF file) into `out`.

    Returns the report as a JSON document, and where the model was found. Where `measure` raises GateRefused the finished folder is kept
    beside `out`, as OUT.rejected; where it raises anything else, in the job. measured: what `resume` needs to make `measure` again.
    published: the formats that the person gets in the end, where this walk is a stage of `compress`; who will refuse them is said before
    the work.
    """
    local = [Path(model)] if Path(model).exists() else []
    job = RunJob(out)
    asked = {"model": model, "recipe": recipe.model_dump(mode="json"), "options": options.document(), "measured": measured}
    request = Request("quantize" if recipe.sparsify.pattern == "none" else "sparsify", asked)
    if not options.resume:
        check_output(out, overwrite=options.overwrite, sources=local, rejects=measure is not None)
        check_request(recipe, options, measure, distils=False)
    with job.held(request, resume=options.resume, console=console):
        console.log_to(job.log)
        if job.publishing is not None and options.redo_from is None:
            job.publish_again(overwrite=options.overwrite, keep=options.keep_job)
            return published_report(out), _found(model, options, console)
        if options.resume:  # there may be an output by now
            check_output(out, overwrite=options.overwrite, sources=local, rejects=measure is not None)
            check_request(recipe, options, measure, distils=False, texts_known=job.begun)
        return _run(job, model, out, recipe, options, console, measure, published)


def _run(
    job: RunJob, model: str, out: Path, recipe: Recipe, options: Options, console: Console, measure: Measurement | None,
    published: Sequence[Format] | None,
) -> tuple[dict[str, Any], Source]:  # fmt: skip
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
    with phases("look at the model"):
        opened = open_model(model, out, recipe, options, console, published, lambda: job.noted("model", console), before_weights)
    job.watch(opened.contents)
    with threads(options.threads), torch.no_grad():
        with phases("probe"):
            steps = steps_on(opened.device, console)
            probe_before(opened, recipe, steps, console)
        calibration = _calibration(job, opened, recipe, texts, steps, console)
        with StagedCheckpoint(out, overwrite=options.overwrite, fmt=fmt, path=job.staged) as staged, ExitStack() as stack:
            reader = stack.enter_context(Reader(opened.checkpoint, opened.device, ahead=opened.device.type == "cuda"))
            solving = LayerQuantizer(opened, recipe, options, staged, console, reader, steps, phases)
            solved = {f"{name}.weight" for name in opened.plan.group_sizes}
            rest = [name for name in opened.tensors if name not in solved]
            with begun(partial(_copy_ahead, staged, opened, rest)) as copied:
                _run_blocks(calibration.tokens, job, solving)
                with phases("copy"):
                    copied()
            with phases("copy"):
                staged.copy_tensors(opened.checkpoint, rest)
                staged.copy_companions(opened.source.folder)
            staged.write_file("recipe.yaml", recipe.to_yaml().encode())
            warnings = _warnings(opened, calibration, solving.records, console)
            report = _report(opened, recipe, options, calibration.facts, solving.records, warnings, time.monotonic() - started)
            with phases("check"):
                staged.finish(
                    _config(opened, recipe),
                    manifest=_manifest(opened, recipe, calibration.facts, solving.records),
                    verify=lambda folder: verify_written(folder, solving.records, console, opened.device),
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


def _copy_ahead(staged: StagedCheckpoint, opened: RunInputs, names: Sequence[str], over: threading.Event) -> None:
    """On a GPU, while it computes; on a CPU all cores are at work."""
    if opened.device.type == "cuda":
        staged.copy_ahead(opened.checkpoint, names, over)


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
    job: RunJob, opened: RunInputs, recipe: Recipe, texts: list[CalibrationSet], steps: PruneSteps, console: Console
) -> CalibrationSet:
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
    device = solving.opened.device
    budget, chunk = 0, CHUNK_TOKENS
    if device.type == "cuda":
        budget, chunk = _left_on_device(solving), CHUNK_TOKENS_ON_DEVICE
    full = ""
    fewer = [less for less in (CHUNK_TOKENS, CHUNK_TOKENS // 2) if less < chunk]
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
        "E590", f"{full}, again", where=f"block {job.finished}",
        fix="free memory of the GPU, or a smaller --sequence-length, or --device cpu; what is finished is kept",
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
    architecture, head = opened.architecture, opened.plan.head
    pieces = len(architecture.blocks) + (head is not None)
    solving.records = job.take_up(solving.staged, console, redo_from=attempt.redo_from, pieces=pieces)
    model = build(opened.checkpoint.config, opened.dtype)
    linears = len(architecture.linears) + (head is not None)
    with (
        console.progress("quantize" if solving.scheme.quantizes else "prune", linears) as solving.progress,
        _deterministic(solving.options.deterministic),
    ):
        first = job.finished
        solving.progress.advance(sum(len(block.linears) for block in architecture.blocks[:first]))
        if first == pieces:
            return
        if first < len(architecture.blocks):
            _expect(architecture.blocks[first], solving)
        with solving.phases("embed"):
            pipeline = SequentialPipeline(
                model, architecture, solving.weights, tokens,
                device=opened.device, dtype=opened.dtype, scratch=_scratch(job, opened, attempt.budget),
                chunk_tokens=attempt.chunk_tokens, corrects_drift=opened.corrects_drift, resident=True,
            )  # fmt: skip
        _replay(pipeline, job, solving, console)
        on_gpu = opened.device.type == "cuda"
        pace = Pace(sum(tensor.nbytes for tensor in pipeline.states().values()))
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
                    kept = block.index + 1 < pieces and (not on_gpu or (pace.due and commits.idle))
                    states = {name: tensor.clone() if on_gpu else tensor for name, tensor in pipeline.states().items()} if kept else {}
                    with solving.phases("wait for the disk"):
                        solved = solving.take()
                        size = sum(linear.nbytes for linear in solved) + sum(tensor.nbytes for tensor in states.values())
                        commits.submit(partial(_commit, job, solving, "block", block.index, solved, states, pace), size)
                    release_heap()
                if stopping.asked:
                    commits.wait()
                    console.say(f"block {block.index} is finished and kept")
                    stopping.raise_again()
            if head is not None:
                pipeline.run_head(head.name, solving.stage)
                commits.submit(partial(_commit, job, solving, "head", len(architecture.blocks), solving.take(), {}, pace))


def _scratch(job: RunJob, opened: RunInputs, budget: int) -> Scratch:
    """For activations: beside a GPU, half of the host's free memory comes before the disk."""
    return Scratch(job.path, opened.device, budget, available_memory() // 2 if opened.device.type == "cuda" else 0)


def _expect(block: Block, solving: LayerQuantizer) -> None:
    """Have its weights read ahead: linears are read by the reference model, too."""
    solving.weights.expect(block.others)
    solving.weights.expect([f"{name}.weight" for name in block.linears], reads=2 if solving.opened.corrects_drift else 1)


def _commit(
    job: RunJob, solving: LayerQuantizer, step: str, index: int, solved: Sequence[SolvedLinear], states: Mapping[str, Tensor], pace: Pace
) -> None:
    with pace.timed() if states else nullcontext():
        job.commit(step, index, solving.note(solved), solving.staged, states)


def _replay(pipeline: SequentialPipeline, job: RunJob, solving: LayerQuantizer, console: Console) -> None:
    """Hidden states behind the last finished block: those that are kept, taken through the blocks behind them with the stored weights."""
    index, states = job.last_states()
    if states:
        pipeline.restore(states)
    blocks = pipeline.architecture.blocks[index : job.finished]
    if not blocks:
        return
    console.say(f"hidden states are kept up to block {index}: {len(blocks)} finished blocks run once more with their stored weights")
    with closing(job.stored_weights(solving.records, solving.weights, solving.opened.device)) as stored:
        for block in blocks:
            pipeline.run_block(block, stored.stage, replay=True)


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
    warnings: list[str], seconds: float,
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
