"""`gptq`: GPTQ v1, for GPTQModel and its relatives, vLLM and SGLang. v2 is read.

    P.qweight  [K/8, N]   int32    of 8-bit codes [K/4, N]
    P.qzeros   [G, N/8]   int32    every nibble 7 (v1 stores zero - 1), of 8-bit codes [G, N/4] and every byte 127; GPTQModel loads garbage
                                   without it
    P.scales   [G, N]     fp16
    P.g_idx    [K]        int32    k // g; optimum reads uninitialised memory without it

v1 tensors under a v2 label, or the reverse, are off by one step everywhere. Asymmetric codes are written as v2,
which stores the zero itself. docs/formats/gptq.md has the bits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from marlinctl.checkpoint.formats import blocks
from marlinctl.checkpoint.formats.base import (
    BLOCK,
    CODES,
    FLOATS,
    GPTQMODEL,
    INDICES,
    MARLINCTL,
    SCALES,
    SGLANG,
    TRANSFORMERS_GPTQ,
    VLLM,
    Chosen,
    Format,
    FormatInfo,
    Kind,
    LinearParts,
    Packed,
    Shapes,
    check_scales,
    codes_of,
    group_size_of,
    is_head,
    object_at,
    refuse,
    strays,
    true_group_size,
)  # fmt: skip
from marlinctl.checkpoint.formats.targets import name_patterns, with_fused_names
from marlinctl.errors import Problem, UsageError
from marlinctl.quantize.scheme import INT4, INT8, UINT4, Grid
from marlinctl.system.files import brief
from marlinctl.system.patterns import Expressions

if TYPE_CHECKING:
    from torch import Tensor

V1, V2 = "v1", "v2"


def _detect(block: Mapping[str, Any], names: Sequence[str]) -> FormatInfo:
    label = block.get("checkpoint_format", block.get("format", "gptq"))
    problems = []
    if label not in ("gptq", "gptq_v2") or block.get("is_marlin_format"):
        what = f"GPTQ checkpoint_format {label!r} is not read"
        problems.append(Problem(what, "config.json: checkpoint_format", "gptq and gptq_v2 are read"))
    if not _is_read(bits := block.get("bits")):
        problems.append(Problem(f"{bits!r}-bit GPTQ is not read", "config.json: bits", "4 and 8 bits are read"))
    symmetric = block.get("sym", True)
    if type(symmetric) is not bool or (not symmetric and (label != "gptq_v2" or bits != UINT4.bits)):
        what = "asymmetric GPTQ is read in version 2 and with 4 bits: version 1 stores zero - 1, and where the zero is 0 that wraps around"
        problems.append(Problem(what, "config.json: sym", "quantize the original model symmetrically"))
    refuse("E340", problems)
    size, dynamic = group_size_of(block.get("group_size", -1)), object_at(block, "dynamic")
    refuse("E340", [*blocks.strange(block, blocks.GPTQ_BLOCK, BLOCK), *_strange_rules(dynamic)])
    present = set(names)
    rule_of = _DynamicRules(dynamic)
    layers: dict[str, int] = {}
    grids: dict[str, Grid] = {}
    for layer in FORMAT.layer_names(names):
        rule = rule_of(layer)
        if rule is None:
            what = f"{layer} is packed, and a rule of `dynamic` says that it is not quantized"
            problems.append(Problem(what, "config.json: dynamic", "config.json belongs to another model; restore it"))
            continue
        bits = rule.get("bits", block["bits"])
        if not _is_read(bits) or rule.get("sym", symmetric) is not symmetric or (not symmetric and bits != UINT4.bits):
            what = f"{layer}: {rule} is neither 4-bit nor 8-bit symmetric"
            fix = "4-bit and 8-bit symmetric linears are read, and 4-bit asymmetric ones where all are"
            problems.append(Problem(what, "config.json: dynamic", fix))
        elif (grid := Grid(bits, symmetric)) != INT4:
            grids[layer] = grid
        if rule.get("desc_act", block.get("desc_act")) and f"{layer}.g_idx" not in present:
            what = f"{layer}: desc_act is true, and without {layer}.g_idx the order of its columns is unknown"
            problems.append(Problem(what, "config.json: desc_act", "fetch the checkpoint again, or quantize the original model"))
        layers[layer] = group_size_of(rule.get("group_size", size))
    refuse("E340", problems or strays(FORMAT, layers, names))
    return FormatInfo(FORMAT, layers, V2 if label == "gptq_v2" else V1, grids)


def labelled_version_2(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """config.json of a checkpoint whose zero points are stored as version 2 has them. UsageError E288 for another format."""
    block = object_at(config, "quantization_config")
    if block.get("quant_method") not in FORMAT.methods:
        what = "--gptq-v2 says how a GPTQ checkpoint stores its zero points, and this is not one"
        raise UsageError("E288", what, where=where, fix="leave out --gptq-v2")
    return {**config, "quantization_config": {**block, "checkpoint_format": "gptq_v2"}}


def _is_read(bits: object) -> bool:
    return type(bits) is int and bits in (INT4.bits, INT8.bits)


class _DynamicRules:
    """GPTQModel's `dynamic`: the first rule whose expression matches a layer. One that begins with "-:" takes its linears out."""

    def __init__(self, dynamic: Mapping[str, Any]) -> None:
        self._rules: list[Mapping[str, Any] | None] = [None if pattern.startswith("-:") else rule for pattern, rule in dynamic.items()]
        self._expressions = Expressions(pattern.removeprefix("+:").removeprefix("-:") for pattern in dynamic)

    def __call__(self, layer: str) -> Mapping[str, Any] | None:
        """None for a rule that takes the layer out."""
        found = self._expressions.first(layer)
        return {} if found is None else self._rules[found]


