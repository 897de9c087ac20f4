"""A native folder (serve/native/folder.py) as SGLang's quantization config.

SGLang hands over quantization_config with two keys of its own: the model's config, whose name is the folder, and which linears the model
joins. So the folder is checked before the model is made.

SGLang's models skip tensors that they have no parameter for, and leave a parameter that no tensor came for as the memory was. So beside the
tensors of each packed linear (method.py) two more things are counted: a linear of the model must have a tensor in the folder, and a packed
linear of the folder must have found a linear of the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from marlinctl.checkpoint.formats.targets import FUSED
from marlinctl.errors import BadInput, Problem
from marlinctl.serve.native.config import ConfigAnswers
from marlinctl.serve.native.folder import AGAIN, INSTEAD, NativeFolder, read_folder
from marlinctl.serve.native.refusals import as_refusals

if TYPE_CHECKING:
    from sglang.srt.models.utils import WeightsMapper

_BLOCK = re.compile(r"^(.*?\.\d+)\.")  # of a linear: model.layers.3


class NativeConfig(ConfigAnswers, QuantizationConfig):
    """One native folder, and what of it the model has asked for."""

    def __init__(self, folder: NativeFolder, joined: Mapping[str, list[str]]) -> None:
        super().__init__()
        self.folder = folder
        self.packed_modules_mapping = {**FUSED, **joined}  # few models say it
        self.claimed: set[str] = set()  # linears of the folder that a module of the model is made of

    def __repr__(self) -> str:
        return f"NativeConfig({self.folder.format_name}, {len(self.folder.layers)} packed linears)"

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> NativeConfig:
        block = {key: value for key, value in config.items() if key not in ("hf_config", "packed_modules_mapping")}
        model = config.get("hf_config")
        name = getattr(model, "_name_or_path", "") or ""
        with as_refusals():
            if not name:
                what = "SGLang does not say where the model lies, and which linears are packed is in the headers of its files"
                raise BadInput("E301", what, where="config.json", fix=INSTEAD)
            folder = read_folder(name, getattr(model, "_commit_hash", None), block, "SGLang", skips_masks=False)
        return cls(folder, config.get("packed_modules_mapping") or {})

    def apply_weight_name_mapper(self, hf_to_sglang_mapper: WeightsMapper) -> None:
        self.folder = self.folder.renamed(hf_to_sglang_mapper.apply_list, hf_to_sglang_mapper.apply_dict)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        from sglang.srt.layers.linear import LinearBase
        from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
        from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead

        is_linear = isinstance(layer, LinearBase)
        if not is_linear and not isinstance(layer, ParallelLMHead):
            return None
        with as_refusals():
            names = self.folder.names_of(prefix, self.packed_modules_mapping)
            size = self.folder.group_size_of(prefix, names)
            if size is None and is_linear:
                self._require_weights(prefix, names)
        if size is None:
            return UnquantizedLinearMethod() if is_linear else None
        self.claimed.update(names)
        from marlinctl.serve.sglang.method import MarlinctlLinearMethod

        return MarlinctlLinearMethod(self.folder.format, names, size, self.folder.rounding_of(names), self.require_claimed)

    def is_linear_unquantized(self, prefix: str) -> bool:
        """Asked before there are layers, about names that may be of none: nothing is claimed."""
        with as_refusals():
            return self.folder.group_size_of(prefix, self.folder.names_of(prefix, self.packed_modules_mapping)) is None

    def _require_weights(self, prefix: str, names: tuple[str, ...]) -> None:
        missing = [name for name in names if name not in self.folder.weights]
        if missing:
            what = f"SGLang's model has a linear {prefix}, and the folder has no tensor of {', '.join(missing)}"
            fix = f"SGLang would leave its memory as it is; {AGAIN}, or {INSTEAD}"
            raise BadInput("E302", what, where=prefix, fix=fix)

    def require_claimed(self, whole: bool) -> None:
        """BadInput E302 names packed linears that no module of the model was made of. whole: this process has all blocks."""
        here = {block for name in self.claimed if (block := _block(name))}
        lost = [name for name in self.folder.layers if name not in self.claimed and (whole or _block(name) in here)]
        if lost:
            fix = f"SGLang's model calls or joins them otherwise; {INSTEAD}"
            problems = [Problem(f"{name} is packed, and SGLang's model has no linear for it", name, fix) for name in lost[:20]]
            raise BadInput.from_problems("E302", problems)


def _block(name: str) -> str | None:
    found = _BLOCK.match(name)
    return None if found is None else found[1]
