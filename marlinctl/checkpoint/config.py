"""What may be in config.json and in the tokenizer files before anybody builds a model from them.

Sizes come from config.json, so a hostile or mistyped one decides how much memory others allocate and how long they loop. They
are bounded here, once, far above any model that exists. What is bounded is hostile values alone: whether a model of these sizes is one
that marlinctl knows is asked later (models.py). Nothing in this file imports torch or transformers. Keys that choose code: switches.py.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marlinctl.checkpoint.blocks import brief
from marlinctl.checkpoint.files import FileRefused, exists, open_member, read_json, refuse_deep, shown
from marlinctl.checkpoint.formats import quantization_block
from marlinctl.errors import BadInput, Problem

if TYPE_CHECKING:
    from marlinctl.checkpoint.reader import Checkpoint

CONFIG = "config.json"
_MAX_CONFIG_BYTES = 8_000_000
_MAX_TOKENIZER_BYTES = 200_000_000  # the largest known tokenizer.json has 34 MB
_MAX_TOKENIZER_VALUES = 12_000_000  # and two million tokens and merges
_LIMITS = {
    "vocab_size": 10**8, "hidden_size": 10**6, "intermediate_size": 10**7, "moe_intermediate_size": 10**7, "head_dim": 10**5,
    "num_hidden_layers": 10**4, "num_attention_heads": 10**5, "num_key_value_heads": 10**5, "max_position_embeddings": 10**10,
    "num_experts": 10**4, "num_local_experts": 10**4, "num_experts_per_tok": 10**4,
    "num_labels": 10**5,  # of a classifier; transformers makes a table of them for every model
}  # fmt: skip
_MAY_BE_ZERO = ("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size")  # a dense one of a family with experts
_NO_MODEL = "config.json is damaged or belongs to no real model; download it again"
_MAX_LIST = 10**4  # some families have one value for each layer
_DTYPES = ("float16", "bfloat16", "float32", "float64", "half", "float", "double", "auto")
_MAX_EXPERTS_IN_MODEL = 2 * 10**5  # layers x experts; each is three linears, of which an object is made before any header is compared
# Ids beyond the embedding that no text produces: Gemma 3's text models ship the tokenizer of their multimodal siblings.
_KNOWN_STRAYS = {"gemma3_text": {"<image_soft_token>"}}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as an object with sizes in reason, or BadInput with everything that is wrong with it."""
    where = str(folder / CONFIG)
    if not exists(folder, CONFIG):
        raise BadInput("E310", "config.json is missing", where=where, fix="name the model's folder, or download config.json into it")
    try:
        config = read_json(folder, CONFIG, limit=_MAX_CONFIG_BYTES)
        refuse_deep(config, where)
    except FileRefused as refused:
        raise BadInput.from_problems("E310", [refused.problem]) from None
    if not isinstance(config, dict):
        raise BadInput("E310", f"config.json holds a {type(config).__name__}, not an object", where=where, fix="download config.json again")
    text = config.get("text_config")
    problems = _problems(config, where) + (_problems(text, where) if isinstance(text, dict) else [])
    problems += [Problem(f"{shown(key, 100)} is not a finite number", where, _NO_MODEL) for key in _not_finite(config)]
    if problems:
        raise BadInput.from_problems("E311", problems)
    return config


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """`quantize` starts from 16 or 32-bit weights; a checkpoint that is quantized already is for `pack`, `eval` and `verify`."""
    block = quantization_block(checkpoint.config)
    if block is None:
        return
    method = block.get("quant_method")
    raise BadInput(
        "E313",
        f"the checkpoint is already quantized ({shown(str(method or 'quantization_config is present'))})",
        where=str(checkpoint.folder / CONFIG),
        fix="start from the original checkpoint; to change the format of this one, use marlinctl pack",
    )


