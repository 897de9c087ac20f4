"""The few names of SGLang 0.5.23 that the plugin uses, with the signatures and the behaviour that it relies on. SGLang is not installed.

Written after its sources: srt/plugins, srt/model_loader, srt/layers/linear.py, vocab_parallel_embedding.py and quantization beside it.
Where a class has more arguments than the plugin meets, they are left out. It has not been compared with a running SGLang.
"""

from __future__ import annotations

import importlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

OURS = ("config", "method", "plugin")  # import SGLang, or keep what it was told


@dataclass(frozen=True)
class Group:
    """GroupCoordinator"""

    rank_in_group: int
    world_size: int


class Sglang(SimpleNamespace):
    """What a test may turn: tp and kv groups, pp_size; and what was registered."""


_state = Sglang(group=None, kv_group=None, pp_size=1)


def get_group_rank_size(group: Group | None) -> tuple[int, int]:
    return (0, 1) if group is None else (group.rank_in_group, group.world_size)


# ---- srt/layers/quantization/base_config.py -----------------------------------------------------------------------------------------


class QuantizeMethodBase(ABC):
    def create_weights(self, layer: nn.Module, *weight_args: Any, **extra_weight_attrs: Any) -> None:
        raise NotImplementedError

    @abstractmethod
    def apply(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Tensor: ...

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        return

    def restore_weights_before_loading(self, layer: nn.Module) -> None:
        return


class LinearMethodBase(QuantizeMethodBase):
    @abstractmethod
    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor: ...


class QuantizationConfig(ABC):
    def __init__(self) -> None:
        super().__init__()
        self.packed_modules_mapping: dict[str, list[str]] = {}

    @abstractmethod
    def get_name(self) -> str: ...

    @abstractmethod
    def get_supported_act_dtypes(self) -> list[torch.dtype]: ...

    @classmethod
    @abstractmethod
    def get_min_capability(cls) -> int: ...

    @staticmethod
    @abstractmethod
    def get_config_filenames() -> list[str]: ...

    @classmethod
    @abstractmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizationConfig: ...

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: Any, user_quant: Any) -> str | None:
        return None

    @abstractmethod
    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None: ...

    @abstractmethod
    def get_scaled_act_names(self) -> list[str]: ...


class UnquantizedLinearMethod(LinearMethodBase):
    def create_weights(
        self, layer: nn.Module, input_size_per_partition: int, output_partition_sizes: list[int], input_size: int, output_size: int,
        params_dtype: torch.dtype, **extra_weight_attrs: Any,
    ) -> None:  # fmt: skip
        shape = (sum(output_partition_sizes), input_size_per_partition)
        layer.register_parameter("weight", Parameter(torch.empty(shape, dtype=params_dtype), requires_grad=False))
        layer.weight.weight_loader = extra_weight_attrs["weight_loader"]  # type: ignore[union-attr]

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return nn.functional.linear(x, layer.weight, bias)  # type: ignore[arg-type]


# ---- srt/layers/linear.py -----------------------------------------------------------------------------------------------------------


class LinearBase(nn.Module):
    tp_group: Group | None = None

    def __init__(
        self, input_size: int, output_size: int, skip_bias_add: bool = False, params_dtype: torch.dtype | None = None,
        quant_config: Any = None, prefix: str = "",
    ) -> None:  # fmt: skip
        super().__init__()
        self.input_size, self.output_size, self.params_dtype = input_size, output_size, params_dtype or torch.float16
        self.quant_method = UnquantizedLinearMethod() if quant_config is None else quant_config.get_quant_method(self, prefix=prefix)

    def _create(self, inputs: int, outputs: list[int]) -> None:
        self.quant_method.create_weights(
            layer=self, input_size_per_partition=inputs, output_partition_sizes=outputs, input_size=self.input_size,
            output_size=self.output_size, params_dtype=self.params_dtype, skip_block_quant_check=False, weight_loader=self.weight_loader,
        )  # fmt: skip

    def weight_loader(self, param: Parameter, loaded_weight: Tensor, *_: Any) -> None:
        assert param.shape == loaded_weight.shape  # 16-bit linears of the tests are not divided
        param.data.copy_(loaded_weight)


