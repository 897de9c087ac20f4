"""What a format on disk is to marlinctl: one frozen description, which everything else asks.

A format is one module of this folder that makes a `Format`; registry.py lists them. Nothing outside of this folder spells the name of a
format, but recipes and the command line.

For a linear P with weight [N, K], group size g and G = K / g groups (G = 1 when one group spans the row) a format says which tensors P.* it
consists of, how they are shaped, which quantization_config belongs to them, how codes become these tensors and back, and who loads them.
The mask of a 2:4 linear lies in a file of its own (checkpoint/mask.py), unless the metadata of the format is one. A bias stays P.bias
everywhere. The layouts inside a word are functions in marlinctl/pack/tile.py. Everything here but functions on tensors works from
config.json and tensor names alone, without torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from marlinctl.checkpoint.formats import blocks
from marlinctl.checkpoint.formats.targets import tower_of
from marlinctl.errors import BadInput, Problem
from marlinctl.quantize.scheme import INT4, Grid, Rounding, RunWith

if TYPE_CHECKING:
    from torch import Tensor

    from marlinctl.pack.types import PackedLinear, PackedSparseLinear
    from marlinctl.quantize.types import QuantizedLinear

AGAIN = "fetch or write the checkpoint again"
BLOCK = "quantization_config"
PROVENANCE = "marlinctl"  # the key of the block under which marlinctl says how it wrote the folder
FLOATS = ("F16", "BF16", "F32")

# What the bytes of a tensor are, for `inspect`.
CODES, SCALES, METADATA, INDICES, WEIGHTS = "codes", "scales", "metadata", "zeros and indices", "weights"
# Programs that load folders.
TRANSFORMERS, TRANSFORMERS_CT, TRANSFORMERS_GPTQ = (
    "transformers",
    "transformers (with compressed-tensors)",
    "transformers (with optimum and gptqmodel)",
)
VLLM, SGLANG, GPTQMODEL, MARLINCTL = "vLLM", "SGLang", "GPTQModel", "marlinctl"
VLLM_MARLINCTL = "vLLM (with marlinctl)"  # whose plugin reads native folders (marlinctl/serve/vllm)
VLLM_RELEASE = "0.26.0"  # the plugin was run with it on an H200; a release is added when it was run
MODEL_FILES, NATIVE_FILES = STEMS = ("model", "marlin")  # of the shards; native folders must not look like a model to plain transformers

Shapes = Mapping[str, tuple[tuple[str, ...], tuple[int, ...]]]  # suffix -> (allowed dtypes, shape)
Kind = tuple[int, Grid]  # group size, -1 for whole rows, and grid of a linear
_MISREAD = "the file is damaged or its config.json belongs to another model; fetch or write it again"


def is_head(layer: str) -> bool:
    """Whether it is the output head; in a wrapper its name has a prefix."""
    return layer.rpartition(".")[2] == "lm_head"


@dataclass(frozen=True, slots=True)
class Chosen:
    """The linears of a model, as a config block describes them."""

    layers: Mapping[str, int]  # quantized linear -> group size, -1 for whole rows
    ignore: Sequence[str]  # every nn.Linear that stays 16-bit: lm_head, skipped layers, routers
    grids: Mapping[str, Grid] = field(default_factory=dict)  # of the linears whose codes are not INT4
    wraps: bool = False  # the language model is part of a wrapper, for which clients have names of their own
    rounding: Mapping[str, Rounding] = field(default_factory=dict)  # of the linears whose activations may be rounded (rounding.py)

    @property
    def tower(self) -> str | None:
        """What the names of the blocks begin with, where clients have other names: in a wrapper, or where that is nothing."""
        found = tower_of(self.layers)
        return found if self.wraps or not found else None

    @property
    def packs_head(self) -> bool:
        return any(map(is_head, self.layers))

    def kind(self, layer: str) -> Kind:
        return self.layers[layer], self.grids.get(layer, INT4)

    @property
    def kinds(self) -> dict[str, Kind]:
        return {layer: self.kind(layer) for layer in self.layers}

    @property
    def everything(self) -> list[str]:
        return [*self.layers, *self.ignore]

    @property
    def majority(self) -> Kind:
        return kinds_by_count(self.kinds)[0]

    @property
    def differing(self) -> dict[str, Kind]:
        majority = self.majority
        return {name: kind for name, kind in self.kinds.items() if kind != majority}


def no_limits(packed: Packed, program: str) -> list[str]:
    return []


def nothing_untested(packed: Packed) -> Mapping[str, str]:
    return {}


def no_layout(grids: Iterable[Grid]) -> str:
    return ""


class ShapesOf(Protocol):
    def __call__(self, n: int, k: int, group_size: int, grid: Grid = INT4) -> Shapes: ...


@dataclass(frozen=True, slots=True, eq=False)  # one object a format: compared and hashed as such
class Format:
    """One format on disk.

    Functions on tensors take and return them by suffix. `detect` and `config_block` are None for models that are not quantized.
    """

    name: str  # as --format, manifest and reports spell it
    label: str  # in tables
    title: str  # of the model card; {} stands for the bits of its codes, a second one for `layout`
    tensors: Mapping[str, str]  # suffix -> what its bytes are, of one quantized linear; the first marks a linear as quantized
    shapes: ShapesOf
    loaders: tuple[str, ...]  # programs that read it; whether they take a given model is what runtimes.loads says
    pack: Callable[[str, LinearParts], dict[str, Tensor]]  # the layer is named in errors
    unpack: Callable[[Mapping[str, Tensor], int, str, Grid], LinearParts]  # (tensors, group size, variant, grid), or ValueError
    grids: tuple[Grid, ...] = (INT4,)  # whose codes it holds
    unpacked: Mapping[str, str] = field(default_factory=dict)  # `tensors` of a linear whose activations are rounded; all of them mark it
    kernels: tuple[str, ...] = ()  # programs that multiply with it as it lies on the disk
    methods: tuple[str, ...] = ()  # values of quant_method that announce it
    detect: Callable[[Mapping[str, Any], Sequence[str]], FormatInfo | None] | None = None  # None: the block is of a sibling
    config_block: Callable[[Chosen], dict[str, Any]] | None = None
    second_reading: Callable[[Mapping[str, Tensor], int, int, int, Grid], Tensor] | None = None  # [N, K] fp32 by another way than `unpack`
    tiles: Callable[[Mapping[str, Tensor], int, int, int], PackedLinear | PackedSparseLinear] | None = None  # native: as kernels take it
    tags: tuple[str, ...] = ()  # of the model card
    note: str = ""  # of the model card
    files: str = MODEL_FILES  # stem of the shards
    optional: tuple[str, ...] = ()  # suffixes that others leave out
    shape_from: str = "weight_shape"  # the tensor that says N and K
    header_shape: Callable[[Sequence[int], Grid], tuple[int, int]] | None = (
        None  # (N, K) from the shape of that tensor, where it is a matrix
    )
    needs_mask: bool = False  # it holds 2:4 linears alone, and its metadata is their mask
    writes_variant: str = ""
    asymmetric_variant: str = ""  # what is written of asymmetric codes, where that is another one
    one_symmetry: bool = False  # all codes of a model are symmetric, or none
    variant_loaders: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    block_file: str = ""  # the config block once more, in a file that old loaders read
    required: Sequence[tuple[str, object, str]] = ()  # keys of the block that clients need and do not miss aloud: key, value, why
    checks_ignore: bool = False  # clients look for packed tensors of every linear that the block does not name
    misfit: Callable[[int, int], str | None] | None = None  # why a linear [N, K] cannot be written
    misread: str = _MISREAD  # what to do where `unpack` refuses
    limits: Callable[[Packed, str], list[str]] = no_limits  # why a program refuses such a model, beyond the shapes of its kernels
    untested: Callable[[Packed], Mapping[str, str]] = nothing_untested
    layout: Callable[[Iterable[Grid]], str] = no_layout  # what the format calls the layout of such codes, where it has several
    rounds: bool = False  # programs that read it round activations beside 4-bit codes, where its block says so (rounding.py)
    trains: str = ""  # what distillation can train of it: "weights", "scales" or nothing

    def variant_of(self, grids: Iterable[Grid]) -> str:
        """That marlinctl writes."""
        return self.writes_variant if all(grid.symmetric for grid in grids) else self.asymmetric_variant

    def title_of(self, grids: Iterable[Grid]) -> str:
        """Of a model with such codes."""
        used = list(grids)
        text = self.title.format(grids_text(used), self.layout(used))
        return text[:1].upper() + text[1:]

    def tags_of(self, grids: Iterable[Grid]) -> list[str]:
        return [*self.tags, *dict.fromkeys("fp8" if grid.floating else f"int{grid.bits}" for grid in sorted({*grids}) if self.quantized)]

    def tensors_of(self, grid: Grid) -> Mapping[str, str]:
        """Of a linear with such codes: suffix -> what its bytes are."""
        return self.unpacked if grid.rounds_activations else self.tensors

    @property
    def suffixes(self) -> tuple[str, ...]:
        return tuple(self.tensors)

    @property
    def quantized(self) -> bool:
        return self.config_block is not None

    @property
    def native(self) -> bool:
        """Tiles of marlinctl's own kernels."""
        return self.tiles is not None

    @property
    def scales(self) -> str | None:
        return next((suffix for suffix, kind in self.tensors.items() if kind == SCALES), None)

    def layer_names(self, names: Iterable[str]) -> list[str]:
        """The linears that the marking tensors name."""
        present = list(names)
        ending = f".{self.suffixes[0]}"
        found = [name.removesuffix(ending) for name in present if name.endswith(ending)]
        if not self.unpacked:
            return found
        marks = [{name.removesuffix(f".{suffix}") for name in present if name.endswith(f".{suffix}")} for suffix in self.unpacked]
        return list(dict.fromkeys([*found, *sorted(set.intersection(*marks))]))


