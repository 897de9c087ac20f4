"""A packed checkpoint against the model it was made from: per linear, how far the weights are apart, and whether that is plausible.

    error         ||W - Q|| / ||W||, the relative distance of the dequantized weight Q. Int4 with groups costs about 0.1; GPTQ a little
                  more, because it moves weights on purpose to keep the layer's output. Above 0.5 the codes are not this weight's codes.
                  Of a 2:4 linear only kept weights are compared. They compensate for pruned neighbours (up to 0.34 on SmolLM2-135M, more
                  with --drift-correction), so 1 is allowed; unrelated weights are 1.4 apart.
    scale match   correlation, over all groups, of the stored scale with the one that fits best, <W, codes> / <codes, codes>. Rightly
                  placed scales give nearly 1. Permuted ones (a wrong layout) give about 0, although they cost so little error, since the
                  scales of a layer resemble each other, that `error` alone would let them pass.

Tensors that were not quantized must be the source's bytes. Other tools convert them (fp16 to bf16, say); that is reported, and is a
failure only where the values are not the source's, rounded to the other dtype. Norms and biases that the manifest names as tuned
(--tune-steps) have the source's dtype, and are as far from it as a weight may be.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from marlinctl.checkpoint.formats import registry
from marlinctl.checkpoint.formats.base import FormatInfo, LinearParts
from marlinctl.checkpoint.orders import read_orders, relative, reordered
from marlinctl.errors import BadInput, CheckFailed, Problem, number_of

if TYPE_CHECKING:
    from torch import Tensor

    from marlinctl.checkpoint.reader import Checkpoint

MAX_ERROR = 0.5
MAX_ERROR_OF_KEPT = 1.0
MIN_SCALE_MATCH = 0.5
_ENOUGH_GROUPS = 64  # fewer say too little about a correlation
_SPREAD = 0.02  # relative; scales that are all but equal have no order that could be wrong


@dataclass(frozen=True, slots=True)
class LayerFidelity:
    layer: str
    error: float
    scale_match: float | None  # None where there are too few groups, or all scales are alike
    sparse: bool


def compare(
    checkpoint: Checkpoint, info: FormatInfo, source: Checkpoint, layers: Sequence[LayerFidelity], tuned: Collection[str] = ()
) -> dict[str, Any]:
    """Every linear, as it was measured, and every other tensor against the source. tuned: those that a run changed on purpose. CheckFailed
    lists all that are implausible, BadInput E302 the first linear that the source lacks."""
    problems, converted, changed = _others(checkpoint, info, source, tuned)
    known = {measured.layer for measured in layers}
    for layer in info.layers:
        if layer not in known:
            problems.append(_other_shape(checkpoint, info, source, layer))
    problems += [problem for measured in layers for problem in _implausible(measured)]
    if problems:
        raise CheckFailed.from_problems("E107", problems)
    errors = sorted(layer.error for layer in layers)
    return {
        "layers": [asdict(layer) for layer in layers],
        "median_error": errors[len(errors) // 2],
        "max_error": errors[-1],
        "worst_layer": max(layers, key=lambda layer: layer.error).layer,
        "converted": converted,
        "tuned": changed,
    }


def has_weight(source: Checkpoint, layer: str, shape: Sequence[int]) -> bool:
    """Whether the source has this linear's weight, in this shape."""
    found = source.tensors.get(f"{layer}.weight")
    return found is not None and tuple(found.shape) == tuple(shape)


def measure(layer: str, weight: Tensor, parts: LinearParts) -> LayerFidelity:
    """weight: [N, K] of the source."""
    import torch

    weight = weight.to(torch.float32) if parts.keep is None else weight.to(torch.float32) * parts.keep
    error = float((weight - parts.weight()).norm() / weight.norm().clamp_min(torch.finfo(torch.float32).tiny))
    return LayerFidelity(layer, error, _scale_match(weight, parts), parts.keep is not None)


