"""`distill`: train a pruned or quantized model toward its original, with the mask or the codes fixed, or with a mask that is renewed.

    look at both models ─► rows of tokens ─► losses before ─► train ─► round ─► losses after ─► check from disk ─► publish
    (nothing written)                                         │
                                                              └─► OUT.job/ every `save_every` steps, to resume from

Three modes (docs/distill.md): full trains the linears and norms of the whole model, blockwise the same one block at a time, scales the
scales and norms of a 4-bit model. The result has the form of the student: a folder for `quantize`, or for `pack`.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from marlinctl.checkpoint import findings
from marlinctl.checkpoint.licence import licence_of, stated
from marlinctl.checkpoint.manifest import made_from
from marlinctl.checkpoint.mask import pack_bits
from marlinctl.checkpoint.source import Source
from marlinctl.checkpoint.writer import StagedCheckpoint, check_output, require_space
from marlinctl.data.calibration import Samples
from marlinctl.data.calibration_size import check_documents
from marlinctl.distillation.agreement import Comparison, require_same_weights
from marlinctl.distillation.blockwise import BlockLoop
from marlinctl.distillation.distributed import Processes
from marlinctl.distillation.loop import Loop
from marlinctl.distillation.losses import Weights
from marlinctl.distillation.masks import Masks
from marlinctl.distillation.open import Model, TrainingInputs, open_models
from marlinctl.distillation.publish import build
from marlinctl.distillation.rows import Rows, load_rows, make_rows
from marlinctl.distillation.state import DistillJob, State
from marlinctl.distillation.student import load_student
from marlinctl.distillation.teacher import Cached, Teacher, live, write_cache
from marlinctl.distillation.tracking import Track, require_tracker, tracking, untracked
from marlinctl.errors import number_of
from marlinctl.jobs.journal import Request
from marlinctl.models.module_map import check_module_map
from marlinctl.oneshot.documents import published_report, versions
from marlinctl.oneshot.open import Options
from marlinctl.planning.disk import merged_bytes, needed_by_distillation
from marlinctl.planning.memory import parameters
from marlinctl.planning.training_settings import check_settings, check_sizes
from marlinctl.recipes.schema import Distill, Recipe, recipe_hash
from marlinctl.report.files import report_files
from marlinctl.system.console import Console
from marlinctl.system.devices import device_peaks, forget_device_peaks, forward_dtype, say_choice, set_up_allocator, threads
from marlinctl.system.host import peak_rss
from marlinctl.system.offload import Scratch
from marlinctl.system.processes import Processes as AllProcesses

_DEVICE_SHARE = 0.4  # of free device memory that hidden states may take in mode blockwise


@dataclass(slots=True)
class _Run:
    """What all parts of one run need."""

    out: Path
    recipe: Recipe
    options: Options
    console: Console
    processes: Processes
    job: DistillJob
    dtype: torch.dtype
    track: Track = untracked
    rows: Rows | None = None  # of a text that was read before the weights
    _teacher: nn.Module | None = field(default=None)

    @property
    def asked(self) -> Distill:
        return self.recipe.distill

    def whole_teacher(self, opened: TrainingInputs) -> nn.Module:
        """The teacher on this process's device, read once."""
        if self._teacher is None:
            self._teacher = opened.teacher.load(self.dtype, self.processes.device)
        return self._teacher

    def let_teacher_go(self) -> None:
        self._teacher = None
        gc.collect()
        if self.processes.device.type == "cuda":
            torch.cuda.empty_cache()