@dataclass(frozen=True, slots=True)
class FormatInfo:
    """What config.json and the tensor names say a checkpoint is."""

    format: Format
    layers: Mapping[str, int] = field(default_factory=dict)  # quantized linears -> group size; -1 is one group for the whole row
    variant: str = ""
    grids: Mapping[str, Grid] = field(default_factory=dict)  # of the linears whose codes are not INT4
    rounding: Mapping[str, Rounding] = field(default_factory=dict)  # of the 4-bit linears whose activations may be rounded (rounding.py)

    def grid(self, layer: str) -> Grid:
        return self.grids.get(layer, INT4)

    def activations(self, layer: str) -> RunWith:
        kind = self.rounding.get(layer, "none") if self.format.rounds else "none"
        return self.grid(layer).activations if kind == "none" else kind

    @property
    def used_grids(self) -> list[Grid]:
        return sorted({self.grid(layer) for layer in self.layers})

    @property
    def name(self) -> str:
        return self.format.name

    @property
    def group_size(self) -> int | None:
        """The group size of most layers; None for a dense model."""
        return sizes_by_count(self.layers)[0] if self.layers else None

    @property
    def owned(self) -> dict[str, str]:
        """The tensors of all quantized linears by full name -> suffix."""
        return {f"{layer}.{suffix}": suffix for layer in self.layers for suffix in self.format.tensors_of(self.grid(layer))}

    def marking(self, layer: str) -> str:
        """The tensor of a quantized linear that holds its codes."""
        return f"{layer}.{next(iter(self.format.tensors_of(self.grid(layer))))}"


