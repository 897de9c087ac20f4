"""A transformers model from any folder that marlinctl reads: dense, ct, gptq or native, packed weights dequantized on the way in.

transformers gets a dictionary of tensors that do not exist yet: asked for one, it is read, unpacked and dequantized, and freed when it
has been copied into the model. So memory is the model in `dtype` plus one linear, and everything transformers does to checkpoints
(fusing the 2-D experts of a mixture into one 3-D parameter, tying the head) happens as for any other model.

Strict: a tensor the model needs and the folder lacks, or the reverse, is BadInput. transformers alone would fill it with random numbers
and continue.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from functools import partial
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marlinctl.checkpoint.formats import registry
from marlinctl.checkpoint.formats.base import EXPERTS, FormatInfo
from marlinctl.checkpoint.fused_experts import joined
from marlinctl.checkpoint.lazy import LazyTensor
from marlinctl.errors import BadInput, Problem
from marlinctl.models.guests import guests
from marlinctl.models.transformers_config import building, model_class, transformers_config
from marlinctl.system.launcher import settings_aside

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from marlinctl.checkpoint.reader import Checkpoint
    from marlinctl.quantize.activations import RoundedAs
    from marlinctl.quantize.scheme import RunWith


def load_dense(
    folder: Path, *, dtype: torch.dtype, device: str | torch.device = "cpu", activations: RunWith | None = None
) -> PreTrainedModel:
    """The model in eval mode, every linear dense in `dtype`: dequantized in fp32, then rounded once. Linears with 8-bit activations round
    what enters them, as servers do.

    activations: of all quantized linears but experts, whatever the folder says.
    """
    from marlinctl.checkpoint.reader import open_checkpoint
    from marlinctl.checkpoint.sixteen_bit import in_sixteen_bits

    with open_checkpoint(folder, weight_files="auto") as opened:
        checkpoint = in_sixteen_bits(opened)
        model = model_from(checkpoint, dense_tensors(checkpoint), dtype=dtype, device=device)
        return with_rounded_activations(model, registry.detect(checkpoint.config, checkpoint.tensors), activations)


def model_from(
    checkpoint: Checkpoint, tensors: Mapping[str, LazyTensor], *, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """A model of the checkpoint's config, filled with these tensors."""
    config = transformers_config(checkpoint.config, checkpoint.folder)
    tensors = joined(checkpoint, tensors)
    where = str(checkpoint.folder / "config.json")
    made_of = model_class(config, where)  # the Auto class insists on a folder or a name
    with building(where), quietly(), settings_aside():  # transformers must load the weights in every process
        model, info = made_of.from_pretrained(
            None, config=config, state_dict=dict(tensors), dtype=dtype, device_map={"": str(device)}, output_loading_info=True,
            ignore_mismatched_sizes=True,  # else the first one raises; they are all refused below
        )  # fmt: skip
    info["unexpected_keys"] = strangers(model, info, checkpoint.config) - _idle_biases(checkpoint, info["unexpected_keys"])
    refuse_incomplete(checkpoint.folder, info)
    return model.eval()


def with_rounded_activations(model: PreTrainedModel, info: FormatInfo, activations: RunWith | None = None) -> PreTrainedModel:
    """The model, whose linears with 8-bit activations now round them. activations: as `load_dense` has it."""
    from marlinctl.quantize.activations import round_activations

    round_activations(model, rounded_linears(model, info, activations))
    return model


def rounded_linears(model: PreTrainedModel, info: FormatInfo, activations: RunWith | None = None) -> dict[str, RoundedAs]:
    """Which linears of the model have 8-bit activations, by path. activations: as `load_dense` has it."""
    from marlinctl.models.stored_names import module_names

    if activations is None:
        kinds = {layer: info.activations(layer) for layer in info.layers}
    else:
        kinds = {layer: activations for layer in info.layers if EXPERTS not in layer}
    rounding = {f"{layer}.weight": kind for layer, kind in kinds.items() if kind != "16-bit"}
    found = module_names(model, model.state_dict(), list(rounding)) if rounding else {}
    return {loaded.name.removesuffix(".weight"): rounding[name] for name, loaded in found.items()}


def strangers(model: PreTrainedModel, info: Mapping[str, Any], config: Mapping[str, Any]) -> set[str]:
    """The tensors that transformers had no place for and that are no guests of the model (models/guests.py)."""
    left = set(info["unexpected_keys"])
    return left - set(guests(left, model.state_dict().keys(), config))


def _idle_biases(checkpoint: Checkpoint, names: Iterable[str]) -> set[str]:
    """Biases of zeros, of packed linears: AutoGPTQ writes one for every linear (folder.py)."""
    layers = registry.detect(checkpoint.config, checkpoint.tensors).layers
    biases = {f"{layer}.bias" for layer in layers}
    return {name for name in names if name in biases and not any(checkpoint.raw(name))}


def dense_tensors(checkpoint: Checkpoint) -> dict[str, LazyTensor]:
    """Every tensor of the dense model by name, packed linears as P.weight."""
    info = registry.detect(checkpoint.config, checkpoint.tensors)
    owned = info.owned
    tensors = {name: LazyTensor(partial(checkpoint.read, name)) for name in checkpoint.tensors if name not in owned}
    tensors |= {f"{layer}.weight": LazyTensor(partial(_weight, checkpoint, info, layer)) for layer in info.layers}
    return tensors


def _weight(checkpoint: Checkpoint, info: FormatInfo, layer: str) -> Tensor:
    return registry.read_parts(checkpoint, info, layer).weight()


@contextmanager
def quietly() -> Iterator[StringIO]:
    """Without the progress bars that transformers and compressed-tensors draw on stderr; what they wrote is handed out instead."""
    with redirect_stderr(StringIO()) as messages:
        yield messages


def refuse_incomplete(folder: Path, info: Mapping[str, Any]) -> None:
    """BadInput E302 for what transformers' loading info lists as missing, left over or of another shape."""
    where = str(folder)
    apart = "config.json and weights do not belong together; fetch both again"
    mismatched = sorted(str(entry[0]) if isinstance(entry, tuple) else str(entry) for entry in info["mismatched_keys"])
    problems = [Problem(f"the model needs {name}, which the checkpoint lacks", where, apart) for name in sorted(info["missing_keys"])]
    problems += [Problem(f"the model has no place for the checkpoint's {name}", where, apart) for name in sorted(info["unexpected_keys"])]
    problems += [Problem(f"{name}: the model and the checkpoint disagree on its shape", where, apart) for name in mismatched]
    problems += [Problem(f"not loaded: {message}", where, apart) for message in info.get("error_msgs", [])]
    if problems:
        raise BadInput.from_problems("E302", problems)
