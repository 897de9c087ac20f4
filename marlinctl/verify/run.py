"""`marlinctl verify`: is this folder what it says, whole, and would a client that loads it compute the right thing?

    1 digests     every file as the manifest says, none missing, none extra                            CheckFailed E101
    2 structure   every tensor the model needs, with its shape and dtype; nothing else; the config     CheckFailed E105
                  fields without which clients load garbage and say nothing
    3 contents    scales finite, codes readable, packing the codes again gives the same bytes (so      CheckFailed E106, BadInput E346
                  padding is zero), and a second, independent reading of the bytes gives the same weights
                  masks 2:4, of linears that exist, and what they say was pruned is zero                       CheckFailed E105, E106
    4 kernels     the tiles of native formats, multiplied by the CUDA kernel or, without a GPU, read    CheckFailed E113
                  lane by lane as it reads them, give the product of the same weights, and with int8
                  activations where the folder allows them: marlinctl/verify/kernels.py
    5 load        transformers and compressed-tensors load the folder on the CPU; each weight that     CheckFailed E108
                  they hold is the dequantized one, and so are the logits
    6 source      with --source: marlinctl/verify/source.py                                                 CheckFailed E107

Other tools check that a model loads. That is not enough here: most of the ways to get a packed checkpoint wrong still load.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marlinctl.checkpoint import manifest, runtimes, sparsity
from marlinctl.checkpoint.finite import scan_finite
from marlinctl.checkpoint.folder import dense_names, refuse_two_heads
from marlinctl.checkpoint.formats import registry, rounding
from marlinctl.checkpoint.formats.base import TRANSFORMERS, TRANSFORMERS_CT, TRANSFORMERS_GPTQ, FormatInfo, LinearParts
from marlinctl.checkpoint.formats.targets import Entries
from marlinctl.checkpoint.fused_experts import with_single_experts
from marlinctl.checkpoint.mask import open_masks
from marlinctl.checkpoint.orders import read_orders, relative, reordered
from marlinctl.checkpoint.reader import FLOAT_DTYPES, require_folder
from marlinctl.checkpoint.rotated import rotated_as
from marlinctl.checkpoint.tied_head import with_own_head
from marlinctl.errors import BadInput, CheckFailed, MarlinctlError, NumericalProblem, Problem, number_of
from marlinctl.models.architectures import with_stored_pieces
from marlinctl.models.families import may_be_derived
from marlinctl.models.lookup import architecture_of
from marlinctl.system.console import gibibytes
from marlinctl.system.host import available_memory
from marlinctl.verify import activations
from marlinctl.verify import source as fidelity
from marlinctl.verify.kernels import KernelCheck, check_kernels

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from marlinctl.checkpoint.mask import Masks
    from marlinctl.checkpoint.reader import Checkpoint
    from marlinctl.system.console import Console

MAX_LOGIT_ERROR = 1e-3  # relative, fp32: both sides multiply the same weights in the same order, so only the order of sums may differ
_AGAIN = "fetch or write the checkpoint again"
_APART = "config.json and weights do not belong together; fetch or write the checkpoint again"
_GARBAGE = "a client would compute garbage from this folder; write it again, and report it if that does not help"
_SAMPLES = 8  # linears whose bytes are read a second way
_PROBE_TOKENS = 32
_FUSED_EXPERTS = 3  # dimensions of the parameter that transformers makes of the experts of a block: [E, N, K]


@dataclass(frozen=True, slots=True)
class Verified:
    """What was checked. `skipped` says what was not, and why."""

    format: str
    linears: int
    files: int
    logit_error: float | None
    skipped: tuple[str, ...]
    source: dict[str, Any] | None = field(default=None)
    pattern: dict[str, Any] | None = field(default=None)
    kernels: KernelCheck | None = field(default=None)

    def document(self) -> dict[str, Any]:
        names = ("format", "linears", "files", "pattern", "logit_error", "skipped", "source")
        read = None if self.kernels is None else asdict(self.kernels)
        return {"ok": True, **{name: getattr(self, name) for name in names}, "kernels": read}


def verify(
    folder: Path, *, source: Path | None, load: bool | None, console: Console, module_map: Path | None = None, kernels: bool = True
) -> Verified:
    """All checks in turn; the first kind that fails raises, naming everything it found. `load` None: if it fits into memory."""
    from marlinctl.checkpoint.folder import open_folder

    require_folder(folder)
    document = manifest.check(folder)
    console.detail(f"digests: {number_of(len(document['files']), 'file')} as the manifest says")
    with ExitStack() as stack:
        examined, masks = stack.enter_context(open_folder(folder, structure="no")), stack.enter_context(open_masks(folder))
        checkpoint, info = examined.checkpoint, examined.info
        for note in examined.notes:
            console.warn(note)
        original = stack.enter_context(_opened(source, checkpoint, info, console))
        skipped = check_structure(checkpoint, info, module_map)
        console.detail(f"structure: {number_of(len(checkpoint.tensors), 'tensor')}, {number_of(len(info.layers), 'linear')} in {info.name}")
        check_finite(checkpoint, info)
        found = check_linears(checkpoint, info, masks, original, console)
        _raise("E106", found.contents)
        console.detail("contents: scales finite, packing again gives the same bytes")
        sparse = check_pattern(checkpoint, info, masks, found)
        if sparse is not None:
            console.detail(f"2:4: {number_of(sparse['linears'], 'linear')} by the {sparse['origin']}; what was pruned is zero")
        read = check_kernels(checkpoint, info, console) if kernels and info.format.native else None
        if read is not None:
            console.detail(
                f"kernels: tiles read by the {read.by}, {read.blocks} of {read.of_blocks} blocks; error {read.error:.1e}, rounding alone"
            )
            if read.rounded:
                console.detail(f"kernels: {number_of(read.rounded, 'linear')} with int8 activations by the {read.rounded_by}")
            if read.unread:
                skipped.append(
                    f"{number_of(len(read.unread), 'linear has', 'linears have')} groups that no kernel multiplies, {read.unread[0]} first"
                )
        elif info.format.native:
            skipped.append("tiles not read as a kernel reads them: --no-kernels")
        error, reason = _load_check(checkpoint, info, load)
        skipped += [reason] if reason else []
        if error is not None:
            console.detail(f"load: logits agree with the dequantized model, relative error {error:.1e}")
        compared = None if original is None else fidelity.compare(
            checkpoint, info, original, found.against_source, manifest.tuned_of(document)
        )  # fmt: skip
        if compared is not None:
            console.detail(f"source: {fidelity.summary(compared)}")
    return Verified(info.name, len(info.layers), len(document["files"]), error, tuple(skipped), compared, sparse, read)


# ---- 2 structure ---------------------------------------------------------------------------------------------------------------------


def check_structure(checkpoint: Checkpoint, info: FormatInfo, module_map: Path | None = None) -> list[str]:
    """Names, shapes and dtypes of all tensors, and the config fields that must not be forgotten. Returns what could not be checked."""
    problems = _config_problems(checkpoint, info)
    try:
        model = architecture_of(checkpoint.config, dense_names(checkpoint, info), module_map)
    except BadInput as unknown:
        if unknown.error_id != "E390" and not may_be_derived(checkpoint.config):  # such a model may need a newer transformers
            raise
        problems += _layer_problems(checkpoint, info, {layer: registry.layer_shape(checkpoint, info, layer) for layer in info.layers})
        _raise("E105", problems)
        return [f"the model's own list of tensors was not checked: {unknown}"]
    model = with_stored_pieces(model, {name: tensor.shape for name, tensor in checkpoint.tensors.items()})
    shapes = {spec.name: (spec.out_features, spec.in_features) for spec in model.linears.values()}
    if model.head is not None:
        shapes[model.head.name] = (model.head.out_features, model.head.in_features)
    strangers = [layer for layer in info.layers if layer not in shapes]
    problems += [Problem(f"{layer} is packed, but the model has no such linear", layer, _APART) for layer in strangers]
    misspelt = rounding.misspelt(registry.quantization_block(checkpoint.config) or {}, info.format, model.by_all_names(info.layers))
    problems += [Problem(f"{name} keeps 16-bit activations, and no packed linear is called so", name, _APART) for name in misspelt]
    problems += _layer_problems(checkpoint, info, {layer: shapes[layer] for layer in info.layers if layer in shapes})
    packed = {f"{layer}.weight" for layer in info.layers}
    for name, shape in model.expected.items():
        if name not in packed:
            problems += _tensor_problems(checkpoint, name, FLOAT_DTYPES, shape)
    owned = info.owned
    problems += [
        Problem(f"{name} is not a tensor of this model", str(checkpoint.tensors[name].file), _APART)
        for name in model.unexpected({name: None for name in checkpoint.tensors if name not in owned})
    ]
    _raise("E105", problems)
    refuse_two_heads(checkpoint, model)
    return []


def _layer_problems(checkpoint: Checkpoint, info: FormatInfo, shapes: Mapping[str, tuple[int, int]]) -> list[Problem]:
    problems: list[Problem] = []
    for layer, (n, k) in shapes.items():
        size = info.layers[layer]
        if size != -1 and k % size:
            problems.append(Problem(f"{layer}: K={k} is not a multiple of group_size {size}", layer, _APART))
            continue
        for suffix, (dtypes, shape) in info.format.shapes(n, k, size, info.grid(layer)).items():
            problems += _tensor_problems(checkpoint, f"{layer}.{suffix}", dtypes, shape)
        if f"{layer}.weight_shape" in checkpoint.tensors and registry.layer_shape(checkpoint, info, layer) != (n, k):
            problems.append(Problem(f"{layer}.weight_shape does not say [{n}, {k}]", layer, _AGAIN))
    return problems


def _tensor_problems(checkpoint: Checkpoint, name: str, dtypes: Sequence[str], shape: Sequence[int]) -> list[Problem]:
    found = checkpoint.tensors.get(name)
    if found is None:
        return [Problem(f"{name} is missing", str(checkpoint.folder), f"{_AGAIN}; clients would fill it with random numbers")]
    if tuple(found.shape) != tuple(shape) or found.dtype not in dtypes:
        what = f"{name} is {found.dtype} {list(found.shape)}, expected {' or '.join(dtypes)} {list(shape)}"
        return [Problem(what, str(found.file), _APART)]
    return []


def _config_problems(checkpoint: Checkpoint, info: FormatInfo) -> list[Problem]:
    """What clients need in quantization_config and do not miss aloud."""
    block = registry.quantization_block(checkpoint.config) or {}
    where = str(checkpoint.folder / "config.json")
    problems: list[Problem] = []

    needed = info.format.required
    if not all(grid.symmetric for grid in info.used_grids):  # what is needed of symmetric codes has been read as it is
        needed = [item for item in needed if item[0] not in ("sym", "checkpoint_format")]
    for key, value, why in needed:
        if block.get(key) != value:
            problems.append(Problem(f"quantization_config.{key} is {block.get(key)!r}, not {value!r}: {why}", where, _AGAIN))
    if info.format.checks_ignore:
        others = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
        try:
            ignored = Entries(str(entry) for entry in block.get("ignore") or [])
            problems += [
                Problem(f"{name} is 16-bit, but `ignore` does not say so: clients would look for packed tensors", where, _AGAIN)
                for name in registry.sixteen_bit_linears(others, info.layers)
                if name not in ignored
            ]
            problems += [
                Problem(f"{layer} is packed, but `ignore` names it: clients would look for a 16-bit weight", where, _AGAIN)
                for layer in info.layers
                if layer in ignored
            ]
        except ValueError as problem:  # expressions that take too long
            problems.append(Problem(f"quantization_config.ignore: {problem}", where, _AGAIN))
    return problems


# ---- 3 contents ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Linears:
    """What one pass over the linears found. A large folder does not fit into memory, so each further pass would read the disk again."""

    contents: tuple[Problem, ...]
    masks: tuple[Problem, ...]
    zero_kept: int  # kept weights that are zero
    against_source: tuple[fidelity.LayerFidelity, ...]  # of linears that the source has in this shape


def check_finite(checkpoint: Checkpoint, info: FormatInfo) -> None:
    """No NaN in what is not packed; those of scales are refused where the linear is unpacked."""
    owned = info.owned
    try:
        scan_finite(checkpoint, [name for name in checkpoint.tensors if name not in owned])
    except NumericalProblem as found:
        _raise("E106", found.problems)


def check_linears(checkpoint: Checkpoint, info: FormatInfo, masks: Masks | None, source: Checkpoint | None, console: Console) -> Linears:
    """Every packed linear is unpacked once, packed again, and compared with its mask and its weight in the source; some are read a second,
    independent way. 16-bit linears are compared with their masks. Raises BadInput E346 alone; what else is wrong is returned."""
    layers = list(info.layers)
    sampled = set(layers[:: max(1, len(layers) // _SAMPLES)])
    masked = [layer for layer in sparsity.stated(checkpoint, info, masks).linears if layer not in info.layers]
    contents: list[Problem] = []
    contradicted: list[Problem] = []
    compared: list[fidelity.LayerFidelity] = []
    zeros = 0
    orders = {} if source is None else relative(read_orders(checkpoint.folder), read_orders(source.folder))
    with console.progress("check linears", len(layers) + len(masked)) as progress:
        for layer in (*layers, *masked):
            parts = registry.read_parts(checkpoint, info, layer) if layer in info.layers else None
            values, keep = (checkpoint.read(f"{layer}.weight"), None) if parts is None else (parts.codes, parts.keep)
            if parts is not None:
                contents += _contents(checkpoint, info, layer, parts, second=layer in sampled)
            try:
                keep = masks.checked_keep(layer, values) if masks is not None and layer in masks else keep
            except BadInput as refused:
                if refused.error_id != sparsity.REFUSED:
                    raise
                contradicted += refused.problems
            zeros += 0 if keep is None else int(((values == 0) & keep).sum())
            if parts is not None and source is not None and not contents and fidelity.has_weight(source, layer, parts.codes.shape):
                original = reordered(f"{layer}.weight", source.read(f"{layer}.weight"), orders)
                compared.append(fidelity.measure(layer, original, replace(parts, keep=keep)))
            progress.advance()
    return Linears(tuple(contents), tuple(contradicted), zeros, tuple(compared))


def _contents(checkpoint: Checkpoint, info: FormatInfo, layer: str, parts: LinearParts, *, second: bool) -> list[Problem]:
    import torch

    problems = [
        Problem(
            f"{name} is not what packing its own codes gives: padding or constant fields are wrong",
            str(checkpoint.tensors[name].file),
            _AGAIN,
        )
        for name, tensor in registry.linear_tensors(info.format, layer, parts).items()
        if not torch.equal(checkpoint.read(name).to(tensor.dtype), tensor)
    ]
    if second and not torch.equal(_second_reading(checkpoint, info, layer), parts.weight()):
        problems.append(Problem(f"{layer}: two ways to read its bytes disagree", layer, "please report it: a defect of marlinctl"))
    return problems


def check_pattern(checkpoint: Checkpoint, info: FormatInfo, masks: Masks | None, found: Linears) -> dict[str, Any] | None:
    """Every mask that the folder states against its weights. Returns what it states, None for a folder that states nothing."""
    stated = sparsity.stated(checkpoint, info, masks)
    if stated.origin is None:
        return None
    if masks is not None:
        _raise("E105", sparsity.strangers(sparsity.shapes(checkpoint, info), info, masks))
    _raise("E106", found.masks)
    return {"origin": stated.origin, "linears": len(stated.linears), "zero_kept": found.zero_kept}


def _second_reading(checkpoint: Checkpoint, info: FormatInfo, layer: str) -> Tensor:
    """[N, K] fp32, without the fast unpackers."""
    assert info.format.second_reading is not None
    tensors = registry.read_tensors(checkpoint, info, layer)
    n, k = registry.layer_shape(checkpoint, info, layer)
    return info.format.second_reading(tensors, n, k, info.layers[layer], info.grid(layer))


# ---- 5 load --------------------------------------------------------------------------------------------------------------------------


def _load_check(checkpoint: Checkpoint, info: FormatInfo, load: bool | None) -> tuple[float | None, str | None]:
    """(relative logit error, None), or (None, why it was not done)."""
    loader = next((program for program in info.format.loaders if program in (TRANSFORMERS, TRANSFORMERS_CT)), None)
    if loader is None:
        without = " (it needs optimum and gptqmodel)" * (TRANSFORMERS_GPTQ in info.format.loaders)
        return None, f"not loaded with transformers, which does not read {info.name} by itself{without}"
    if load is False:
        return None, "not loaded with transformers: --no-load"
    refused = runtimes.loads(runtimes.packed_of(checkpoint, info)).refused.get(loader)
    if load is None and refused:
        return None, f"not loaded with transformers, which refuses it: {refused[0]} (--load insists)"
    needed, available = int(2.5 * 4 * _parameters(checkpoint, info)), available_memory()
    if load is None and needed > available:
        sizes = f"it needs about {gibibytes(needed)} of memory, {gibibytes(available)} are free"
        return None, f"not loaded with transformers: {sizes} (--load insists)"
    error = logit_error(checkpoint)
    if not error <= MAX_LOGIT_ERROR:  # NaN too
        raise CheckFailed(
            "E108",
            f"transformers' logits differ from the dequantized model's: relative error {error:.2e}, at most {MAX_LOGIT_ERROR} is allowed",
            where=str(checkpoint.folder),
            fix=_GARBAGE,
        )
    return error, None


def logit_error(checkpoint: Checkpoint) -> float:
    """||a - b|| / ||b|| of logits: a from transformers with compressed-tensors, b from the model of the dequantized weights.

    CheckFailed E108 where transformers does not load the folder, or a weight that it holds is not the dequantized one. One model is
    in memory at a time; of the client's weights the digests stay.

    NOTE: transformers decompresses experts in the dtype of their scales, and now and then the last bit of a weight sends a token to another
    expert: of sound models, logits were 1e-3 to 7e-2 apart in 2 % of probes (2 blocks, 6 experts) to 45 % (16 blocks, 64). So weights are
    compared first, exactly or as that rounding leaves them, and the logits are those of equal weights.

    NOTE: activations of 8 bits are not rounded here; which linears the client rounds is compared instead (activations.py).
    """
    import torch

    from marlinctl.checkpoint.transformers_model import dense_tensors, model_from, quietly, strangers
    from marlinctl.models.transformers_config import client_class, transformers_config

    try:
        with quietly():
            config = transformers_config(checkpoint.config, checkpoint.folder, quantized=True)
            client, info = client_class(config).from_pretrained(
                checkpoint.folder, config=config, dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
            info["unexpected_keys"] = strangers(client, info, checkpoint.config)
            torch.nn.Module.float(client.eval())  # experts stay in the dtype of their scales, whatever dtype is asked for
            rounded = activations.turn_off(client)
            tokens = _probe(int(client.config.get_text_config().vocab_size))
            theirs = _logits(client, tokens)  # dense linears are decompressed by the first call
            held = {name: _digests(parameter.data) for name, parameter in client.named_parameters()}
    except (MarlinctlError, MemoryError):
        raise
    except Exception as problem:
        lines = [*str(problem).strip().splitlines(), type(problem).__name__]
        raise CheckFailed(
            "E108",
            f"transformers does not load the folder: {lines[0][:300]}",
            where=str(checkpoint.folder),
            fix="`marlinctl pack FOLDER --check` names linears that no client loads together; for anything else please report it",
        ) from problem
    _raise("E108", _loading_problems(checkpoint.folder, info))
    del client
    gc.collect()  # its modules refer to each other
    ours = model_from(checkpoint, dense_tensors(checkpoint), dtype=torch.float32)
    _raise("E108", activations.different(ours, rounded, checkpoint, fix=_GARBAGE))
    _raise("E108", _match_weights(ours, held, str(checkpoint.folder)))
    expected = _logits(ours, tokens)
    return float((theirs - expected).norm() / expected.norm())


def _match_weights(ours: torch.nn.Module, held: Mapping[str, Sequence[bytes]], where: str) -> list[Problem]:
    """Every weight of ours against the digests of the client's, bit for bit. Experts may be ours rounded once to a 16-bit dtype: then ours
    are rounded too, in place. Returns the weights that differ, each expert by its number."""
    different: list[str] = []
    for name, parameter in ours.named_parameters():
        theirs = held.get(name, ())
        if parameter.dim() == _FUSED_EXPERTS:
            different += [f"{name}[{e}]" for e in _match_experts(parameter.data, theirs)]
        elif _digests(parameter.data) != theirs:
            different.append(name)
    return [Problem(f"transformers holds another {name} than the dequantized one", where, _GARBAGE) for name in different]


def _match_experts(weight: Tensor, held: Sequence[bytes]) -> list[int]:
    """weight: [E, N, K] fp32. Rounds it in place as the client does, and returns the experts that differ all the same."""
    import torch

    wrong: dict[torch.dtype, list[int]] = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        ours = _digests(weight.to(dtype).to(weight.dtype))
        wrong[dtype] = [e for e, digest in enumerate(ours) if digest not in held[e : e + 1]]
        if not wrong[dtype]:
            break
    rounded = min(wrong, key=lambda dtype: len(wrong[dtype]))
    weight.copy_(weight.to(rounded))
    return wrong[rounded]


def _digests(weight: Tensor) -> tuple[bytes, ...]:
    """Of fp32 weights: one, or of fused experts one for each."""
    parts = weight if weight.dim() == _FUSED_EXPERTS else (weight,)
    return tuple(hashlib.sha256((part + 0.0).contiguous().numpy().data).digest() for part in parts)  # -0.0 is 0.0


def _loading_problems(folder: Path, info: Mapping[str, Any]) -> list[Problem]:
    """What transformers itself noted, and went on: a missing tensor is filled with random numbers, an unknown one is dropped."""
    where = str(folder)
    missing, unknown = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    problems = [Problem(f"transformers misses {name} and fills it with random numbers", where, _GARBAGE) for name in missing]
    return problems + [Problem(f"transformers has no place for {name}", where, _GARBAGE) for name in unknown]


def _probe(vocab_size: int) -> Tensor:
    import torch

    return torch.randint(vocab_size, (1, _PROBE_TOKENS), generator=torch.Generator().manual_seed(0))


def _logits(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    import torch

    with torch.inference_mode():
        # Some hybrids have no cache for what they are configured as.
        return model(input_ids=tokens, use_cache=False).logits.to(torch.float64)


def _parameters(checkpoint: Checkpoint, info: FormatInfo) -> int:
    owned = info.owned
    return sum(prod(tensor.shape) for name, tensor in checkpoint.tensors.items() if name not in owned) + sum(
        n * k for n, k in (registry.layer_shape(checkpoint, info, layer) for layer in info.layers)
    )


# ---- 6 source ------------------------------------------------------------------------------------------------------------------------


@contextmanager
def _opened(source: Path | None, checkpoint: Checkpoint, info: FormatInfo, console: Console) -> Iterator[Checkpoint | None]:
    if source is None:
        yield None
        return
    from marlinctl.checkpoint.folder import open_folder

    if not info.layers:
        raise BadInput("E313", "the folder holds no quantized linear to compare", where=str(checkpoint.folder), fix="leave --source out")
    with open_folder(source, weight_files="model") as original:
        for note in original.notes:
            console.warn(f"source: {note}")
        if original.info.format.quantized:
            what = f"the source is quantized itself ({original.info.name})"
            raise BadInput("E313", what, where=str(source), fix="name the 16-bit model that this checkpoint was made from")
        yield _as_of(checkpoint, original.checkpoint)


def _as_of(checkpoint: Checkpoint, source: Checkpoint) -> Checkpoint:
    """The source with a name for each expert, rotated as `checkpoint` is, and with a head of its own where `checkpoint` has one that was
    made of the tied embedding."""
    try:
        known = architecture_of(source.config, source.tensors)
        ours = architecture_of(checkpoint.config, dense_names(checkpoint, registry.detect(checkpoint.config, checkpoint.tensors)))
    except BadInput:  # of a model that a module map describes
        return source
    source = rotated_as(checkpoint.folder, with_single_experts(source, known), known)
    return source if known.tied is None or ours.head is None else with_own_head(source, known)


def _raise(error_id: str, problems: Sequence[Problem]) -> None:
    if problems:
        raise CheckFailed.from_problems(error_id, problems)
