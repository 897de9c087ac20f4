"""`marlinctl resume`: continue a run that was interrupted, killed, or ran out of disk space."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import chdir, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from marlinctl.checkpoint.shards import MAX_SHARD_BYTES
from marlinctl.commands.common import FormerFlag, common_options, go_offline
from marlinctl.commands.evaluation_flags import changed_gate, chosen_measuring, evaluation_flags
from marlinctl.commands.help import Command
from marlinctl.commands.recipe_flags import command_line
from marlinctl.errors import UsageError
from marlinctl.system.console import Console
from marlinctl.system.files import shown
from marlinctl.system.log import printable
from marlinctl.system.processes import silence_if_second

if TYPE_CHECKING:
    from marlinctl.evaluation.gate import Gate
    from marlinctl.oneshot.open import Options
    from marlinctl.recipes.schema import Recipe

_T = TypeVar("_T")


@click.command("resume", cls=Command)
@click.argument("out", type=click.Path(path_type=Path), metavar="OUT")
@click.option("--from-block", type=click.IntRange(0), metavar="N", help="Solve block N and all later ones again.")
@click.option("--redo-from", "--from-block", cls=FormerFlag, type=click.IntRange(0))
@click.option("--overwrite", is_flag=True, help="Replace an OUT that is there by now, after the new one is complete.")
@click.option("--keep-job", is_flag=True, help="Keep OUT.job, the run's journal, when OUT is published.")
@evaluation_flags
@common_options
def command(console: Console, out: Path, from_block: int | None, overwrite: bool, keep_job: bool, **values: Any) -> None:
    """Continue an interrupted quantize, sparsify, distill, pack or compress.

    \b
    Example:
        marlinctl resume ./qwen3-int4
        marlinctl resume ./qwen3-int4 --from-block 12
        marlinctl resume ./qwen3-int4 --tasks arc,winogrande --limit 100
        marlinctl jobs ls .

    OUT is that of the original command; its folder OUT.job holds the request and what is finished. Recipe, options and paths are those of
    the request. On a CPU the result is byte for byte that of an uninterrupted run. Any difference in model, recipe or versions is listed,
    and nothing is done.

    --from-block goes back: block N and all later blocks are solved again. Earlier blocks whose hidden states are not kept any more run once
    more with their stored weights.

    The measurement of a compress or sparsify may be changed: --tasks, --text, --window and the like, --max-kl, --max-ppl-ratio, --no-eval.
    Nothing is solved again for that.
    """
    silence_if_second(console)
    from marlinctl.checkpoint.manifest import NAME as MANIFEST
    from marlinctl.jobs.journal import JOB, JobFolder

    out = out.absolute()
    job = JobFolder(out)
    job.refuse_foreign(resume=True)
    if not (job.path / JOB).is_file():
        if (out / MANIFEST).is_file():
            fix = f"nothing needs to be done; `marlinctl verify {out.name}` checks it"
            raise UsageError("E287", "there is no job to resume: the output is complete", where=str(out), fix=fix)
        fix = "`marlinctl jobs ls FOLDER` lists the jobs below a folder; to start over, give the whole command again"
        raise UsageError("E287", "there is no job to resume", where=str(job.path), fix=fix)
    request = job.request()
    if from_block is not None and request.verb not in ("quantize", "sparsify", "compress"):
        what = f"--from-block counts the blocks that are quantized or pruned, and {request.verb} has none"
        raise UsageError("E288", what, where="--from-block", fix="leave it out")
    changes = {name: value for name, value in values.items() if value is not None}
    if changes and request.verb not in ("sparsify", "compress"):
        flag = "--no-eval" if values["evaluated"] is False else "--" + next(iter(changes)).replace("_", "-").replace("evaluated", "eval")
        what = f"{flag} changes the measurement, and {request.verb} does not measure"
        raise UsageError("E288", what, where=flag, fix="leave it out; `marlinctl eval` measures what is published")
    _make_absolute(values)
    if request.verb not in _VERBS:
        raise UsageError("E287", f"this marlinctl has no {printable(request.verb)!r} to continue", where=str(job.path / JOB), fix=_OTHER)
    asked = asdict(_read(_ARGUMENTS[request.verb], dict(request.arguments), "what was asked for"))
    if changes:  # the report names what makes this result again
        asked["options"] = {**asked["options"], "command": f"{asked['options'].get('command', '')}; {command_line()}"}
    console.say(f"{request.verb}, as it was asked for in {job.path}")
    with chdir(request.folder) if request.folder and request.folder.is_dir() else nullcontext():
        _VERBS[request.verb](console, out, asked, values, from_block, overwrite, keep_job)


def _make_absolute(values: dict[str, Any]) -> None:
    """Paths that are given now are relative to where we are now, and not to where the job was begun."""
    if values["task_data"] is not None:
        values["task_data"] = values["task_data"].absolute()
    if values["text"] not in (None, "pythondoc"):
        values["text"] = str(Path(values["text"]).expanduser().absolute())


def _options(console: Console, document: dict[str, Any], from_block: int | None, overwrite: bool, keep_job: bool) -> Options:
    from marlinctl.oneshot.open import Options

    asked: Options = _read(Options, document, "the options")
    if asked.offline:
        go_offline()
    return replace(
        asked,
        offline=asked.offline or console.offline,
        resume=True,
        redo_from=from_block,
        overwrite=asked.overwrite or overwrite,
        keep_job=asked.keep_job or keep_job,
    )


def _measuring(
    asked: dict[str, Any], recorded: Mapping[str, Any], values: dict[str, Any], console: Console
) -> tuple[Recipe, Gate, str | None]:
    """Recipe, gate and the folder of the tasks' data: those of the job, with what was given now over them."""
    from marlinctl.evaluation.gate import Gate
    from marlinctl.recipes.schema import resolve

    overrides, task_data = chosen_measuring(values)
    recipe, changes = resolve(_recipe(asked["recipe"]), overrides)
    if changes:
        console.say("measured differently from the original command: " + "; ".join(changes))
    gate = changed_gate(values, _read(Gate, recorded["gate"], "the gate").document())
    if values["evaluated"] is False and gate.asked:
        console.warn("--no-eval: nothing is measured, so the gate (--max-kl, --max-ppl-ratio) is ignored too")
        gate = Gate()
    found = recorded.get("task_data") if task_data is None else str(task_data)
    if found is not None:
        go_offline()
    return recipe, gate, found