@dataclass(frozen=True, slots=True)
class Packed:
    """A folder as clients see it: of headers, or of a plan for one that is not written yet."""

    format: Format
    shapes: Mapping[str, tuple[int, int]]  # quantized linear -> (N, K)
    sizes: Mapping[str, int]  # quantized linear -> group size, -1 for whole rows
    ignore: Sequence[str]  # linears that stay 16-bit
    config: Mapping[str, Any]
    variant: str = ""
    grids: Mapping[str, Grid] = field(default_factory=dict)  # of the linears whose codes are not INT4

    def grid(self, layer: str) -> Grid:
        return self.grids.get(layer, INT4)

    @property
    def kinds(self) -> dict[str, Kind]:
        return {layer: (size, self.grid(layer)) for layer, size in self.sizes.items()}

    @property
    def experts(self) -> list[str]:
        return [name for name in self.sizes if EXPERTS in name]

    @property
    def sixteen_bit_experts(self) -> list[str]:
        return [name for name in self.ignore if EXPERTS in name]


EXPERTS = ".experts."


@dataclass(frozen=True, slots=True)
class LinearParts:
    """One linear as it lies on disk, unpacked: scales keep the dtype they had, which QuantizedLinear need not be able to hold."""

    codes: Tensor  # [N, K] int8; of FP8 the bits
    scales: Tensor  # [N, G] float16, bfloat16 or float32
    group_size: int  # K when one group spans the row
    keep: Tensor | None = None  # [N, K] bool, True for a kept weight of a 2:4 linear; None: dense, or not stated
    grid: Grid = INT4
    zeros: Tensor | None = None  # [N, G] int8, of asymmetric codes

    @classmethod
    def of(cls, q: QuantizedLinear) -> LinearParts:
        return cls(q.codes, q.scales, q.group_size, getattr(q, "keep", None), q.grid, q.zeros)

    def steps(self) -> Tensor:
        """[N, K] int8: codes less the zeros of their groups; -15..15 of asymmetric ones."""
        return self.codes if self.zeros is None else self.codes - self.zeros.repeat_interleave(self.group_size, dim=1)

    def weight(self) -> Tensor:
        """[N, K] float32: the weight that every runtime must compute with. Exact."""
        from marlinctl.quantize.types import dequantized

        return dequantized(self.codes, self.scales, self.group_size, self.zeros, self.grid)

    def quantized(self, layer: str) -> QuantizedLinear:
        """With fp16 scales, as every packed format but ct needs them; refused where that would change a value."""
        import torch

        from marlinctl.quantize.types import QuantizedLinear
        from marlinctl.sparsify.types import SparseQuantizedLinear

        scales = self.scales.to(torch.float16)
        wrong = scales.to(torch.float32) != self.scales.to(torch.float32)
        if bool(wrong.any()):
            row, group = (int(i) for i in wrong.nonzero()[0])
            raise BadInput(
                "E349",
                f"{layer}: its {str(self.scales.dtype).removeprefix('torch.')} scales have no exact float16 form "
                f"({int(wrong.sum())} of {wrong.numel()}; the first is {float(self.scales[row, group]):.9g})",
                where=f"{layer}, row {row}, group {group}",
                fix="pack to ct, which keeps the scales as they are, or quantize the original model again with marlinctl",
            )
        if self.keep is not None:
            return SparseQuantizedLinear(self.codes, scales, self.group_size, self.keep, grid=self.grid)
        return QuantizedLinear(self.codes, scales, self.group_size, grid=self.grid, zeros=self.zeros)


