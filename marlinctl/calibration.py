"""Calibration: the tokens that the Hessians see.

    documents ─► joined by blank lines ─► tokens ─► cut into samples of equal length          (text)
    chats     ─► the model's chat template ─► tokens ─► one sample each, padded on the right  (chat)
    self      ─► the model writes the samples itself, once, with a seed of its own

Padding and special tokens run through the model, because they are part of what it reads, but they are not counted in any Hessian: one
BOS token can weigh as much as thousands of ordinary ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from marlinctl.console import Console
from marlinctl.errors import BadInput, EnvironmentProblem, HubProblem, UsageError
from marlinctl.memory import CHARACTERS_PER_TOKEN, PIECE, SELF_BATCH
from marlinctl.preflight import check_length, too_few_tokens
from marlinctl.recipe import Calibration
from marlinctl.walk import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from marlinctl.texts import Chat, Document


@dataclass(frozen=True, slots=True)
class CalibrationSet:
    tokens: Tokens
    facts: Mapping[str, Any]  # for report and manifest: where from, how many, SHA-256 of the ids


def load_calibration(
    asked: Calibration, folder: Path, config: Mapping[str, Any], *, console: Console, load_model: Callable[[], torch.nn.Module]
) -> CalibrationSet:
    """The samples that `asked` describes, for the model in `folder`. `load_model` is called for `self` only.

    UsageError E252 for a length the model cannot read; BadInput E393 for fewer samples or tokens than asked, E262 for a chat that the
    template refuses.
    """
    check_length(asked, config)
    tokenizer = load_tokenizer(folder)
    if asked.source == "self":
        ids, how = write_samples(load_model(), tokenizer, asked, console), "written by the model itself"
    else:
        ids, how = read_samples(asked, tokenizer)
    special = torch.tensor(sorted({i for i in tokenizer.all_special_ids if i is not None}), dtype=torch.int64)
    padding = ids < 0
    counted = ~padding & ~torch.isin(ids, special)
    _require(asked, ids, counted)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    ids = torch.where(padding, pad, ids)
    sizes = {"asked": asked.samples * asked.sequence_length, "got": int((~padding).sum()), "counted": int(counted.sum())}
    facts = {
        "source": asked.source,
        "how": how,
        "samples": {"asked": asked.samples, "got": ids.shape[0]},
        "tokens": sizes,
        "sequence_length": asked.sequence_length,
        "seed": asked.seed,
        "sha256": hashlib.sha256(ids.numpy().tobytes()).hexdigest(),
    }
    console.say(
        f"calibration: {asked.source} ({how}), {ids.shape[0]} of {asked.samples} samples, "
        f"{sizes['got']:,} of {sizes['asked']:,} tokens, {sizes['counted']:,} counted"
    )
    return CalibrationSet(Tokens(ids, counted), facts)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise what they like, a bare Exception too
        raise _no_tokenizer("cannot be loaded", error, folder) from error


def _no_tokenizer(what: str, error: Exception, folder: Path) -> BadInput:
    return BadInput(
        "E394",
        f"the tokenizer {what}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
        where=str(folder),
        fix="copy tokenizer.json and tokenizer_config.json from the original model",
    )


def _require(asked: Calibration, ids: Tensor, counted: Tensor) -> None:
    got, tokens = ids.shape[0], int(counted.sum())
    if got < asked.samples:
        raise BadInput(
            "E393",
            f"{got} samples of {asked.sequence_length} tokens are there, {asked.samples} were asked for",
            where=f"calibration {asked.source}",
            fix=f"give more text, or --samples {got}" if got else "give more text, or a smaller --sequence-length",
        )
    if tokens < asked.minimum_tokens:
        raise too_few_tokens(asked, str(tokens))


# ---- text and chats ------------------------------------------------------------------------------------------------------------------


def read_samples(asked: Calibration, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, str]:
    """[S, L] int64 with -1 where padded, and how they were made."""
    documents = list(_documents(asked))
    chats = [d for d in documents if not isinstance(d, str)]
    texts = [d for d in documents if isinstance(d, str)]
    template = getattr(tokenizer, "chat_template", None)
    if asked.chat == "always" and (not template or not chats):
        missing = "the model has no chat template" if not template else "the data are no chats"
        raise UsageError("E253", f"--chat always, but {missing}", where=f"calibration {asked.source}", fix="--chat auto")
    if chats and template and asked.chat != "never":
        rows = [number for number, document in enumerate(documents, start=1) if not isinstance(document, str)]
        taken = list(zip(chats, rows, strict=True))[: asked.samples]
        ids = [_chat_ids(tokenizer, chat, f"{asked.source}, row {row}") for chat, row in taken]
        return _pad(ids, asked.sequence_length), "chats, with the model's template"
    texts += ["\n\n".join(turn["content"] for turn in chat) for chat in chats]
    return _cut(texts, tokenizer, asked.samples, asked.sequence_length), "documents joined by blank lines and cut"


def _documents(asked: Calibration) -> Iterable[Document]:
    from marlinctl.texts import load_documents, names_a_file

    if names_a_file(asked.source):
        return load_documents(asked.source)
    return islice(_hub_documents(asked.source), 64 * asked.samples)


def _hub_documents(source: str) -> Iterator[Document]:
    """Rows of a hub data set `org/name[:config][:split]`, streamed: column text, or messages for chats."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise EnvironmentProblem(
            "E400", "hub data sets need the package datasets", where=source, fix="pip install 'marlinctl[distill]'"
        ) from error
    name, *rest = source.split(":")
    split = rest[-1] if rest else "train"
    try:
        rows = iter(load_dataset(name, rest[0] if len(rest) > 1 else None, split=split, streaming=True))
        first = next(rows, None)
    except Exception as error:  # the library raises many kinds for an absent, gated or unreachable data set
        if "scripts are no longer supported" in str(error):  # datasets >= 4 runs none, and tells nobody but by these words
            raise BadInput(
                "E379",
                "this data set is a program that would have to be run to read it",
                where=f"calibration {source}",
                fix="choose a data set of .parquet or .jsonl files, or give a local .txt, .jsonl or .parquet file",
            ) from error
        raise HubProblem(
            "E710",
            f"the data set cannot be read: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            where=f"calibration {source}",
            fix="check name, config and split (org/name:config:split), or give a local .txt, .jsonl or .parquet file",
        ) from error
    if first is None or not ({"text", "messages"} & set(first)):
        columns = ", ".join(first or ()) or "none"
        raise BadInput(
            "E395", f"no column text or messages; it has: {columns}", where=f"calibration {source}", fix="choose another data set"
        )
    column = "messages" if "messages" in first else "text"
    yield first[column]
    for row in rows:
        yield row[column]