def _recipe(document: Any) -> Recipe:
    from marlinctl.recipes.schema import recipe_of_document

    return _reading(lambda: recipe_of_document(document), "the recipe")


def _read(form: Any, document: Any, name: str) -> Any:
    """A part of job.json in this form."""
    from pydantic import TypeAdapter

    return _reading(lambda: TypeAdapter(form).validate_python(document), name)


def _reading(read: Callable[[], _T], name: str) -> _T:
    """A part of job.json. UsageError E287 where this version has other keys, or the file was changed."""
    from pydantic import ValidationError

    try:
        return read()
    except ValidationError as error:
        first = error.errors()[0]
        what = f"{name} of the job cannot be read: {'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise UsageError("E287", shown(what), where="job.json", fix=_OTHER) from error


def _solve(console: Console, out: Path, asked: dict[str, Any], values: dict[str, Any], *changes: Any) -> None:
    from marlinctl.commands import quantize, sparsify
    from marlinctl.evaluation.gate import Gate, Measurement
    from marlinctl.evaluation.settings import EvalSettings
    from marlinctl.oneshot.run import run_job

    given = any(value is not None for value in values.values())
    recorded = asked["measured"]
    recipe, gate, task_data = _measuring(asked, recorded or {"gate": Gate().document()}, values, console)
    looking = measured = None
    if values["evaluated"] is not False and (recorded is not None or given):
        looking = Measurement(EvalSettings.of_recipe(recipe.evaluate, None if task_data is None else Path(task_data)), gate, console)
        measured = {"gate": gate.document(), "task_data": task_data}
    options = _options(console, asked["options"], *changes)
    report, _ = run_job(asked["model"], out, recipe, options, console, looking, measured=measured)
    (quantize.show_result if report["kind"] == "quantize" and not report["sparse"] else sparsify.show_result)(console, out, report)


def _distill(console: Console, out: Path, asked: dict[str, Any], _values: dict[str, Any], *changes: Any) -> None:
    from marlinctl.commands.distill import show_result
    from marlinctl.distillation.run import run_distill

    options = _options(console, asked["options"], *changes)
    show_result(console, out, run_distill(asked["student"], out, asked["teacher"], _recipe(asked["recipe"]), options, console))


def _compress(console: Console, out: Path, asked: dict[str, Any], values: dict[str, Any], *changes: Any) -> None:
    from marlinctl.commands.compress import show_result

    given = any(value is not None for value in values.values())
    recipe, gate, task_data = _measuring(asked, asked, values, console)
    from marlinctl.compress import run_compress

    report = run_compress(
        asked["model"],
        out,
        recipe,
        _options(console, asked["options"], *changes),
        console,
        evaluate_result=values["evaluated"] is not False and (asked["evaluate_result"] or given),
        task_data=None if task_data is None else Path(task_data),
        gate=gate,
    )
    show_result(console, report)


def _pack(
    console: Console, out: Path, asked: dict[str, Any], _values: dict[str, Any], _redo_from: int | None, overwrite: bool, keep_job: bool
) -> None:
    from marlinctl.commands.pack import pack

    changed = {"overwrite": asked["overwrite"] or overwrite, "keep_job": asked["keep_job"] or keep_job}
    pack(console, out, {**asked, **changed}, resume=True)


# What job.json keeps of a request, for each verb; recipe, options and gate have forms of their own.


@dataclass(frozen=True, slots=True)
class _Measured:
    gate: dict[str, Any]
    task_data: str | None = None


@dataclass(frozen=True, slots=True)
class _Solved:
    model: str
    recipe: dict[str, Any]
    options: dict[str, Any]
    measured: _Measured | None


@dataclass(frozen=True, slots=True)
class _Distilled:
    student: str
    teacher: str
    recipe: dict[str, Any]
    options: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Compressed:
    model: str
    recipe: dict[str, Any]
    options: dict[str, Any]
    evaluate_result: bool
    task_data: str | None
    gate: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Packed:
    source: str
    cache_dir: str | None
    format: str
    also: list[str]
    overwrite: bool
    keep_job: bool
    max_shard_bytes: int = MAX_SHARD_BYTES
    base_model: str | None = None
    license: str | None = None


_ARGUMENTS = {"quantize": _Solved, "sparsify": _Solved, "distill": _Distilled, "compress": _Compressed, "pack": _Packed}
_OTHER = "continue with the version of marlinctl that began it, or start again"
_VERBS = {"quantize": _solve, "sparsify": _solve, "distill": _distill, "compress": _compress, "pack": _pack}
