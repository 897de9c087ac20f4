"""The quantization method `marlinctl` in a vLLM that we do not know: it says so when a native folder is opened."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from marlinctl.serve.native.refusals import Refused


def refusing_config(why: str) -> type[QuantizationConfig]:
    class RefusingConfig(QuantizationConfig):
        """Of all that vLLM asks, `from_config` comes first."""

        @classmethod
        def get_name(cls) -> str:
            return "marlinctl"

        @classmethod
        def get_supported_act_dtypes(cls) -> list[Any]:
            return []

        @classmethod
        def get_min_capability(cls) -> int:
            return 0

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> QuantizationConfig:
            raise Refused(f"this folder holds tiles of marlinctl's kernels, and {why}; or `marlinctl pack FOLDER OUT --format ct`")

        def get_quant_method(self, layer: Any, prefix: str) -> None:
            return None

    return RefusingConfig
