"""A native folder as a server meets it: which linears are packed, and how, from the headers of its files.

config.json says the format and the group size, and not which linears are packed. All that is wrong with the folder is said at once, before
a weight is read: servers load what they find, and do not miss the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marlinctl.checkpoint.formats import registry
from marlinctl.checkpoint.formats.base import EXPERTS, NATIVE_FILES, Format, FormatInfo, size_text
from marlinctl.errors import BadInput, Problem
from marlinctl.quantize.scheme import Rounding

if TYPE_CHECKING:
    from marlinctl.checkpoint.reader import Checkpoint

AGAIN = "config.json and weights do not belong together, or the copy is incomplete; fetch or write the folder again"
INSTEAD = "serve the model from `marlinctl pack FOLDER OUT --format ct`"


@dataclass(frozen=True, slots=True)
class NativeFolder:
    """Names are those of the folder, or, after `renamed`, those that a server's model has for the same parts. It can be pickled."""

    format_name: str
    server: str  # for messages
    layers: Mapping[str, int]  # packed linear -> group size, -1 for whole rows
    weights: frozenset[str]  # 16-bit linears and embeddings: modules with a weight of their own
    present: frozenset[str]  # modules that have a tensor of any kind
    rounding: Mapping[str, Rounding] = field(default_factory=dict)  # of packed linears whose activations may be rounded

    @property
    def format(self) -> Format:
        """Not kept: a Format is not made to be pickled."""
        return registry.FORMATS[self.format_name]

    def renamed(
        self, rename: Callable[[list[str]], Iterable[str]], rename_keys: Callable[[dict[str, Any]], dict[str, Any]]
    ) -> NativeFolder:
        return replace(
            self,
            layers=rename_keys(dict(self.layers)),
            weights=frozenset(rename(sorted(self.weights))),
            present=frozenset(rename(sorted(self.present))),
            rounding=rename_keys(dict(self.rounding)),
        )

    def names_of(self, prefix: str, joined: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
        """The linears of the folder that a server's module is made of. joined: last name of a module -> those of its parts."""
        parent, _, leaf = prefix.rpartition(".")
        shards = joined.get(leaf, [leaf])
        if prefix in self.layers or prefix in self.present:
            return (prefix,)
        return tuple(f"{parent}.{shard}" if parent else shard for shard in shards)

    def group_size_of(self, prefix: str, names: Sequence[str]) -> int | None:
        """None: 16 bits. BadInput E302 where linears that the server joins are not packed alike, or are not there at all."""
        sizes = {name: self.layers.get(name, 0) for name in names}
        if len(set(sizes.values())) > 1:
            said = ", ".join(f"{name} {size_text(size)}" for name, size in sizes.items())
            fix = f"quantize the model again with one group size for linears that belong together, or {INSTEAD}"
            raise BadInput("E302", f"{self.server} loads these as one linear, and they are not packed alike: {said}", where=prefix, fix=fix)
        size = next(iter(sizes.values()))
        if size:
            return size
        packed_elsewhere = {name.rpartition(".")[2] for name in self.layers}
        for name in names:
            if name.rpartition(".")[2] in packed_elsewhere and name not in self.present:
                raise BadInput("E302", f"the folder has no tensor of {name}", where=name, fix=AGAIN)
        return None

    def rounding_of(self, names: Sequence[str]) -> Rounding:
        """Of linears that the server joins: as they are where one of them is not to be rounded."""
        kinds = {self.rounding.get(name, "none") for name in names}
        return next(iter(kinds)) if len(kinds) == 1 else "none"


def format_of(block: Mapping[str, Any]) -> str:
    """The format's name, from quantization_config alone. BadInput E340."""
    return registry.detect({"quantization_config": dict(block)}, []).name


def read_folder(model: str, revision: str | None, block: Mapping[str, Any], server: str, *, skips_masks: bool) -> NativeFolder:
    """model: a folder, or a hub model, which is fetched into the hub's own cache, where the server looks next. BadInput lists what is
    wrong.

    skips_masks: whether the server can be asked to leave out a mask file, which is for pruning and training and no part of the model.
    """
    from marlinctl.checkpoint.reader import open_checkpoint

    with open_checkpoint(_folder(model, revision), weight_files=NATIVE_FILES) as checkpoint:
        _refuse_other_weights(checkpoint, server, skips_masks)
        _refuse_incomplete(checkpoint, registry.FORMATS[format_of(block)])  # by name, before `detect` wonders what the others are
        info = registry.detect(checkpoint.config, checkpoint.tensors)
        _refuse_misfits(checkpoint, info)
        present = frozenset(name.rpartition(".")[0] for name in checkpoint.tensors)
        weights = frozenset(name.removesuffix(".weight") for name in checkpoint.tensors if name.endswith(".weight"))
        return NativeFolder(info.name, server, dict(info.layers), weights, present, dict(info.rounding))


def _folder(model: str, revision: str | None) -> Path:
    if Path(model).is_dir():
        return Path(model)
    from marlinctl.checkpoint.hub import fetch
    from marlinctl.system.console import Console

    return fetch(model, revision=revision, cache_dir=None, offline=False, console=Console.quiet())[0]


def _refuse_other_weights(checkpoint: Checkpoint, server: str, skips_masks: bool) -> None:
    """BadInput E301: the server would load them too, one over the other."""
    from marlinctl.checkpoint.model_files import MASK_FILE

    known = {path.name for path in checkpoint.files} | ({MASK_FILE} if skips_masks else set())
    others = sorted(path.name for path in checkpoint.folder.iterdir() if path.suffix == ".safetensors" and path.name not in known)
    if others:
        what = f"the folder holds other weights too, {others[0]}{f' and {len(others) - 1} more' if others[1:] else ''}"
        raise BadInput(
            "E301", f"{what}, and {server} would load both", where=str(checkpoint.folder), fix="move them into a folder of their own"
        )


def _refuse_incomplete(checkpoint: Checkpoint, fmt: Format) -> None:
    """BadInput E302 names what packed linears lack, and experts."""
    needed = [suffix for suffix in fmt.suffixes if suffix not in fmt.optional]
    layers = sorted({name.rpartition(".")[0] for name in checkpoint.tensors if name.rpartition(".")[2] in fmt.suffixes})
    missing = [f"{layer}.{suffix}" for layer in layers for suffix in needed if f"{layer}.{suffix}" not in checkpoint.tensors]
    problems = [Problem(f"{name} is missing", str(checkpoint.folder), AGAIN) for name in missing]
    experts = next((layer for layer in layers if EXPERTS in layer), None)
    if experts is not None:
        problems.append(Problem(f"{experts} is an expert, and experts are not served from native folders", experts, INSTEAD))
    if problems:
        raise BadInput.from_problems("E302", problems)


def _refuse_misfits(checkpoint: Checkpoint, info: FormatInfo) -> None:
    """BadInput E302 lists tensors of packed linears that have another dtype or shape than weight_shape asks for."""
    problems: list[Problem] = []
    for layer, group_size in info.layers.items():
        n, k = registry.layer_shape(checkpoint, info, layer)
        for suffix, (dtypes, shape) in info.format.shapes(n, k, group_size).items():
            found = checkpoint.tensors[f"{layer}.{suffix}"]
            if found.dtype not in dtypes or tuple(found.shape) != shape:
                what = f"{layer}.{suffix} is {found.dtype} {list(found.shape)}, expected {' or '.join(dtypes)} {list(shape)}"
                problems.append(Problem(what, str(found.file), AGAIN))
    if problems:
        raise BadInput.from_problems("E302", problems)