def _scale_match(weight: Tensor, parts: LinearParts) -> float | None:
    import torch

    from marlinctl.quantize.types import values_of

    codes = values_of(parts.codes, parts.grid).reshape(len(parts.codes), -1, parts.group_size)  # [N, G, g]
    power = (codes * codes).sum(-1)
    fitted = (weight.reshape(codes.shape) * codes).sum(-1) / power.clamp_min(1)  # [N, G] the scale that fits best
    used = power > 0
    stored, fitted = parts.scales.to(torch.float64)[used].abs(), fitted.to(torch.float64)[used].abs()
    if stored.numel() < _ENOUGH_GROUPS or float(fitted.std()) < _SPREAD * float(fitted.mean()):
        return None
    return float(torch.corrcoef(torch.stack([stored, fitted]))[0, 1].nan_to_num())  # equal stored scales: 0


def _implausible(measured: LayerFidelity) -> list[Problem]:
    fix = "the codes, their order or the layer's name are wrong; pack or quantize again, and report it if that does not help"
    most = MAX_ERROR_OF_KEPT if measured.sparse else MAX_ERROR
    if not measured.error <= most:  # NaN too
        return [Problem(f"{measured.layer}: ||W - Q|| / ||W|| = {measured.error:.3f}, above {most}", measured.layer, fix)]
    if measured.scale_match is not None and measured.scale_match < MIN_SCALE_MATCH:
        what = f"{measured.layer}: the scales do not fit their groups (correlation {measured.scale_match:.2f}, below {MIN_SCALE_MATCH})"
        return [Problem(what, measured.layer, "the scales are permuted; pack or quantize again, and report it if that does not help")]
    return []


def _other_shape(checkpoint: Checkpoint, info: FormatInfo, source: Checkpoint, layer: str) -> Problem:
    name = f"{layer}.weight"
    if name not in source.tensors:
        raise BadInput("E302", f"the source has no {name}", where=str(source.folder), fix="name the model this checkpoint was made from")
    theirs, ours = list(source.tensors[name].shape), list(registry.layer_shape(checkpoint, info, layer))
    return Problem(f"{layer} is {theirs} in the source and {ours} here", layer, "name the model that this checkpoint was made from")


def _others(
    checkpoint: Checkpoint, info: FormatInfo, source: Checkpoint, tuned: Collection[str]
) -> tuple[list[Problem], list[str], list[str]]:
    """What is wrong with the tensors that were not quantized, which of them changed their dtype only, and which were tuned."""
    owned, orders = info.owned, relative(read_orders(checkpoint.folder), read_orders(source.folder))
    problems, converted, changed = [], [], []
    for name in (name for name in checkpoint.tensors if name not in owned):
        if name not in source.tensors:
            problems.append(Problem(f"{name} is not in the source", name, "name the model that this checkpoint was made from"))
            continue
        ours, theirs = checkpoint.tensors[name], source.tensors[name]
        if ours.dtype == theirs.dtype and ours.shape == theirs.shape and checkpoint.raw(name) == source.raw(name):
            continue
        alike = ours.shape == theirs.shape
        found, wanted = checkpoint.read(name), reordered(name, source.read(name), orders) if alike else None
        if wanted is not None and _same_rounded(found, wanted):
            if ours.dtype != theirs.dtype:
                converted.append(name)
        elif wanted is not None and name in tuned and ours.dtype == theirs.dtype and _distance(found, wanted) <= MAX_ERROR:
            changed.append(name)
        else:
            what = f"{name} was not quantized and yet differs from the source"
            problems.append(Problem(what, name, "name the model that this was made from, or write it again"))
    return problems, converted, changed


def _distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def _same_rounded(ours: Tensor, theirs: Tensor) -> bool:
    import torch

    return torch.equal(ours, theirs.to(ours.dtype))


def summary(report: Mapping[str, Any]) -> str:
    converted, tuned = len(report["converted"]), len(report["tuned"])
    others = f"{converted} other tensors changed their dtype only" if converted else "other tensors are byte-identical"
    norms = f"{number_of(tuned, 'norm or bias was', 'norms and biases were')} tuned, " if tuned else ""
    worst = f"worst {report['max_error']:.4f} ({report['worst_layer']})"
    return f"||W - Q|| / ||W||: median {report['median_error']:.4f}, {worst}; {norms}{others}"