def check_tokenizer(folder: Path, config: dict[str, Any]) -> None:
    """A tokenizer is there and none of its ids lies behind the embedding's last row."""
    present = [name for name in TOKENIZER_FILES if exists(folder, name)]
    if not present:
        raise BadInput(
            "E314",
            "the tokenizer is missing",
            where=str(folder),
            fix=f"download it into the folder (one of {', '.join(TOKENIZER_FILES)}, with tokenizer_config.json)",
        )
    try:
        ids = _token_ids(folder, present[0])
    except FileRefused as refused:
        raise BadInput.from_problems("E314", [refused.problem]) from None
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    rows = (text or config).get("vocab_size", config.get("vocab_size"))
    if not isinstance(rows, int):
        return  # the model class then has a size of its own, and check_expected compares it with the embedding
    if max(ids.values(), default=-1) < rows:
        return
    strays = stray_tokens(config)
    token, number = max(((t, i) for t, i in ids.items() if t not in strays), key=lambda item: item[1], default=("", -1))
    if number >= rows:
        raise BadInput(
            "E315",
            f"the tokenizer is larger than the embedding: {shown(token, 60)!r} has id {number}, but vocab_size is {rows}",
            where=str(folder / present[0]),
            fix="the tokenizer belongs to another model, or the embedding was not resized; take both from one checkpoint",
        )


def positions(config: Mapping[str, Any]) -> int | None:
    """How many tokens a model can read at once; None where config.json does not say."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key in ("max_position_embeddings", "n_positions"):
            if type(part.get(key)) is int:
                return int(part[key])
    return None


def stray_tokens(config: Mapping[str, Any]) -> set[str]:
    """Tokens of the model's own tokenizer that its embedding has no row for, and that no text produces."""
    text = config.get("text_config")
    return _KNOWN_STRAYS.get(str((text if isinstance(text, dict) else config).get("model_type")), set())


def refuse_large(config: Mapping[str, Any], names: Mapping[str, str], where: str) -> None:
    """BadInput E311 for a size beyond reason under the name that a family has for it: `n_layer` for num_hidden_layers.

    names: the usual name -> the family's own, as transformers' classes hold them (`attribute_map`).
    """
    if problems := _sizes(config, names, where):
        raise BadInput.from_problems("E311", problems)


def _sizes(config: Mapping[str, Any], names: Mapping[str, str], where: str) -> list[Problem]:
    problems = []
    for usual, name in names.items():
        least, limit = 0 if usual in _MAY_BE_ZERO else 1, _LIMITS.get(usual)
        if limit is not None and not _in_reason(config.get(name), least, limit):
            what = f"{name} is {shown(repr(config[name]), 60)}, which is not a whole number from {least} to {limit:,}"
            problems.append(Problem(what, where, _NO_MODEL))
    return problems


