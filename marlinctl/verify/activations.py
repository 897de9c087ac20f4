"""Activations of 8 bits in transformers: whether it rounds what enters the linears that the folder says, and a model that does not.

Logits of two models that round are not compared: a difference in the last bit of a sum moves a code that lies on a tie, and that moved
logits by 1e-3 to 3e-2 (a Llama of 2 blocks, 2026-11).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from marlinctl.checkpoint.formats import registry
from marlinctl.errors import Problem

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from marlinctl.checkpoint.reader import Checkpoint


def turn_off(client: nn.Module) -> dict[str, str]:
    """Let a model of compressed-tensors compute with 16-bit activations. Returns which linears rounded theirs, by path: `int8`, `fp8`, or
    the whole of a scheme that is not marlinctl's."""
    found = {}
    for path, module in client.named_modules():
        inputs = getattr(getattr(module, "quantization_scheme", None), "input_activations", None)
        if inputs is not None:
            module.quantization_enabled = False
            ours = (inputs.num_bits, inputs.dynamic, inputs.symmetric, inputs.strategy) == (8, True, True, "token")
            found[path] = ("fp8" if inputs.type == "float" else "int8") if ours else str(inputs)
    return found


def different(ours: PreTrainedModel, rounding: Mapping[str, str], checkpoint: Checkpoint, *, fix: str) -> list[Problem]:
    """The linears whose input transformers rounds otherwise than the folder says."""
    from marlinctl.checkpoint.transformers_model import rounded_linears

    wanted: Mapping[str, str] = rounded_linears(ours, registry.detect(checkpoint.config, checkpoint.tensors))
    paths = [path for path in sorted({*rounding, *wanted}) if rounding.get(path) != wanted.get(path)]
    what = (
        f"{path}: transformers has {rounding.get(path, '16-bit')} activations, the folder {wanted.get(path, '16-bit')} ones"
        for path in paths
    )
    return [Problem(line, str(checkpoint.folder), fix) for line in what]
