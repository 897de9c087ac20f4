"""A linear kernel for the 4-bit checkpoints that vLLM loads itself: GPTQ and compressed-tensors, symmetric, without activation order.

vLLM loads words, K/8 to a column or to a row, with a scale for each group. When all are there they become tiles, on the GPU, and the words
are dropped: a word keeps its bits, so that nothing is rounded. vLLM asks its kernels in order which of them takes a linear; the first that
does multiplies it. Ours is asked first, and says no to whatever it has no measured kernel for.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import vllm.envs as envs
from torch import Tensor
from vllm.model_executor.kernels.linear import _POSSIBLE_KERNELS, register_linear_kernel
from vllm.model_executor.kernels.linear.mixed_precision import MPLinearKernel, MPLinearLayerConfig
from vllm.platforms import PlatformEnum, current_platform
from vllm.scalar_type import scalar_types

from marlinctl.kernels import dispatch
from marlinctl.kernels.configurations import GROUP_SIZES, NUMBERS
from marlinctl.kernels.functions import architecture_for, require_driver
from marlinctl.kernels.jit import CompilerMissing, DriverTooOld
from marlinctl.kernels.ops import marlin_gemm
from marlinctl.kernels.prepare import Multiplied
from marlinctl.kernels.repack import repack
from marlinctl.pack.marlin import order_scales
from marlinctl.pack.types import PAD_TO
from marlinctl.serve.native import products
from marlinctl.serve.native.refusals import Refused
from marlinctl.serve.vllm import cache_key

_log = logging.getLogger("vllm.marlinctl")  # below vLLM's own


class MarlinctlLinearKernel(MPLinearKernel):
    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        why = _misfit(c) or _no_kernels_here()
        return why is None, why

    def __init__(self, c: MPLinearLayerConfig, *names: Any, **named: Any) -> None:
        super().__init__(c, *names, **named)
        self.in_features, self.out_features = c.partition_weight_shape
        self.group_size = -1 if c.group_size == self.in_features else c.group_size
        products.expect(Multiplied(False, self.out_features, self.in_features, self.group_size, c.act_type))
        cache_key.note(f"words [{self.out_features}, {self.in_features}] {self.group_size} {c.act_type}")

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        self._transform_param(layer, self.w_q_name, lambda words: repack(_inputs_first(words)))
        self._transform_param(layer, self.w_s_name, self._scales)
        products.compile_expected(getattr(layer, self.w_s_name).device, _log)

    def _scales(self, parameter: Any) -> Tensor:
        """Kernels read float16. bfloat16 has fewer bits of a number and more of its size: below 6e-5 a bit or more is lost."""
        scales = _inputs_first(parameter).to(torch.float16)
        if not bool(torch.isfinite(scales).all()):
            raise Refused(
                f"a scale of {self.w_s_name} [{self.out_features}, {self.in_features}] is not finite in float16; "
                "serve the model with VLLM_DISABLED_KERNELS=MarlinctlLinearKernel"
            )
        return order_scales(scales, channel_wise=self.group_size == -1)

    def apply_weights(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        qweight, scales, _, _ = self._get_weight_params(layer)
        out: Tensor = marlin_gemm(x, qweight, scales, self.out_features, self.group_size, bias, True)
        return out


def put_in_front() -> None:
    """Before all kernels for CUDA. Called again, it changes nothing."""
    kernels = _POSSIBLE_KERNELS[PlatformEnum.CUDA]
    if MarlinctlLinearKernel not in kernels:
        register_linear_kernel(MarlinctlLinearKernel, PlatformEnum.CUDA, "mp")
        kernels.remove(MarlinctlLinearKernel)
        kernels.insert(0, MarlinctlLinearKernel)


def _inputs_first(parameter: Any) -> Tensor:
    """[K.., N], whichever way vLLM keeps it: compressed-tensors has outputs first."""
    return parameter.data.T if parameter.output_dim == 0 else parameter.data


def _misfit(c: MPLinearLayerConfig) -> str | None:
    """What of a linear our kernels have no place for."""
    k, n = c.partition_weight_shape
    if c.weight_type != scalar_types.uint4b8:
        return f"weights are {c.weight_type}, and marlinctl has symmetric 4-bit kernels (uint4b8)"
    if c.zero_points:
        return "it has zero points"
    if c.has_g_idx:
        return "its inputs are in activation order (g_idx)"
    if c.act_type not in NUMBERS or c.out_type not in (None, c.act_type):
        return f"activations are {c.act_type}, and marlinctl has float16 and bfloat16"
    if c.group_size not in (-1, *GROUP_SIZES):
        return f"groups of {c.group_size}; marlinctl has {', '.join(map(str, GROUP_SIZES))} and whole rows"
    if k % PAD_TO or n % PAD_TO:
        return f"[{n}, {k}] on this device is not a multiple of {PAD_TO} both ways"
    if c.group_size != -1 and k % c.group_size:
        return f"{k} inputs on this device cut a group of {c.group_size}"
    return None


def _no_kernels_here() -> str | None:
    """Why not on this machine, whatever the linear."""
    if envs.VLLM_BATCH_INVARIANT:
        return "the order of its sums depends on the batch (VLLM_BATCH_INVARIANT)"
    if envs.VLLM_MARLIN_INPUT_DTYPE:
        return f"VLLM_MARLIN_INPUT_DTYPE={envs.VLLM_MARLIN_INPUT_DTYPE} asks for vLLM's Marlin"
    capability = current_platform.get_device_capability()
    if not current_platform.is_cuda() or capability is None:
        return "it needs CUDA"
    architecture = architecture_for(capability.major, capability.minor)
    if architecture is None:
        return f"marlinctl has no kernels for compute capability {capability.major}.{capability.minor}"
    if (architecture, dispatch.KINDS[False]) not in dispatch.tables():
        return (
            f"marlinctl's kernels were not measured on {architecture}, so whether they are faster is not known (`marlinctl bench --tune`)"
        )
    try:
        require_driver()
    except (CompilerMissing, DriverTooOld) as error:
        return f"its kernels cannot be compiled here: {error}"
    return None
