"""Weights that are stored in fewer bits, and are read as 16-bit ones: a view of the checkpoint as a dense model.

    FP8 in blocks          P.weight [N, K] F8_E4M3    P.weight_scale_inv [N/128 up, K/128 up]    DeepSeek, Qwen
    FP8 in rows            P.weight [N, K] F8_E4M3    P.weight_scale [N, 1]                      compressed-tensors, FBGEMM
    FP8 of all experts     P [E, N, K] F8_E4M3        P_scale_inv, P_scale [E, ...], each as above    Qwen3-VL-MoE, GLM
    FP8 with one scale     P.weight [N, K] F8_E4M3    P.weight_scale or P.weight_scale_inv []    compressed-tensors, Mistral
    AWQ                    P.qweight [K, N/8] I32     P.qzeros [G, N/8] I32, P.scales [G, N]     4 bits with a zero point for each group

A weight is code x scale in every one of them, or (code - zero) x scale, whatever the scale is called. It is computed in float32 and rounded
once, to bfloat16, or to the dtype of AWQ's scales, whenever it is asked for; nothing is kept. Scales of activations are left out.

AWQ packs eight columns of N into a word in the order 0 2 4 6 1 3 5 7, lowest nibble first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from marlinctl.checkpoint.formats.base import PROVENANCE
from marlinctl.checkpoint.formats.registry import quantization_block, without_quantization
from marlinctl.checkpoint.reader import Checkpoint, dtype_called
from marlinctl.checkpoint.safetensors_header import TensorInfo
from marlinctl.errors import BadInput, Problem, number_of
from marlinctl.models.places import Place
from marlinctl.system.files import brief, shown

if TYPE_CHECKING:
    from torch import Tensor

_FP8 = "F8_E4M3"
_SCALES = ("_scale_inv", "_scale")  # of a tensor with such a name before them
_ACTIVATIONS = (".input_scale", ".activation_scale", ".input_scale_ub", ".output_scale")
_AWQ_PARTS = ("qweight", "qzeros", "scales")
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # nibble of a word that holds its column 0, 1, 2, ...
_ORIGINAL = "start from the original 16-bit model"


def in_sixteen_bits(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint as a dense one, where its weights are FP8 or AWQ; itself where they are anything else.

    BadInput E340 where a scale is missing or of another shape than its weight, or where the scheme is one that is not read.
    """
    block = quantization_block(checkpoint.config) or {}
    if block.get("quant_method") == "awq":
        return _of_awq(checkpoint, block)
    if _is_fp8(block):
        return _of_fp8(checkpoint, block)
    return checkpoint


def _dense(checkpoint: Checkpoint, made: Mapping[str, Made], left_out: set[str], precision: str) -> Checkpoint:
    config = without_quantization(checkpoint.config)
    tensors = {name: info for name, info in checkpoint.tensors.items() if name not in left_out}
    tensors |= {name: one.info for name, one in made.items()}
    return replace(checkpoint, config=config, tensors=tensors, made=made, stored=checkpoint.tensors, precision=precision)


@dataclass(frozen=True, slots=True)
class Made:
    """A 16-bit weight, and what it is made of."""

    info: TensorInfo  # of the weight: its place in the file is that of its codes
    parts: Mapping[str, TensorInfo]  # stored
    compute: Callable[[Mapping[str, Tensor]], Tensor]  # in float32

    def __call__(self, checkpoint: Checkpoint) -> Tensor:
        stored = replace(checkpoint, tensors=dict(self.parts), made={}, device=None)
        weight = self.compute({role: stored.read(role) for role in self.parts}).to(dtype_called(self.info.dtype))
        return weight if checkpoint.device is None else weight.to(checkpoint.device)

    def rows(self, checkpoint: Checkpoint, ids: Tensor) -> Tensor:
        return self(replace(checkpoint, device=None))[ids]

    def of_expert(self, e: int, name: str, shape: tuple[int, int], place: Place) -> Made:
        """Of one that holds all experts, the linear `name` that lies at `place`; no other expert is read."""
        parts = {role: _one_of(info, e) for role, info in self.parts.items()}
        whole = self.compute

        def compute(stored: Mapping[str, Tensor]) -> Tensor:
            part = whole(stored)[place.index[1:]]
            return (part.T if place.transposed else part).contiguous()

        return Made(_sixteen(name, self.info.dtype, shape, parts["codes"]), parts, compute)


