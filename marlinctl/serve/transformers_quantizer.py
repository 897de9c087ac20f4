"""Native folders in transformers: AutoModelForCausalLM.from_pretrained(folder) with linears that stay packed.

    config.json: quant_method marlinctl ─► MarlinctlConfig, MarlinctlQuantizer, by transformers' own registry
    before files are looked for         ─► config.transformers_weights: our index, as native shards are not called model*.safetensors
    before weights are loaded           ─► every packed linear of the folder becomes a MarlinLinear or SparseMarlinLinear, without memory
    transformers loads                  ─► buffers by name: B, s, .., each with the dtype that it has on disk
    after that                          ─► anything missing, left over or of another shape is an error, and so is 2:4 metadata that
                                           the hardware has no meaning for: kernels do not look, and compute with whatever it does

transformers alone would warn, fill what is missing with random numbers, and continue. Importing this module registers; importing
marlinctl imports it as soon as transformers' registry is there (marlinctl/__init__.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from marlinctl.checkpoint.formats import registry
from marlinctl.checkpoint.formats.base import NATIVE_FILES, Format
from marlinctl.checkpoint.transformers_model import refuse_incomplete
from marlinctl.errors import BadInput, Problem

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from marlinctl.checkpoint.reader import Checkpoint
    from marlinctl.pack.types import PackedLinear, PackedSparseLinear

METHOD = "marlinctl"
_AGAIN = "config.json and weights do not belong together, or the copy is incomplete; fetch or write the folder again"


@register_quantization_config(METHOD)
class MarlinctlConfig(QuantizationConfigMixin):
    """The quantization_config of a native folder, kept as it is; formats.py reads it."""

    def __init__(self, **block: Any) -> None:
        self.__dict__.update(block)
        self.quant_method = METHOD


@register_quantizer(METHOD)
class MarlinctlQuantizer(HfQuantizer):
    """Puts packed linears into a model that has no weights yet, and sees to it that all of them arrive."""

    requires_calibration = True  # a model that is not packed yet is not packed here

    def update_attn_implementation(self, config: Any) -> Any:
        """transformers hands the config over here before it looks for files, and nowhere else: the place to name ours."""
        config.transformers_weights = f"{NATIVE_FILES}.safetensors.index.json"
        return config

    update_tp_plan = update_attn_implementation  # where 5.17 hands it over

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        import torch

        if dtype not in (torch.float16, torch.bfloat16):
            fix = "from_pretrained(folder, dtype=torch.bfloat16) or float16; marlinctl.api.load dequantizes to float32"
            raise BadInput("E313", f"packed linears compute in float16 or bfloat16, not in {dtype}", where="from_pretrained", fix=fix)
        return dtype

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> PreTrainedModel:
        from marlinctl.checkpoint.reader import open_checkpoint

        if not checkpoint_files:
            raise BadInput("E302", "a packed model is loaded from its folder alone", where="from_pretrained", fix="name the folder")
        folder = Path(checkpoint_files[0]).parent
        with open_checkpoint(folder, weight_files=NATIVE_FILES) as checkpoint:
            _put_packed_linears(model, checkpoint)
        model._adjust_missing_and_unexpected_keys = partial(_refuse, model, folder, model._adjust_missing_and_unexpected_keys)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        from marlinctl.kernels.linear import MarlinLinear, SparseMarlinLinear

        del model.config.transformers_weights  # it said where the weights are, not what the model is
        for module in model.modules():
            if isinstance(module, MarlinLinear | SparseMarlinLinear) and module.s.is_meta:  # left on the disk by device_map
                module.keeps_tiles = True
            elif isinstance(module, MarlinLinear | SparseMarlinLinear) and module.s.is_cuda:
                module.split_scales()
        return model

    def is_serializable(self) -> bool:
        """save_pretrained would call the files model*.safetensors, and plain transformers would load them at random."""
        return False

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def _refuse(model: PreTrainedModel, folder: Path, adjust: Any, loading_info: Any) -> None:
    """In the place of a method that knows at last what was missing and left over, once what the model says is harmless is off the lists."""
    del model._adjust_missing_and_unexpected_keys  # the method of the class is back
    adjust(loading_info)
    refuse_incomplete(folder, loading_info.to_dict())
    _refuse_metadata(model, folder)


def _refuse_metadata(model: nn.Module, folder: Path) -> None:
    """BadInput E346 lists the 2:4 linears whose metadata no kernel may see. Each is read once, on the device where it lies.

    What transformers leaves on the disk (device_map) has no memory yet, and is read from there.
    """
    from marlinctl.checkpoint.reader import open_checkpoint
    from marlinctl.kernels.linear import SparseMarlinLinear
    from marlinctl.pack.sparse_marlin import check_metadata

    sparse = {f"{layer}.B_meta": module for layer, module in model.named_modules() if isinstance(module, SparseMarlinLinear)}
    problems = []
    with open_checkpoint(folder, weight_files=NATIVE_FILES) as checkpoint:
        for name, module in sparse.items():
            try:
                check_metadata(checkpoint.read(name) if module.B_meta.is_meta else module.B_meta)
            except ValueError as problem:
                fix = "the file is damaged; fetch or write it again"
                problems.append(Problem(f"{name}: {problem}", str(checkpoint.tensors[name].file), fix))
    if problems:
        raise BadInput.from_problems("E346", problems)


def _put_packed_linears(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Every linear that the folder has packed, without memory. BadInput lists what does not fit the model."""
    from torch import nn

    from marlinctl.kernels.linear import packed_module

    info = registry.detect(checkpoint.config, checkpoint.tensors)
    modules = dict(model.named_modules())
    problems: list[Problem] = []
    paths = _paths(model, [layer for layer in info.layers if layer not in modules])
    for layer, group_size in info.layers.items():
        n, k = registry.layer_shape(checkpoint, info, layer)
        path = paths.get(layer, layer)
        linear = modules.get(path)
        if not isinstance(linear, nn.Linear):
            what = f"the model has no linear {layer}, which the folder has packed"
            fix = "experts that transformers fuses into one tensor cannot stay packed: `marlinctl pack FOLDER OUT --format ct`"
            problems.append(Problem(what, layer, fix))
        elif (linear.out_features, linear.in_features) != (n, k):
            shape = [linear.out_features, linear.in_features]
            problems.append(Problem(f"{layer} is [{n}, {k}] in the folder and {shape} in the model", layer, _AGAIN))
        elif not (wrong := _wrong_tensors(checkpoint, info.format, layer, n, k, group_size)):
            packed = _without_memory(info.format, n, k, group_size)
            _replace(model, path, packed_module(packed, linear.bias, info.rounding.get(layer, "none")))
        else:
            problems += wrong
    for name, tensor in model.state_dict().items():  # transformers 5.17 takes any shape into a quantized model
        found = checkpoint.tensors.get(name)
        if found is not None and tuple(found.shape) != tuple(tensor.shape):
            what = f"{name} is {list(found.shape)} in the folder and {list(tensor.shape)} in the model"
            problems.append(Problem(what, str(found.file), _AGAIN))
    if problems:
        raise BadInput.from_problems("E302", problems)


