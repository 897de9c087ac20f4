"""Who loads a folder, who refuses it, and why: the one source for plan, pack, card, report, inspect and verify.

A server that splits a model over T devices cuts the linears of a branch's entry along N (q, k, v, gate, up: column-parallel) and the
linear that leaves the branch along K (o, down: row-parallel). A cut along K must not go through a group, so K/T has to be a multiple
of the group size. q/k/v, gate/up and the experts of a block are fused first, so the shards of one fused linear have to be quantized
alike, and it is the fused N that the shape rules see.

    Packed    a folder, written or planned: format, shapes, group sizes, what stays 16-bit
    survey    kernels and servers at each tensor-parallel split: what `marlinctl pack --check` prints
    loads     programs on one device: what every page says

The rules are those of the releases named here (2026-11); docs/formats/ has the sources.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from marlinctl.checkpoint.formats import registry
from marlinctl.checkpoint.formats.base import (
    SGLANG,
    TRANSFORMERS,
    TRANSFORMERS_CT,
    VLLM,
    VLLM_MARLINCTL,
    Format,
    FormatInfo,
    Kind,
    Packed,
    kind_text,
)
from marlinctl.checkpoint.formats.targets import FUSED, split_fused
from marlinctl.models.config import language_model_type, sizes_of, wraps
from marlinctl.quantize.scheme import FP8, INT4, INT8, INT8_ACTIVATIONS, UINT4, Grid

if TYPE_CHECKING:
    from marlinctl.checkpoint.reader import Checkpoint

_ROW_PARALLEL = ("o_proj", "down_proj", "w2", "dense", "fc2", "out_proj")
_REPLICATED_HEADS = ("k_proj", "v_proj")
_COMMON_GROUPS = (-1, 32, 64, 128)
_GRIDS = (INT4, INT8, UINT4)  # that servers multiply; GPTQ of asymmetric codes they do not read
_ROUNDED = (INT8_ACTIVATIONS, FP8)  # for which servers have other kernels, chosen linear by linear; they take any shape
# Families whose checkpoints hold all experts of a block in one tensor: transformers does not put theirs together (models/stored_names.py).
WHOLE_EXPERTS = frozenset(
    (
        *("aria_text", "gpt_oss", "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "llama4_text"),
        *("minimax_m3_vl_text", "qwen3_vl_moe_text"),
    )
)
# Families whose code in transformers reads the weight of a linear, mostly for its dtype: a packed linear has none.
READ_WEIGHTS = frozenset(
    ("falcon", "falcon_mamba", "gpt_bigcode", "mamba", "mamba2", "modernbert-decoder", "nanochat", "recurrent_gemma", "xlstm")
)
# Models of which transformers splits or joins 16-bit weights when it loads them: it takes those for packed ones too, where others are.
CONVERTED_WEIGHTS = frozenset(("bailing_hybrid", "kimi_linear", "olmo_hybrid", "qianfan_ocr"))


def packed_of(checkpoint: Checkpoint, info: FormatInfo) -> Packed:
    """From the headers of a checkpoint. BadInput E302, E346 where a linear has no shape."""
    owned = info.owned  # not once for each of 56,000 tensors: a mixture of experts took minutes
    others = {name: tensor.shape for name, tensor in checkpoint.tensors.items() if name not in owned}
    shapes = {layer: registry.layer_shape(checkpoint, info, layer) for layer in info.layers}
    ignore = registry.sixteen_bit_linears(others, info.layers)
    return Packed(info.format, shapes, info.layers, ignore, checkpoint.config, info.variant, info.grids)


@dataclass(frozen=True, slots=True)
class Unit:
    """What one device computes with: a linear, or several fused along N, after the split."""

    name: str
    n: int
    k: int
    group_size: int  # -1: whole rows
    grid: Grid = INT4


@dataclass(frozen=True, slots=True)
class Runtime:
    name: str
    groups: tuple[int, ...] | None  # None: any
    n_multiple: int
    k_multiple: int
    serves: bool  # a server: fuses and splits
    note: str = ""
    reads_folders: bool = True  # False: a kernel whose checkpoint format is gone
    loader: str = ""  # the program, where it is not the first word of the name
    grids: tuple[Grid, ...] = (INT4,)  # of codes
    cut_multiple: int = 1  # of N and K of each linear on a device, fused or not, where there are several devices

    @property
    def program(self) -> str:
        return self.loader or self.name.partition(" ")[0]

    def reads(self, fmt: Format) -> bool:
        """Whether it multiplies with this format as it lies on the disk."""
        return self.reads_folders and self.program in fmt.kernels

    @property
    def formats(self) -> list[str]:
        return [fmt.name for fmt in registry.FORMATS.values() if self.reads(fmt)]


RUNTIMES = (
    Runtime("vLLM 0.24+ Marlin", _COMMON_GROUPS, 1, 1, True, "pads odd shapes with zeros", grids=(*_GRIDS, *_ROUNDED)),
    Runtime("vLLM Machete (Hopper)", (-1, 64, 128), 128, 64, True, "vLLM takes Marlin where Machete does not fit", grids=_GRIDS),
    Runtime("SGLang 0.5 Marlin", _COMMON_GROUPS, 64, 128, True, "pads nothing", grids=(*_GRIDS, *_ROUNDED)),
    Runtime("GPTQModel 7 Marlin", _COMMON_GROUPS, 8, 8, False, grids=(INT4, INT8)),
    Runtime("IST-DASLab kernels", (-1, 128), 256, 128, False, "the kernel's shapes; it reads no checkpoint format of today", False),
    Runtime("vLLM 0.3-0.10 marlin", (-1, 128), 64, 128, True, "the kernel's shapes; its checkpoint format is gone from vLLM", False),
    Runtime(
        "vLLM 0.26 with marlinctl", _COMMON_GROUPS, 1, 1, True, "tiles of 64; pads on one device", loader=VLLM_MARLINCTL, cut_multiple=64
    ),
    Runtime("marlinctl", None, 1, 1, False, "pads N and K to multiples of 64"),
)


@dataclass(frozen=True, slots=True)
class Verdict:
    runtime: str
    tensor_parallel: int
    refused: tuple[str, ...]  # reasons with layers; empty: accepted

    @property
    def accepted(self) -> bool:
        return not self.refused


@dataclass(frozen=True, slots=True)
class Loads:
    """Programs on one device. A reason begins with the linear, or the first of the linears, that it is about."""

    accepted: tuple[str, ...]
    refused: Mapping[str, tuple[str, ...]]
    untested: Mapping[str, str]
    wraps: bool = False  # a language model with parts for images or sound

    def refusals(self) -> list[str]:
        """One line for all programs that have the same reasons: `vLLM, SGLang: REASON (and 3 more)`."""
        programs: dict[tuple[str, ...], list[str]] = {}
        for program, reasons in self.refused.items():
            programs.setdefault(reasons, []).append(program)
        return [f"{', '.join(names)}: {_first(reasons)}" for reasons, names in programs.items()]

    def rows(self) -> list[tuple[str, str]]:
        """For a page or a table: who loads it, and for each other program why not."""
        rows = [("Loads in", ", ".join(self.accepted))]
        rows += [("Refused by" if i == 0 else "", line) for i, line in enumerate(self.refusals())]
        return rows + [("Not tested", f"{program}, with {what}") for program, what in self.untested.items()]

    def warnings(self, fmt: Format) -> list[str]:
        """For the person who is about to write such a folder."""
        lines = [f"the {fmt.name} folder will not load in {line}" for line in self.refusals()]
        untested = self.untested.items()
        return lines + [f"whether the {fmt.name} folder loads in {program} was not tested: {what}" for program, what in untested]


def _first(reasons: Sequence[str]) -> str:
    return reasons[0] + (f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else "")


def loads(packed: Packed) -> Loads:
    """Who loads the folder on one device: a server where one of its kernels takes every linear, all others by rules of their own."""
    verdicts = {v.runtime: v for v in survey(packed, (1,))}
    refused: dict[str, tuple[str, ...]] = {}
    programs = packed.format.variant_loaders.get(packed.variant, packed.format.loaders)
    for program in programs:
        kernels = [r for r in RUNTIMES if r.serves and r.program == program and r.reads(packed.format)]
        reasons = () if kernels else (*_no_place(packed, program), *packed.format.limits(packed, program))
        if kernels and not any(verdicts[kernel.name].accepted for kernel in kernels):
            reasons = verdicts[kernels[0].name].refused
        if reasons:
            refused[program] = reasons
    unknown = {**_unknown(packed), **packed.format.untested(packed)}
    untested = {program: what for program, what in unknown.items() if program in programs and program not in refused}
    accepted = tuple(p for p in programs if p not in refused and p not in untested)
    return Loads(accepted, refused, untested, wraps(packed.config))


def _no_place(packed: Packed, program: str) -> list[str]:
    """Experts one by one, of a family whose checkpoints hold all of a block in one tensor: transformers does not put them together. Packed
    linears of a family whose code reads their weights. And models of which it splits or joins weights."""
    experts = [*packed.experts, *packed.sixteen_bit_experts]
    kind = language_model_type(packed.config)
    if not program.startswith(TRANSFORMERS):
        return []
    whole = packed.config.get("model_type")
    if program == TRANSFORMERS_CT and whole in CONVERTED_WEIGHTS and packed.sizes:
        return [f"{next(iter(packed.sizes))}: transformers splits or joins 16-bit weights of {whole}, and cannot where others are packed"]
    if kind in READ_WEIGHTS and packed.sizes:
        return [f"{next(iter(packed.sizes))}: the code of {kind} in transformers reads the weights of linears"]
    if kind not in WHOLE_EXPERTS or not experts:
        return []
    return [f"{experts[0]}: transformers loads the experts of a block of {kind} from one tensor alone"]


def _unknown(packed: Packed) -> Mapping[str, str]:
    kind = language_model_type(packed.config)
    return dict.fromkeys((VLLM, SGLANG), f"experts of {kind} one by one") if packed.experts and kind in WHOLE_EXPERTS else {}


def survey(packed: Packed, splits: Sequence[int]) -> list[Verdict]:
    """Every runtime at every split."""
    kinds = packed.kinds
    whole: tuple[list[Unit], list[str]] = (_single(packed.shapes, kinds), [])
    cut = {split: split_units(packed.shapes, kinds, packed.config, split) for split in splits}
    parts = {split: _split_parts(packed.shapes, kinds, packed.config, split)[0] for split in splits}
    uneven = _uneven(packed)
    verdicts = []
    for runtime in RUNTIMES:
        alike = [*uneven, *packed.format.limits(packed, runtime.program)] if runtime.serves else []
        for split in splits if runtime.serves else (1,):
            units, broken = cut[split] if runtime.serves else whole
            torn = _torn(runtime, parts[split]) if runtime.serves and split > 1 else []
            verdicts.append(Verdict(runtime.name, split, (*alike, *broken, *torn, *_refusals(runtime, units))))
    return verdicts


def _uneven(packed: Packed) -> list[str]:
    """Linears that servers load as one although they are not quantized alike."""
    everything: dict[str, Kind | None] = {**dict.fromkeys(packed.ignore), **packed.kinds}
    lines = []
    for fused, shards in split_fused(everything):
        parts = "experts" if fused.endswith("experts") else ", ".join(FUSED[fused.rpartition(".")[2]])
        kinds = ", ".join(kind_text(kind) for kind in sorted({kind or (0, INT4) for kind in shards.values()}))
        lines.append(f"{fused}: {parts} are not quantized alike ({kinds}), and servers load them as one linear")
    return lines


def split_units(
    shapes: Mapping[str, tuple[int, int]], kinds: Mapping[str, Kind], config: Mapping[str, Any], split: int
) -> tuple[list[Unit], list[str]]:
    """The linears of one device, fused; and what cannot be split."""
    parts, broken = _split_parts(shapes, kinds, config, split)
    return [replace(units[0], name=fused, n=sum(unit.n for unit in units)) for fused, units in parts.items()], broken


def _split_parts(
    shapes: Mapping[str, tuple[int, int]], kinds: Mapping[str, Kind], config: Mapping[str, Any], split: int
) -> tuple[dict[str, list[Unit]], list[str]]:
    """The same by the names of what they are fused into."""
    parts: dict[str, list[Unit]] = {}
    broken = []
    for name, (n, k) in shapes.items():
        last = name.rpartition(".")[2]
        size, grid = kinds[name]
        if last in _ROW_PARALLEL:
            if k % split or (size != -1 and (k // split) % size):
                reason = f"cut in {split} goes through a group of {size}" if size != -1 else f"is not a multiple of {split}"
                broken.append(f"{name}: K={k} {reason}")
                continue
            parts.setdefault(name, []).append(Unit(name, n, k // split, size, grid))
        else:
            share = _column_share(last, n, config, split)
            if share is None:
                broken.append(f"{name}: N={n} cannot be cut in {split}")
                continue
            parts.setdefault(_fused_name(name, last), []).append(Unit(name, share, k, size, grid))
    return parts, broken


def _torn(runtime: Runtime, parts: Mapping[str, Sequence[Unit]]) -> list[str]:
    """Linears that a cut goes through where the runtime cannot cut."""
    multiple = runtime.cut_multiple
    units = [unit for fused in parts.values() for unit in fused if unit.n % multiple or unit.k % multiple]
    return [f"{unit.name}: [{unit.n}, {unit.k}] on each device is not a multiple of {multiple}" for unit in units]


def _column_share(last: str, n: int, config: Mapping[str, Any], split: int) -> int | None:
    """Rows of one device. Attention is cut by heads; fewer key/value heads than devices are replicated."""
    config = sizes_of(config)
    heads = config.get("num_attention_heads")
    kv_heads = config.get("num_key_value_heads", heads)
    if last in _REPLICATED_HEADS and isinstance(kv_heads, int) and kv_heads > 0:
        if split % kv_heads == 0:
            return n // kv_heads
        return n // split if kv_heads % split == 0 else None
    if last == "q_proj" and isinstance(heads, int) and heads % split:
        return None
    return None if n % split else n // split


def _fused_name(name: str, last: str) -> str:
    for fused, shards in FUSED.items():
        if last in shards:
            return f"{name.rpartition('.')[0]}.{fused}"
    return name


def _single(shapes: Mapping[str, tuple[int, int]], kinds: Mapping[str, Kind]) -> list[Unit]:
    return [Unit(name, n, k, *kinds[name]) for name, (n, k) in shapes.items()]


def _refusals(runtime: Runtime, units: Sequence[Unit]) -> list[str]:
    rules: tuple[tuple[Callable[[Unit], bool], Callable[[Unit], str]], ...] = (
        (lambda u: runtime.groups is not None and u.group_size not in runtime.groups, lambda u: f"group size {u.group_size}"),
        (lambda u: u.grid not in runtime.grids, lambda u: f"{u.grid} codes"),
        (lambda u: u.n % runtime.n_multiple != 0, lambda u: f"N={u.n} is not a multiple of {runtime.n_multiple}"),
        (lambda u: u.k % runtime.k_multiple != 0, lambda u: f"K={u.k} is not a multiple of {runtime.k_multiple}"),
    )
    return [f"{unit.name}: {say(unit)}" for fails, say in rules for unit in units if fails(unit)]


def servers_that_accept(verdicts: Iterable[Verdict], fmt: Format, split: int) -> list[str]:
    """Servers that read the format and accept every linear at this split (Machete is a kernel inside vLLM, not a server of its own)."""
    able = {r.name for r in RUNTIMES if r.serves and r.reads(fmt) and "Machete" not in r.name}
    return [v.runtime for v in verdicts if v.runtime in able and v.tensor_parallel == split and v.accepted]
