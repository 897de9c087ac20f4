"""One packed linear of vLLM: serve/native/method.py, with what vLLM says of a module and when it asks."""

from __future__ import annotations

import logging
from typing import Any

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.linear import LinearMethodBase

from marlinctl.serve.native.method import PackedLinearMethod, layout_of
from marlinctl.serve.native.refusals import as_refusals
from marlinctl.serve.vllm import cache_key

DUMMY = "dummy"  # load_format of vLLM: no weights, random ones
_log = logging.getLogger("vllm.marlinctl")


class MarlinctlLinearMethod(PackedLinearMethod, LinearMethodBase):
    """Of one module: vLLM asks the config for a new one each time."""

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        rank = getattr(layer, "tp_rank", None)
        if rank is None:
            rank = get_tensor_model_parallel_rank()
        with as_refusals():
            place = layout_of(
                layer, self.names, input_size_per_partition, output_partition_sizes, input_size, output_size, self.group_size, rank
            )
        self.make_parameters(layer, place, params_dtype)
        config = get_current_vllm_config_or_none()
        self.load_format = "" if config is None else str(config.load_config.load_format)
        shape = f"[{self.out_features}, {place.inputs}] {self.product_group}"
        cache_key.note(" ".join((f"{', '.join(self.names)}: {self.format.name}", shape, *self.more)))

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        if self.load_format == DUMMY:
            self.fill_at_random(layer)  # vLLM has filled the scales
        else:
            with as_refusals():
                self.arrivals.complete()
        self.finish(layer, _log)
        if self.product.factored:  # the product has one operand more
            cache_key.note(f"{', '.join(self.names)}: factored")