def run_distill(
    student: str, out: Path, teacher: str, recipe: Recipe, options: Options, console: Console, joined: AllProcesses | None = None
) -> dict[str, Any]:
    """Train `student` toward `teacher` and publish it as `out`. Returns the report as a JSON document.

    joined: the processes of the run that this is a stage of.
    """
    processes = Processes(options.device, joined)
    set_up_allocator(processes.device)
    forget_device_peaks(processes.device)  # `compress` quantizes first
    run = _Run(out, recipe, options, console, processes, DistillJob(out), forward_dtype(processes.device, options.dtype))
    asked = {"student": student, "teacher": teacher, "recipe": recipe.model_dump(mode="json"), "options": options.document()}
    request = Request("distill", asked)
    sources = [Path(name) for name in (student, teacher) if Path(name).exists()]

    with processes, ExitStack() as stack, threads(options.threads):

        def check_arguments() -> None:
            """What needs no model, before one is fetched."""
            check_output(out, overwrite=options.overwrite, sources=sources)
            check_module_map(options.module_map)
            require_tracker(options.tracker)
            check_documents(run.asked.data)

        def take() -> None:
            check_settings(run.asked, processes.count)
            if not options.resume:
                check_arguments()
            if joined is None and processes.main:
                say_choice(options.device, processes.device.type, console)
            if processes.main:
                stack.enter_context(run.job.held(request, resume=options.resume, console=console, launcher=processes.launcher))
                console.log_to(run.job.log)
                if run.job.publishing is None:
                    require_tracker(options.tracker)
                    settings = recipe.distill.model_dump(mode="json")
                    run.track = stack.enter_context(
                        tracking(options.tracker, out, run.job, settings, offline=options.offline, console=console)
                    )

        def look() -> TrainingInputs:
            if options.resume:
                check_arguments()

            def before_weights(pupil: Model) -> None:
                check_sizes(run.asked, pupil.checkpoint.config, processes.count)
                if processes.main and run.asked.data != "self":
                    run.rows = load_rows(run.asked, pupil.source.folder, console=console, load_teacher=_no_model)

            noted = partial(run.job.noted, console=console)
            opened = open_models(student, teacher, run.asked, options, console, stack, noted, before_weights)
            for contents in opened.contents.values():
                run.job.watch(contents)
            _require_disk_space(opened, out, run.asked, options.max_shard_bytes)
            return opened

        processes.main_first(take)
        if processes.share(run.job.publishing is not None):
            report = _publish_again(run)
        else:
            opened = processes.main_first(look)
            begun = processes.share(run.job.begun)
            rows = _rows(run, opened, begun)
            state = _state(run, begun)
            report = _train_blocks(run, opened, rows, state) if run.asked.mode == "blockwise" else _train(run, opened, rows, state)
    return report


# ---- what the job reads --------------------------------------------------------------------------------------------------------------


def _rows(run: _Run, opened: TrainingInputs, resume: bool) -> Rows:
    """The training text: read (or written by the teacher) by the main process, compared with that of the job on resuming."""

    def read() -> Rows:
        if not run.processes.main:
            return None  # type: ignore[return-value]  # it comes below
        kept = run.job.rows() if resume and run.asked.data == "self" else None
        if kept is not None:
            rows = make_rows(*kept, run.asked, Samples(kept[0], "written by the teacher", 0), run.console)
        elif run.rows is not None:
            rows = run.rows
        else:
            folder = opened.student.source.folder
            rows = load_rows(run.asked, folder, console=run.console, load_teacher=lambda: run.whole_teacher(opened))
        facts = _fingerprint(run, opened, rows)
        if resume:
            run.job.check(facts)
        else:
            run.job.save_rows(rows.ids, rows.counted)
            run.job.begin(facts, inputs={name: contents.document() for name, contents in opened.contents.items()})
        return rows

    rows = run.processes.main_first(read)
    if run.processes.count == 1:
        return rows
    ids, counted = (run.processes.share_tensor(getattr(rows, name, None)) for name in ("ids", "counted"))
    held_out, facts = run.processes.share((rows.held_out, rows.facts) if rows is not None else (0, {}))
    return Rows(ids, counted, held_out, facts)


def _no_model() -> nn.Module:
    raise AssertionError("a text is read without the model")


def _state(run: _Run, resume: bool) -> State | None:
    """The newest state of the job. Its tensors are the main process's; the others get their part of them in the loop."""
    found = run.job.newest() if resume and run.processes.main else None
    described = run.processes.share((found.step, dict(found.document)) if found is not None else None)
    if described is None:
        if resume:
            run.console.say("the job has no saved state: it starts with its first step")
        return None
    run.console.say(f"resuming after step {described[0]}")
    return found if found is not None else State(described[0], {}, described[1])


def _fingerprint(run: _Run, opened: TrainingInputs, rows: Rows) -> dict[str, Any]:
    """Everything that decides the numbers. Where any of it differs, resuming would mix two jobs."""
    return {
        **{name: contents.fingerprint for name, contents in opened.contents.items()},
        "recipe": run.recipe.canonical()["distill"],
        "rows_sha256": rows.sha256,
        "versions": versions(),
        "device": run.processes.device.type,
        "dtype": str(run.dtype).removeprefix("torch."),
    }


def _require_disk_space(opened: TrainingInputs, out: Path, asked: Distill, max_shard_bytes: int) -> None:
    """Disk for the result, a part of it twice, and, beside it, for two states (weights and two moments in float32) and what the teacher
    predicts."""
    tensors = opened.student.checkpoint.tensors
    result = sum(info.nbytes for info in tensors.values())
    require_space(
        out, result + merged_bytes(result, max_shard_bytes) + needed_by_distillation(opened.student.architecture, result, asked)
    )  # fmt: skip