def _one_of(info: TensorInfo, e: int) -> TensorInfo:
    """The part of a tensor [E, ...] that is of expert `e`."""
    size = info.nbytes // info.shape[0]
    return replace(info, shape=info.shape[1:], begin=info.begin + e * size, end=info.begin + (e + 1) * size)


def _sixteen(name: str, dtype: str, shape: tuple[int, ...], codes: TensorInfo) -> TensorInfo:
    size = 2
    for side in shape:
        size *= side
    return TensorInfo(name, dtype, shape, codes.file, codes.begin, codes.begin + size)


# ---- FP8 -----------------------------------------------------------------------------------------------------------------------------


def _is_fp8(block: Mapping[str, Any]) -> bool:
    method = block.get("quant_method")
    if method in ("fp8", "fbgemm_fp8"):
        return True
    groups = block.get("config_groups")
    if method != "compressed-tensors" or not isinstance(groups, Mapping) or block.get("transform_config"):
        return False
    if PROVENANCE in block:  # marlinctl's own FP8 folder is a quantized model, whose activations are rounded too
        return False
    weights = [group.get("weights") if isinstance(group, Mapping) else None for group in groups.values()]
    return bool(weights) and all(isinstance(w, Mapping) and w.get("num_bits") == 8 and w.get("type") == "float" for w in weights)


def _of_fp8(checkpoint: Checkpoint, block: Mapping[str, Any]) -> Checkpoint:
    sides = _block_sides(block)
    made: dict[str, Made] = {}
    left_out = {name for name in checkpoint.tensors if name.endswith(_ACTIVATIONS)}
    problems: list[Problem] = []
    for name, codes in checkpoint.tensors.items():
        if codes.dtype != _FP8:
            continue
        scales = next((checkpoint.tensors[name + end] for end in _SCALES if name + end in checkpoint.tensors), None)
        reason = "it has no scales" if scales is None else _misfit(codes.shape, scales, sides)
        if scales is None or reason is not None:
            problems.append(Problem(f"{shown(name)} is FP8, and {reason}", str(codes.file), f"fetch the checkpoint again, or {_ORIGINAL}"))
            continue
        left_out |= {name, scales.name}
        parts = {"codes": replace(codes, name="codes"), "scales": replace(scales, name="scales")}
        made[name] = Made(_sixteen(name, "BF16", codes.shape, codes), parts, lambda t: fp8_weight(t["codes"], t["scales"], sides))
    if problems:
        raise BadInput.from_problems("E340", problems)
    kind = f"blocks of {sides[0]} x {sides[1]}" if sides else "a scale for each row or matrix"
    return _dense(
        checkpoint, made, left_out, f"{number_of(len(made), 'weight is', 'weights are')} FP8 ({kind}), read as bfloat16 and rounded once"
    )


def _block_sides(block: Mapping[str, Any]) -> tuple[int, int] | None:
    given = block.get("weight_block_size")
    for group in (block.get("config_groups") or {}).values():
        given = given or group["weights"].get("block_structure")
    if given is None:
        return None
    if not isinstance(given, list) or len(given) != 2 or not all(type(side) is int and side > 0 for side in given):
        what = f"the sides of a block are {brief(given)}, not two positive numbers"
        raise BadInput("E340", what, where="config.json: quantization_config", fix="restore config.json from the original")
    return given[0], given[1]


