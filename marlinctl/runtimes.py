"""Which runtime accepts which shapes, at which tensor-parallel split: what `marlinctl pack --check` prints.

A server that splits a model over T devices cuts the linears of a branch's entry along N (q, k, v, gate, up: column-parallel) and the
linear that leaves the branch along K (o, down: row-parallel). A cut along K must not go through a group, so K/T has to be a multiple
of the group size. q/k/v, gate/up and the experts of a block are fused first, so the shards of one fused linear have to be quantized
alike, and it is the fused N that the shape rules see.

The rules are those of the releases named here (2026-11); docs/formats/ has the sources.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from marlinctl.checkpoint.formats import LOADERS
from marlinctl.checkpoint.targets import FUSED, split_fused

_ROW_PARALLEL = ("o_proj", "down_proj", "w2", "dense", "fc2", "out_proj")
_REPLICATED_HEADS = ("k_proj", "v_proj")
_COMMON_GROUPS = (-1, 32, 64, 128)


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


def survey(
    shapes: Mapping[str, tuple[int, int]], sizes: Mapping[str, int], config: Mapping[str, Any], splits: Sequence[int]
) -> list[Verdict]:
    """Every runtime at every split. `shapes`: layer -> (N, K); `sizes`: layer -> group size."""
    verdicts = []
    for runtime in RUNTIMES:
        for split in splits if runtime.serves else (1,):
            units, broken = split_units(shapes, sizes, config, split) if runtime.serves else (_single(shapes, sizes), [])
            verdicts.append(Verdict(runtime.name, split, tuple(broken + _refusals(runtime, units))))
    return verdicts


def uneven(sizes: Mapping[str, int], ignore: Sequence[str]) -> list[str]:
    """Warnings for linears that clients treat as one although they are not quantized alike: they refuse such a model."""
    everything: dict[str, int | None] = {**dict.fromkeys(ignore), **sizes}
    lines = []
    for fused, shards in split_fused(everything):
        named = sorted({size if size is not None else 0 for size in shards.values()})
        text = ", ".join("16-bit" if size == 0 else "whole rows" if size == -1 else f"group {size}" for size in named)
        lines.append(f"{fused}: its shards are not quantized alike ({text}); vLLM and SGLang load them as one linear and will refuse")
    experts = sorted({size for name, size in sizes.items() if ".experts." in name})
    if len(experts) > 1:
        lines.append(
            f"experts have group sizes {', '.join(map(str, experts))}; transformers knows one for all experts of a model and will refuse"
        )
    return lines


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


def servers_that_accept(verdicts: Sequence[Verdict], fmt: str, split: int) -> list[str]:
    """Servers that read the format and accept every shape at this split (Machete is a kernel inside vLLM, not a server of its own)."""
    able = {r.name for r in RUNTIMES if r.serves and fmt in r.reads and "Machete" not in r.name}
    return [v.runtime for v in verdicts if v.runtime in able and v.tensor_parallel == split and v.accepted]


def loaders(fmt: str, verdicts: Sequence[Verdict], *, uneven: bool) -> list[str]:
    """The programs that load a folder of this format (formats.LOADERS), less the servers that refuse these shapes on one device.

    uneven: fused linears are not quantized alike, which no server takes.
    """
    able = servers_that_accept(verdicts, fmt, 1)
    servers = {runtime.name.partition(" ")[0] for runtime in RUNTIMES if runtime.serves and fmt in runtime.reads}
    return [
        name for name in LOADERS[fmt] if name not in servers or (not uneven and any(runtime.partition(" ")[0] == name for runtime in able))
    ]
