"""The files of a tokenizer: which there are, and whether their ids fit the embedding. Without torch and transformers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from marlinctl.errors import BadInput
from marlinctl.system.files import FileRefused, exists, open_member, read_json, shown

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_MAX_TOKENIZER_BYTES = 200_000_000  # the largest known tokenizer.json has 34 MB
_MAX_TOKENIZER_VALUES = 12_000_000  # and two million tokens and merges
# Ids beyond the embedding that no text produces: Gemma 3's text models ship the tokenizer of their multimodal siblings.
_KNOWN_STRAYS = {"gemma3_text": {"<image_soft_token>"}}


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
            "E314",
            f"the tokenizer is larger than the embedding: {shown(token, 60)!r} has id {number}, but vocab_size is {rows}",
            where=str(folder / present[0]),
            fix="the tokenizer belongs to another model, or the embedding was not resized; take both from one checkpoint",
        )


def stray_tokens(config: Mapping[str, Any]) -> set[str]:
    """Tokens of the model's own tokenizer that its embedding has no row for, and that no text produces."""
    text = config.get("text_config")
    return _KNOWN_STRAYS.get(str((text if isinstance(text, dict) else config).get("model_type")), set())


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
        raise FileRefused("added_tokens is not a list of objects", where, "download it again")
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
        raise FileRefused("this is not a SentencePiece model, or it is cut", folder / name, "download it again")
    return count


def _varint(data: bytes, position: int, where: Path) -> tuple[int, int]:
    value = 0
    for i, byte in enumerate(data[position : position + 10]):
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            return value, position + i + 1
    raise FileRefused("this is not a SentencePiece model, or it is cut", where, "download it again")