def _strange_rules(dynamic: Mapping[str, Any]) -> list[Problem]:
    """What is not known in the rules of GPTQModel's `dynamic`. A rule that begins with "-:" takes its linears out, whatever it holds."""
    problems: list[Problem] = []
    for pattern, rule in dynamic.items():
        path = f"{BLOCK}.dynamic.{pattern}"
        if pattern.startswith("-:"):
            continue
        if isinstance(rule, Mapping):
            problems += blocks.strange(rule, blocks.GPTQ_RULE, path)
        else:
            what = f"the rule is {brief(rule)}, not an object"
            problems.append(Problem(what, f"config.json: {path}", "restore it from the original"))
    return problems


def _config_block(chosen: Chosen) -> dict[str, Any]:
    size, grid = chosen.majority
    block = {"quant_method": "gptq", "bits": grid.bits, "group_size": size, "desc_act": False, "sym": grid.symmetric}
    label = "gptq" if grid.symmetric else "gptq_v2"
    block |= {"checkpoint_format": label, "format": label, "pack_dtype": "int32", "lm_head": chosen.packs_head}
    dynamic = _dynamic_block(chosen)
    return block | ({"dynamic": dynamic} if dynamic else {})


def _rule(kind: Kind, usual: Kind) -> dict[str, int]:
    """What a rule of `dynamic` says of linears that differ from the usual ones."""
    return ({} if kind[0] == usual[0] else {"group_size": kind[0]}) | ({} if kind[1] == usual[1] else {"bits": kind[1].bits})


def _dynamic_block(chosen: Chosen) -> dict[str, Any]:
    """GPTQModel's per-module rules. Servers match them after fusing q/k/v and gate/up, hence the fused names."""

    def rules(sign: str, names: Sequence[str], rule: dict[str, Any]) -> dict[str, Any]:
        everything = chosen.everything
        patterns = name_patterns(with_fused_names(names, everything), with_fused_names(everything, everything), chosen.tower)
        return {f"{sign}:{p[3:] if p.startswith('re:') else '^' + re.escape(p) + '$'}": rule for p in patterns}

    block: dict[str, Any] = {}
    differing = {name: _rule(kind, chosen.majority) for name, kind in chosen.differing.items()}
    for rule in sorted({tuple(rule.items()) for rule in differing.values()}):
        block |= rules("+", [name for name, other in differing.items() if tuple(other.items()) == rule], dict(rule))
    return block | rules("-", [name for name in chosen.ignore if name != "lm_head"], {})


