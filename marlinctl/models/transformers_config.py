"""config.json as transformers gets to see it: one way in, for the sequential pipeline, for loading and for tokenizers.

transformers never reads the file itself. It would follow whatever stands in it: a kernel of the hub as attention, another config file, a
dtype that is the name of a function, settings under the names of its own methods. What remains after models/switches.py are settings of
the model; where and in which dtype it runs, and what its forward pass returns, marlinctl says itself.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marlinctl.errors import BadInput, MarlinctlError
from marlinctl.models.config import refuse_large
from marlinctl.models.switches import without
from marlinctl.system.files import shown

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Said by marlinctl whenever it runs a model; quantizers have no business where weights come dense or through our own.
_OURS = ("dtype", "torch_dtype", "return_dict", "use_return_dict", "output_attentions", "output_hidden_states", "torchscript")


def transformers_config(config: Mapping[str, Any], folder: Path | None = None, *, quantized: bool = False) -> PreTrainedConfig:
    """The config object of a parsed config.json. `quantized`: with its quantization_config, for transformers' own quantizers.

    BadInput E392 for a model_type that transformers does not have, and for values that its class refuses.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    where = str(folder / "config.json") if folder else "config.json"
    model_type = config.get("model_type")
    if model_type == "mistral" and "layer_types" in config:
        model_type = "ministral"  # as transformers itself distinguishes the two
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise BadInput(
            "E392",
            f"transformers has no language model for model_type {shown(repr(model_type), 60)}",
            where=where,
            fix="only decoder language models that transformers itself supports are loaded; a newer release may know this one",
        )
    with building(where):
        kind = CONFIG_MAPPING[model_type]
        refuse_large(config, kind.attribute_map, where)
        parsed: PreTrainedConfig = kind(**_settings(config, kind, quantized))
    parsed.name_or_path = str(folder) if folder else ""
    return parsed


def client_class(config: PreTrainedConfig) -> Any:
    """The class with which people load such a model: for a language model alone, or for one with parts for images or sound."""
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

    wraps = config.get_text_config() is not config and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if wraps else AutoModelForCausalLM


def model_class(config: PreTrainedConfig, where: str = "config.json") -> type[PreTrainedModel]:
    """The class of the whole model. BadInput E392."""
    mapping = client_class(config)._model_mapping
    if type(config) not in mapping:
        raise BadInput(
            "E392",
            f"transformers has no language model for model_type {shown(repr(config.model_type), 60)}",
            where=where,
            fix="only language models that transformers itself supports are loaded, alone or with parts for images",
        )
    found: type[PreTrainedModel] = mapping[type(config)]
    return found


_NO_JSON_NUMBERS = ("Infinity", "-Infinity", "NaN")


@contextmanager
def building(where: str) -> Iterator[None]:
    """BadInput E392, with the first line of what transformers says, where it cannot make a config or a model of what config.json says.

    Any exception: it asserts, its checkers have classes of their own, and values go through functions of Python and torch. Out of memory is
    reported as such.
    """
    try:
        yield
    except (MarlinctlError, MemoryError):
        raise
    except Exception as error:
        of_the_system = isinstance(error, OSError) and bool(error.errno)  # what transformers raises itself has no number
        if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error) or of_the_system:
            raise
        first = shown(str(error).strip().splitlines()[0], 300) if str(error).strip() else ""
        raise BadInput(
            "E392",
            f"transformers cannot build this model: {type(error).__name__}: {first}",
            where=where,
            fix="restore the model's own config.json, or install a transformers release that knows this model",
        ) from error


def _settings(config: Mapping[str, Any], kind: type[PreTrainedConfig], quantized: bool) -> dict[str, Any]:
    """What is left of the config: no key that chooses code, none that is marlinctl's to say, none that names a part of the class itself."""
    fields = {field.name for field in dataclasses.fields(kind)}
    quantization = () if quantized else ("quantization_config", "compression_config")
    return {
        key: _decoded(value)
        for key, value in without(_nested_without(config, quantization)).items()
        if key not in _OURS and (key in fields or _may_be_set(kind, key))
    }


def _nested_without(config: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """Without these keys and without dtypes in the configs inside; `_OURS` at the top stay for `_settings`."""
    inner = {*keys, "dtype", "torch_dtype"}
    plain = {key: value for key, value in config.items() if key not in keys}
    return {
        key: {k: v for k, v in value.items() if k not in inner} if isinstance(value, Mapping) and key.endswith("_config") else value
        for key, value in plain.items()
    }


def _decoded(value: Any) -> Any:
    """With numbers in place of {"__float__": "Infinity"}, which is how transformers writes what JSON lacks."""
    if isinstance(value, list):
        return [_decoded(part) for part in value]
    if isinstance(value, Mapping) and set(value) == {"__float__"} and value["__float__"] in _NO_JSON_NUMBERS:
        return float(value["__float__"])
    return value


def _may_be_set(kind: type, key: str) -> bool:
    """A name that the class does not have, or has as a property that can be set. Methods and class variables are not settings."""
    found = inspect.getattr_static(kind, key, None)
    return found is None or (isinstance(found, property) and found.fset is not None)
