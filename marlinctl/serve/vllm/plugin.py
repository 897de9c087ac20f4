"""What vLLM calls in each of its processes, as soon as it has parsed its arguments, and maybe more than once.

vLLM that we know     the quantization method marlinctl; in front of the linear kernels ours, when vLLM imports them
another vLLM          the method marlinctl refuses with vLLM's version; its own kernels stay as they are
"""

from __future__ import annotations

import logging

from marlinctl.serve.vllm import versions
from marlinctl.system.after_import import after_import

METHOD = "marlinctl"  # quant_method of native folders
KERNELS = "vllm.model_executor.kernels.linear"  # importing it takes seconds, and a model that is not quantized needs none of it
_log = logging.getLogger("vllm.marlinctl")  # below vLLM's own, which decides where lines go
_registered: list[str] = []


def register() -> None:
    """The entry point."""
    if _registered:
        return
    found = versions.installed()
    why = versions.refusal(found)
    _registered.append(found or "")
    if why is not None:
        _log.warning("%s. Native folders are refused, and vLLM's own kernels serve everything else.", why)
        _register_refusal(why)
        return
    from vllm.model_executor.layers.quantization import register_quantization_config

    from marlinctl.serve.vllm.config import NativeConfig

    register_quantization_config(METHOD)(NativeConfig)
    after_import(KERNELS, _register_kernel)


def _register_kernel() -> None:
    from marlinctl.serve.vllm.linear_kernel import put_in_front

    put_in_front()


def _register_refusal(why: str) -> None:
    """So that a native folder gets an answer, instead of "Unknown quantization method"."""
    try:
        from vllm.model_executor.layers.quantization import register_quantization_config
        from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
    except ImportError:  # so different that there is no place for an answer; vLLM will say that it does not know the method
        return
    from marlinctl.serve.native.config import refusing_config

    register_quantization_config(METHOD)(refusing_config(QuantizationConfig, why))
