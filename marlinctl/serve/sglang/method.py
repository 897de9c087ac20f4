"""One packed linear of SGLang: serve/native/method.py, with what SGLang says of a module and when it asks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from sglang.srt.distributed.utils import get_group_rank_size
from sglang.srt.layers.quantization.base_config import LinearMethodBase
from sglang.srt.runtime_context import get_parallel

from marlinctl.checkpoint.formats.base import Format
from marlinctl.errors import BadInput
from marlinctl.quantize.scheme import Rounding
from marlinctl.serve.native.folder import INSTEAD
from marlinctl.serve.native.method import PackedLinearMethod, layout_of
from marlinctl.serve.native.refusals import as_refusals

_log = logging.getLogger("sglang.marlinctl")


class MarlinctlLinearMethod(PackedLinearMethod, LinearMethodBase):
    """Of one module: SGLang asks the config for a new one each time."""

    def __init__(
        self, fmt: Format, names: Sequence[str], group_size: int, rounding: Rounding, require_claimed: Callable[[bool], None]
    ) -> None:
        """require_claimed: of the config (config.py), asked when the model is loaded."""
        super().__init__(fmt, names, group_size, rounding)
        self.require_claimed = require_claimed

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
        rank, _size = get_group_rank_size(getattr(layer, "tp_group", None))
        with as_refusals():
            _refuse_other_divisions(layer, self.names)
            place = layout_of(
                layer, self.names, input_size_per_partition, output_partition_sizes, input_size, output_size, self.group_size, rank
            )
        self.make_parameters(layer, place, params_dtype)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Also refused here: --load-format dummy, and loaders that copy parameters from memory. Nothing has been counted then."""
        with as_refusals():
            self.arrivals.complete()
            self.require_claimed(get_parallel().pp_size == 1)
        self.finish(layer, _log)

    def restore_weights_before_loading(self, layer: torch.nn.Module) -> None:
        """SGLang is about to load other weights into the same model: what was dropped must be there to be loaded."""
        shape = self.format.shape_from
        if not hasattr(layer, shape):
            device = getattr(layer, self.scales).device
            self._register(layer, shape, torch.empty(2, dtype=torch.int64, device=device))


def _refuse_other_divisions(layer: torch.nn.Module, names: Sequence[str]) -> None:
    """BadInput E302 where not each device takes the part of its rank out of whole tensors."""
    where = ", ".join(names)
    if getattr(layer, "use_presharded_weights", False):
        raise BadInput("E302", "SGLang takes these weights for divided already", where=where, fix=INSTEAD)
    if getattr(layer, "kv_tp_group", None) is not getattr(layer, "tp_group", None) and hasattr(layer, "kv_tp_group"):
        raise BadInput("E302", "SGLang divides keys and values otherwise than queries here", where=where, fix=INSTEAD)
