"""The few names of vLLM 0.26.0 that the plugin uses, with the behaviour that it relies on. vLLM itself is not installed where tests run.

What is here was read from vLLM's sources. Whether the real classes still behave so, a run on a GPU says (benchmarks/vllm_serve.py).
"""

from __future__ import annotations

import enum
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter

OURS = ("config", "method", "linear_kernel", "cache_key", "plugin")  # import vLLM, or keep what it was told


class Platform(enum.Enum):
    CUDA = "cuda"
    CPU = "cpu"


@dataclass
class Mapper:
    """vLLM's WeightsMapper: names of a checkpoint to those of a model."""

    orig_to_new_prefix: dict[str, str | None] = field(default_factory=dict)
    orig_to_new_suffix: dict[str, str | None] = field(default_factory=dict)

    def __or__(self, other: Mapper) -> Mapper:
        return Mapper(self.orig_to_new_prefix | other.orig_to_new_prefix, self.orig_to_new_suffix | other.orig_to_new_suffix)

    def apply_dict(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {new: value for name, value in values.items() if (new := self._map(name)) is not None}

    def apply_list(self, values: list[str]) -> list[str]:
        return [new for name in values if (new := self._map(name)) is not None]

    def _map(self, name: str) -> str | None:
        for old, new in self.orig_to_new_prefix.items():
            if name.startswith(old):
                return None if new is None else new + name.removeprefix(old)
        return None if any(name.endswith(suffix) for suffix in self.orig_to_new_suffix) else name


class QuantizationConfig:
    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}

    @classmethod
    def override_quantization_method(cls, *_: Any, **__: Any) -> None:
        return None

    @staticmethod
    def get_cache_scale_mapper() -> Mapper:
        return Mapper()


