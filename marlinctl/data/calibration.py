"""Calibration: the tokens that the Hessians see.

    documents ─► joined by blank lines ─► tokens ─► cut into samples of equal length          (text)
    chats     ─► the model's chat template ─► tokens ─► one sample each, padded on the right  (chat)
    self      ─► the model writes the samples itself, once, with a seed of its own
    mixture   ─► each part as above, its rows drawn from the seed ─► all samples in an order drawn from the seed

Padding and special tokens run through the model, because they are part of what it reads, but they are not counted in any Hessian: one
BOS token can weigh as much as thousands of ordinary ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from marlinctl.checkpoint import findings
from marlinctl.data.calibration_size import CHARACTERS_PER_TOKEN, PIECE, SELF_BATCH, check_length, too_few_tokens
from marlinctl.data.mixture import SELF, Part, parts_of, samples_of_parts
from marlinctl.data.rows import Document, Item, RowCount, columns_of, item_of, no_column, usable
from marlinctl.data.tokens import SLACK, Tokens, first_ids, token_ids, tokenizer_refused
from marlinctl.errors import BadInput, EnvironmentProblem, HubProblem, MarlinctlError, Problem, UsageError, number_of
from marlinctl.models.config import read_config
from marlinctl.models.transformers_config import transformers_config
from marlinctl.recipes.schema import Calibration
from marlinctl.system.confined import Bounds, Exceeded, confined
from marlinctl.system.console import Console
from marlinctl.system.digests import sha256_of, sha256_of_tensors
from marlinctl.system.files import shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What regular expressions of tokenizers divide: words, numbers, runs of a letter, of spaces and of signs, other scripts, lines.
_LINE = f"The quick brown fox jumps over the dog 1234567890 times; it's {'a' * 40} {' ' * 40} {'!?' * 20} Grüße, 世界\n\n\tEnd. #$%&@~|\"<>"


_WINDOW, _WINDOW_CHARACTERS = 2000, 1 << 24  # documents, and characters of them, among which the next row of a mixture is drawn
_Placed = tuple[str, Document]  # where it is, what it is


@dataclass(frozen=True, slots=True)
class CalibrationSet:
    tokens: Tokens
    facts: Mapping[str, Any]  # for report and manifest: where from, how many, SHA-256 of the ids


def load_calibration(
    asked: Calibration, folder: Path, config: Mapping[str, Any], *, console: Console, load_model: Callable[[], torch.nn.Module]
) -> CalibrationSet:
    """The samples that `asked` describes, for the model in `folder`. `load_model` is called for `self` only.

    UsageError E246 for a length the model cannot read; BadInput E393 for fewer samples or tokens than asked, E253 for a chat that the
    template refuses.
    """
    check_length(asked, config)
    tokenizer = load_tokenizer(folder)
    if asked.source == SELF:
        found = Samples(write_samples(load_model(), tokenizer, asked, console), "written by the model itself", 0)
    else:
        found = read_samples(asked, tokenizer)
    ids = found.ids
    special = torch.tensor(sorted({i for i in tokenizer.all_special_ids if i is not None}), dtype=torch.int64)
    padding = ids < 0
    counted = ~padding & ~torch.isin(ids, special)
    _require(asked, ids, counted)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    ids = torch.where(padding, pad, ids)
    sizes = {"asked": asked.samples * asked.sequence_length, "got": int((~padding).sum()), "counted": int(counted.sum())}
    facts = {
        "source": asked.source,
        "how": found.how,
        "samples": {"asked": asked.samples, "got": ids.shape[0]},
        "tokens": sizes,
        "sequence_length": asked.sequence_length,
        "cut": found.cut,
        **({"parts": found.parts} if found.parts else {}),
        "seed": asked.seed,
        "sha256": sha256_of_tensors(ids),
    }
    console.say(
        f"calibration: {asked.source} ({found.how}), {ids.shape[0]} of {number_of(asked.samples, 'sample')}, "
        f"{sizes['got']:,} of {sizes['asked']:,} tokens, {sizes['counted']:,} counted"
    )
    if len(found.parts) > 1:
        console.say("mixture: " + ", ".join(f"{number_of(part['samples'], 'sample')} of {part['source']}" for part in found.parts))
    for warning in findings.of_text(facts, "--sequence-length"):
        console.warn(warning)
    return CalibrationSet(Tokens(ids, counted), facts)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of an examined folder. BadInput E314 where it cannot be loaded, E325 where it takes too long for a line of text."""
    from transformers import AutoTokenizer, PreTrainedConfig

    try:
        config = transformers_config(read_config(folder), folder)
    except BadInput:
        config = PreTrainedConfig(name_or_path=str(folder))  # transformers does not know the model; its tokenizer may be one that it knows
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # pydantic, pyo3 and each of a hundred tokenizer classes raise what they like
        raise tokenizer_refused("cannot be loaded", error, folder) from error
    _try(tokenizer, folder)
    return tokenizer


