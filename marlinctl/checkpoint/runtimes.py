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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from marlinctl.checkpoint.formats import registry
from marlinctl.checkpoint.formats.targets import FUSED, split_fused

if TYPE_CHECKING:
    from marlinctl.checkpoint.reader import Checkpoint

# Format -> programs that read it. Whether they take a given model is what `loads` says.
TRANSFORMERS = "transformers (with compressed-tensors)"
_TRANSFORMERS_GPTQ = "transformers (with optimum and gptqmodel)"
LOADERS: Mapping[str, tuple[str, ...]] = {
    "dense": ("transformers", "vLLM", "SGLang", "marlinctl"),
    "ct": ("vLLM", "SGLang", TRANSFORMERS, "marlinctl"),
    "gptq": ("GPTQModel", "vLLM", "SGLang", _TRANSFORMERS_GPTQ, "marlinctl"),
    "gptq_v2": ("GPTQModel", "vLLM", _TRANSFORMERS_GPTQ, "marlinctl"),
    "marlin": ("marlinctl",),
    "marlin_24": ("marlinctl",),
}

_ROW_PARALLEL = ("o_proj", "down_proj", "w2", "dense", "fc2", "out_proj")
_REPLICATED_HEADS = ("k_proj", "v_proj")
_COMMON_GROUPS = (-1, 32, 64, 128)
_EXPERTS = ".experts."
_MIXTRAL = ("w1", "w2", "w3")


@dataclass(frozen=True, slots=True)
class Packed:
    """A folder as clients see it: of headers, or of a plan for one that is not written yet."""

    fmt: str
    shapes: Mapping[str, tuple[int, int]]  # quantized linear -> (N, K)
    sizes: Mapping[str, int]  # quantized linear -> group size, -1 for whole rows
    ignore: Sequence[str]  # linears that stay 16-bit
    config: Mapping[str, Any]
    variant: str = ""  # gptq: "v1" or "v2"

    @classmethod
    def of(cls, checkpoint: Checkpoint, info: registry.FormatInfo) -> Packed:
        """From the headers of a checkpoint. BadInput E345, E346 where a linear has no shape."""
        owned = {f"{layer}.{suffix}" for layer in info.layers for suffix in registry.SUFFIXES[info.name]}
        others = {name: tensor.shape for name, tensor in checkpoint.tensors.items() if name not in owned}
        shapes = {layer: registry.layer_shape(checkpoint, info, layer) for layer in info.layers}
        ignore = registry.sixteen_bit_linears(others, info.layers)
        return cls(info.name, shapes, info.layers, ignore, checkpoint.config, info.variant)

    @property
    def experts(self) -> list[str]:
        return [name for name in self.sizes if _EXPERTS in name]

    @property
    def sixteen_bit_experts(self) -> list[str]:
        return [name for name in self.ignore if _EXPERTS in name]


@dataclass(frozen=True, slots=True)
class Unit:
    """What one device computes with: a linear, or several fused along N, after the split."""

    name: str
    n: int
    k: int
    group_size: int  # -1: whole rows


@dataclass(frozen=True, slots=True)
class Runtime:
    name: str
    reads: tuple[str, ...]  # formats on disk
    groups: tuple[int, ...] | None  # None: any
    n_multiple: int
    k_multiple: int
    serves: bool  # a server: fuses and splits
    note: str = ""

    @property
    def program(self) -> str:
        return self.name.partition(" ")[0]


