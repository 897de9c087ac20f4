"""What is measured: linears of some shapes, times some numbers of tokens.

A shape is written N x K, outputs first, as everywhere in marlinctl. A set is the linears of one decoder block, with those that share an
input fused as servers fuse them (q, k and v; gate and up); its time is the sum over them. Where a shape occurs twice it is
measured once.

    llama2-7b .. falcon-180b   the five sets of MARLIN's run.py, whose sizes are rounded to multiples of 256: 10752 for Llama-2-7B's 11008
    llama3-8b, llama3-70b      true sizes
    llama3-8b-unfused          the same as transformers calls them, one by one
    ideal                      the two orientations of 73728 x 18432, which is MARLIN's peak shape for 72 multiprocessors
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from marlinctl.errors import UsageError

if TYPE_CHECKING:
    from marlinctl.quantize.scheme import Rounding
    from marlinctl.system.console import Console

Kind = Literal["dense", "sparse"]
KINDS: tuple[Kind, ...] = ("dense", "sparse")
OPERATORS: dict[Kind, str] = {"dense": "int4", "sparse": "int4 2:4"}  # what they are called in tables
DEFAULT_TOKENS = (1, 8, 16, 32, 64, 128)
GROUPS = (32, 64, 128, -1)
ROOFLINE_SIZES = (4096, 8192, 16384, 32768)
ROOFLINE_TOKENS = tuple(2**i for i in range(17))  # 1 .. 65536
SIDE_BY_SIDE = ("shapes", "ideal", "roofline")  # sets whose linears do not make up one block
MULTIPLE = 64  # of N and K, in tiles


@dataclass(frozen=True, slots=True)
class Shape:
    n: int
    k: int
    group_size: int  # -1: channel-wise

    def __str__(self) -> str:
        return f"{self.n} x {self.k}"


@dataclass(frozen=True, slots=True)
class Layer:
    name: str
    shape: Shape
    count: int = 1  # how often the set has it


@dataclass(frozen=True, slots=True)
class LayerSet:
    name: str
    layers: tuple[Layer, ...]

    @property
    def shapes(self) -> tuple[Shape, ...]:
        return tuple(layer.shape for layer in self.layers)


@dataclass(frozen=True, slots=True)
class OfFolder:
    """What a packed checkpoint says."""

    linears: LayerSet
    kind: Kind | None  # that its format fixes: marlin_24 is 2:4, marlin is dense
    rounding: Rounding = "none"  # of activations, where config.json allows it
    rounded: frozenset[Shape] = frozenset()  # of which at least one linear is allowed to


_BLOCK = ("qkv", "o", "gate_up", "down")
_APART = ("q", "k", "v", "o", "gate", "up", "down")
SETS: dict[str, tuple[tuple[str, int, int], ...]] = {  # name, N, K
    "llama3-8b": tuple(zip(_BLOCK, (6144, 4096, 28672, 4096), (4096, 4096, 4096, 14336), strict=True)),
    "llama3-8b-unfused": tuple(zip(_APART, (4096, 1024, 1024, 4096, 14336, 14336, 4096), (*[4096] * 6, 14336), strict=True)),
    "llama3-70b": tuple(zip(_BLOCK, (10240, 8192, 57344, 8192), (8192, 8192, 8192, 28672), strict=True)),
    "llama2-7b": tuple(zip(_BLOCK, (12288, 4096, 21504, 4096), (4096, 4096, 4096, 10752), strict=True)),
    "llama2-13b": tuple(zip(_BLOCK, (15360, 5120, 27136, 5120), (5120, 5120, 5120, 13568), strict=True)),
    "llama-33b": tuple(zip(_BLOCK, (19968, 6656, 35328, 6656), (6656, 6656, 6656, 17664), strict=True)),
    "llama-65b": tuple(zip(_BLOCK, (24576, 8192, 43520, 8192), (8192, 8192, 8192, 21760), strict=True)),
    "falcon-180b": (("qkv_up", 75264, 14848), ("o_down", 14848, 74240)),
    "ideal": (("73728x18432", 73728, 18432), ("18432x73728", 18432, 73728)),
}


def operator_name(kind: Kind, rounding: Rounding = "none") -> str:
    """In tables: int4 2:4, or int4, int8-128 of rounded activations."""
    return OPERATORS[kind] if rounding == "none" else f"{OPERATORS[kind]}, {rounding}"


def named_set(name: str, group_size: int) -> LayerSet:
    return LayerSet(name, tuple(Layer(layer, checked(n, k, group_size)) for layer, n, k in SETS[name]))


def shapes_set(texts: Sequence[str], group_size: int) -> LayerSet:
    """--shape 4096x14336, as often as given. UsageError E202."""
    return LayerSet("shapes", tuple(Layer(text, _shape(text, group_size)) for text in texts))


def roofline_set(group_size: int) -> LayerSet:
    """Square matrices, 4k to 32k."""
    return LayerSet("roofline", tuple(Layer(f"{size}x{size}", checked(size, size, group_size)) for size in ROOFLINE_SIZES))


def checkpoint_set(folder: Path, console: Console) -> OfFolder:
    """The packed linears of a folder, equal ones together.

    Sizes are rounded up to multiples of 64, as the tiles are. BadInput as open_checkpoint raises it; UsageError E202 where the folder has
    no packed linear that a kernel multiplies.
    """
    from marlinctl.checkpoint.folder import open_folder
    from marlinctl.checkpoint.formats import registry

    with open_folder(folder) as examined:
        checkpoint, info = examined.checkpoint, examined.info
        for note in examined.notes:
            console.warn(note)
        found: Counter[tuple[str, Shape]] = Counter()
        rounding = info.rounding if info.format.rounds else {}
        rounded = set[Shape]()
        for layer, group_size in info.layers.items():
            n, k = registry.layer_shape(checkpoint, info, layer)
            size = -1 if group_size == k else group_size
            shape = Shape(_rounded(n), _rounded(k), size)
            found[layer.rpartition(".")[2], shape] += 1
            rounded |= {shape} if layer in rounding else set()
    layers = tuple(Layer(name, shape, count) for (name, shape), count in found.items() if _multiplied(shape))
    left_out = sum(found.values()) - sum(layer.count for layer in layers)
    if left_out:
        console.warn(f"{left_out} of {sum(found.values())} linears have groups that no kernel multiplies; they are not measured")
    if not layers:
        raise UsageError(
            "E202",
            f"there is no packed linear to measure ({info.name})",
            where=str(folder),
            fix="name a folder that `pack` wrote, or --layers",
        )
    kind: Kind | None = ("sparse" if info.format.needs_mask else "dense") if info.format.native else None
    return OfFolder(LayerSet(folder.resolve().name, layers), kind, next(iter(rounding.values()), "none"), frozenset(rounded))


def distinct(sets: Iterable[LayerSet]) -> tuple[Shape, ...]:
    """Every shape once, in the order in which they come."""
    return tuple(dict.fromkeys(shape for one in sets for shape in one.shapes))


def parse_tokens(text: str, option: str = "--tokens") -> tuple[int, ...]:
    """`1,8,16`: ascending, each once. UsageError E202."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[1-9][0-9]{0,6}", part) for part in parts):
        raise UsageError("E202", f"{option} {text!r} is not a list of numbers", where=option, fix=f"give for example {option} 1,8,16,64")
    return tuple(sorted({int(part) for part in parts}))