# ---- the modes -----------------------------------------------------------------------------------------------------------------------


def _train(run: _Run, opened: TrainingInputs, rows: Rows, state: State | None) -> dict[str, Any]:
    asked, processes = run.asked, run.processes
    weights = Weights(asked.ce, asked.squarehead, asked.kl, asked.temperature)
    comparison = Comparison(rows.ids[rows.trained : rows.trained + 1], run.dtype, processes, run.console)
    if processes.sharded:
        _measure_whole(run, opened, comparison)
    with ExitStack() as stack:
        if asked.cache_logits:
            known = opened.student.architecture.vocab_size
            teacher = run.whole_teacher(opened)
            require_same_weights("teacher", teacher, processes)
            k = min(asked.cache_logits, known)
            write_cache(teacher, rows, k, weights, asked.micro_batch, run.job, processes, run.console)
            del teacher
            run.let_teacher_go()
            ask: Teacher = stack.enter_context(Cached(run.job))
        elif processes.sharded:
            original = opened.teacher.load(run.dtype, torch.device("cpu"))
            require_same_weights("teacher", original, processes)
            processes.shard(original, [original.get_submodule(block.path) for block in opened.teacher.architecture.blocks])
            comparison.require_same_losses("teacher", original)
            ask = live(original, weights)
        else:
            teacher = run.whole_teacher(opened)
            require_same_weights("teacher", teacher, processes)
            ask = live(teacher, weights)
        student = load_student(opened, asked, processes, run.dtype)
        comparison.require_same_losses("student", student.model)
        loop = Loop(
            student, ask, rows, asked,
            dtype=run.dtype, processes=processes, job=run.job, console=run.console, track=run.track,
        )  # fmt: skip
        before = loop.measure()
        if state is None:
            run.track(_held_out(before), 0)
        run.console.say(f"held out, before: {_as_text(before)}")
        unpruned = student.masks.pruned_norm()
        loop.run(state)
        facts = loop.facts()
        if student.masks.renewal is not None:
            opened, facts["mask"] = _with_last_masks(run, opened, student.masks, unpruned)
        student.settle(opened)
        after = loop.measure()
        run.track(_held_out(after), loop.steps)
        run.console.say(f"held out, after, as published: {_as_text(after)}")
        if after["loss"] > before["loss"] and not unpruned:
            run.console.warn("the held-out loss has risen: the result is worse than the student; try a lower --learning-rate")
    return _publish(run, opened, rows, student.values, facts, before, after)


def _with_last_masks(run: _Run, opened: TrainingInputs, masks: Masks, unpruned: float) -> tuple[TrainingInputs, dict[str, Any]]:
    """What is published instead of the student's own masks, and what the report says of it. All processes must ask together.

    unpruned: norm of the weights that the first masks prune, as a share of all; 0 of a student that is 2:4.
    """
    assert masks.renewal is not None
    left = masks.pruned_norm()
    found: dict[str, Tensor] = {}
    replaced = kept = 0
    for linear, mask in masks.of_linears():
        held = mask.cpu()
        first = opened.pattern.mask(linear)
        replaced, kept = replaced + int((first & ~held).sum()), kept + int(first.sum())
        found[linear] = pack_bits(held)
    changed = replaced / kept if kept else 0.0
    run.console.say(f"the mask: {changed:.2%} of the kept weights are others than before; {left:.2%} of the weights' norm is set to zero")
    facts = {"renewals": masks.renewal.count, "changed": changed, "pruned_norm": {"before": unpruned, "after": left}}
    return replace(opened, pattern=opened.pattern.after(found)), facts


def _measure_whole(run: _Run, opened: TrainingInputs, comparison: Comparison) -> None:
    """Before any device holds shards. A teacher that is asked once is never sharded."""
    run.let_teacher_go()
    asked_for = {"student": (opened.student, torch.float32)} | ({} if run.asked.cache_logits else {"teacher": (opened.teacher, run.dtype)})
    for title, (model, dtype) in asked_for.items():
        load = partial(model.load, dtype, run.processes.device)
        comparison.measure(title, parameters(model.architecture) * dtype.itemsize, load)
    if run.asked.data != "self":  # the report's peak is what a run needs: the whole teacher that writes text, not a comparison
        forget_device_peaks(run.processes.device)


