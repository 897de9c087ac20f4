"""`plan`: what `compress` would do to a model, what it needs and whether it fits. Config and headers only, no torch.

    headers ─► the checks of a run (preflight.py) ─► linears: compressed, skipped, kept
                                                 ─► outputs, byte for byte (disk.py)      ─┐
                                                 ─► memory (memory.py) and disk (disk.py) ─┼─► against what there is: fits, yes or no
                                                 ─► time (time.py), a guess           ─┘

The arithmetic has one home for plan and run. A recipe that prunes and distils runs in three stages, each of which is planned; the largest
counts. NaN and infinity, and masks that contradict their weights, are found only by reading weights, so not here.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from marlinctl.checkpoint import runtimes
from marlinctl.checkpoint.formats import registry
from marlinctl.checkpoint.formats.base import EXPERTS, Format
from marlinctl.checkpoint.reader import Checkpoint
from marlinctl.checkpoint.remote_headers import Headers, headers
from marlinctl.checkpoint.sparsity import MASK_FILE, Pattern, from_headers
from marlinctl.checkpoint.writer import companions
from marlinctl.data.mixture import SELF
from marlinctl.errors import UsageError
from marlinctl.models.architectures import Architecture
from marlinctl.models.config import positions, sizes_of
from marlinctl.models.folds import foldable, order_bytes
from marlinctl.planning import disk as disk_space
from marlinctl.planning import time
from marlinctl.planning.memory import Work, predicted_device_peak, predicted_distillation, predicted_peak, predicted_repack
from marlinctl.planning.preflight import (
    ModelPlan,
    as_published,
    check_arguments,
    check_lengths,
    check_pattern,
    check_texts,
    formats_of,
    look,
    require_samples,
    said_of_untied_head,
    stored_once,
    wants_mask,
)
from marlinctl.planning.rotating import refuse_rotated_pattern
from marlinctl.planning.tokens_per_input import fewest
from marlinctl.planning.training_settings import check_settings, check_sizes
from marlinctl.recipes.schema import AUTO, Recipe, divided, recipe_hash
from marlinctl.system.console import Console
from marlinctl.system.devices import free_device_memory, has_matrix_units, planned_device, planned_dtype
from marlinctl.system.host import available_memory

_ELEMENT = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True, slots=True)
class Settings:
    """Where the run would take place."""

    out: Path  # OUT would lie here; it need not exist
    revision: str | None = None
    device: str = "cpu"
    dtype: str = "auto"
    cache_dir: Path | None = None
    threads: int | None = None
    max_memory: int | None = None  # bytes; None: what is free
    device_memory: int | None = None  # bytes of each GPU; None: what nvidia-smi says
    ranks: int = 1  # processes that share the work, all on this host; on GPUs each has one
    module_map: Path | None = None
    drop_unexpected: bool = False
    task_data: Path | None = None
    files_are_here: bool = False  # texts and the tasks' data: else the run takes place where they are, and they are not looked at
    probe: Probe | None = None  # runs the largest solve of a stage once


# The largest solve of one pass, measured: what is planned, its recipe, the dtype of the forward pass. oneshot has it; it imports torch.
Probe = Callable[[ModelPlan, Recipe, str], time.ProbeResult]


@dataclass(frozen=True, slots=True)
class Check:
    """One resource: what is needed and what there is, in bytes."""

    resource: str
    needed: int
    available: int | None
    where: str

    @property
    def fits(self) -> bool:
        return self.available is not None and self.needed <= self.available


def make_plan(model: str, recipe: Recipe, settings: Settings, console: Console) -> dict[str, Any]:
    """The plan as one JSON-ready document. Refuses what a run would refuse, with the same error ids."""
    settings = replace(settings, device=planned_device(settings.device))
    if recipe.calibration.source == AUTO:  # the hub is not asked for a plan: what needs most is planned
        recipe = recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update={"source": SELF})})
    check_arguments(recipe, settings.module_map, distils=True)
    _check_ranks(recipe, settings)
    _check_evaluation(recipe, settings, None, console)
    with headers(model, revision=settings.revision, cache_dir=settings.cache_dir, offline=console.offline, console=console) as seen:
        return _document(seen, recipe, settings, console)


def _check_ranks(recipe: Recipe, settings: Settings) -> None:
    require_samples(recipe.calibration.samples, settings.ranks)
    if settings.ranks == 1:
        return
    if divided(recipe) is not None:
        check_settings(recipe.distill, settings.ranks)
    if ":" in settings.device:
        what = f"{settings.ranks} processes have a GPU each, and {settings.device} is one"
        raise UsageError("E288", what, where="--device", fix="--device cuda")


def _check_evaluation(recipe: Recipe, settings: Settings, checkpoint: Checkpoint | None, console: Console) -> None:
    """How the result would be measured, as a run refuses it: before there is a checkpoint texts and tasks, then whether the model is long
    enough. The defaults suit every model, and nothing is imported for them: a plan takes a third of a second."""
    if checkpoint is None and settings.files_are_here:
        check_texts(recipe, distils=True)
    asked = recipe.evaluate
    if asked.window is None and not asked.tasks and asked.text == "pythondoc":
        return
    from marlinctl.evaluation import early
    from marlinctl.evaluation.settings import EvalSettings

    measuring = EvalSettings.of_recipe(asked, settings.task_data)
    if checkpoint is not None:
        measuring.window_for(positions(checkpoint.config))
    elif settings.files_are_here:
        early.check_arguments(measuring, console, with_text=True, load_tasks=False)


def _document(seen: Headers, recipe: Recipe, settings: Settings, console: Console) -> dict[str, Any]:
    looked = look(
        seen.checkpoint, recipe, settings.module_map, console,
        files=seen.files, weights=seen.weights, drop_unexpected=settings.drop_unexpected,
    )  # fmt: skip
    check_lengths(recipe, seen.checkpoint.config, distils=True)
    if divided(recipe) is not None:
        check_sizes(recipe.distill, seen.checkpoint.config, settings.ranks, where="--distill-sequence-length")
    _check_evaluation(recipe, settings, seen.checkpoint, console)
    found = from_headers(looked.checkpoint, looked.shapes, weights=seen.weights)
    if found.origin is not None or seen.weights or not any(fmt.needs_mask for fmt in formats_of(recipe)):
        check_pattern(found, looked, recipe, console)
    refuse_rotated_pattern(found, recipe)
    dtype = planned_dtype(settings.device, settings.dtype)
    outputs = [_output(looked, found, recipe, fmt) for fmt in _formats(recipe)]
    small = sum(len(data) for _, data in companions(seen.checkpoint.folder)) if seen.files else 0
    stages = _stages(recipe, looked, settings, _ELEMENT[dtype])
    memory = _memory(looked, outputs, stages, recipe, settings.ranks)
    disk = _disk(seen, looked, found, outputs, small, stages, recipe)
    checks = _checks(memory, disk, seen, settings)
    probed = {name: settings.probe(looked, part, dtype) for name, part, _ in stages} if settings.probe else {}
    info = seen.checkpoint.tensors
    return {
        "model": {
            "name": seen.source.name,
            "kind": seen.source.kind,
            "revision": seen.source.revision,
            "model_type": looked.architecture.model_type,
            "blocks": len(looked.architecture.blocks),
            "parameters": sum(prod(tensor.shape) for tensor in info.values()),
            "bytes": sum(tensor.nbytes for tensor in info.values()),
            "dtypes": sorted({tensor.dtype for tensor in info.values()}),
        },
        "recipe": {"name": recipe.name, "sha256": recipe_hash(recipe), **recipe.model_dump(mode="json", exclude={"name", "description"})},
        "settings": {"device": settings.device, "dtype": dtype, "ranks": settings.ranks},
        "linears": _linears(looked, found, recipe),
        "outputs": [_describe(output, looked, small) for output in outputs],
        "memory": memory,
        "disk": disk,
        "time": _time(seen, looked, stages, recipe, settings, _ELEMENT[dtype], probed),
        "probe": [{"name": name, **asdict(measured)} for name, measured in probed.items()],
        "checks": [{**asdict(check), "fits": check.fits} for check in checks],
        "fits": all(check.fits for check in checks),
        "warnings": list(looked.notes),
        "notes": _notes(seen, looked, found, recipe, settings.ranks),
    }


def _formats(recipe: Recipe) -> list[Format]:
    """What is published: at 16 bits the pruned model itself."""
    return formats_of(recipe) if recipe.scheme.quantizes else [registry.DENSE]


def _masked(looked: ModelPlan, found: Pattern, recipe: Recipe) -> tuple[str, ...]:
    """The linears that are 2:4 in the end."""
    return tuple(looked.shapes) if recipe.sparsify.pattern != "none" else found.linears


def _output(looked: ModelPlan, found: Pattern, recipe: Recipe, fmt: Format) -> disk_space.Output:
    tensors = stored_once(looked.checkpoint, looked.architecture)
    return disk_space.output(fmt, tensors, looked.shapes, looked.plan, _masked(looked, found, recipe), _orders(looked, found, recipe))


def _orders(looked: ModelPlan, found: Pattern, recipe: Recipe) -> int:
    """Bytes of the orders that a run chooses for channels, if all hold that may."""
    if not recipe.scheme.prunes or recipe.sparsify.permute == "never" or found.linears:
        return 0
    return order_bytes(foldable(looked.architecture.blocks, sizes_of(looked.checkpoint.config), looked.shapes), looked.shapes)


# ---- stages: what runs one after another -----------------------------------------------------------------------------------------------


def _stages(recipe: Recipe, looked: ModelPlan, settings: Settings, element: int) -> list[tuple[str, Recipe, Work]]:
    """Passes over the blocks: one, or with distillation one that prunes and one that quantizes (compress.py)."""

    def one(name: str, part: Recipe) -> tuple[str, Recipe, Work]:
        on_device = settings.device.startswith("cuda")
        work = Work.of(part, element=element, corrects_drift=looked.corrects_drift, on_device=on_device, ranks=settings.ranks)
        return name, part, work

    parts = divided(recipe)
    if parts is None:
        return [one("quantize" if recipe.sparsify.pattern == "none" else "prune", recipe)]
    return [one("prune", parts[0]), one("quantize", parts[1])]


def _memory(
    looked: ModelPlan, outputs: list[disk_space.Output], stages: list[tuple[str, Recipe, Work]], recipe: Recipe, ranks: int
) -> dict[str, Any]:
    """Bytes at the peak of each stage, on the host and on the device: of one process, and of all on the host together. Evaluation takes
    what is free, or is left out (evaluation/gate.py).
    """
    known, sizes = looked.architecture, looked.plan.group_sizes
    host = {name: predicted_peak(known, sizes, work) for name, _, work in stages}
    on_device = stages[0][2].on_device
    device = {name: predicted_device_peak(known, sizes, work) for name, _, work in stages} if on_device else {}
    if divided(recipe) is not None:
        training = predicted_distillation(known, recipe.distill)
        host["distil"], device = (host["prune"], device | {"distil": training}) if on_device else (training, device)
    together = ranks * max(host.values())
    if [output.format for output in outputs] not in ([registry.INTERCHANGE], [registry.DENSE]):
        host["pack"] = predicted_repack([n * k for n, k in looked.shapes.values()], [output.linears for output in outputs])
    return {
        "host": {"peak": max(host.values()), "stages": host, "processes": ranks, "together": max(together, *host.values())},
        "device": {"peak": max(device.values()), "stages": device, "activations": _activations(known, stages)} if device else None,
    }


def _activations(known: Architecture, stages: list[tuple[str, Recipe, Work]]) -> int:
    """What stays on the device besides, where half of what is free suffices (system/offload.py); in host memory or on disk where it does
    not.
    """
    return max(disk_space.resident_bytes(known, work) for _, _, work in stages)


def _disk(
    seen: Headers,
    looked: ModelPlan,
    found: Pattern,
    outputs: list[disk_space.Output],
    small: int,
    stages: list[tuple[str, Recipe, Work]],
    recipe: Recipe,
) -> dict[str, Any]:
    """Bytes on the disk of OUT: at the fullest moment, and in the end. `fetch` is what a cache gets before."""
    first = registry.working_format(recipe.scheme)
    first_output = _output(looked, found, recipe, first)
    scratch = max(disk_space.scratch_bytes(looked.architecture, work) for _, _, work in stages)
    states = max(disk_space.state_bytes(looked.architecture, work) for _, _, work in stages)
    published = sum(output.on_disk + small for output in outputs)
    extra = 0 if first in {output.format for output in outputs} else first_output.on_disk + small
    moments = {
        "blocks": disk_space.needed_by_blocks(first_output, scratch, states) + small,
        "publish": published + extra + sum(output.mask for output in outputs),
    }
    moments["publish"] += max((disk_space.merged_bytes(output.linears) for output in outputs if output.format is not first), default=0)
    if divided(recipe) is not None:
        dense = _output(looked, found, recipe, registry.DENSE)
        training = disk_space.needed_by_distillation(looked.architecture, dense.weights, recipe.distill)
        moments["prune"] = disk_space.needed_by_blocks(dense, scratch, states) + small
        moments["distil"] = 2 * (dense.on_disk + small) + disk_space.merged_bytes(dense.weights) + training
        moments["blocks"] += dense.on_disk + small
        moments["publish"] += dense.on_disk + small
    return {"during": max(moments.values()), "outputs": published, "scratch": scratch, "moments": moments, "fetch": seen.to_fetch}


def _checks(memory: Mapping[str, Any], disk: Mapping[str, Any], seen: Headers, settings: Settings) -> list[Check]:
    limit = settings.max_memory
    where = "free memory of this machine" if limit is None else "--max-memory"
    several = f" of {settings.ranks} processes" if settings.ranks > 1 else ""
    checks = [Check(f"host memory{several}", memory["host"]["together"], available_memory() if limit is None else limit, where)]
    if memory["device"] is not None:
        available, title = _device_memory(settings)
        checks.append(Check("GPU memory" if settings.ranks == 1 else "memory of each GPU", memory["device"]["peak"], available, title))
    place = _existing(settings.out)
    needed = disk["during"]
    if seen.to_fetch:
        cache = _existing(seen.cache)
        if cache.stat().st_dev == place.stat().st_dev:
            needed += seen.to_fetch
        else:
            checks.append(Check("disk of the cache", seen.to_fetch, shutil.disk_usage(cache).free, str(cache)))
    checks.append(Check("disk", needed, shutil.disk_usage(place).free, str(place)))
    return checks


def _device_memory(settings: Settings) -> tuple[int | None, str]:
    """Bytes of the GPU, or of the one of all that has least, and where that is known from."""
    if settings.device_memory is not None:
        return settings.device_memory, "--device-memory"
    if settings.ranks == 1:
        card = free_device_memory(settings.device)
        return (card[1], card[0]) if card else (None, "no GPU was found; give --device-memory")
    found = [free_device_memory(f"cuda:{index}") for index in range(settings.ranks)]
    cards = [card for card in found if card is not None]
    if len(cards) < settings.ranks:
        return None, f"{len(cards)} of {settings.ranks} GPUs were found; give --device-memory"
    name, least = min(cards, key=lambda card: card[1])
    return least, name


def _existing(path: Path) -> Path:
    """The nearest folder above `path` that is there."""
    path = path.expanduser().resolve()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


# ---- what the plan says --------------------------------------------------------------------------------------------------------------


def _linears(looked: ModelPlan, found: Pattern, recipe: Recipe) -> dict[str, Any]:
    """Every matrix that a product is taken with, and what becomes of it."""
    known, sizes = looked.architecture, looked.plan.group_sizes
    scheme = recipe.scheme
    sparse = set(_masked(looked, found, recipe))
    compressed = [
        {
            "name": name,
            "shape": list(looked.shapes[name]),
            "bits": looked.plan.grid(name).bits if scheme.quantizes else scheme.bits,
            "activations": looked.plan.grid(name).activations if scheme.rounding == "none" or EXPERTS in name else scheme.rounding,
            "group_size": size if scheme.quantizes else None,
            "pattern": "2:4" if name in sparse else None,
        }
        for name, size in sizes.items()
    ]
    skipped = [{"name": name, "reason": reason} for name, reason in looked.plan.kept.items() if reason.startswith("--skip")]
    kept = [{"name": name, "reason": reason} for name, reason in looked.plan.kept.items() if not reason.startswith("--skip")]
    linears = {f"{name}.weight" for name in known.linears} | ({f"{known.head.name}.weight"} if known.head else set())
    kept += [
        {"name": name.removesuffix(".weight"), "reason": _why_kept(name, known)}
        for name, shape in known.expected.items()
        if len(shape) == 2 and name not in linears
    ]
    return {"compressed": compressed, "skipped": skipped, "kept": kept}


def _why_kept(tensor: str, known: Architecture) -> str:
    if tensor == f"{known.embedding}.weight":
        return "embedding"
    if known.spelling is not None and not known.spelling.holds(tensor):
        return "not of the language model"
    name = tensor.removesuffix(".weight")
    if _ROUTERS.intersection(name.split(".")):
        return "router of the experts"
    return "bias of the experts" if name.endswith("bias") else "a gate of few outputs, or read without a product"


_ROUTERS = {"gate", "router"}  # modules


def _describe(output: disk_space.Output, looked: ModelPlan, small: int) -> dict[str, Any]:
    """One published folder: bytes and who loads it."""
    weights = sum(n * k for n, k in looked.shapes.values())
    planned = as_published(looked, output.format)
    loads = runtimes.loads(planned)
    readers = {runtime.name for runtime in runtimes.RUNTIMES if runtime.reads(output.format)}
    refused = {v.runtime: list(v.refused) for v in runtimes.survey(planned, (1,)) if v.refused and v.runtime in readers}
    servers = {runtime.program for runtime in runtimes.RUNTIMES}
    refused |= {program: list(reasons) for program, reasons in loads.refused.items() if program not in servers}
    return {
        "format": output.format.name,
        "bits_per_weight": round(8 * output.linears / weights, 3),
        "bytes": {
            "weights": output.weights,
            "linears": output.linears,
            "untouched": output.untouched,
            "mask": output.mask,
            "companions": small,
            "on_disk_about": output.on_disk + small,
        },
        "loads_in": list(loads.accepted),
        "refused_by": refused,  # kernels, and programs that are refused for other reasons than shapes
        "untested": dict(loads.untested),
        "warnings": loads.warnings(output.format),
    }


def _time(
    seen: Headers,
    looked: ModelPlan,
    stages: list[tuple[str, Recipe, Work]],
    recipe: Recipe,
    settings: Settings,
    element: int,
    probed: Mapping[str, time.ProbeResult],
) -> dict[str, Any]:
    """Seconds of each part, and what they rest on."""
    cores = settings.threads or max(1, _cores() // settings.ranks)
    speed = time.machine(settings.device, cores, element, matrix_units=has_matrix_units())
    size = sum(tensor.nbytes for tensor in seen.checkpoint.tensors.values())
    free = _device_memory(settings)[0] if settings.device.startswith("cuda") else None
    parts: dict[str, float] = {}
    counted_at = speed
    for name, part, work in stages:
        if name in probed:
            speed = time.machine_of_probe(counted_at, probed[name], part, corrects_drift=work.corrects_drift)
        seconds_of = time.seconds_of_blocks(looked.architecture, looked.plan.group_sizes, work, part, speed, size, free)
        parts = {name: parts.get(name, 0.0) + seconds for name, seconds in seconds_of.items()} | {
            k: v for k, v in parts.items() if k not in seconds_of
        }
    if divided(recipe) is not None:
        parts["distil"] = time.seconds_of_training(looked.architecture, recipe.distill, speed) / settings.ranks
    return {
        "seconds": round(sum(parts.values())),
        "parts": {name: round(seconds, 1) for name, seconds in parts.items()},
        "basis": f"counted operations at the rates measured on {speed.title}; downloads and evaluation apart"
        + ("" if probed else "; a factor of two either way")
        + ("; the rate of the link between processes is a guess" if settings.ranks > 1 else ""),
    }


def _cores() -> int:
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() and int(asked) > 0 else len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def _notes(seen: Headers, looked: ModelPlan, found: Pattern, recipe: Recipe, ranks: int) -> list[str]:
    notes = [seen.source.note] if seen.source.note else []
    if (tokens := fewest(looked.architecture, looked.plan.group_sizes, recipe.calibration)) is not None:
        notes.append(str(tokens))
    if looked.unties:
        notes.append(said_of_untied_head(looked, _formats(recipe)[0]))
    if looked.stream is not None and not found.linears:
        notes.append("the residual stream and the value heads are rotated (--rotate): adapters of the original do not fit the result")
    if not recipe.scheme.quantizes and divided(recipe) is None:
        notes.append("at 16 bits this is what `marlinctl sparsify` writes")
    if recipe.calibration.source == SELF:
        notes.append(
            "--calibration self loads the whole model once to write its text; a file or a data set, as UltraChat by default, does not"
        )
    if found.linears and found.origin != MASK_FILE:
        notes.append("the first row of the first linear is 2:4, so all linears are taken to be; the run looks at every weight")
    if found.origin is None and not seen.weights and (sparse := wants_mask(recipe)) is not None:
        notes.append(
            f"{sparse.name} holds only 2:4 linears, and whether these are is known when weights are read: a dense model is refused (E273)"
        )
    if divided(recipe) is not None:
        notes.append("distillation is planned without its activations: --micro-batch and --checkpointing decide those")
    if divided(recipe) is not None and ranks > 1:
        notes.append("every process is planned to hold both models; FSDP2 divides them (docs/distill.md)")
    return notes