def checked(n: int, k: int, group_size: int) -> Shape:
    """UsageError E202 for what no tile holds."""
    if n % MULTIPLE or k % MULTIPLE or n < MULTIPLE or k < MULTIPLE:
        raise UsageError("E202", f"{n}x{k}: N and K of what is timed are multiples of 64", where="--shape", fix="round both up to 64")
    shape = Shape(n, k, group_size)
    if not _multiplied(shape):
        what = f"K={k} has no groups of {group_size}"
        raise UsageError("E202", what, where="--group-size", fix="give 32, 64, 128 or -1, of which K is a multiple")
    return shape


def _shape(text: str, group_size: int) -> Shape:
    found = re.fullmatch(r"([0-9]{1,7})x([0-9]{1,7})", text.strip().lower())
    if found is None:
        raise UsageError("E202", f"--shape {text!r} is not NxK", where="--shape", fix="give for example --shape 4096x14336, outputs first")
    return checked(int(found[1]), int(found[2]), group_size)


def _rounded(size: int) -> int:
    return -(-size // MULTIPLE) * MULTIPLE


def _multiplied(shape: Shape) -> bool:
    """Whether there is a kernel for its groups."""
    return shape.group_size in GROUPS and (shape.group_size == -1 or shape.k % shape.group_size == 0)
