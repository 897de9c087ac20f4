"""A native folder as vLLM's quantization config: which linears are packed, and how, from the headers of its files.

config.json says the format and the group size, and not which linears are packed. vLLM names the folder before it makes the model
(`maybe_update_config`), so all that is wrong with the folder is said then, at once, before a weight is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from marlinctl.checkpoint.formats import registry
from marlinctl.checkpoint.formats.base import EXPERTS, NATIVE_FILES, Format, FormatInfo, size_text
from marlinctl.errors import BadInput, Problem
from marlinctl.serve.vllm.told import telling

if TYPE_CHECKING:
    from vllm.model_executor.models.utils import WeightsMapper

    from marlinctl.checkpoint.reader import Checkpoint

_AGAIN = "config.json and weights do not belong together, or the copy is incomplete; fetch or write the folder again"
_INSTEAD = "serve the model from `marlinctl pack FOLDER OUT --format ct`"


class NativeConfig(QuantizationConfig):
    """One native folder. `layers` and `present` have the names that the model of vLLM gives them."""

    def __init__(self, block: dict[str, Any]) -> None:
        super().__init__()
        with telling():
            self.format_name = registry.detect({"quantization_config": block}, []).name
        self.block = block
        self.layers: dict[str, int] = {}  # packed linear -> group size, -1 for whole rows
        self.present: dict[str, None] = {}  # modules that have a tensor of any kind

    @property
    def format(self) -> Format:
        """Not kept: a config is pickled for other processes, and a Format is not made for that."""
        return registry.FORMATS[self.format_name]

    def __repr__(self) -> str:
        return f"NativeConfig({self.format_name}, {len(self.layers)} packed linears)"

    @classmethod
    def get_name(cls) -> Any:
        return "marlinctl"

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> NativeConfig:
        return cls(config)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        from marlinctl.checkpoint.reader import open_checkpoint

        with telling():
            folder = _folder(model_name, revision)
            with open_checkpoint(folder, weight_files=NATIVE_FILES) as checkpoint:
                _refuse_other_weights(checkpoint)
                _refuse_incomplete(checkpoint, self.format)  # by name, before `detect` wonders what the others are
                info = registry.detect(checkpoint.config, checkpoint.tensors)
                _refuse_misfits(checkpoint, info)
            self.format_name, self.layers = info.name, dict(info.layers)
            self.present = dict.fromkeys(name.rpartition(".")[0] for name in checkpoint.tensors)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        self.layers = hf_to_vllm_mapper.apply_dict(self.layers)
        self.present = dict.fromkeys(hf_to_vllm_mapper.apply_list(list(self.present)))

    @staticmethod
    def get_cache_scale_mapper() -> WeightsMapper:
        """vLLM reads every *.safetensors of a folder. A mask file is for pruning and training, and no part of the model."""
        from vllm.model_executor.models.utils import WeightsMapper

        from marlinctl.checkpoint.mask import SUFFIX

        return QuantizationConfig.get_cache_scale_mapper() | WeightsMapper(orig_to_new_suffix={SUFFIX: None})

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        is_linear = isinstance(layer, LinearBase)
        if not is_linear and not isinstance(layer, ParallelLMHead):
            return None
        with telling():
            names = self.names_of(prefix)
            size = self.group_size_of(prefix, names)
        if size is None:
            return UnquantizedLinearMethod() if is_linear else None
        from marlinctl.serve.vllm.method import MarlinctlLinearMethod

        return MarlinctlLinearMethod(self.format, names, size)

    def names_of(self, prefix: str) -> tuple[str, ...]:
        """The linears of the folder that a module of vLLM is made of."""
        parent, _, leaf = prefix.rpartition(".")
        shards = self.packed_modules_mapping.get(leaf, [leaf])
        if prefix in self.layers or prefix in self.present:
            return (prefix,)
        return tuple(f"{parent}.{shard}" if parent else shard for shard in shards)

    def group_size_of(self, prefix: str, names: Sequence[str]) -> int | None:
        """None: 16 bits. BadInput E302 where the linears that vLLM joins are not packed alike, or are not there at all."""
        sizes = {name: self.layers.get(name, 0) for name in names}
        if len(set(sizes.values())) > 1:
            said = ", ".join(f"{name} {size_text(size)}" for name, size in sizes.items())
            fix = f"quantize the model again with one group size for linears that belong together, or {_INSTEAD}"
            raise BadInput("E302", f"vLLM loads these as one linear, and they are not packed alike: {said}", where=prefix, fix=fix)
        size = next(iter(sizes.values()))
        if size:
            return size
        packed_elsewhere = {name.rpartition(".")[2] for name in self.layers}
        for name in names:
            if name.rpartition(".")[2] in packed_elsewhere and name not in self.present:
                raise BadInput("E302", f"the folder has no tensor of {name}", where=name, fix=_AGAIN)
        return None


def _folder(model: str, revision: str | None) -> Path:
    """A hub model is fetched into the hub's own cache, where vLLM looks next."""
    if Path(model).is_dir():
        return Path(model)
    from marlinctl.checkpoint.hub import fetch
    from marlinctl.system.console import Console

    return fetch(model, revision=revision, cache_dir=None, offline=False, console=Console.quiet())[0]


def _refuse_other_weights(checkpoint: Checkpoint) -> None:
    """BadInput E301: vLLM would load them too, one over the other."""
    from marlinctl.checkpoint.model_files import MASK_FILE

    known = {path.name for path in checkpoint.files} | {MASK_FILE}
    others = sorted(path.name for path in checkpoint.folder.iterdir() if path.suffix == ".safetensors" and path.name not in known)
    if others:
        what = f"the folder holds other weights too, {others[0]}{f' and {len(others) - 1} more' if others[1:] else ''}"
        raise BadInput(
            "E301", f"{what}, and vLLM would load both", where=str(checkpoint.folder), fix="move them into a folder of their own"
        )


def _refuse_incomplete(checkpoint: Checkpoint, fmt: Format) -> None:
    """BadInput E302 names what packed linears lack, and experts."""
    needed = [suffix for suffix in fmt.suffixes if suffix not in fmt.optional]
    layers = sorted({name.rpartition(".")[0] for name in checkpoint.tensors if name.rpartition(".")[2] in fmt.suffixes})
    missing = [f"{layer}.{suffix}" for layer in layers for suffix in needed if f"{layer}.{suffix}" not in checkpoint.tensors]
    problems = [Problem(f"{name} is missing", str(checkpoint.folder), _AGAIN) for name in missing]
    experts = next((layer for layer in layers if EXPERTS in layer), None)
    if experts is not None:
        problems.append(Problem(f"{experts} is an expert, and experts are not served from native folders", experts, _INSTEAD))
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
                problems.append(Problem(what, str(found.file), _AGAIN))
    if problems:
        raise BadInput.from_problems("E302", problems)
