"""`compress`: prune, distil, quantize, pack, verify, evaluate and report, as one run with one result.

    OUT.job/ct   ◄── quantize, or prune and quantize in one pass, or prune ─► distil ─► quantize where tokens are given
    OUT.job/...  ◄── pack, once for each format
                     verify each ─► evaluate against the original ─► gate ─► reports ─► rename all of them into place, or none

Nothing appears under its final name before everything is checked. A result that the gate refuses is kept as OUT.rejected.

Each stage is a job of its own inside (OUT.job/ct.job, ...), so a resumed run takes up the stage it died in where that one stood, and
skips those whose folders are there: a folder gets its name when it is whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from marlinctl.checkpoint import manifest
from marlinctl.checkpoint.contents import read_contents
from marlinctl.checkpoint.folder import examine
from marlinctl.checkpoint.formats.registry import INTERCHANGE, detect
from marlinctl.checkpoint.manifest import check as check_manifest
from marlinctl.checkpoint.ownership import leave_results
from marlinctl.checkpoint.reader import Checkpoint, open_checkpoint
from marlinctl.checkpoint.source import Source, resolve_model
from marlinctl.checkpoint.writer import check_output, keep_rejected
from marlinctl.convert.repack import repack
from marlinctl.data.default_set import settled
from marlinctl.data.mixture import parts_of
from marlinctl.data.text import names_a_file
from marlinctl.distillation.rows import load_rows
from marlinctl.errors import GateRefused
from marlinctl.evaluation.gate import Gate, Measurement
from marlinctl.evaluation.settings import EvalSettings
from marlinctl.jobs.journal import JOB, JobFolder, Place, Request
from marlinctl.jobs.staged_job import CompressJob
from marlinctl.oneshot.documents import published_report, versions
from marlinctl.oneshot.open import Options, check_request
from marlinctl.oneshot.run import run_job
from marlinctl.planning.preflight import check_lengths, folders_of, formats_of
from marlinctl.recipes.schema import Recipe, divided, recipe_hash
from marlinctl.report.files import report_files
from marlinctl.system.atomic import canonical, write_bytes, write_document
from marlinctl.system.console import Console
from marlinctl.system.devices import say_choice
from marlinctl.system.digests import sha256_of
from marlinctl.system.processes import Processes
from marlinctl.verify.run import verify

_CT = INTERCHANGE.name  # the folder of the 4-bit checkpoint in the job, from which the other formats are packed


def run_compress(
    model: str,
    out: Path,
    recipe: Recipe,
    options: Options,
    console: Console,
    *,
    evaluate_result: bool = True,
    task_data: Path | None = None,
    gate: Gate | None = None,
) -> dict[str, Any]:
    """The whole way from a model to published folders: OUT in the recipe's first format, OUT-<format> for each further one."""
    with Processes(options.device) as processes:
        recipe = processes.share(settled(recipe, console, offline=options.offline) if processes.main else recipe)
        if processes.main:
            report = _compress(model, out, recipe, options, console, processes, evaluate_result, task_data, gate or Gate())
        else:
            report = _assist(model, out, recipe, options, console, processes)
        return processes.part(report)


def _assist(model: str, out: Path, recipe: Recipe, options: Options, console: Console, processes: Processes) -> dict[str, Any]:
    """What a process does that is not the main one: its part of the stages that are spread."""
    if not processes.share(True):  # the result of an earlier run gets its place
        return {}
    source = _found(model, options, console)
    inner = replace(options, keep_job=False, overwrite=False)
    report = _interchange(model, source, JobFolder(out).path, recipe, inner, console, processes)
    processes.disband()
    return report


def _found(model: str, options: Options, console: Console) -> Source:
    return resolve_model(model, revision=options.revision, cache_dir=options.cache_dir, offline=options.offline, console=console)


