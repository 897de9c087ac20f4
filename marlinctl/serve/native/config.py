"""What every server asks of a quantization config, and the config of a server whose release is not known."""

from __future__ import annotations

from typing import Any

import torch

from marlinctl.serve.native.refusals import Refused


class ConfigAnswers:
    """Comes before the server's own class among the bases."""

    @classmethod
    def get_name(cls) -> Any:
        return "marlinctl"

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def get_scaled_act_names(self) -> list[str]:
        """SGLang alone asks."""
        return []


def refusing_config(base: Any, why: str) -> Any:
    """A class of the method `marlinctl` that says why a native folder is not loaded. base: the server's QuantizationConfig."""

    class RefusingConfig(ConfigAnswers, base):
        """Of all that a server asks, `from_config` comes first."""

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> Any:
            raise Refused(f"this folder holds tiles of marlinctl's kernels, and {why}; or `marlinctl pack FOLDER OUT --format ct`")

        def get_quant_method(self, layer: Any, prefix: str) -> None:
            return None

    return RefusingConfig