def _not_finite(document: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """Settings that are NaN or infinite: Python reads such JSON, and every number that they touch becomes the same or zero.

    Lists are left out: Mamba 2 has [0.0, Infinity] as the limits of a time step.
    """
    for key, value in document.items():
        if isinstance(value, dict):
            yield from _not_finite(value, f"{above}{key}.")
        elif isinstance(value, float) and not math.isfinite(value):
            yield f"{above}{key}"


def _problems(config: dict[str, Any], where: str) -> list[Problem]:
    problems = _sizes(config, {name: name for name in _LIMITS}, where)
    for key in ("dtype", "torch_dtype"):
        value = config.get(key)
        if any(part is not None and part not in _DTYPES for part in (value.values() if isinstance(value, dict) else [value])):
            what = f"{key} is {brief(value)}, which names no type of floating-point weights"
            problems.append(Problem(what, where, f"one of {', '.join(_DTYPES[:4])}: the type that the weights have"))
    if not isinstance(config.get("is_causal"), (bool, type(None))):  # no class of transformers checks it, and attention fails with it
        what = f"is_causal is {brief(config['is_causal'])}, not true or false"
        problems.append(Problem(what, where, "config.json is damaged; download it again"))
    experts = next((config[key] for key in ("num_experts", "num_local_experts") if type(config.get(key)) is int), 1)
    layers = config.get("num_hidden_layers")
    if not problems and type(layers) is int and layers * experts > _MAX_EXPERTS_IN_MODEL:
        what = f"num_hidden_layers {layers} times {experts} experts is impossibly large"
        problems.append(Problem(what, where, _NO_MODEL))
    return problems


def _in_reason(value: object, least: int, limit: int) -> bool:
    """Absent, a whole number up to the limit, or a list of such: one for each layer, where a layer may have none."""
    if isinstance(value, list):
        return 0 < len(value) <= _MAX_LIST and all(item is None or (type(item) is int and 0 <= item <= limit) for item in value)
    return value is None or (type(value) is int and least <= value <= limit)


def _token_ids(folder: Path, name: str) -> dict[str, int]:
    """Token -> id from one tokenizer file, added tokens included."""
    ids: dict[str, int] = {}
    if name.endswith(".model"):
        last = _sentencepiece_count(folder, name) - 1
        ids[f"piece {last}"] = last
    elif name == "vocab.txt":
        with open_member(folder, name) as handle:
            ids = {line.decode("utf-8", "replace"): i for i, line in enumerate(handle.readall().splitlines())}
    else:
        document = read_json(folder, name, limit=_MAX_TOKENIZER_BYTES, values=_MAX_TOKENIZER_VALUES)
        if not isinstance(document, dict):
            raise FileRefused("not an object", folder / name, "download it again")
        ids = _fast_ids(folder / name, document) if name == "tokenizer.json" else _whole_numbers(folder / name, document)
    if name != "tokenizer.json" and exists(folder, "added_tokens.json"):
        added = read_json(folder, "added_tokens.json")
        ids |= _whole_numbers(folder / "added_tokens.json", added if isinstance(added, dict) else {})
    return ids


def _fast_ids(where: Path, document: dict[str, Any]) -> dict[str, int]:
    model = document.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, list):  # Unigram: [[piece, score], ...]
        ids = {f"piece {i}": i for i in range(len(vocab))}
    elif isinstance(vocab, dict):
        ids = _whole_numbers(where, vocab)
    else:
        raise FileRefused("tokenizer.json holds no vocabulary", where, "download it again")
    added = document.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(entry, dict) for entry in added):
        raise FileRefused("added_tokens is no list of objects", where, "download it again")
    return ids | _whole_numbers(where, {str(entry.get("content")): entry.get("id") for entry in added})


def _whole_numbers(where: Path, vocab: dict[str, Any]) -> dict[str, int]:
    if not vocab or ({*map(type, vocab.values())} == {int} and min(vocab.values()) >= 0):  # at the speed of C: there are 150,000 of them
        return vocab
    wrong = next((token for token, number in vocab.items() if type(number) is not int or number < 0), None)
    if wrong is not None:
        raise FileRefused(f"the token {shown(wrong, 60)!r} has no whole number as its id", where, "download it again")
    return vocab


def _sentencepiece_count(folder: Path, name: str) -> int:
    """How many pieces a SentencePiece model has: field 1 of its protobuf message, counted without decoding the pieces."""
    with open_member(folder, name) as handle:
        if os.fstat(handle.fileno()).st_size > _MAX_TOKENIZER_BYTES:
            raise FileRefused("the file is too large for a SentencePiece model", folder / name, "download it again")
        data = handle.readall()
    count = position = 0
    while position < len(data):
        tag, position = _varint(data, position, folder / name)
        if tag & 7 != 2:
            break  # all fields of the outermost message are length-delimited
        length, position = _varint(data, position, folder / name)
        position += length
        count += tag == (1 << 3 | 2)
    if count == 0 or position != len(data):
        raise FileRefused("this is no SentencePiece model, or it is cut", folder / name, "download it again")
    return count


def _varint(data: bytes, position: int, where: Path) -> tuple[int, int]:
    value = 0
    for i, byte in enumerate(data[position : position + 10]):
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            return value, position + i + 1
    raise FileRefused("this is no SentencePiece model, or it is cut", where, "download it again")