def _compress(
    model: str, out: Path, recipe: Recipe, options: Options, console: Console, processes: Processes,
    evaluate_result: bool, task_data: Path | None, gate: Gate,
) -> dict[str, Any]:  # fmt: skip
    """The whole of it, as the main process goes through it."""
    places = folders_of(recipe, out)
    sources = [Path(model)] if Path(model).exists() else []
    asked = {
        "model": model,
        "recipe": recipe.model_dump(mode="json"),
        "options": options.document(),
        "evaluate_result": evaluate_result,
        "task_data": None if task_data is None else str(task_data),
        "gate": gate.document(),
    }
    job = CompressJob(out)
    rejects = evaluate_result or gate.asked
    if not options.resume:
        _check_places(places.values(), options, sources, rejects)
    looking = Measurement(EvalSettings.of_recipe(recipe.evaluate, task_data), gate, console) if rejects else None
    if not options.resume:
        check_request(recipe, options, looking, distils=True)
        say_choice(options.device, processes.device.type, console)
    with job.held(Request("compress", asked), resume=options.resume, console=console, launcher=processes.launcher):
        console.log_to(job.log)
        if job.publishing is not None and options.redo_from is None:
            processes.share(False)
            job.publish_again(overwrite=options.overwrite, keep=options.keep_job)
            return published_report(out)
        if options.resume:
            _check_places(places.values(), options, sources, rejects)
            check_request(recipe, options, looking, distils=True, texts_known=job.begun)
        source = _found(model, options, console)
        with open_checkpoint(source.folder) as checkpoint:
            examine(checkpoint, structure="needed", dense=True, tokenizer=True, module_map=options.module_map)  # the stages say its notes
            _check_model(recipe, source, checkpoint, looking, begun=job.begun, console=console)
            contents = read_contents(checkpoint, console, noted=job.noted("model", console))
        job.watch(contents)
        texts = _texts(recipe, job.lines[0]["fingerprint"].get("texts", {}) if job.begun else {})
        facts = {"model": contents.fingerprint, **texts, "recipe": recipe.canonical(), "versions": versions()}
        if job.begun:
            job.check(facts)
            job.drop_from(1)
        else:
            job.begin(facts, inputs={"model": contents.document()})
        work = job.path
        packed = [name for fmt in places if fmt != _CT for name in (fmt, f"{fmt}.job")]
        if options.redo_from is not None:
            for made in (_CT, *packed):
                shutil.rmtree(work / made, ignore_errors=True)
        _note_recipe(work, (divided(recipe) or (recipe,))[-1], packed)
        inner = replace(options, keep_job=False, overwrite=False)
        processes.share(True)
        report = _interchange(model, source, work, recipe, inner, console, processes)
        processes.disband()
        for fmt in places:
            if fmt != _CT and not (work / fmt).is_dir():
                again = (work / f"{fmt}.job" / JOB).is_file()
                repack(
                    work / _CT, work / fmt, format=fmt, console=console, resume=again, max_shard_bytes=options.max_shard_bytes
                )  # fmt: skip
        report = {
            **report,
            "kind": "compress",
            "command": options.command,
            "recipe": {"sha256": recipe_hash(recipe), **recipe.model_dump(mode="json")},
            "outputs": [{"folder": str(place), "format": fmt} for fmt, place in places.items()],
        }
        distilled = work / "distilled"  # trained weights and norms are what the codes were made from
        made_from = distilled if distilled.is_dir() else source.folder
        checked = {fmt: verify(work / fmt, source=made_from, load=None, console=console) for fmt in places}
        for line in dict.fromkeys(line for found in checked.values() for line in found.skipped):
            console.say(line)
        report["verified"] = {fmt: found.document() for fmt, found in checked.items()}
        if looking is not None:
            try:
                with job.measuring():
                    report["evaluation"] = looking(work / (_CT if recipe.scheme.rounding == "none" else next(iter(places))), source)
            except GateRefused:
                kept = keep_rejected(work, job.out)
                leave_results(kept)
                console.warn(f"not published; the result is kept in {kept}")
                raise
        for fmt in places:
            _write_reports(work / fmt, places[fmt].name, report)
        stages = [Place(work / fmt, place.resolve(), options.overwrite) for fmt, place in places.items()]
        job.publish(stages, keep=options.keep_job)
    return report


def _check_model(
    recipe: Recipe, source: Source, checkpoint: Checkpoint, looking: Measurement | None, *, begun: bool, console: Console
) -> None:
    """What the model's config and tokenizer refuse of any stage, before the first of them begins."""
    check_lengths(recipe, checkpoint.config, distils=True)
    if (
        divided(recipe) is not None
        and not begun
        and recipe.distill.data != "self"
        and all(names_a_file(part.source) for part in parts_of(recipe.distill.data))
    ):
        console.detail(f"reading {recipe.distill.data} once, so that training does not stop at it")
        load_rows(recipe.distill, source.folder, console=Console.quiet(), load_teacher=_no_model)
    if looking is not None:
        looking.check_model(source.folder, checkpoint.config)


def _no_model() -> Any:
    raise AssertionError("a text is read without the model")


def _note_recipe(work: Path, recipe: Recipe, packed: Iterable[str]) -> None:
    """Where `resume` changed how the result is measured, the finished checkpoint names the recipe that is used now, as if it always had.

    recipe.yaml and the recipe's hash in config.json and manifest; what was packed from it is packed again. What a kill leaves half done
    is done again. The codes are those of this recipe: in all but its section `evaluate` it is the one that made them (JobFolder.check).
    """
    made = work / _CT
    data = recipe.to_yaml().encode()
    if not made.is_dir() or manifest.describes(made, "recipe.yaml", data):
        return
    for name in packed:
        shutil.rmtree(work / name, ignore_errors=True)
    config = json.loads((made / "config.json").read_bytes())
    config["quantization_config"]["marlinctl"]["recipe_sha256"] = recipe_hash(recipe)
    files = {"config.json": canonical(config), "recipe.yaml": data}
    manifest.replace_files(made, files, recipe={"sha256": recipe_hash(recipe)})


