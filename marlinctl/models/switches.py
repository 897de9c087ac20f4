"""Keys of a model folder's JSON files that choose code, and not what the model is.

    config.json              attn_implementation: "kernels-community/anything@branch"     fetches a kernel from the hub and runs it
                             auto_map, configuration_files, transformers_weights          other code, another config, other weights
                             attribute_map, base_model_tp_plan                            what transformers' classes hold for themselves
    tokenizer_config.json,   auto_map                                                     other code
    generation_config.json,
    processor files

None of it was asked for on the command line, so none of it is followed: transformers gets the config without these keys
(transformers_config.py), a warning names them, and what is published does not carry them on. The attention and experts that run are those
that transformers has itself; they compute the same model, up to rounding. No torch here, and of transformers its list of model types alone
where a folder brings code of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from marlinctl.errors import BadInput, number_of
from marlinctl.system.files import FileRefused, brief, exists, parse_json, read_json, refuse_deep, shown

CODE = "auto_map"
_WHICH_KERNELS = "which kernels run is not for a model to choose"
_OTHER_FILE = "what the model is stands in this file alone"
_INNER = "this name is one of transformers' own, not a property of a model"
SWITCHES: Mapping[str, str] = {
    CODE: "code of a model folder is never run",
    "custom_generate": "code of a model folder is never run",
    "custom_pipelines": "code of a model folder is never run",
    "trust_remote_code": "code of a model folder is never run",
    **dict.fromkeys(
        (
            *("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "_attn_implementation_autoset"),
            *("experts_implementation", "_experts_implementation", "_experts_implementation_internal"),
            *("use_kernels", "kernel_config", "use_mamba_kernels", "fusion_config", "_flash_attn_2_enabled", "use_flash_attention_2"),
        ),
        _WHICH_KERNELS,
    ),
    **dict.fromkeys(("configuration_files", "transformers_weights", "extra_files", "extra_config_files"), _OTHER_FILE),
    **dict.fromkeys(
        (
            *("attribute_map", "sub_configs", "sub_configs_defaults", "base_config_key", "distributed_config", "tp_plan", "pp_plan"),
            *("base_model_tp_plan", "base_model_fsdp_plan", "base_model_pp_plan", "base_model_ep_plan", "_auto_class"),
        ),
        _INNER,
    ),
}
# Companions that transformers reads beside config.json; those that are JSON are looked through for the same keys.
JSON_COMPANIONS = (
    *("tokenizer_config.json", "special_tokens_map.json", "generation_config.json"),
    *("preprocessor_config.json", "processor_config.json", "chat_template.json"),
)
_LISTED = 20  # switches that are listed one by one


def without(document: Any) -> Any:
    """The document without the keys that choose code, at any depth."""
    if isinstance(document, Mapping):
        return {key: without(value) for key, value in document.items() if key not in SWITCHES}
    return [without(item) for item in document] if isinstance(document, list) else document


def cleaned(name: str, data: bytes) -> bytes:
    """A companion as it is published: JSON without such keys, byte for byte where there are none. BadInput E301 for JSON that is none."""
    if name not in JSON_COMPANIONS:
        return data
    try:
        document = parse_json(data, name)
        refuse_deep(document, name)
    except FileRefused as refused:
        raise BadInput.from_problems("E301", [refused.problem]) from None
    if not any(_found(document)):
        return data
    return (json.dumps(without(document), indent=2, ensure_ascii=False) + "\n").encode()


def check_switches(folder: Path, config: Mapping[str, Any], *, files: bool = True) -> tuple[str, ...]:
    """What is not followed, one line each. files: False where there is no folder yet.

    BadInput E312 for a model that needs Python code from its folder, E301 for a file that is not JSON.
    """
    documents: dict[str, Any] = {"config.json": config}
    problems = []
    for name in JSON_COMPANIONS if files else ():
        try:
            if exists(folder, name):
                documents[name] = read_json(folder, name)
                refuse_deep(documents[name], folder / name)
        except FileRefused as refused:
            problems.append(refused.problem)
    if problems:
        raise BadInput.from_problems("E301", problems)
    carriers = [name for name in ("config.json", "tokenizer_config.json") if _has_code(documents.get(name))]
    notes = [_about_code(folder, config.get("model_type"), carriers)] if carriers else []
    notes += [
        f"{name}: {path} is ignored ({brief(value)}): {SWITCHES[path.rpartition('.')[2]]}"
        for name, document in documents.items()
        for path, value in _found(document)
        if not (name in carriers and path == CODE)
    ]
    more = len(notes) - _LISTED
    return (
        *notes[:_LISTED],
        *([f"and {number_of(more, 'more key that chooses code is', 'more keys that choose code are')} ignored"] if more > 0 else []),
    )


def _found(document: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of every key that chooses code and is not null."""
    if isinstance(document, Mapping):
        for key, value in document.items():
            path = f"{above}.{shown(str(key), 60)}" if above else shown(str(key), 60)
            if key in SWITCHES:
                if value is not None:
                    yield path, value
            else:
                yield from _found(value, path)
    elif isinstance(document, list):
        for item in document:
            yield from _found(item, above)


def _has_code(document: Any) -> bool:
    return isinstance(document, Mapping) and bool(document.get(CODE))


def _about_code(folder: Path, model_type: object, carriers: list[str]) -> str:
    """A note where code of the folder is not needed; BadInput E312 where it is."""
    if _known_to_transformers(model_type):
        return f"auto_map in {' and '.join(carriers)} is ignored and its code is not run: transformers knows {model_type} itself"
    raise BadInput(
        "E312",
        f"the model needs Python code from its folder (auto_map in {' and '.join(carriers)}), which marlinctl never runs",
        where=str(folder),
        fix=f"use a model that transformers knows by itself; {shown(repr(model_type), 60)} is not one of them in the installed version",
    )


def _known_to_transformers(model_type: object) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return isinstance(model_type, str) and model_type in CONFIG_MAPPING_NAMES
