"""A native folder (serve/native/folder.py) as vLLM's quantization config.

vLLM names the folder before it makes the model (`maybe_update_config`), so all that is wrong with it is said then, before a weight is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from marlinctl.serve.native.config import ConfigAnswers
from marlinctl.serve.native.folder import NativeFolder, format_of, read_folder
from marlinctl.serve.native.refusals import as_refusals

if TYPE_CHECKING:
    from vllm.model_executor.models.utils import WeightsMapper


class NativeConfig(ConfigAnswers, QuantizationConfig):
    """One native folder. It is pickled for vLLM's other processes."""

    def __init__(self, block: dict[str, Any]) -> None:
        super().__init__()
        self.block = block
        with as_refusals():
            self.folder = NativeFolder(format_of(block), "vLLM", {}, frozenset(), frozenset())  # until vLLM has named it

    def __repr__(self) -> str:
        return f"NativeConfig({self.folder.format_name}, {len(self.folder.layers)} packed linears)"

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> NativeConfig:
        return cls(config)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        with as_refusals():
            self.folder = read_folder(model_name, revision, self.block, "vLLM", skips_masks=True)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        self.folder = self.folder.renamed(hf_to_vllm_mapper.apply_list, hf_to_vllm_mapper.apply_dict)

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
        with as_refusals():
            names: Sequence[str] = self.folder.names_of(prefix, self.packed_modules_mapping)
            size = self.folder.group_size_of(prefix, names)
        if size is None:
            return UnquantizedLinearMethod() if is_linear else None
        from marlinctl.serve.vllm.method import MarlinctlLinearMethod

        return MarlinctlLinearMethod(self.folder.format, names, size, self.folder.rounding_of(names))