def _try(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """One line of text in a process of its own: tokenizer.json may hold regular expressions, whose engine goes back as it likes.

    It gives up on a single match after ten million steps (tokenizers then panics), and may be led into that for every letter.
    """
    try:
        for _ in confined(lambda: iter((len(tokenizer(_LINE, verbose=False)["input_ids"]),)), Bounds(memory=1 << 30, cpu=10, wait=30)):
            return
    except (Exceeded, RuntimeError) as reason:
        shown_reason = str(reason) if isinstance(reason, Exceeded) else str(reason).strip().splitlines()[-1]
        raise BadInput(
            "E325",
            f"the tokenizer cannot read a line of text: {shown_reason}",
            where=str(folder),
            fix="copy tokenizer.json and tokenizer_config.json from the original model",
        ) from None


def _there(samples: int, length: int) -> str:
    return number_of(samples, f"sample of {length} tokens is there", f"samples of {length} tokens are there")


def _require(asked: Calibration, ids: Tensor, counted: Tensor) -> None:
    got, tokens = ids.shape[0], int(counted.sum())
    if got < asked.samples:
        raise BadInput(
            "E393",
            f"{_there(got, asked.sequence_length)}, {asked.samples} were asked for",
            where=f"calibration {asked.source}",
            fix=f"give more text, or --samples {got}" if got else "give more text, or a smaller --sequence-length",
        )
    if tokens < asked.minimum_tokens:
        raise too_few_tokens(asked, str(tokens))


# ---- text and chats ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Samples:
    """ids: [S, L] int64 with -1 where padded. how: how they were made. cut: chats that were longer than L."""

    ids: Tensor
    how: str
    cut: int
    parts: Sequence[Mapping[str, Any]] = ()  # for report and manifest: what was read of each source


def read_samples(asked: Calibration, tokenizer: PreTrainedTokenizerBase) -> Samples:
    """No more is read than the samples need. A single source is read from its beginning; of a mixture each part's rows, and in the end the
    order of all samples, are drawn from the seed.

    Whether the data are chats is decided by the first document of each part (with --chat always by any). BadInput E325 where the chat
    template takes too much time or memory, E385 where too many rows cannot be used, E393 where a part of a mixture is too short;
    UsageError E246 for a mixture that is none.
    """
    parts = parts_of(asked.source)
    counts = samples_of_parts(parts, asked.samples)
    found = [
        _read_part(part, count, place, asked, tokenizer, mixed=len(parts) > 1)
        for place, (part, count) in enumerate(zip(parts, counts, strict=True))
    ]
    if len(found) == 1:
        return found[0]
    length = max(part.ids.shape[1] for part in found)
    ids = torch.cat([torch.nn.functional.pad(part.ids, (0, length - part.ids.shape[1]), value=-1) for part in found])
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(asked.seed))
    how = "; ".join(dict.fromkeys(part.how for part in found))
    return Samples(ids[order], how, sum(part.cut for part in found), [facts for part in found for facts in part.parts])


def _read_part(part: Part, samples: int, place: int, asked: Calibration, tokenizer: PreTrainedTokenizerBase, *, mixed: bool) -> Samples:
    count = RowCount(part.source)
    documents: Iterator[_Placed] = ((count.where, document) for document in _documents(part.source, samples, count))
    if mixed:
        documents = _drawn(documents, f"{asked.seed} {place}")
    first = next(((where, d) for where, d in documents if asked.chat != "always" or not isinstance(d, str)), None)
    template = getattr(tokenizer, "chat_template", None)
    as_chats = bool(template) and first is not None and not isinstance(first[1], str) and asked.chat != "never"
    if asked.chat == "always" and not as_chats:
        count.require()
        missing = "the model has no chat template" if not template else "the data are no chats"
        raise UsageError("E253", f"--chat always, but {missing}", where=f"calibration {part.source}", fix="--chat auto")
    everything = chain(() if first is None else (first,), documents)
    if as_chats:
        chats = _chats(everything, None if asked.chat == "always" else count)
        rows = list(islice(_chat_ids(chats, samples, asked.sequence_length, tokenizer, count), samples))
        cut, ids = sum(len(row) > asked.sequence_length for row in rows), _pad(rows, asked.sequence_length)
        how = "chats, with the model's template"
    else:
        texts = (d if isinstance(d, str) else "\n\n".join(turn["content"] for turn in d) for _, d in everything)
        cut, ids = 0, _cut(texts, tokenizer, samples, asked.sequence_length)
        how = "documents joined by blank lines and cut"
    count.require()
    if mixed and len(ids) < samples:
        raise BadInput(
            "E393",
            f"{_there(len(ids), asked.sequence_length)}, the share of {part.share:.3g} asks for {samples}",
            where=f"calibration {part.source}",
            fix="give more text, a smaller share, or fewer --samples",
        )
    path = Path(part.source).expanduser()
    digest = {"file_sha256": sha256_of(path)} if path.is_file() else {}
    facts = {"source": part.source, "share": round(part.share, 6), "samples": len(ids), "rows": count.facts(), **digest}
    return Samples(ids, how, cut, [facts])


