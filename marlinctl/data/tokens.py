"""Text as token ids."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marlinctl.errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

FIRST_CHARACTERS_PER_TOKEN = 8  # English has some 4.5; more is read when that was too little
MOST_CHARACTERS_PER_TOKEN = 64  # a text that has more of them is hardly one: what it has by then is all that is used
SLACK = 64  # tokens beyond the last one used: where the text is cut, the last word may be tokenized differently


@dataclass(frozen=True, slots=True)
class Tokens:
    """Calibration as the model reads it. ids: [S, L] int64, right-padded; counted: [S, L] bool, False for padding and special tokens."""

    ids: Tensor
    counted: Tensor


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a text, without special tokens. BadInput E314 where the tokenizer's files are such that it cannot read it."""
    try:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    except Exception as error:  # tokenizers raise a bare Exception
        raise tokenizer_refused("cannot read a text", error, Path(getattr(tokenizer, "name_or_path", ""))) from error
    return ids


def first_ids(text: str, tokenizer: Any, wanted: int) -> list[int]:
    """At least `wanted` ids from the start of the text, or all that there are; without tokenizing a gigabyte for 20,480 of them."""
    characters = wanted * FIRST_CHARACTERS_PER_TOKEN
    most = max(wanted * MOST_CHARACTERS_PER_TOKEN, 1 << 16)
    while True:
        ids = token_ids(tokenizer, text[:characters])
        if characters >= min(most, len(text)) or len(ids) >= wanted + SLACK:
            return ids
        characters *= 4


# Packages that transformers asks for without a tokenizer.json -> the files that are read with them.
_PACKAGES = {"sentencepiece": ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model"), "tiktoken": ("tiktoken.model",)}


def tokenizer_refused(what: str, error: Exception, folder: Path) -> BadInput:
    copied = "copy tokenizer.json and tokenizer_config.json from the original model"
    read_with = [(file, package) for package, files in _PACKAGES.items() for file in files if (folder / file).is_file()]
    if read_with and not (folder / "tokenizer.json").is_file() and find_spec(read_with[0][1]) is None:
        file, package = read_with[0]
        what = f"the tokenizer {what}: {file} is read with {package}, which is not installed"
        return BadInput("E314", what, where=str(folder), fix=f"pip install {package}; or {copied}")
    reason = str(error).splitlines()[0] if str(error) else ""
    return BadInput("E314", f"the tokenizer {what}: {type(error).__name__}: {reason}", where=str(folder), fix=copied)