def _misfit(shape: tuple[int, ...], scales: TensorInfo, sides: tuple[int, int] | None) -> str | None:
    """Why these scales do not belong to FP8 codes of that shape."""
    if len(shape) < 2:
        return f"of shape {list(shape)}, where only matrices are read"
    *before, n, k = shape
    fitting: list[tuple[int, ...]] = [(), (1,), (n,), (n, 1)]
    if before:  # all experts in one tensor
        fitting = [tuple(before), (*before, 1, 1), (*before, n, 1)]
    if sides:
        fitting.append((*before, -(-n // sides[0]), -(-k // sides[1])))
    if scales.dtype not in ("F32", "BF16", "F16"):
        return f"its scales are {scales.dtype}, which is not read"
    return None if scales.shape in fitting else f"scales of shape {list(scales.shape)} do not fit {list(shape)}"


def fp8_weight(codes: Tensor, scales: Tensor, sides: tuple[int, int] | None) -> Tensor:
    """[..., N, K] float32. scales: one, one for each row, or one for each block of `sides`."""
    n, k = codes.shape[-2:]
    scales = scales.float()
    if scales.dim() == 1 and scales.numel() == n and codes.dim() == 2:
        scales = scales[:, None]
    elif scales.dim() < codes.dim():
        scales = scales.reshape(*scales.shape[: codes.dim() - 2], 1, 1) if scales.dim() else scales
    elif sides is not None and scales.shape[-2:] != (n, 1) and scales.numel() > 1:
        scales = scales.repeat_interleave(sides[0], -2)[..., :n, :].repeat_interleave(sides[1], -1)[..., :k]
    return codes.float() * scales


# ---- AWQ -----------------------------------------------------------------------------------------------------------------------------


def _of_awq(checkpoint: Checkpoint, block: Mapping[str, Any]) -> Checkpoint:
    bits, version = block.get("bits", block.get("w_bit")), str(block.get("version", "gemm")).lower()
    if bits != 4 or version != "gemm":
        what = f"AWQ with {brief(bits)} bits in the layout {brief(version)} is not read, only 4 bits in `gemm`"
        raise BadInput("E340", what, where="config.json: quantization_config", fix=_ORIGINAL)
    tensors = checkpoint.tensors
    layers = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    made: dict[str, Made] = {}
    problems: list[Problem] = []
    for layer in layers:
        names = {part: f"{layer}.{part}" for part in _AWQ_PARTS}
        parts = {part: replace(tensors[name], name=part) for part, name in names.items() if name in tensors}
        reason = _awq_misfit(parts)
        if reason is not None:
            problems.append(Problem(f"{shown(layer)}: {reason}", str(parts["qweight"].file), f"fetch the checkpoint again, or {_ORIGINAL}"))
            continue
        codes, scales = parts["qweight"], parts["scales"]
        info = _sixteen(f"{layer}.weight", scales.dtype, (codes.shape[1] * 8, codes.shape[0]), codes)
        made[info.name] = Made(info, parts, lambda t: awq_weight(t["qweight"], t["qzeros"], t["scales"]))
    if problems:
        raise BadInput.from_problems("E340", problems)
    left_out = {f"{layer}.{part}" for layer in layers for part in _AWQ_PARTS}
    again = f"quantizing them again loses accuracy, so {_ORIGINAL} where you can"
    return _dense(checkpoint, made, left_out, f"{number_of(len(made), 'linear is', 'linears are')} 4-bit AWQ, dequantized; {again}")


def _awq_misfit(parts: Mapping[str, TensorInfo]) -> str | None:
    absent = [part for part in _AWQ_PARTS if part not in parts]
    if absent:
        return f"{absent[0]} is missing"
    codes, zeros, scales = (parts[part] for part in _AWQ_PARTS)
    if (codes.dtype, zeros.dtype) != ("I32", "I32") or scales.dtype not in ("F16", "BF16"):
        return f"its tensors are {codes.dtype}, {zeros.dtype} and {scales.dtype}, not I32, I32 and F16"
    k, n = codes.shape[0], codes.shape[-1] * 8
    groups = scales.shape[0] if scales.shape else 0
    if not groups or k % groups or scales.shape != (groups, n) or zeros.shape != (groups, n // 8):
        return f"scales {list(scales.shape)} and zeros {list(zeros.shape)} do not fit codes {list(codes.shape)}"
    return None


def awq_weight(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    """[N, K] float32 from codes [K, N/8], zeros [G, N/8] and scales [G, N]."""
    rows = qweight.shape[0] // scales.shape[0]
    zeros = _columns(qzeros).repeat_interleave(rows, 0)
    return ((_columns(qweight) - zeros).float() * scales.float().repeat_interleave(rows, 0)).T.contiguous()


def _columns(words: Tensor) -> Tensor:
    """int32 [R, C] -> int32 [R, 8 C], in order."""
    import torch

    shifts = torch.tensor(_AWQ_ORDER, dtype=torch.int32, device=words.device) * 4
    return (words.unsqueeze(-1) >> shifts & 15).flatten(1)
