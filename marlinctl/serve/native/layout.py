"""Which part of which tensor of a native folder belongs where, for a linear of a server on one of its devices. It needs no server, no GPU.

    folder                 server                   one device of two
    q_proj  N = 4096  ─┐                            ┌ outputs    0 .. 2048   of q, its heads
    k_proj  N = 1024  ─┼─ qkv_proj  N = 6144  ─►    ├ outputs 2048 .. 2560   of k
    v_proj  N = 1024  ─┘                            └ outputs 2560 .. 3072   of v
    o_proj  K = 4096  ──  o_proj    K = 4096  ─►      inputs     0 .. 2048

Parts begin at multiples of 64, the width of a tile, so outputs may have gaps between them: those of one device, whose widths 64 does not
divide. Devices cut at multiples of 64 and of the group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from marlinctl.errors import BadInput, Problem
from marlinctl.kernels.configurations import GROUP_SIZES
from marlinctl.pack.slices import Slice
from marlinctl.pack.types import PAD_TO, padded

_SHARDS = {"q": 0, "k": 1, "v": 2}
_AGAIN = "config.json and weights do not belong together, or the copy is incomplete; fetch or write the folder again"


@dataclass(frozen=True, slots=True)
class Part:
    """One of the linears that the server has joined, by its outputs."""

    n: int  # of the whole part, on all devices; keys and values counted once
    here: int  # on each device
    replicas: int = 1  # devices that have the same outputs: those with the same keys and values


@dataclass(frozen=True, slots=True)
class Place:
    """A slice of a linear of the folder, and the output of the module where it begins, a multiple of 64."""

    cut: Slice
    first: int


@dataclass(frozen=True, slots=True)
class Layout:
    """A module on one device."""

    names: tuple[str, ...]  # of the linears in the folder
    widths: tuple[int, ...]  # their N
    in_features: int  # their K
    group_size: int  # as config.json has it: -1 for whole rows
    places: tuple[tuple[Place, ...], ...]  # for each name; none where a device has nothing of it
    outputs: tuple[tuple[int, int], ...]  # (first, how many): the outputs that the server wants side by side
    inputs: int  # K of the product here
    product_group: int  # its group size, -1 where one scale is left for each output

    @property
    def out_features(self) -> int:
        """N of the product here, gaps and all."""
        first, count = self.outputs[-1]
        return first + count

    @property
    def gaps(self) -> bool:
        return sum(count for _, count in self.outputs) != self.out_features

    @property
    def covered(self) -> bool:
        """Whether loading fills every column of the tiles."""
        return sum(padded(place.cut.outputs[1]) - place.cut.outputs[0] for places in self.places for place in places) == padded(
            self.out_features
        )

    def index(self, shard: object) -> int:
        """Which name a shard means: q, k, v or a number; None is the only one. BadInput E302."""
        if shard is None and len(self.names) == 1:
            return 0
        found = _SHARDS.get(shard, -1) if isinstance(shard, str) else shard
        if isinstance(found, int) and not isinstance(found, bool) and 0 <= found < len(self.names):
            return found
        what = f"the server loads shard {shard!r} of a linear that the folder has as {', '.join(self.names)}"
        raise BadInput("E302", what, where=self.names[0], fix="this model cannot be served from a native folder; use `pack --format ct`")


def layout(names: Sequence[str], parts: Sequence[Part], *, in_features: int, inputs_here: int, group_size: int, rank: int) -> Layout:
    """BadInput E302 says which linear cannot be cut, and why.

    names: one for each part, or a single one that holds all of them side by side.
    rank: of this device among those that share the outputs, or the inputs.
    """
    if len(names) not in (1, len(parts)):
        raise BadInput(
            "E302",
            f"the server joins {len(parts)} linears where the folder has {len(names)}",
            where=", ".join(names),
            fix="this model cannot be served from a native folder; use `pack --format ct`",
        )
    size = in_features if group_size == -1 else group_size
    inputs = (0, in_features) if inputs_here == in_features else (rank * inputs_here, (rank + 1) * inputs_here)
    if len(names) == 1 and all(part.here == part.n for part in parts):
        parts = [Part(sum(part.n for part in parts), sum(part.here for part in parts))]
    joined = len(names) == 1
    widths = [sum(part.n for part in parts)] if joined else [part.n for part in parts]
    places: list[list[Place]] = [[] for _ in names]
    outputs = []
    first = before = 0
    for i, part in enumerate(parts):
        which, offset = (0, before) if joined else (i, 0)
        begin = rank // part.replicas * part.here if part.here < part.n else 0
        end = min(begin + part.here, part.n)  # a head of words: the last devices may have less, or nothing
        if begin < end:
            cut = _cut(names[which], widths[which], in_features, size, (offset + begin, offset + end), inputs)
            places[which].append(Place(cut, first))
        outputs.append((first, part.here))
        first += padded(part.here)
        before += part.n
    here = inputs[1] - inputs[0]
    one_group = size >= here
    if not one_group and size not in GROUP_SIZES:
        what = f"groups of {size}; the kernels have {', '.join(map(str, GROUP_SIZES))} and whole rows"
        raise BadInput("E302", what, where=names[0], fix="quantize the model again with one of these group sizes")
    return Layout(
        tuple(names), tuple(widths), in_features, group_size, tuple(map(tuple, places)), tuple(outputs), here, -1 if one_group else size
    )


def _cut(name: str, n: int, k: int, size: int, outputs: tuple[int, int], inputs: tuple[int, int]) -> Slice:
    try:
        return Slice(n, k, size, outputs, inputs)
    except ValueError as problem:
        fix = f"divide the model among fewer GPUs: parts of a linear are multiples of {PAD_TO} and of the group size"
        raise BadInput("E302", f"{name} cannot be divided: {problem}", where=name, fix=fix) from None


class Arrivals:
    """Which tensors of a module have been loaded. Servers do not look: one that is missing leaves memory as it was."""

    def __init__(self, names: Sequence[str], suffixes: Sequence[str]) -> None:
        self.wanted = [f"{name}.{suffix}" for name in names for suffix in suffixes]
        self._seen: Counter[str] = Counter()

    def note(self, tensor: str) -> None:
        """BadInput E302 for one that has come before."""
        self._seen[tensor] += 1
        if self._seen[tensor] > 1:
            raise BadInput("E302", f"{tensor} is there twice", where=tensor, fix="two files of the folder hold it; " + _AGAIN)

    def complete(self) -> None:
        """BadInput E302 names all that did not come. Afterwards everything may come again: servers can load weights again."""
        missing = [tensor for tensor in self.wanted if not self._seen[tensor]]
        if missing:
            raise BadInput.from_problems("E302", [Problem(f"{tensor} was not loaded", tensor, _AGAIN) for tensor in missing])
        self._seen.clear()


def check_tensor(tensor: str, dtype: str, shape: Sequence[int], dtypes: Sequence[str], wanted: Sequence[int]) -> None:
    """BadInput E302 for another dtype or shape than the format has for this linear. Dtypes as safetensors spells them."""
    if dtype not in dtypes or tuple(shape) != tuple(wanted):
        what = f"{tensor} is {dtype} {list(shape)}, expected {' or '.join(dtypes)} {list(wanted)}"
        raise BadInput("E302", what, where=tensor, fix=_AGAIN)