def _paths(model: PreTrainedModel, layers: Sequence[str]) -> dict[str, str]:
    """Linears that the model calls otherwise than the folder -> their paths: transformers renames tensors when it loads."""
    from marlinctl.models.stored_names import module_names

    found = module_names(model, model.state_dict(), [f"{layer}.weight" for layer in layers]) if layers else {}
    return {name.removesuffix(".weight"): loaded.name.removesuffix(".weight") for name, loaded in found.items() if not loaded.converted}


def _wrong_tensors(checkpoint: Checkpoint, fmt: Format, layer: str, n: int, k: int, group_size: int) -> list[Problem]:
    problems = []
    for suffix, (dtypes, shape) in fmt.shapes(n, k, group_size).items():
        found = checkpoint.tensors.get(f"{layer}.{suffix}")
        if found is None:
            problems.append(Problem(f"the model needs {layer}.{suffix}, which the checkpoint lacks", str(checkpoint.folder), _AGAIN))
        elif found.dtype not in dtypes or tuple(found.shape) != shape:
            what = f"{layer}.{suffix} is {found.dtype} {list(found.shape)}, expected {' or '.join(dtypes)} {list(shape)}"
            problems.append(Problem(what, str(found.file), _AGAIN))
    return problems


def _without_memory(fmt: Format, n: int, k: int, group_size: int) -> PackedLinear | PackedSparseLinear:
    import torch

    from marlinctl.checkpoint.reader import dtype_called

    shapes = fmt.shapes(n, k, group_size).items()
    empty = {suffix: torch.empty(shape, dtype=dtype_called(dtypes[0]), device="meta") for suffix, (dtypes, shape) in shapes}
    assert fmt.tiles is not None
    return fmt.tiles(empty, n, k, group_size)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