def _cut(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, samples: int, length: int) -> Tensor:
    """Join, tokenize, cut. Samples begin with BOS where the tokenizer puts one before every text."""
    begins = _begins_with(tokenizer)
    body = length - len(begins)
    needed = samples * body
    found = [torch.empty(0, dtype=torch.int64)]
    got = 0
    for piece in _pieces(texts, min(needed * CHARACTERS_PER_TOKEN, PIECE)):
        ids = token_ids(tokenizer, piece)
        found.append(torch.tensor(ids, dtype=torch.int64))
        got += len(ids)
        if got >= needed:
            break
    count = min(samples, got // body)
    cut = torch.cat(found)[: count * body].reshape(count, body)
    return torch.cat([torch.tensor(begins, dtype=torch.int64).expand(count, -1), cut], dim=1)


def _pieces(texts: Sequence[str], size: int) -> Iterator[str]:
    """All texts joined by blank lines, in pieces of at least `size` characters that end where a text ends."""
    taken: list[str] = []
    length = 0
    for i, text in enumerate(texts):
        taken.append(text)
        length += len(text) + 2
        if length >= size or i == len(texts) - 1:
            yield "\n\n".join(taken) + ("\n\n" if i < len(texts) - 1 else "")
            taken, length = [], 0


def _begins_with(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """[BOS] for models that want one at the start of every text (Gemma, Llama 3), else []."""
    bos = tokenizer.bos_token_id
    first = tokenizer("a")["input_ids"][:1]
    return [bos] if bos is not None and first == [bos] else []


def _chat_ids(tokenizer: PreTrainedTokenizerBase, chat: Chat, where: str) -> list[int]:
    """A chat through the model's template. UsageError E262 where the template refuses it: it is a program of the model's maker."""
    try:
        text = str(tokenizer.apply_chat_template(chat, tokenize=False))
    except Exception as error:  # raise_exception() of the template, and whatever its own mistakes raise in jinja or Python
        roles = ", ".join(turn["role"] for turn in chat[:4]) + (", ..." if len(chat) > 4 else "")
        reason = str(error).strip() or type(error).__name__
        raise UsageError(
            "E262",
            f"the model's chat template refuses this chat ({roles}): {reason}",
            where=where,
            fix="leave out the turns that the template does not know, such as `system`; or calibrate with --chat never, on plain text",
        ) from error
    return token_ids(tokenizer, text)


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a text, without special tokens. BadInput E394 where the tokenizer's files are such that it cannot read it."""
    try:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    except Exception as error:  # tokenizers raise a bare Exception
        raise _no_tokenizer("cannot read a text", error, Path(getattr(tokenizer, "name_or_path", ""))) from error
    return ids


def _pad(rows: Sequence[list[int]], length: int) -> Tensor:
    """[S, L] with -1 behind shorter rows; longer ones are cut; L is the longest row."""
    cut = [row[:length] for row in rows if row]
    padded = torch.full((len(cut), max((len(row) for row in cut), default=1)), -1, dtype=torch.int64)
    for i, row in enumerate(cut):
        padded[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return padded


# ---- self ----------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def write_samples(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, asked: Calibration, console: Console, *, together: int = SELF_BATCH
) -> Tensor:
    """[S, L] int64 that the model writes from its BOS token, by plain sampling (temperature 1) with a generator of its own.

    `together`: samples written at a time; it changes which ones are drawn.

    A model's own text has the statistics of what it was trained on, and needs no data set (LLM-QAT, arXiv 2305.17888).
    """
    start = next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), 0)
    generator = torch.Generator().manual_seed(asked.seed)
    device = next(model.parameters()).device
    samples = torch.empty(asked.samples, asked.sequence_length, dtype=torch.int64)
    samples[:, 0] = start
    steps = -(-asked.samples // together) * (asked.sequence_length - 1)
    with console.progress("the model writes its calibration text", steps) as progress:
        for first in range(0, asked.samples, together):
            batch = samples[first : first + together]
            cache = None
            for position in range(1, asked.sequence_length):
                given = batch[:, position - 1 : position].to(device)
                out = model(input_ids=given, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache = out.past_key_values
                chances = torch.softmax(out.logits[:, -1].float().cpu(), dim=-1)
                batch[:, position] = torch.multinomial(chances, 1, generator=generator).squeeze(-1)
                progress.advance()
    return samples