def _shapes(n: int, k: int, group_size: int, grid: Grid = INT4) -> Shapes:
    groups = 1 if group_size == -1 else -(-k // group_size)
    together = 32 // grid.bits
    return {
        "qweight": (("I32",), (k // together, n)),
        "qzeros": (("I32",), (groups, n // together)),
        "scales": (FLOATS, (groups, n)),
        "g_idx": (("I32", "I64"), (k,)),
    }


def _pack(layer: str, parts: LinearParts) -> dict[str, Tensor]:
    from marlinctl.pack.interchange import pack_gptq

    return pack_gptq(parts.quantized(layer))


def _unpack(tensors: Mapping[str, Tensor], group_size: int, variant: str, grid: Grid) -> LinearParts:
    import torch

    from marlinctl.pack.interchange import unpack_gptq

    qweight, qzeros, scales = (tensors[suffix] for suffix in ("qweight", "qzeros", "scales"))
    k, n = qweight.shape[0] * 32 // grid.bits, qweight.shape[-1]
    check_scales(scales.T, n)
    # The codes do not depend on the scales; foreign ones may be of a dtype that QuantizedLinear does not hold.
    ones = torch.ones_like(scales, dtype=torch.float16)
    q = unpack_gptq(qweight, qzeros, ones, tensors.get("g_idx"), v2=variant == V2, grid=grid)
    return LinearParts(q.codes, scales.T.contiguous(), true_group_size(group_size, k, int(scales.shape[0])), grid=grid, zeros=q.zeros)


def _second_reading(tensors: Mapping[str, Tensor], n: int, k: int, group_size: int, grid: Grid) -> Tensor:
    """Code by code, as clients do."""
    import torch

    codes = codes_of(tensors["qweight"].T, grid.bits)  # [N, K]
    zeros = codes_of(tensors["qzeros"], grid.bits) + grid.symmetric  # [G, N], v1 stores one less
    group = tensors["g_idx"].to(torch.int64)
    scales = tensors["scales"].to(torch.float32)  # [G, N]
    return (codes - zeros[group].T).to(torch.float32) * scales[group].T


def _misfit(n: int, k: int) -> str | None:
    return f"GPTQ needs N and K in multiples of 8, this linear is [{n}, {k}]" if n % 8 or k % 8 else None


def _limits(packed: Packed, program: str) -> list[str]:
    """optimum (2.3.0) makes packed linears in the blocks alone, and transformers would fill the head with random numbers."""
    asymmetric = next((name for name in packed.sizes if not packed.grid(name).symmetric), None)
    if asymmetric and program in (VLLM, SGLANG):
        return [f"{asymmetric}: {program} reads symmetric GPTQ alone; ct has its zero points for it"]
    if program == TRANSFORMERS_GPTQ and any(map(is_head, packed.sizes)):
        return ["lm_head: optimum looks for packed linears in the blocks alone"]
    return []


def _untested(packed: Packed) -> Mapping[str, str]:
    return {TRANSFORMERS_GPTQ: "experts"} if packed.experts else {}


FORMAT = Format(
    name="gptq",
    label="GPTQ",
    title="{} weights, GPTQ v1",
    tensors={"qweight": CODES, "qzeros": INDICES, "scales": SCALES, "g_idx": INDICES},
    shapes=_shapes,
    loaders=(GPTQMODEL, VLLM, SGLANG, TRANSFORMERS_GPTQ, MARLINCTL),
    kernels=(VLLM, SGLANG, GPTQMODEL, MARLINCTL),
    methods=("gptq", "gptq_marlin", "auto_gptq"),
    detect=_detect,
    config_block=_config_block,
    pack=_pack,
    unpack=_unpack,
    grids=(INT4, INT8, UINT4),
    one_symmetry=True,
    asymmetric_variant=V2,
    second_reading=_second_reading,
    tags=("gptq",),
    optional=("g_idx",),  # old files lack it, which means plain order
    shape_from="qweight",
    header_shape=lambda shape, grid: (shape[1], 32 // grid.bits * shape[0]),
    writes_variant=V1,
    variant_loaders={V2: (GPTQMODEL, VLLM, TRANSFORMERS_GPTQ, MARLINCTL)},
    block_file="quantize_config.json",
    required=(
        ("checkpoint_format", "gptq", "clients would be off by one step everywhere"),
        ("desc_act", False, "current servers refuse activation order at run time"),
        ("sym", True, "the zero points are those of symmetric codes"),
    ),
    misfit=_misfit,
    misread="activation order at run time and zero points other than 8 are not read; quantize the original model again, "
    "symmetric and with static order (desc_act false)",
    limits=_limits,
    untested=_untested,
)