def sizes_by_count(layers: Mapping[str, int]) -> list[int]:
    """Group sizes, the most frequent first; among equals the smaller, so that the order of the layers does not matter."""
    counts = Counter(layers.values())
    return sorted(counts, key=lambda size: (-counts[size], size))


def kinds_by_count(kinds: Mapping[str, Kind]) -> list[Kind]:
    """The same of group sizes with grids."""
    counts = Counter(kinds.values())
    return sorted(counts, key=lambda kind: (-counts[kind], kind))


def kind_text(kind: Kind) -> str:
    """What differs from INT4 is said."""
    size, grid = kind
    return size_text(size) if grid == INT4 else f"{grid}, {size_text(size)}"


def grids_text(grids: Iterable[Grid]) -> str:
    """4-bit, or 4-bit and 8-bit"""
    return " and ".join(str(grid) for grid in sorted({*grids}))


def size_text(size: int) -> str:
    """0: 16-bit."""
    return "16-bit" if size == 0 else "whole rows" if size == -1 else f"group {size}"


# ---- for the modules of the formats ---------------------------------------------------------------------------------------------------


def strays(fmt: Format, layers: Mapping[str, int], names: Iterable[str], grids: Mapping[str, Grid] | None = None) -> list[Problem]:
    """Tensors below a packed linear that its format has no place for, and those that a quantizer wrote for a linear that is not packed.

    Copied along as "untouched" they would be lost or misread: an order of columns, a scale of activations, another format beside this one.
    grids: of the linears whose codes are not INT4.
    """
    if not layers:
        return []  # config.json is of another model altogether, which is said as such (folder.py)
    grids = grids or {}
    fix = "the model was quantized in a way that marlinctl does not read; quantize the original model with marlinctl"
    problems = []
    for name in names:
        parent, _, leaf = name.rpartition(".")
        if parent in layers:
            if leaf != "bias" and leaf not in fmt.tensors_of(grids.get(parent, INT4)):
                problems.append(Problem(f"{name} belongs to a packed linear, and {fmt.name} has no such tensor", name, fix))
        elif leaf in blocks.QUANTIZER_SUFFIXES:
            problems.append(Problem(f"{name} belongs to a quantized linear, and {parent} is not packed as {fmt.name}", name, fix))
        elif any(above in layers for above in _above(parent)):
            problems.append(Problem(f"{name} lies below a packed linear, and {fmt.name} has no such tensor", name, fix))
    return problems