class Linear(nn.Module):
    """LinearBase: asks its config for a method, and the method for parameters, as ColumnParallelLinear and RowParallelLinear do."""

    def __init__(
        self,
        config: Any,
        prefix: str,
        k: int,
        widths: list[int],
        *,
        devices: int = 1,
        rank: int = 0,
        rows: bool = False,
        replicas: int = 1,
        dtype: torch.dtype = torch.float16,
    ) -> None:
        """widths: outputs of each part on one device. rows: devices share the inputs, not the outputs."""
        super().__init__()
        self.tp_rank, self.prefix = rank, prefix
        if replicas > 1:
            self.num_kv_head_replicas = replicas
        self.quant_method = config.get_quant_method(self, prefix)
        inputs, outputs = (k // devices, sum(widths)) if rows else (k, sum(widths) * devices)
        self.quant_method.create_weights(
            layer=self,
            input_size_per_partition=inputs,
            output_partition_sizes=widths,
            input_size=k,
            output_size=outputs,
            params_dtype=dtype,
            weight_loader=None,
        )


class Head(nn.Module):
    """ParallelLMHead: rows are padded to 64 and divided among devices."""

    def __init__(self, config: Any, prefix: str, k: int, words: int, *, devices: int = 1) -> None:
        super().__init__()
        self.org_vocab_size = words
        self.quant_method = config.get_quant_method(self, prefix)
        padded = -(-words // 64) * 64
        if self.quant_method is not None:
            self.quant_method.create_weights(self, k, [padded // devices], k, padded, params_dtype=torch.float16, weight_loader=None)


class Unquantized:
    """UnquantizedLinearMethod"""

    def create_weights(self, layer: nn.Module, **_: Any) -> None:
        layer.weight = Parameter(torch.empty(0), requires_grad=False)


@dataclass
class MPLinearLayerConfig:
    full_weight_shape: tuple[int, int]
    partition_weight_shape: tuple[int, int]
    weight_type: Any
    act_type: torch.dtype
    group_size: int
    zero_points: bool
    has_g_idx: bool
    out_type: torch.dtype | None = None


class MPLinearKernel:
    def __init__(self, c: MPLinearLayerConfig, w_q_param_name: str, w_s_param_name: str, *_: Any) -> None:
        self.config, self.w_q_name, self.w_s_name = c, w_q_param_name, w_s_param_name

    def _transform_param(self, layer: nn.Module, name: str, fn: Callable[[Any], torch.Tensor]) -> None:
        new = fn(getattr(layer, name))
        delattr(layer, name)
        layer.register_parameter(name, Parameter(new, requires_grad=False))

    def _get_weight_params(self, layer: nn.Module) -> tuple[Any, Any, None, None]:
        return getattr(layer, self.w_q_name), getattr(layer, self.w_s_name), None, None


class Vllm(SimpleNamespace):
    """What a test may turn: rank, load_format, capability; and what was registered."""


@contextmanager
def installed(version: str = "0.26.0") -> Iterator[Vllm]:
    """vLLM is importable, and our modules that import it are new; afterwards both are gone."""
    state = Vllm(rank=0, load_format="auto", capability=(9, 0), methods={}, version=version)
    kernels: dict[Any, list[Any]] = {Platform.CUDA: [type("MacheteLinearKernel", (), {}), type("MarlinLinearKernel", (), {})]}
    platform = SimpleNamespace(
        is_cuda=lambda: state.capability is not None,
        get_device_capability=lambda: SimpleNamespace(major=state.capability[0], minor=state.capability[1]) if state.capability else None,
    )
    types = SimpleNamespace(uint4b8="uint4b8", uint4="uint4", uint8b128="uint8b128")

    def registering(method: str) -> Callable[[Any], Any]:
        def keep(cls: Any) -> Any:
            state.methods[method] = cls
            return cls

        return keep

    state.kernels, state.envs = (
        kernels[Platform.CUDA],
        SimpleNamespace(environment_variables={}, VLLM_BATCH_INVARIANT=False, VLLM_MARLIN_INPUT_DTYPE=None),
    )
    base = "vllm.model_executor"
    contents: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.envs": vars(state.envs),
        "vllm.config": {
            "get_current_vllm_config_or_none": lambda: SimpleNamespace(load_config=SimpleNamespace(load_format=state.load_format))
        },
        "vllm.distributed": {"get_tensor_model_parallel_rank": lambda: state.rank},
        "vllm.platforms": {"PlatformEnum": Platform, "current_platform": platform},
        "vllm.scalar_type": {"scalar_types": types},
        base: {},
        f"{base}.layers": {},
        f"{base}.layers.quantization": {"register_quantization_config": registering},
        f"{base}.layers.quantization.base_config": {"QuantizationConfig": QuantizationConfig, "QuantizeMethodBase": object},
        f"{base}.layers.linear": {"LinearBase": Linear, "LinearMethodBase": object, "UnquantizedLinearMethod": Unquantized},
        f"{base}.layers.vocab_parallel_embedding": {"ParallelLMHead": Head},
        f"{base}.models": {},
        f"{base}.models.utils": {"WeightsMapper": Mapper},
        f"{base}.kernels": {},
        f"{base}.kernels.linear": {
            "_POSSIBLE_KERNELS": kernels,
            "register_linear_kernel": lambda kernel, where, kind="mp": kernels[where].append(kernel),
        },
        f"{base}.kernels.linear.mixed_precision": {"MPLinearKernel": MPLinearKernel, "MPLinearLayerConfig": MPLinearLayerConfig},
    }
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "vllm" or _ours(name)}
    _forget()
    for name, names in contents.items():
        module = ModuleType(name)
        vars(module).update(names)
        module.__path__ = []
        sys.modules[name] = module
    state.module_of = lambda name: importlib.import_module(f"marlinctl.serve.vllm.{name}")
    state.envs = sys.modules["vllm.envs"]
    try:
        yield state
    finally:
        _forget()
        sys.modules.update(before)


def _forget() -> None:
    """A module is an attribute of its package too, which `from package import module` asks first."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm" or _ours(name)]:
        del sys.modules[name]
    for name in OURS:
        vars(importlib.import_module("marlinctl.serve.vllm")).pop(name, None)


def _ours(name: str) -> bool:
    return name.removeprefix("marlinctl.serve.vllm.") in OURS and name.startswith("marlinctl.serve.vllm.")
