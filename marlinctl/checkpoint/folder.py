"""The one look at a model folder that every verb takes before it does anything with it.

    small files     regular, inside of the folder, JSON where they should be           E301
    manifest        of a schema that is known; config, tokenizer, template as listed   E101, E304
    quantization    the block of config.json, key by key; it is of these tensors       E302, E313, E340
    code            nothing of config or tokenizer is run; what asks for it is named   E312
    structure       every tensor that the model needs, and no other                    E302
    tokenizer       there, and not larger than the embedding                           E314
    tied head       the embedding, where config.json says so                           E302

Before that, `open_checkpoint` has read config.json, headers, index and links (E301, E302, E304, E306, E307, E390, E392). A verb says what
it needs, and has no list of its own: quantize, sparsify, compress and plan by way of planning/preflight.py, distill (both models), pack,
eval, inspect, verify, report and bench, and the API. No torch; the only weights that are read are an embedding and a head that should be
equal.

Where the architecture is not in the table, `structure` is "needed" for verbs that run it block by block, and left to transformers' own
strict loading for the others (transformers_model.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from marlinctl.checkpoint.formats import registry
from marlinctl.checkpoint.formats.base import FormatInfo
from marlinctl.checkpoint.fused_experts import with_single_experts
from marlinctl.checkpoint.model_files import companion_names
from marlinctl.checkpoint.reader import Checkpoint, check_expected, open_checkpoint
from marlinctl.checkpoint.sixteen_bit import in_sixteen_bits
from marlinctl.checkpoint.source_digests import check_small_files
from marlinctl.checkpoint.tied_head import with_embedding
from marlinctl.errors import BadInput, Problem, number_of
from marlinctl.models.architectures import Architecture, with_stored_pieces
from marlinctl.models.config import CONFIG
from marlinctl.models.families import architecture
from marlinctl.models.lookup import architecture_of, spelled_as
from marlinctl.models.switches import check_switches
from marlinctl.models.tokenizer_files import check_tokenizer
from marlinctl.system.files import FileRefused, open_member, shown

# "needed": refused where the architecture is unknown. "known": compared with the table where it is in it. "no": not compared.
Structure = Literal["needed", "known", "no"]
_READ_BY_LOADERS = (".json", ".jinja", ".txt", ".model", ".tiktoken")
_APART = "config.json and the weights do not belong together; write or fetch both again"


@dataclass(frozen=True, slots=True)
class Examined:
    """A folder that passed. `notes` is what the person should know, one line each."""

    checkpoint: Checkpoint
    info: FormatInfo
    architecture: Architecture | None  # None: not in the table, or not laid out as the table says
    notes: tuple[str, ...]
    idle: tuple[str, ...] = ()  # biases of zeros that the model has no place for; they are left out of what is written


@contextmanager
def open_folder(
    folder: Path, *, weight_files: str = "auto", structure: Structure = "known", tokenizer: bool = False, module_map: Path | None = None
) -> Iterator[Examined]:
    """Open and examine; closed with the context."""
    with open_checkpoint(folder, weight_files=weight_files) as checkpoint:
        yield examine(checkpoint, structure=structure, tokenizer=tokenizer, module_map=module_map)


def examine(
    checkpoint: Checkpoint,
    *,
    structure: Structure,
    dense: bool = False,
    tokenizer: bool = False,
    module_map: Path | None = None,
    files: bool = True,
    weights: bool = True,
    drop_unexpected: bool = False,
) -> Examined:
    """All checks of the table above, in its order. BadInput lists all that is wrong of a kind; CheckFailed E101 for the manifest.

    dense: a quantized checkpoint is refused. files: False where there is no folder yet, because it will be made from a GGUF file.
    weights: False where the folder holds headers alone, as for a plan of a model on the hub. drop_unexpected: what is beside the model is
    no longer among the tensors of the checkpoint.
    """
    checkpoint = in_sixteen_bits(checkpoint)
    folder, config = checkpoint.folder, checkpoint.config
    if files:
        _check_small_files_open(folder)
        if weights:
            check_small_files(folder)
    if dense:
        refuse_quantized(checkpoint.config, checkpoint.folder)
    info = registry.detect(config, checkpoint.tensors)
    if info.format.quantized and not info.layers:
        what = f"config.json says {info.name}, but no tensor is packed that way"
        raise BadInput("E302", what, where=str(folder), fix="config.json belongs to another model; fetch the checkpoint again")
    precision = (checkpoint.precision,) if checkpoint.precision else ()
    notes = (*checkpoint.notes, *precision, *check_switches(folder, config, files=files))
    known = None
    if structure != "no":
        known, checkpoint = _architecture(checkpoint, info, structure, module_map)
    checks: list[Callable[[], None]] = []
    if known is not None:
        checks += _structure_checks(checkpoint, info, known)
    if tokenizer and files:
        checks.append(lambda: check_tokenizer(folder, config))
    check_together(*checks)
    if known is not None and weights:
        refuse_two_heads(checkpoint, known)
    if known is not None and known.guests:
        notes = (*notes, _said_of_guests(known.guests, dropped=drop_unexpected))
    if known is not None and drop_unexpected:
        checkpoint = replace(checkpoint, tensors={name: info for name, info in checkpoint.tensors.items() if name not in known.guests})
        known = replace(known, guests={})
    idle = () if known is None else tuple(known.unexpected(dict.fromkeys(biases(checkpoint, info))))
    if weights:
        refuse_used(checkpoint, idle)
    return Examined(checkpoint, info, known, notes, idle)


def check_together(*checks: Callable[[], None]) -> None:
    """Run all checks of the checkpoint and list the problems of all of them."""
    errors: list[BadInput] = []
    for check in checks:
        try:
            check()
        except BadInput as error:
            errors.append(error)
    if errors:
        problems: list[Problem] = [problem for error in errors for problem in error.problems]
        raise BadInput.from_problems(errors[0].error_id, problems)


# ---- files ---------------------------------------------------------------------------------------------------------------------------


def _check_small_files_open(folder: Path) -> None:
    """Whatever is copied from the folder or opened by libraries that load from it: a FIFO would hang them, a link may lead anywhere."""
    problems = []
    for name in sorted({*companion_names(folder), *(path.name for path in folder.iterdir() if path.suffix in _READ_BY_LOADERS)}):
        try:
            open_member(folder, name).close()
        except FileRefused as refused:
            problems.append(refused.problem)
    if problems:
        raise BadInput.from_problems("E301", problems)


# ---- structure -----------------------------------------------------------------------------------------------------------------------


def _architecture(
    checkpoint: Checkpoint, info: FormatInfo, structure: Structure, module_map: Path | None
) -> tuple[Architecture | None, Checkpoint]:
    """The architecture, and the checkpoint with the names that it has for experts and for the embedding."""
    names = dense_names(checkpoint, info)
    try:
        if structure == "needed":
            known = architecture_of(checkpoint.config, names, module_map)
        else:
            known = spelled_as(architecture(checkpoint.config, module_map), checkpoint.config, names)
    except BadInput as unknown:
        if structure == "known" and unknown.error_id == "E390":
            return None, checkpoint
        raise
    known = with_stored_pieces(known, {name: tensor.shape for name, tensor in checkpoint.tensors.items()})
    seen = with_single_experts(with_embedding(checkpoint, known), known)
    other = _other_layout(seen, _owned(info)[0], known)
    if other is None:
        return known, seen
    if structure == "known":
        return None, checkpoint  # transformers may know the layout; it loads all tensors or none
    raise other


def dense_names(checkpoint: Checkpoint, info: FormatInfo) -> set[str]:
    """The tensors that the checkpoint has, or would have if its linears were not packed."""
    packed, owned = _owned(info)
    return packed | {name for name in checkpoint.tensors if name not in owned}


def _owned(info: FormatInfo) -> tuple[set[str], set[str]]:
    """The dense weights that packed linears stand for, and the tensors that they consist of."""
    packed = {f"{layer}.weight" for layer in info.layers} if info.format.quantized else set()
    return packed, set(info.owned)


def _structure_checks(checkpoint: Checkpoint, info: FormatInfo, known: Architecture) -> list[Callable[[], None]]:
    packed, owned = _owned(info)
    return [
        lambda: check_expected(checkpoint, {name: shape for name, shape in known.expected.items() if name not in packed}),
        lambda: _refuse_unexpected(checkpoint, info, known, [name for name in checkpoint.tensors if name not in owned]),
        lambda: _check_packed(checkpoint, info, known),
    ]


def _refuse_unexpected(checkpoint: Checkpoint, info: FormatInfo, known: Architecture, names: Iterable[str]) -> None:
    """BadInput E302 for tensors that the model has no place for."""
    may_be_idle = set(biases(checkpoint, info))
    extra = known.unexpected({name: None for name in names if name not in may_be_idle})
    if not extra:
        return
    listed = ", ".join(shown(name, 100) for name in extra[:5]) + (" ..." if len(extra) > 5 else "")
    what = f"{number_of(len(extra), 'tensor has', 'tensors have')} no place in the model that config.json describes: {listed}"
    fix = (
        "transformers would leave them out, and compute another model than the one that was trained: take config.json and weights from one "
        "place (more blocks, or biases, than config.json says? an adapter that was not merged?)"
    )
    raise BadInput("E302", what, where=str(checkpoint.folder), fix=fix)


def _said_of_guests(found: Mapping[str, str], *, dropped: bool) -> str:
    listed = ", ".join(shown(name, 100) for name in list(found)[:3]) + (" ..." if len(found) > 3 else "")
    kinds = "; ".join(sorted(set(found.values())))
    what = "left out" if dropped else "carried along unchanged"
    count = number_of(len(found), "tensor is", "tensors are")
    return f"{count} no part of the model that config.json describes, and {what}: {listed} ({kinds})"


def biases(checkpoint: Checkpoint, info: FormatInfo) -> list[str]:
    """Of packed linears. AutoGPTQ writes one for every linear, whether the model has it or not, and clients leave out what has no place."""
    return [name for layer in info.layers if (name := f"{layer}.bias") in checkpoint.tensors]


def refuse_used(checkpoint: Checkpoint, idle: Iterable[str]) -> None:
    """BadInput E302 for a bias that the model has no place for and that is not zero."""
    used = [name for name in idle if any(checkpoint.raw(name))]
    if used:
        what = f"{len(used)} biases are not zero, and the model of config.json has no place for them; the first is {shown(used[0], 100)}"
        raise BadInput("E302", what, where=str(checkpoint.folder), fix=_APART)


def _check_packed(checkpoint: Checkpoint, info: FormatInfo, known: Architecture) -> None:
    """Every packed linear is one of the model's, and has its size."""
    specs = dict(known.linears)
    if known.head is not None:
        specs[known.head.name] = known.head
    problems: list[Problem] = []
    for layer in info.layers:
        spec = specs.get(layer)
        where = str(checkpoint.tensors[info.marking(layer)].file)
        if spec is None:
            problems.append(Problem(f"{layer} is packed, but the model has no such linear", where, _APART))
        elif (shape := registry.layer_shape(checkpoint, info, layer)) != (spec.out_features, spec.in_features):
            wanted = [spec.out_features, spec.in_features]
            problems.append(Problem(f"{layer} is {list(shape)}, config.json asks for {wanted}", where, _APART))
    if problems:
        raise BadInput.from_problems("E302", problems)


