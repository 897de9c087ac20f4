"""`marlinctl pack`: the same integer codes in another format. No model, no GPU, no calibration; nothing is rounded.

    source shard ─ one linear ─► codes [N, K], scales [N, G] ─► the target's tensors ─► staged shard
    mask file or metadata ─────► mask [N, K], if it is 2:4 ───► metadata, or the staged mask file
    untouched tensors ─────────────── as bytes ──────────────────────────────────────► their own shards
    companions, config with the new quantization_config, manifest
    from disk: codes, scales and mask of every linear equal the source's, untouched bytes too ─► published

A run that was killed packs again from the start when it is resumed, unless nothing but the last rename is missing: it takes minutes.
It streams: at most `SHARD_BYTES` of finished tensors and one linear are in memory. Several target formats come from one pass and
appear together or not at all.

To `ct`, scales go as they are. `gptq` and the native formats hold fp16 scales, so foreign bf16 or fp32 ones pass only where fp16 holds
them exactly. `dense` is for clients that read no packed format: fp16(code * scale), which rounds to 11 significant bits (the product has
up to 14), so a dense copy is close to the packed model and not equal to it.

A mask travels along, into whatever form. `marlin_24` needs one for every linear; where none is stated, it is found from the
codes that are zero, and that is said. Masks and codes are compared before anything is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marlinctl.checkpoint import licence, manifest, runtimes, sparsity, writer
from marlinctl.checkpoint.contents import Contents, read_contents
from marlinctl.checkpoint.folder import dense_names
from marlinctl.checkpoint.formats import registry
from marlinctl.checkpoint.formats.base import Format
from marlinctl.checkpoint.licence import NOTHING_STATED, Stated
from marlinctl.checkpoint.mask import Masks, open_masks
from marlinctl.checkpoint.orders import folded
from marlinctl.checkpoint.shards import MAX_SHARD_BYTES
from marlinctl.checkpoint.source_digests import check_known_digests
from marlinctl.convert.source import Source, open_source
from marlinctl.convert.written import check_written
from marlinctl.errors import BadInput, CheckFailed, Problem, UsageError, number_of
from marlinctl.jobs.journal import JobFolder, Request
from marlinctl.models.config import named_otherwise
from marlinctl.models.families import FAMILIES
from marlinctl.models.lookup import architecture_of
from marlinctl.models.switches import without
from marlinctl.planning.disk import merged_bytes
from marlinctl.planning.memory import SHARD_BYTES
from marlinctl.recipes.foreign_formats import instead_of
from marlinctl.report import card
from marlinctl.report.page import Name
from marlinctl.system.atomic import canonical
from marlinctl.system.console import Console

if TYPE_CHECKING:
    from torch import Tensor


def repack(
    source: Path,
    out: Path,
    *,
    format: str = registry.INTERCHANGE.name,
    also: Sequence[str] = (),
    overwrite: bool = False,
    console: Console | None = None,
    request: Request | None = None,
    resume: bool = False,
    keep_job: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    said: Stated = NOTHING_STATED,
    gptq_v2: bool = False,
) -> dict[str, Any]:
    """Write `source` in another format to `out`, and in each format of `also` to OUT-<format>. Returns what was written.

    request: what the person asked for, where that says more than these arguments. resume: take up a job that was killed; the codes are
    packed again, unless only the last rename is missing. said: what the cards say instead of what is known. gptq_v2: `source` is GPTQ of
    version 2, whatever its config.json says.
    """
    console = console or Console.quiet()
    outputs = output_folders(out, format, also)
    asked = {"source": str(source), "format": format, "also": list(also), "overwrite": overwrite, "keep_job": keep_job, "cache_dir": None}
    asked |= {"max_shard_bytes": max_shard_bytes, "gptq_v2": gptq_v2, **asdict(said)}
    request = request or Request("pack", asked)
    job = JobFolder(out)
    if not resume:
        for folder in outputs.values():
            writer.check_output(folder, overwrite=overwrite, sources=[source])
    with job.held(request, resume=resume, console=console):
        if job.publishing is not None:
            job.publish_again(overwrite=overwrite, keep=keep_job)
            with open_masks(out) as masks:
                return _written(open_source(out, masks), outputs)
        for folder in outputs.values() if resume else ():
            writer.check_output(folder, overwrite=overwrite, sources=[source])
        return _repack(job, source, outputs, overwrite, console, keep_job, max_shard_bytes, said, gptq_v2)


def _repack(
    job: JobFolder, source: Path, outputs: Mapping[Format, Path], overwrite: bool, console: Console, keep_job: bool, max_shard_bytes: int,
    said: Stated, gptq_v2: bool,
) -> dict[str, Any]:  # fmt: skip
    out = next(iter(outputs.values()))
    with ExitStack() as stack:
        masks = stack.enter_context(open_masks(source))
        opened = open_source(source, masks, gptq_v2=gptq_v2)
        for note in opened.notes:
            console.warn(note)
        opened = replace(opened, from_zeros=any(fmt.needs_mask for fmt in outputs) and opened.origin is None)
        refuse_misfits(opened, list(outputs))
        contents = read_contents(opened.checkpoint, console, scan=opened.untouched)
        check_known_digests(opened.checkpoint, contents)
        contents.require_finite()
        job.watch(contents)
        for fmt in outputs:
            for line in (*runtimes.loads(opened.packed(fmt)).warnings(fmt), *registry.losses(opened.info, fmt)):
                console.warn(line)
        facts = {"source": _source_digest(opened, contents), "formats": [fmt.name for fmt in outputs], "version": provenance({})["version"]}
        job.check(facts) if job.begun else job.begin(facts)
        sizes = {fmt: written_bytes(opened, fmt) for fmt in outputs}
        pieces = sum(_packed_bytes(opened, fmt) for fmt in list(outputs)[1:])  # they wait until the first is merged
        pieces += merged_bytes(_packed_bytes(opened, next(iter(outputs))), max_shard_bytes)
        writer.require_space(out, sum(sizes.values()) + pieces + sum(_mask_bytes(opened, fmt) for fmt in outputs))
        console.say(f"{source}: {opened.info.name}, {number_of(len(opened.info.layers), 'linear')}, group size {opened.info.group_size}")
        _check_pattern(opened, console)

        stages = {
            fmt: writer.StagedCheckpoint(
                folder, overwrite=overwrite, fmt=fmt, pieces=job.path / f"staged-{fmt.name}", max_shard_bytes=max_shard_bytes
            )
            for fmt, folder in outputs.items()
        }
        for stage in stages.values():
            stack.enter_context(stage).restore([], [])
        _write_linears(opened, stages, console)
        for fmt, stage in stages.items():
            command = f"marlinctl pack {source.name} {outputs[fmt].name} --format {fmt.name}"
            _finish(opened, contents, fmt, stage, console, command, said)
        job.publish(list(stages.values()), keep=keep_job)
    for fmt, folder in outputs.items():
        console.say(f"wrote {folder} ({fmt.name}, {sizes[fmt] / 1e6:,.1f} MB of weights)")
    return _written(opened, outputs)


def _written(source: Source, outputs: Mapping[Format, Path]) -> dict[str, Any]:
    """What `repack` returns: of what was packed, and of every folder that came out."""
    facts = {
        "format": source.info.name,
        "layers": len(source.info.layers),
        "group_size": source.info.group_size,
        "pattern": source.origin,
    }
    return {
        "source": facts,
        "outputs": [
            {"folder": str(folder), "format": fmt.name, "weight_bytes": written_bytes(source, fmt)} for fmt, folder in outputs.items()
        ],
        "warnings": list(source.notes),
    }


def output_folders(out: Path, fmt: str, also: Sequence[str]) -> dict[Format, Path]:
    """Format -> folder: OUT itself, and OUT-<format> beside it for each further one."""
    asked = (fmt, *also)
    for name in asked:
        if name not in registry.FORMATS:
            raise UsageError(
                "E202", f"there is no format {name!r}", where="--format, --also", fix=instead_of(name, ", ".join(registry.FORMATS))
            )
    if len(set(asked)) != len(asked):
        raise UsageError("E288", f"one format twice: {', '.join(asked)}", where="--format, --also", fix="name each format once")
    return {registry.FORMATS[fmt]: out} | {registry.FORMATS[name]: out.with_name(f"{out.name}-{name}") for name in also}


def refuse_misfits(source: Source, targets: Sequence[Format]) -> None:
    """Everything that would fail later, found first and named all at once."""
    problems = registry.misfits(source.shapes, targets, source.info.grids)
    for layer, (_, k) in source.shapes.items():
        size = source.info.layers[layer]
        if size != -1 and (size < 1 or k % size):
            what = f"{layer}: K={k} is not a multiple of group_size {size}"
            problems.append(Problem(what, layer, "config.json belongs to another model; fetch the checkpoint again"))
    if problems:
        raise BadInput.from_problems("E349", problems)
    if source.masks is not None:
        _refuse_mask_misfits(source, source.masks, targets)


def _refuse_mask_misfits(source: Source, masks: Masks, targets: Sequence[Format]) -> None:
    problems = sparsity.strangers(sparsity.shapes(source.checkpoint, source.info), source.info, masks)
    if problems:
        raise BadInput.from_problems("E356", problems)
    if source.info.format.needs_mask or not any(fmt.needs_mask for fmt in targets):
        return
    fix = "marlin takes dense linears too; for marlin_24 prune the whole model"
    problems = [
        Problem(f"{layer} has no mask, so it is dense, and marlin_24 holds 2:4 linears alone", masks.where, fix)
        for layer in source.info.layers
        if layer not in masks
    ]
    if problems:
        raise BadInput.from_problems("E356", problems)


def _check_pattern(source: Source, console: Console) -> None:
    """Every mask against its codes, or the pattern in the codes themselves; all that is wrong at once, before anything is written."""
    if source.origin is None:
        return
    if source.masks is None and not source.from_zeros:
        console.say("2:4: the mask is that of the metadata")
        return  # it is checked whenever it is read
    console.say(
        "2:4: there is no mask file, so the mask is derived from codes that are zero; "
        "where a group of four has more than two of those, the lowest columns count as kept"
        if source.masks is None
        else f"2:4: the masks of {number_of(len(source.masks.layers), 'linear')} are those of {source.masks.where}"
    )
    sparsity.refuse(sparsity.contradictions([*source.info.layers, *source.carried], source.mask, console))


def written_bytes(source: Source, fmt: Format) -> int:
    """Bytes of weights that a target will have."""
    untouched = (source.checkpoint.tensors[name] for name in source.untouched)
    return _packed_bytes(source, fmt) + sum(info.end - info.begin for info in untouched)


def _packed_bytes(source: Source, fmt: Format) -> int:
    info = source.info
    return sum(registry.linear_bytes(fmt, n, k, info.layers[layer], info.grid(layer)) for layer, (n, k) in source.shapes.items())


def _mask_bytes(source: Source, fmt: Format) -> int:
    """Bytes of the mask file, twice: it is spooled first (checkpoint/writer.py)."""
    linears = source.masked(fmt) & set(source.shapes)
    return 2 * sum(n * -(-k // 8) for n, k in (source.shapes[layer] for layer in linears))


def _write_linears(source: Source, stages: Mapping[Format, writer.StagedCheckpoint], console: Console) -> None:
    """One pass over the source, shard by shard, so that each file is read once and in order."""
    places = {layer: source.checkpoint.tensors[source.info.marking(layer)] for layer in source.info.layers}
    order = sorted(places, key=lambda layer: (places[layer].file.name, places[layer].begin))
    pending: dict[Format, dict[str, Tensor]] = {fmt: {} for fmt in stages}
    size = 0
    with console.progress("pack", len(order)) as progress:
        for layer in order:
            parts = source.parts(layer)
            for fmt, stage in stages.items():
                tensors = registry.linear_tensors(fmt, layer, parts)
                if parts.keep is not None and not fmt.needs_mask:
                    stage.write_mask(layer, parts.keep)
                pending[fmt] |= tensors
                size += sum(t.numel() * t.element_size() for t in tensors.values())
            if size >= SHARD_BYTES:
                _flush(stages, pending)
                size = 0
            progress.advance()
    _flush(stages, pending)
    for layer in source.carried:
        mask = source.mask(layer)
        for stage in stages.values():
            if mask is not None:
                stage.write_mask(layer, mask)


def _flush(stages: Mapping[Format, writer.StagedCheckpoint], pending: dict[Format, dict[str, Tensor]]) -> None:
    for fmt, tensors in pending.items():
        if tensors:
            stages[fmt].write_shard(tensors)
            tensors.clear()


def _block(source: Source, fmt: Format, config: Mapping[str, Any], provenance: dict[str, Any]) -> dict[str, Any]:
    """The quantization_config of a target, with all names that clients have for linears. A model that the installed transformers lacks is
    packed by its names alone."""
    layers, grids, ignore, rounding = source.info.layers, source.info.grids, source.ignore, source.info.rounding
    if config.get("model_type") not in FAMILIES:
        try:
            known = architecture_of(source.checkpoint.config, dense_names(source.checkpoint, source.info))
        except BadInput as unknown:
            if unknown.error_id not in ("E390", "E392"):
                raise
        else:
            layers, grids, ignore = known.by_all_names(layers), known.by_all_names(grids), known.sixteen_bit(ignore, layers)
            rounding = known.by_all_names(rounding)
    return registry.quantization_config(fmt, layers, ignore, provenance, grids, named_otherwise(config), rounding)


def _finish(
    source: Source, contents: Contents, fmt: Format, stage: writer.StagedCheckpoint, console: Console, command: str, said: Stated
) -> None:
    """Everything of the folder but the linears, and the check from disk."""
    stage.copy_tensors(source.checkpoint, source.untouched)
    stage.copy_companions(source.checkpoint.folder)
    old = registry.quantization_block(source.checkpoint.config) or {}
    config = without(registry.without_quantization(source.checkpoint.config))
    if fmt.quantized:
        config["quantization_config"] = _block(source, fmt, config, provenance(old))
    if fmt.block_file:
        stage.write_file(fmt.block_file, canonical(config["quantization_config"]))
    origin = {"format": source.info.name, "variant": source.info.variant, **_source_digest(source, contents)}
    earlier = _earlier_facts(source.checkpoint.folder)
    facts = {**earlier, "packed_from": origin, "format": fmt.name, **({"pattern": "2:4"} if source.origin else {})}
    made_from, recipe = earlier.get("source", {}), earlier.get("recipe", {})
    digest = recipe.get("sha256")
    details = card.CardFacts(
        stage.out.name,
        fmt,
        source.info.layers,
        source.ignore,
        command,
        runtimes.loads(source.packed(fmt)),
        base_model=said.base_model or (made_from.get("name") if made_from.get("kind") == "hub" else None),
        license=licence.stated(None, said.license),
        made_from=[("SHA-256 of the recipe", Name(digest))] if isinstance(digest, str) else (),
        two_of_four=source.origin is not None,
        folded=folded(source.checkpoint.folder),
        grids=source.info.grids,
        rounding=source.info.rounding,
    )
    stage.finish(config, manifest=facts, verify=lambda folder: check_written(source, fmt, folder, console), report_files={})
    written = _report_files(source, fmt, stage, command, console, said) or {"README.md": card.render(details).encode()}
    for name, data in written.items():
        stage.write_file(name, data)


def _report_files(
    source: Source, fmt: Format, stage: writer.StagedCheckpoint, command: str, console: Console, said: Stated
) -> dict[str, bytes]:
    """The source's report travels on: its codes are the same. Nothing where there is none, as in a foreign folder."""
    from marlinctl.report import rewrite

    try:
        document = rewrite.read_report(source.checkpoint.folder)
        sizes = {**document["bytes"], "result": written_bytes(source, fmt)}
        packed = {**rewrite.restated(document, said), "bytes": sizes, "packed": {"command": command, "format": fmt.name}}
        return rewrite.checked_files(packed, stage.path, name=stage.out.name, fmt=fmt, layers=source.info.layers)
    except CheckFailed:
        return {}
    except (BadInput, KeyError, TypeError) as refused:
        console.warn(f"the report of {source.checkpoint.folder} stays behind: {refused}")
        return {}


def provenance(old_block: Mapping[str, Any]) -> dict[str, Any]:
    """The key "marlinctl" of a config block: which version wrote it, and whatever an earlier step noted (the recipe's hash)."""
    from marlinctl import __version__

    earlier = old_block.get("marlinctl")
    return {**(earlier if isinstance(earlier, dict) else {}), "version": __version__}


def _earlier_facts(folder: Path) -> dict[str, Any]:
    """What the source's manifest says of the model and the recipe it was made from, and of tensors that are not the model's; nothing for a
    foreign folder."""
    if not (folder / manifest.NAME).is_file():
        return {}
    document = manifest.read(folder)
    tuned = manifest.tuned_of(document)
    found = {key: document[key] for key in ("source", "recipe", "calibration") if isinstance(document.get(key), dict)}
    return found | ({manifest.TUNED: sorted(tuned)} if tuned else {})


def _source_digest(source: Source, contents: Contents) -> dict[str, Any]:
    """What the codes came from: the source's manifest when it has one, whose digests were compared, else its fingerprint."""
    if (source.checkpoint.folder / manifest.NAME).is_file():
        return {"manifest_sha256": manifest.digest(source.checkpoint.folder)}
    return {"fingerprint": contents.fingerprint}