class ReplicatedLinear(LinearBase):
    def __init__(self, input_size: int, output_size: int, bias: bool = True, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__(input_size, output_size, False, None, quant_config, prefix=prefix)
        self._create(input_size, [output_size])


class ColumnParallelLinear(LinearBase):
    use_presharded_weights = False

    def _initialize_partition(self, input_size: int, output_size: int, quant_config: Any, prefix: str, tp_group: Group | None) -> None:
        self.tp_group = tp_group
        LinearBase.__init__(self, input_size, output_size, False, None, quant_config, prefix)
        _, tp_size = get_group_rank_size(tp_group)
        sizes = getattr(self, "output_sizes", [output_size])
        assert all(size % tp_size == 0 for size in sizes)
        self._create(input_size, [size // tp_size for size in sizes])


class MergedColumnParallelLinear(ColumnParallelLinear):
    def __init__(self, input_size: int, output_sizes: list[int], bias: bool = True, quant_config: Any = None, prefix: str = "") -> None:
        self.output_sizes = output_sizes
        self._initialize_partition(input_size, sum(output_sizes), quant_config, prefix, _state.group)


class QKVParallelLinear(ColumnParallelLinear):
    def __init__(
        self, hidden_size: int, head_size: int, total_num_heads: int, total_num_kv_heads: int | None = None, bias: bool = True,
        quant_config: Any = None, prefix: str = "", *, load_presharded_attn: bool = False,
    ) -> None:  # fmt: skip
        tp_group = _state.group
        self.kv_tp_group = tp_group if _state.kv_group is None else _state.kv_group
        _, tp_size = get_group_rank_size(tp_group)
        _, kv_tp_size = get_group_rank_size(self.kv_tp_group)
        total_num_kv_heads = total_num_kv_heads or total_num_heads
        num_heads = total_num_heads // tp_size
        if kv_tp_size >= total_num_kv_heads:
            num_kv_heads, self.num_kv_head_replicas = 1, kv_tp_size // total_num_kv_heads
        else:
            num_kv_heads, self.num_kv_head_replicas = total_num_kv_heads // kv_tp_size, 1
        self.output_sizes = [one * head_size * tp_size for one in (num_heads, num_kv_heads, num_kv_heads)]
        self.use_presharded_weights = load_presharded_attn
        self._initialize_partition(hidden_size, sum(self.output_sizes), quant_config, prefix, tp_group)


class RowParallelLinear(LinearBase):
    def __init__(self, input_size: int, output_size: int, bias: bool = True, quant_config: Any = None, prefix: str = "") -> None:
        self.tp_group = _state.group
        super().__init__(input_size, output_size, False, None, quant_config, prefix)
        _, tp_size = get_group_rank_size(self.tp_group)
        assert input_size % tp_size == 0
        self._create(input_size // tp_size, [output_size])


# ---- srt/layers/vocab_parallel_embedding.py -----------------------------------------------------------------------------------------


class UnquantizedEmbeddingMethod(UnquantizedLinearMethod):
    def embedding(self, layer: nn.Module, input_: Tensor) -> Tensor:
        return nn.functional.embedding(input_, layer.weight)  # type: ignore[arg-type]


class VocabParallelEmbedding(nn.Module):
    def __init__(
        self, num_embeddings: int, embedding_dim: int, *, padding_size: int = 64, quant_config: Any = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.tp_group = _state.group
        _, self.tp_size = get_group_rank_size(self.tp_group)
        self.org_vocab_size = num_embeddings
        if -(-num_embeddings // padding_size) * padding_size % self.tp_size:
            padding_size *= self.tp_size
        padded = -(-num_embeddings // padding_size) * padding_size
        method = None if quant_config is None else quant_config.get_quant_method(self, prefix=prefix)
        self.quant_method = UnquantizedEmbeddingMethod() if method is None else method
        if type(self) is VocabParallelEmbedding and not hasattr(type(self.quant_method), "embedding"):
            raise NotImplementedError
        self.quant_method.create_weights(
            self,
            embedding_dim,
            [padded // self.tp_size],
            embedding_dim,
            padded,
            params_dtype=torch.float16,
            weight_loader=self.weight_loader,
        )

    def weight_loader(self, param: Parameter, loaded_weight: Tensor) -> None:
        rank, _ = get_group_rank_size(self.tp_group)
        here = loaded_weight[rank * len(param) : (rank + 1) * len(param)]
        param.data[: len(here)].copy_(here)
        param.data[len(here) :].fill_(0)


class ParallelLMHead(VocabParallelEmbedding):
    pass


# ---- srt/models/utils.py, srt/models/llama.py, srt/model_loader ---------------------------------------------------------------------


@dataclass
class WeightsMapper:
    orig_to_new_prefix: dict[str, str] = field(default_factory=dict)

    def _map_name(self, key: str) -> str:
        for prefix, new in self.orig_to_new_prefix.items():
            if key.startswith(prefix):
                return key.replace(prefix, new, 1)
        return key

    def apply_list(self, values: list[str]) -> list[str]:
        return [self._map_name(name) for name in values]

    def apply_dict(self, values: dict[str, Any]) -> dict[str, Any]:
        return {self._map_name(name): value for name, value in values.items()}


STACKED = (
    ("qkv_proj", "q_proj", "q"), ("qkv_proj", "k_proj", "k"), ("qkv_proj", "v_proj", "v"),
    ("gate_up_proj", "gate_proj", 0), ("gate_up_proj", "up_proj", 1),
)  # fmt: skip


class Model(nn.Module):
    """The linears of LlamaForCausalLM, by its names; no forward pass."""

    def __init__(self, config: Mapping[str, Any], quant_config: Any, blocks: Iterable[int] | None = None) -> None:
        super().__init__()
        hidden, heads, inner = config["hidden_size"], config["num_attention_heads"], config["intermediate_size"]
        self.linears = nn.ModuleDict()
        self.names: dict[str, str] = {}
        for i in range(config["num_hidden_layers"]) if blocks is None else blocks:
            p, given = f"model.layers.{i}.", {"bias": False, "quant_config": quant_config}
            attention, kv = p + "self_attn.", config["num_key_value_heads"]
            self._add(QKVParallelLinear(hidden, hidden // heads, heads, kv, prefix=attention + "qkv_proj", **given), attention + "qkv_proj")
            self._add(RowParallelLinear(hidden, hidden, prefix=attention + "o_proj", **given), attention + "o_proj")
            self._add(MergedColumnParallelLinear(hidden, [inner] * 2, prefix=p + "mlp.gate_up_proj", **given), p + "mlp.gate_up_proj")
            self._add(RowParallelLinear(inner, hidden, prefix=p + "mlp.down_proj", **given), p + "mlp.down_proj")
        self._add(
            VocabParallelEmbedding(config["vocab_size"], hidden, quant_config=quant_config, prefix="model.embed_tokens"),
            "model.embed_tokens",
        )
        if not config["tie_word_embeddings"]:
            self._add(ParallelLMHead(config["vocab_size"], hidden, quant_config=quant_config, prefix="lm_head"), "lm_head")

    def _add(self, module: nn.Module, name: str) -> None:
        self.names[name] = name.replace(".", "/")
        self.linears[self.names[name]] = module

    def __call__(self, name: str) -> Any:
        return self.linears[self.names[name]]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """StackedParamsDispatch.try_load and LlamaForCausalLM.load_weights: what has no parameter is skipped without a word."""
        parameters = {f"{name}.{key}": value for name in self.names for key, value in self(name).named_parameters()}
        for name, tensor in weights:
            for fused, source, shard in STACKED:
                if source in name:
                    param = parameters.get(name.replace(source, fused))
                    if param is not None:
                        param.weight_loader(param, tensor, shard)
                    break
            else:
                if name in parameters:
                    parameters[name].weight_loader(parameters[name], tensor)

    def process(self) -> None:
        """load_weights_and_postprocess"""
        for module in map(self, self.names):
            module.quant_method.process_weights_after_loading(module)

    def restore(self) -> None:
        for module in map(self, self.names):
            module.quant_method.restore_weights_before_loading(module)


def get_quant_config(cls: Any, block: Mapping[str, Any], folder: str) -> Any:
    """srt/model_loader/weight_utils.py"""
    given = deepcopy(dict(block))
    given["packed_modules_mapping"] = {}
    given["hf_config"] = SimpleNamespace(_name_or_path=folder)
    return cls.from_config(given)


# ---- all of it, importable ----------------------------------------------------------------------------------------------------------


@contextmanager
def installed() -> Iterator[Sglang]:
    """SGLang is importable, and our modules that import it are new; afterwards both are gone."""
    _state.group, _state.kv_group, _state.pp_size = None, None, 1
    _state.methods, _state.choices = {"fp8": object}, ["fp8"]
    srt = "sglang.srt"
    contents: dict[str, dict[str, Any]] = {
        "sglang": {},
        srt: {},
        f"{srt}.arg_groups": {},
        f"{srt}.arg_groups.choices": {
            "QUANTIZATION_CHOICES": _state.choices,
            "add_quantization_method_choices": _state.choices.extend,
        },
        f"{srt}.distributed": {},
        f"{srt}.distributed.utils": {"get_group_rank_size": get_group_rank_size},
        f"{srt}.runtime_context": {"get_parallel": lambda: _state},
        f"{srt}.models": {},
        f"{srt}.models.utils": {"WeightsMapper": WeightsMapper},
        f"{srt}.layers": {},
        f"{srt}.layers.linear": {"LinearBase": LinearBase},
        f"{srt}.layers.vocab_parallel_embedding": {"ParallelLMHead": ParallelLMHead},
        f"{srt}.layers.quantization": {"QUANTIZATION_METHODS": _state.methods},
        f"{srt}.layers.quantization.base_config": {
            "QuantizationConfig": QuantizationConfig,
            "QuantizeMethodBase": QuantizeMethodBase,
            "LinearMethodBase": LinearMethodBase,
        },
        f"{srt}.layers.quantization.unquant": {"UnquantizedLinearMethod": UnquantizedLinearMethod},
    }
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "sglang" or _ours(name)}
    _forget()
    for name, names in contents.items():
        module = ModuleType(name)
        vars(module).update(names)
        module.__path__ = []
        sys.modules[name] = module
    _state.module_of = lambda name: importlib.import_module(f"marlinctl.serve.sglang.{name}")
    try:
        yield _state
    finally:
        _forget()
        sys.modules.update(before)


def _forget() -> None:
    """A module is an attribute of its package too, which `from package import module` asks first."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "sglang" or _ours(name)]:
        del sys.modules[name]
    for name in OURS:
        vars(importlib.import_module("marlinctl.serve.sglang")).pop(name, None)


def _ours(name: str) -> bool:
    return name.removeprefix("marlinctl.serve.sglang.") in OURS and name.startswith("marlinctl.serve.sglang.")