def _other_layout(checkpoint: Checkpoint, packed: set[str], known: Architecture) -> BadInput | None:
    """The model is whole, but laid out in another way: what to say of that, in place of a line for each tensor."""
    tensors = checkpoint.tensors
    missing = [name for name in known.expected if name not in tensors and name not in packed]
    if not missing:
        return None
    where = str(checkpoint.folder)
    inner = _prefix_before(missing[0], tensors)
    if inner and all(inner + name in tensors for name in missing):
        what = f"the names of the tensors begin with {shown(inner, 60)!r}: {shown(inner, 60)}{missing[0]} in place of {missing[0]}"
        fix = "transformers would fill the model with random numbers: take config.json of the model that the weights were saved from"
        return BadInput("E302", what, where=where, fix=fix)
    return None


def _prefix_before(name: str, tensors: Mapping[str, object]) -> str | None:
    """What stands before `name` in the checkpoint's own names."""
    return next((found.removesuffix(name) for found in tensors if found.endswith("." + name)), None)


def refuse_two_heads(checkpoint: Checkpoint, known: Architecture) -> None:
    """BadInput E302: the stored head and the tied embedding differ, and runtimes choose either."""
    for name in known.tied_copies(checkpoint.tensors):
        if checkpoint.raw(name) != checkpoint.raw(f"{known.embedding}.weight"):
            what = f"config.json ties the output head to the embedding, and {name} is another matrix"
            fix = 'write "tie_word_embeddings": false into config.json if the model has a head of its own'
            raise BadInput("E302", what, where=str(checkpoint.tensors[name].file), fix=fix)


def refuse_quantized(config: Mapping[str, Any], folder: Path) -> None:
    """`quantize` starts from 16 or 32-bit weights; a checkpoint that is quantized already is for `pack`, `eval` and `verify`."""
    block = registry.quantization_block(config)
    if block is None:
        return
    method = block.get("quant_method")
    raise BadInput(
        "E313",
        f"the checkpoint is already quantized ({shown(str(method or 'quantization_config is present'))})",
        where=str(folder / CONFIG),
        fix=registry.way_to_sixteen_bits(method)
        or "start from the original checkpoint; to change the format of this one, use marlinctl pack",
    )
