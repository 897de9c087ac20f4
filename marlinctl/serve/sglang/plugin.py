"""What SGLang calls in each of its processes before it parses arguments (`sglang.srt.plugins.load_plugins`).

The method `marlinctl` becomes a choice of --quantization, and config.json's quant_method finds it. Another release than the one that was
looked at gets a method of that name that refuses with its version; nothing else of SGLang is touched.

SGLang's list WEIGHT_LOADER_V2_SUPPORTED decides which of a layer's loaders a parameter is given. Ours have a loader of their own, so we are
not on it.
"""

from __future__ import annotations

import logging

from marlinctl.serve.sglang import versions
from marlinctl.system.after_import import after_import

METHOD = "marlinctl"  # quant_method of native folders
METHODS = "sglang.srt.layers.quantization"  # importing it takes seconds, and may need a GPU; SGLang does when it looks at a model
CHOICES = "sglang.srt.arg_groups.choices"
_log = logging.getLogger("sglang.marlinctl")
_registered: list[str] = []


def register() -> None:
    """The entry point."""
    if _registered:
        return
    found = versions.installed()
    why = versions.refusal(found)
    _registered.append(found or "")
    if why is not None:
        _log.warning("%s. Native folders are refused.", why)
    after_import(CHOICES, _add_choice)
    after_import(METHODS, lambda: _add_method(why))


def _add_choice() -> None:
    from sglang.srt.arg_groups.choices import QUANTIZATION_CHOICES, add_quantization_method_choices

    if METHOD not in QUANTIZATION_CHOICES:
        add_quantization_method_choices([METHOD])


def _add_method(why: str | None) -> None:
    from sglang.srt.layers.quantization import QUANTIZATION_METHODS

    if why is None:
        from marlinctl.serve.sglang.config import NativeConfig

        QUANTIZATION_METHODS[METHOD] = NativeConfig
    else:
        from sglang.srt.layers.quantization.base_config import QuantizationConfig

        from marlinctl.serve.native.config import refusing_config

        QUANTIZATION_METHODS[METHOD] = refusing_config(QuantizationConfig, why)