RUNTIMES = (
    Runtime("vLLM 0.24+ Marlin", ("ct", "gptq"), _COMMON_GROUPS, 1, 1, True, "pads odd shapes with zeros"),
    Runtime("vLLM Machete (Hopper)", ("ct", "gptq"), (-1, 64, 128), 128, 64, True, "vLLM takes Marlin where Machete does not fit"),
    Runtime("SGLang 0.5 Marlin", ("ct", "gptq"), _COMMON_GROUPS, 64, 128, True, "pads nothing"),
    Runtime("GPTQModel 7 Marlin", ("gptq",), _COMMON_GROUPS, 8, 8, False),
    Runtime("IST-DASLab kernels", (), (-1, 128), 256, 128, False, "the kernel's shapes; it reads no checkpoint format of today"),
    Runtime("vLLM 0.3-0.10 marlin", (), (-1, 128), 64, 128, True, "the kernel's shapes; its checkpoint format is gone from vLLM"),
    Runtime("marlinctl", ("ct", "gptq", "marlin", "marlin_24", "dense"), None, 1, 1, False, "pads N and K to multiples of 64"),
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

    def warnings(self, fmt: str) -> list[str]:
        """For the person who is about to write such a folder."""
        lines = [f"the {fmt} folder will not load in {line}" for line in self.refusals()]
        return lines + [f"whether the {fmt} folder loads in {program} was not tested: {what}" for program, what in self.untested.items()]


def _first(reasons: Sequence[str]) -> str:
    return reasons[0] + (f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else "")


def loads(packed: Packed) -> Loads:
    """Who loads the folder on one device: a server where one of its kernels takes every linear, everybody else by rules of their own."""
    verdicts = {v.runtime: v for v in survey(packed, (1,))}
    refused: dict[str, tuple[str, ...]] = {}
    programs = LOADERS["gptq_v2" if packed.variant == "v2" else packed.fmt]
    for program in programs:
        kernels = [r for r in RUNTIMES if r.serves and r.program == program and packed.fmt in r.reads]
        reasons = tuple(_transformers(packed)) if program == TRANSFORMERS else ()
        if kernels and not any(verdicts[kernel.name].accepted for kernel in kernels):
            reasons = verdicts[kernels[0].name].refused
        if reasons:
            refused[program] = reasons
    untested = {program: what for program, what in _untested(packed).items() if program in programs and program not in refused}
    return Loads(tuple(p for p in programs if p not in refused and p not in untested), refused, untested)


def survey(packed: Packed, splits: Sequence[int]) -> list[Verdict]:
    """Every runtime at every split."""
    whole: tuple[list[Unit], list[str]] = (_single(packed.shapes, packed.sizes), [])
    cut = {split: split_units(packed.shapes, packed.sizes, packed.config, split) for split in splits}
    uneven = _uneven(packed)
    verdicts = []
    for runtime in RUNTIMES:
        alike = [*uneven, *_experts(packed, runtime.program)] if runtime.serves else []
        for split in splits if runtime.serves else (1,):
            units, broken = cut[split] if runtime.serves else whole
            verdicts.append(Verdict(runtime.name, split, (*alike, *broken, *_refusals(runtime, units))))
    return verdicts


def _uneven(packed: Packed) -> list[str]:
    """Linears that servers load as one although they are not quantized alike."""
    everything: dict[str, int | None] = {**dict.fromkeys(packed.ignore), **packed.sizes}
    lines = []
    for fused, shards in split_fused(everything):
        parts = "experts" if fused.endswith("experts") else ", ".join(FUSED[fused.rpartition(".")[2]])
        sizes = ", ".join(_size(size) for size in sorted({0 if size is None else size for size in shards.values()}))
        lines.append(f"{fused}: {parts} are not quantized alike ({sizes}), and servers load them as one linear")
    return lines


def _size(size: int) -> str:
    return "16-bit" if size == 0 else "whole rows" if size == -1 else f"group {size}"


def _experts(packed: Packed, program: str) -> list[str]:
    """What a server's own look-up of the scheme of fused experts does not find."""
    if packed.fmt != "ct" or not packed.experts:
        return []
    first, sizes = packed.experts[0], sorted(set(packed.sizes.values()))
    if program == "SGLang" and len(sizes) > 1:
        text = ", ".join(_size(size) for size in sizes)
        return [f"{first}: SGLang finds the scheme of experts only where a model has one for all linears, and this has {text}"]
    if program == "vLLM" and first.rpartition(".")[2] in _MIXTRAL and (len(sizes) > 1 or packed.sixteen_bit_experts):
        return [f"{first}: vLLM finds the scheme of experts of this name only where a model has one for all linears, experts included"]
    return []


def _transformers(packed: Packed) -> list[str]:
    """transformers fuses the experts of a block. It takes one scheme for all experts of a model, that of the first config group which names
    some; a single scale per row fits whatever scheme has groups, but not the reverse."""
    used = {packed.sizes[name] for name in packed.experts}
    grouped = {packed.sizes[name] for name in packed.experts if packed.sizes[name] not in (-1, packed.shapes[name][1])}
    scheme = next((size for size in registry.sizes_by_count(packed.sizes) if size in used), None)
    if grouped - {scheme}:
        text = ", ".join(_size(size) for size in sorted(used))
        return [f"{packed.experts[0]}: experts have {text}, and transformers takes one for all experts of a model"]
    if packed.sixteen_bit_experts and packed.sizes:
        return [f"{packed.sixteen_bit_experts[0]}: it stays 16-bit, and transformers looks for packed experts alone"]
    return []


def _untested(packed: Packed) -> dict[str, str]:
    if packed.fmt == "ct" and "lm_head" in packed.sizes:
        return dict.fromkeys(("vLLM", "SGLang"), "a quantized lm_head")
    if packed.fmt == "gptq" and packed.experts:
        return {_TRANSFORMERS_GPTQ: "experts"}
    return {}


def split_units(
    shapes: Mapping[str, tuple[int, int]], sizes: Mapping[str, int], config: Mapping[str, Any], split: int
) -> tuple[list[Unit], list[str]]:
    """The linears of one device, fused; and what cannot be split."""
    parts: dict[str, list[Unit]] = {}
    broken = []
    for name, (n, k) in shapes.items():
        last = name.rpartition(".")[2]
        size = sizes[name]
        if last in _ROW_PARALLEL:
            if k % split or (size != -1 and (k // split) % size):
                reason = f"cut in {split} goes through a group of {size}" if size != -1 else f"is no multiple of {split}"
                broken.append(f"{name}: K={k} {reason}")
                continue
            parts.setdefault(name, []).append(Unit(name, n, k // split, size))
        else:
            share = _column_share(last, n, config, split)
            if share is None:
                broken.append(f"{name}: N={n} cannot be cut in {split}")
                continue
            parts.setdefault(_fused_name(name, last), []).append(Unit(name, share, k, size))
    return [Unit(fused, sum(u.n for u in units), units[0].k, units[0].group_size) for fused, units in parts.items()], broken


def _column_share(last: str, n: int, config: Mapping[str, Any], split: int) -> int | None:
    """Rows of one device. Attention is cut by heads; fewer key/value heads than devices are replicated."""
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


def _single(shapes: Mapping[str, tuple[int, int]], sizes: Mapping[str, int]) -> list[Unit]:
    return [Unit(name, n, k, sizes[name]) for name, (n, k) in shapes.items()]


def _refusals(runtime: Runtime, units: Sequence[Unit]) -> list[str]:
    rules: tuple[tuple[Callable[[Unit], bool], Callable[[Unit], str]], ...] = (
        (lambda u: runtime.groups is not None and u.group_size not in runtime.groups, lambda u: f"group size {u.group_size}"),
        (lambda u: u.n % runtime.n_multiple != 0, lambda u: f"N={u.n} is no multiple of {runtime.n_multiple}"),
        (lambda u: u.k % runtime.k_multiple != 0, lambda u: f"K={u.k} is no multiple of {runtime.k_multiple}"),
    )
    return [f"{unit.name}: {say(unit)}" for fails, say in rules for unit in units if fails(unit)]


def servers_that_accept(verdicts: Iterable[Verdict], fmt: str, split: int) -> list[str]:
    """Servers that read the format and accept every linear at this split (Machete is a kernel inside vLLM, not a server of its own)."""
    able = {r.name for r in RUNTIMES if r.serves and fmt in r.reads and "Machete" not in r.name}
    return [v.runtime for v in verdicts if v.runtime in able and v.tensor_parallel == split and v.accepted]