def _train_blocks(run: _Run, opened: TrainingInputs, rows: Rows, state: State | None) -> dict[str, Any]:
    run.let_teacher_go()
    device = run.processes.device
    budget = int(torch.cuda.mem_get_info(device)[0] * _DEVICE_SHARE) if device.type == "cuda" else 0
    loop = BlockLoop(
        opened, rows, run.asked, device=device, dtype=run.dtype, job=run.job,
        scratch=Scratch(run.job.path, device, budget), console=run.console, track=run.track,
    )  # fmt: skip
    loop.run(state)
    before, after = loop.measured()
    run.console.say(f"held out, before: {_as_text(before)}; after, as published: {_as_text(after)}")
    return _publish(run, opened, rows, loop.values, loop.facts(), before, after)


def _held_out(losses: Mapping[str, float]) -> dict[str, float]:
    return {f"held_out/{name}": value for name, value in losses.items()}


def _as_text(losses: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in losses.items())


# ---- the result ----------------------------------------------------------------------------------------------------------------------


def _publish(
    run: _Run, opened: TrainingInputs, rows: Rows, values: Callable[[], Iterable[tuple[str, Tensor]]], training: Mapping[str, Any],
    before: Mapping[str, float], after: Mapping[str, float],
) -> dict[str, Any]:  # fmt: skip
    report = _report(run, opened, rows, training, before, after)
    if not run.processes.main:
        for _ in values():  # gathering a sharded parameter takes all processes
            pass
        return report
    job = run.job
    with StagedCheckpoint(
        run.out, overwrite=run.options.overwrite, fmt=opened.student.info.format, pieces=job.staged,
        max_shard_bytes=run.options.max_shard_bytes,
    ) as staged:  # fmt: skip
        staged.restore([], [])
        build(
            opened,
            values(),
            staged,
            recipe_yaml=run.recipe.to_yaml(),
            manifest=_manifest(run, opened, rows),
            report_files=lambda folder: report_files(report, folder, name=staged.out.name, fmt=opened.student.info.format, layers={}),
            console=run.console,
        )
        job.publish([staged], keep=run.options.keep_job)
    return report


def _publish_again(run: _Run) -> dict[str, Any]:
    if run.processes.main:
        run.job.publish_again(overwrite=run.options.overwrite, keep=run.options.keep_job)
    run.processes.wait()
    return published_report(run.out)


def _report(
    run: _Run, opened: TrainingInputs, rows: Rows, training: Mapping[str, Any], before: Mapping[str, float], after: Mapping[str, float]
) -> dict[str, Any]:
    """Peaks are the main process's, and those of each. All processes must ask together."""
    device = run.processes.device
    peaks = {"peak_memory_bytes": peak_rss(), **device_peaks(device)}
    return {
        "kind": "distill",
        "command": run.options.command,
        "format": opened.student.info.name,
        "student": _source_facts(opened.student.source),
        "teacher": {
            **_source_facts(opened.teacher.source),
            "license": stated(licence_of(opened.teacher.source), run.options.license),
            "base_model": run.options.base_model,
        },
        "written": time.strftime("%Y-%m-%d", time.gmtime()),
        "recipe": {"sha256": recipe_hash(run.recipe), **run.recipe.model_dump(mode="json")},
        "sparse_linears": len(opened.pattern.shapes),
        "data": dict(rows.facts),
        "warnings": [*opened.warnings, *findings.of_text(rows.facts, "--sequence-length")],
        "training": dict(training),
        "held_out": {"before": dict(before), "after": dict(after)},
        "versions": versions(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {number_of(torch.get_num_threads(), 'thread')}",
        "processes": run.processes.count,
        "dtype": str(run.dtype).removeprefix("torch."),
        **peaks,
        "peaks": run.processes.gather(peaks),
    }


def _manifest(run: _Run, opened: TrainingInputs, rows: Rows) -> dict[str, Any]:
    """No times and no losses: two equal runs give two equal manifests."""
    student = opened.student
    earlier = made_from(student.source.folder)
    source = {**_source_facts(student.source), "fingerprint": opened.contents["student"].fingerprint}
    return {
        "format": student.info.name,
        "recipe": {"sha256": recipe_hash(run.recipe)},
        "source": {**source, **({"made_from": earlier} if earlier else {})},
        "teacher": {**_source_facts(opened.teacher.source), "fingerprint": opened.contents["teacher"].fingerprint},
        "data": {"sha256": rows.sha256, **{key: value for key, value in rows.facts.items() if key != "source"}},
        "versions": versions(),
        "device": run.processes.device.type,
        "dtype": str(run.dtype).removeprefix("torch."),
    }


def _source_facts(source: Source) -> dict[str, Any]:
    return {"kind": source.kind, "name": Path(source.name).name if source.kind != "hub" else source.name, "revision": source.revision}