def _texts(recipe: Recipe, noted: Mapping[str, Any]) -> dict[str, Any]:
    """Digests of the files that stages read one after the other, so that all of them see one text.

    A file that is gone has the digest that was `noted`: a stage that has its tokens does not need it, and any other says that it is gone.
    """
    if divided(recipe) is None:
        return {}  # the tokens of the only pass are in its job
    sources = {"calibration": recipe.calibration.source, "distillation": recipe.distill.data}
    files = {
        f"{name} {place}" if place else name: Path(part.source)
        for name, source in sources.items()
        for place, part in enumerate(parts_of(source))
        if names_a_file(part.source)
    }
    found = {name: {"sha256": sha256_of(path)} for name, path in files.items() if path.is_file()}
    return {"texts": {**noted, **found}}


def _check_places(places: Iterable[Path], options: Options, sources: list[Path], rejects: bool) -> None:
    for i, place in enumerate(places):
        check_output(place, overwrite=options.overwrite, sources=sources, rejects=rejects and i == 0)  # all are kept as the first one's


def _interchange(
    model: str, source: Source, work: Path, recipe: Recipe, options: Options, console: Console, processes: Processes
) -> dict[str, Any]:
    """The 4-bit checkpoint in the interchange form, as work/ct, by one pass or by three stages. All processes are at work on it."""
    parts, formats = divided(recipe), formats_of(recipe)
    if parts is None:
        return _stage(
            work / _CT, options, processes,
            lambda inner: run_job(model, work / _CT, recipe, inner, console, published=formats, joined=processes)[0],
        )  # fmt: skip
    from marlinctl.distillation.run import run_distill

    pruning, quantizing = parts
    pruned_at, distilled_at = work / "pruned", work / "distilled"
    without = replace(options, redo_from=None)  # blocks are counted in the pass that makes the result
    if processes.share(not distilled_at.is_dir()):
        _stage(
            pruned_at, without, processes,
            lambda inner: run_job(model, pruned_at, pruning, inner, console, published=formats, joined=processes)[0],
        )  # fmt: skip
    if processes.main and not (work / "pruned.json").is_file():  # its report stays when its weights go
        write_document(work / "pruned.json", published_report(pruned_at))
    distilled = _stage(
        distilled_at, without, processes,
        lambda inner: run_distill(str(pruned_at), distilled_at, str(source.folder), recipe, inner, console, processes),
    )  # fmt: skip
    processes.wait()
    if processes.main:
        with suppress(FileNotFoundError):
            shutil.rmtree(pruned_at)
    at_hand = replace(options, revision=None)
    report = _stage(
        work / _CT, at_hand, processes,
        lambda inner: run_job(str(distilled_at), work / _CT, quantizing, inner, console, published=(), joined=processes)[0],
    )  # fmt: skip
    if not processes.main:
        return report
    pruned = json.loads((work / "pruned.json").read_text("utf-8"))
    stages = {
        "pruned": {key: pruned[key] for key in ("error", "seconds", "layers")},
        "distilled": {key: distilled[key] for key in ("training", "held_out")},
    }
    report |= {"source": pruned["source"], "stages": stages}
    report["bytes"] = {**report["bytes"], "source": pruned["bytes"]["source"]}
    warned = [line for stage in (pruned, distilled, report) for line in stage.get("warnings", [])]  # an earlier marlinctl noted none
    report["warnings"] = list(dict.fromkeys(warned))
    report["seconds"] = round(pruned["seconds"] + distilled["training"]["seconds"] + report["seconds"], 1)
    return report


def _stage(folder: Path, options: Options, processes: Processes, run: Callable[[Options], dict[str, Any]]) -> dict[str, Any]:
    """The report of a stage: of the folder that is there already, or of a run that takes up what an earlier one left."""
    done, again = processes.share(_left(folder) if processes.main else (None, False))
    return done or run(replace(options, resume=again, redo_from=options.redo_from if again else None))


def _left(folder: Path) -> tuple[dict[str, Any] | None, bool]:
    """What an earlier run left of a stage: the report of its folder; whether there is a job to resume."""
    job = JobFolder(folder)
    if folder.is_dir():
        job.remove()  # it died between the rename and the removal
        check_manifest(folder)
        return published_report(folder), False
    return None, (job.path / JOB).is_file()


def _write_reports(folder: Path, name: str, report: Mapping[str, Any]) -> None:
    """Card and report of each folder, with what was measured. They lie outside the manifest and may be rewritten."""
    with open_checkpoint(folder, weight_files="auto") as checkpoint:
        info = detect(checkpoint.config, checkpoint.tensors)
        report = {**report, "bytes": {**report["bytes"], "result": sum(info.nbytes for info in checkpoint.tensors.values())}}
    for file, data in report_files(report, folder, name=name, fmt=info.format, layers=info.layers).items():
        write_bytes(folder / file, data)