def require_files_unchanged(facts: Mapping[str, Any]) -> None:
    """facts: of a calibration that a job was begun with. UsageError E286 for a file that is another one by now; one that is gone is not
    needed any more."""
    problems = []
    for part in facts.get("parts", ()):
        path = Path(part["source"]).expanduser()
        if "file_sha256" in part and path.is_file() and sha256_of(path) != part["file_sha256"]:
            what = f"{path.name} is not the file any more that the job was begun with"
            problems.append(Problem(what, f"calibration {part['source']}", "put the earlier file back, or start again with another OUT"))
    if problems:
        raise UsageError.from_problems("E286", problems)


def _drawn(documents: Iterator[_Placed], seed: str) -> Iterator[_Placed]:
    """In an order drawn from the seed: out of a window over the next documents, so that a corpus of any size is read as a stream."""
    draw = Random(seed)
    held: list[_Placed] = []
    characters = 0
    for placed in documents:
        held.append(placed)
        characters += _characters(placed)
        if len(held) > _WINDOW or characters > _WINDOW_CHARACTERS:
            place = draw.randrange(len(held))
            held[place], held[-1] = held[-1], held[place]
            characters -= _characters(held[-1])
            yield held.pop()
    draw.shuffle(held)
    yield from held


def _characters(placed: _Placed) -> int:
    document = placed[1]
    return len(document) if isinstance(document, str) else sum(len(turn["content"]) for turn in document)


def _documents(source: str, samples: int, count: RowCount) -> Iterator[Document]:
    from marlinctl.data.text import READING, documents, names_a_file

    if names_a_file(source):
        return documents(source, count)
    return islice(_of_hub(source, count, READING), 64 * samples)


def _of_hub(source: str, count: RowCount, bounds: Bounds) -> Iterator[Document]:
    """In a process of its own: the library unpacks what the hub's files say, and they are as much a stranger's as a local one."""
    try:
        found = usable(confined(lambda: _hub_items(source), bounds), count)
        yield from (document for document in found if not isinstance(document, str) or document.strip())
    except Exceeded as reason:
        what = f"reading the data set was stopped: {reason}"
        raise BadInput("E325", what, where=f"calibration {source}", fix="choose another data set") from None


def _hub_items(source: str) -> Iterator[Item]:
    """Rows of a hub data set `org/name[:config][:split]`, streamed, through the same checks as those of a file."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise EnvironmentProblem(
            "E402", "hub data sets need the package datasets", where=source, fix="pip install 'marlinctl[distill]'"
        ) from error
    name, *rest = source.split(":")
    split = rest[-1] if rest else "train"
    number = 0
    try:
        for row in load_dataset(name, rest[0] if len(rest) > 1 else None, split=split, streaming=True):
            number += 1
            if number == 1 and not columns_of(list(row), chats=True):
                raise no_column(list(row), chats=True, where=f"calibration {source}")
            yield item_of(row, chats=True, where=f"{source}, row {number}")
    except (MarlinctlError, MemoryError):
        raise
    except Exception as error:  # the library raises many kinds for an absent, gated or unreachable data set
        if "scripts are no longer supported" in str(error):  # datasets >= 4 runs none, and says so only in these words
            raise BadInput(
                "E385",
                "this data set is a program that would have to be run to read it",
                where=f"calibration {source}",
                fix="choose a data set of .parquet or .jsonl files, or give a local .txt, .jsonl or .parquet file",
            ) from error
        raise HubProblem(
            "E707",
            f"the data set cannot be read: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            where=f"calibration {source}" + (f", after row {number}" if number else ""),
            fix="check name, config and split (org/name:config:split), or give a local .txt, .jsonl or .parquet file",
        ) from error


def _chats(documents: Iterable[_Placed], count: RowCount | None) -> Iterator[_Placed]:
    """Those of the documents that are chats. With a count, texts among them are skipped and counted."""
    for where, document in documents:
        if not isinstance(document, str):
            yield where, document
        elif count is not None:
            fix = "divide the file in two and give both as a mixture, or read all as plain text with --chat never"
            count.skip(Problem("a text among chats", where, fix))


def _cut(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, samples: int, length: int) -> Tensor:
    """Join, tokenize, cut. Samples begin with BOS where the tokenizer puts one before every text; UsageError E246 where that is all."""
    begins = _begins_with(tokenizer)
    body = length - len(begins)
    if body < 1:
        what = f"a sample of {length} has no room but for the token that the tokenizer puts before every text"
        raise UsageError("E246", what, where="--sequence-length", fix=f"--sequence-length {len(begins) + 1} or more")
    needed = samples * body
    found = [torch.empty(0, dtype=torch.int64)]
    got = 0
    for piece, whole in _pieces(texts, min(needed * CHARACTERS_PER_TOKEN, PIECE)):
        ids = token_ids(tokenizer, piece)
        found.append(torch.tensor(ids, dtype=torch.int64))
        got += len(ids)
        if got >= (needed if whole else needed + SLACK):
            break
    count = min(samples, got // body)
    cut = torch.cat(found)[: count * body].reshape(count, body)
    return torch.cat([torch.tensor(begins, dtype=torch.int64).expand(count, -1), cut], dim=1)


def _pieces(texts: Iterable[str], size: int) -> Iterator[tuple[str, bool]]:
    """All texts joined by blank lines, in pieces of `size` to two times `size` characters, and whether the piece ends where a text ends.

    Only a text longer than `size` is divided, before a word.
    """
    taken: list[str] = []
    length = 0
    for text, last in _with_last(texts):
        parts = _divided(text, size)
        for i, part in enumerate(parts):
            ends = i == len(parts) - 1
            taken.append(part + ("\n\n" if ends and not last else ""))
            length += len(part) + 2
            if length >= size or (ends and last):
                yield "".join(taken), ends
                taken, length = [], 0


def _with_last(texts: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Each text, and whether it is the last one."""
    ahead = iter(texts)
    for text in ahead:
        for following in ahead:
            yield text, False
            text = following
        yield text, True