def _above(name: str) -> Iterator[str]:
    """a.b.c -> a.b, a"""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def object_at(block: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """block[key], which must be an object; absent and null are an empty one."""
    value = block.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"{key} is not an object")
    return value or {}


def group_size_of(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or (value < 1 and value != -1):
        raise ValueError(f"group_size {value!r} is neither a positive number nor -1 (whole rows)")
    return value


def unreadable(what: str, fix: str) -> BadInput:
    return BadInput("E340", what, where="config.json: quantization_config", fix=fix)


def refuse(error_id: str, problems: Sequence[Problem]) -> None:
    if problems:
        raise BadInput.from_problems(error_id, problems)


def true_shape(tensor: Tensor) -> tuple[int, int]:
    if tensor.is_floating_point() or tuple(tensor.shape) != (2,):
        raise ValueError(f"weight_shape must hold two whole numbers, it is {tensor.dtype} {list(tensor.shape)}")
    n, k = (int(size) for size in tensor)
    if n < 1 or k < 1:
        raise ValueError(f"weight_shape says [{n}, {k}]")
    return n, k


def true_group_size(configured: int, k: int, groups: int) -> int:
    """The true group size, after config and scales were found to agree."""
    size = k if configured == -1 else configured
    if k % size or k // size != groups:
        raise ValueError(f"config.json says group_size {configured} for K={k}, but there are {groups} groups of scales")
    return size


def check_scales(scales: Tensor, rows: int) -> None:
    import torch

    if not scales.is_floating_point() or scales.ndim != 2 or scales.shape[0] != rows:
        raise ValueError(f"scales are {scales.dtype} {tuple(scales.shape)}, expected float [{rows}, G]")
    if not bool(torch.isfinite(scales).all()):
        raise ValueError("scales hold NaN or infinity")


def codes_of(words: Tensor, bits: int) -> Tensor:
    """int32 [R, C] -> int32 [R, C x codes in a word], lowest bits first; half of their range is added to them."""
    import torch

    return (words.unsqueeze(-1) >> torch.arange(0, 32, bits, dtype=torch.int32) & (1 << bits) - 1).reshape(words.shape[0], -1)