def _divided(text: str, size: int) -> list[str]:
    """A text in parts of at most `size` characters; a part ends before a space where there is one in its last thousand characters."""
    parts = []
    begin = 0
    while len(text) - begin > size:
        end = begin + size
        space = text.rfind(" ", max(begin + 1, end - 1000), end)
        end = space if space > begin else end
        parts.append(text[begin:end])
        begin = end
    return [*parts, text[begin:]]


def _chat_ids(
    chats: Iterator[_Placed], wanted: int, length: int, tokenizer: PreTrainedTokenizerBase, count: RowCount
) -> Iterator[list[int]]:
    """The ids of chats in the model's template, until there are as many as wanted; `length` and more of each. Those that the template
    refuses are skipped and counted."""
    while wanted > 0 and (some := list(islice(chats, wanted))):
        for (where, chat), text in zip(some, _rendered([chat for _, chat in some], tokenizer), strict=True):
            if isinstance(text, str):
                wanted -= 1
                yield first_ids(text, tokenizer, length)
            else:
                count.skip(_refused_chat(chat, where, text[0]), by_template=True)


def _rendered(chats: Sequence[Any], tokenizer: PreTrainedTokenizerBase) -> Iterator[str | list[str]]:
    """Each chat in the model's template, or [why the template refuses it]. The template is a program that came with the model: it runs in a
    process of its own (system/confined.py)."""

    def render() -> Iterator[str | list[str]]:
        for chat in chats:
            try:
                text: str | list[str] = str(tokenizer.apply_chat_template(chat, tokenize=False))
            except Exception as error:  # raise_exception() of the template, and whatever its own mistakes raise in jinja or Python
                if isinstance(error, MemoryError):
                    raise
                text = [str(error).strip() or type(error).__name__]
            yield text

    try:
        yield from confined(render, Bounds(memory=1 << 30, cpu=30 + len(chats) // 20, wait=20))
    except Exceeded as reason:
        raise BadInput(
            "E325",
            f"the model's chat template was stopped: {reason}",
            where="chat_template.jinja or tokenizer_config.json of the model",
            fix="--chat never reads the chats as plain text; a template that does this is not to be trusted",
        ) from None


def _refused_chat(chat: Any, where: str, reason: str) -> Problem:
    roles = ", ".join(shown(turn["role"], 30) for turn in chat[:4]) + (", ..." if len(chat) > 4 else "")
    return Problem(
        f"the model's chat template refuses this chat ({roles}): {shown(reason)}",
        where,
        "leave out the turns that the template does not know, such as `system`; or calibrate with --chat never, on plain text",
    )


def _begins_with(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """[BOS] for models that want one at the start of every text (Gemma, Llama 3), else []."""
    bos = tokenizer.bos_token_id
    first = tokenizer("a")["input_ids"][:1]
    return [bos] if bos is not None and first == [bos] else []


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
