"""Text for measuring and for calibrating: from a file, or from the Python that runs marlinctl.

    notes.txt  notes.txt.gz        the file is the text; as documents: one for every paragraph (blank lines divide them)
    rows.jsonl  rows.jsonl.gz      one JSON object a line: {"text": "..."}, or a chat: {"messages": [...]} / {"conversations": [...]}
    rows.parquet                   column `text`, or `messages` / `conversations`
    pythondoc                      pydoc_data.topics, the English prose behind help() that every CPython ships

Rows become one text by joining them with a blank line, which is how the published WikiText-2 perplexities are made.
`load_text` gives that one text with its SHA-256; `documents` gives the rows one by one, and chats stay chats.

A data file is foreign: it may be binary, in another encoding, truncated, hold one line of a gigabyte, or unpack to a thousand
times its size. It is read as a stream, up to what is needed. Lines have an upper size, so a refusal names the line and costs no memory;
parquet, whose library unpacks as the file says, is read in a process of its own (system/confined.py). Nothing in a file is ever run.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import platform
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Any, cast

from marlinctl.errors import BadInput, EnvironmentProblem, UsageError
from marlinctl.system.confined import Bounds, Exceeded, confined
from marlinctl.system.files import FileRefused, open_plain, shown

PYTHONDOC = "pythondoc"
LONGEST_LINE = 16 << 20  # bytes; a row of 16 MiB is some 4 million tokens
LONGEST_TEXT = 1 << 24  # characters of one text or paragraph; WikiText-2's test text has 1.3 million
MOST_UNPACKED = 100  # times the size of a .gz, beyond the first 64 MiB; text packs to a fifth, a log to a thirtieth
UNPACKED_FREELY = 64 << 20
MOST_BLANK = 1_000_000  # lines; a second of reading
READING = Bounds(memory=1 << 30, cpu=600, wait=120)  # of a parquet file
KINDS = ".txt, .jsonl (both also as .gz), .parquet or the word pythondoc"
CHAT_COLUMNS = ("messages", "conversations")
_HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+(:.*)?", re.ASCII)  # org/name[:config][:split]
ROLES = {"human": "user", "gpt": "assistant"}  # the names that ShareGPT's `conversations` use

Chat = list[dict[str, Any]]  # [{"role": "user", "content": "..."}, ...], what chat templates take
Document = str | Chat


@dataclass(frozen=True, slots=True)
class Text:
    """One text and what to print beside a figure measured on it."""

    name: str
    text: str
    sha256: str  # of the text in UTF-8
    note: str


def load_text(source: str, *, longest: int = LONGEST_TEXT) -> Text:
    """`source` as one text; of a longer one the first `longest` characters, and the note says so."""
    if source == PYTHONDOC:
        return _text(PYTHONDOC, "\n\n".join(_python_topics()), f"pydoc_data.topics of Python {platform.python_version()}")
    path, kind = _open_kind(source)
    if kind == "txt":
        parts, more = _first_characters((line for _, line in _lines(path)), longest)
        text, note = "".join(parts), str(path)
    else:
        parts, more = _first_characters((row for row in _rows(path, kind, chats=False) if isinstance(row, str)), longest)
        text, note = "\n\n".join(parts), f"{path}, {len(parts):,} rows joined by blank lines"
    return _text(path.name, text[:longest] if more else text, f"{note}, the first {longest:,} characters" if more else note)


def documents(source: str) -> Iterator[Document]:
    """The documents of `source`, in file order, empty ones left out. Read as they are asked for: who has enough stops.

    A paragraph of more than LONGEST_TEXT characters comes in several, divided where a line ends.
    """
    if source == PYTHONDOC:
        found: Iterable[Document] = _python_topics()
    else:
        path, kind = _open_kind(source)
        found = _paragraphs(path) if kind == "txt" else _rows(path, kind, chats=True)
    return (document for document in found if not isinstance(document, str) or document.strip())


def _first_characters(parts: Iterable[str], longest: int) -> tuple[list[str], bool]:
    """Parts until there are more than `longest` characters, and whether there are."""
    taken: list[str] = []
    left = longest
    for part in parts:
        taken.append(part)
        left -= len(part)
        if left < 0:
            return taken, True
    return taken, False


def names_a_file(source: str) -> bool:
    """Whether a source of documents is a file here, there or not; else `org/name` is a data set on the hub."""
    if not _HUB_NAME.fullmatch(source):
        folder, colon, _ = source.partition(":")
        return not (colon and Path(folder).is_dir())  # a copy of a data set, with its split
    return Path(source).suffix in (".txt", ".jsonl", ".parquet", ".gz") or Path(source).exists()


def check_text(source: str, *, chats: bool = False) -> None:
    """What load_text (with `chats`, documents) would refuse of the file's name, kind and first row. Reads no further than that."""
    if source == PYTHONDOC:
        return
    path, kind = _open_kind(source)
    rows: Iterator[Document] = _paragraphs(path) if kind == "txt" else _rows(path, kind, chats=chats)
    if next(rows, None) is None:
        raise BadInput("E393", "the text is empty", where=str(path), fix="give a file that holds text")


def _text(name: str, text: str, note: str) -> Text:
    if not text.strip():
        raise BadInput("E393", "the text is empty", where=note, fix="give a file that holds text")
    return Text(name, text, hashlib.sha256(text.encode("utf-8")).hexdigest(), note)


def _python_topics() -> list[str]:
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def _open_kind(source: str) -> tuple[Path, str]:
    """The path and its kind, from the name: txt, jsonl or parquet."""
    path = Path(source).expanduser()
    if not path.exists():
        raise UsageError("E240", f"no such text: {source}", where=str(path), fix=f"give {KINDS}")
    if not path.is_file():  # a FIFO or a device would make us wait for ever
        raise UsageError("E240", f"{source} is not a regular file", where=str(path), fix=f"give {KINDS}")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
        kinds = {".txt": "txt", ".jsonl": "jsonl"}
    else:
        kinds = {".txt": "txt", ".jsonl": "jsonl", ".parquet": "parquet"}
    kind = kinds.get(suffixes[-1] if suffixes else "")
    if kind is None:
        raise UsageError("E240", f"what kind of text is {path.name}? Its name does not say", where=str(path), fix=f"give {KINDS}")
    return path, kind


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line with its newline), each checked for size, encoding and binary junk."""
    packed = path.suffix.lower() == ".gz"
    with _open(path) as plain, _unpacked(plain, packed=packed) as file:
        most = max(UNPACKED_FREELY, MOST_UNPACKED * os.fstat(plain.fileno()).st_size)
        number = unpacked = blank = 0
        while True:
            number += 1
            where = f"{path}, line {number}"
            try:
                line = file.readline(LONGEST_LINE + 1)
            except (OSError, EOFError, zlib.error) as error:  # a damaged .gz, or the disk
                raise BadInput("E385", f"cannot read the file: {error}", where=where, fix="copy or download the file again") from error
            if not line:
                return
            if len(line) > LONGEST_LINE:
                raise BadInput(
                    "E385",
                    f"a line is longer than {LONGEST_LINE >> 20} MiB",
                    where=where,
                    fix="split the text into lines; a file without line ends is most often not text",
                )
            unpacked += len(line)
            blank = blank + 1 if line.isspace() else 0
            if blank > MOST_BLANK:
                what = f"more than {MOST_BLANK:,} blank lines in a row"
                raise BadInput("E325", what, where=where, fix="give a file that holds text")
            if packed and unpacked > most:
                what = f"the file unpacks to more than {MOST_UNPACKED} times its size"
                raise BadInput("E325", what, where=where, fix="no text does that; if this one does, unpack it first (gunzip)")
            yield number, _decode(line, first=number == 1, where=where)


def _open(path: Path) -> FileIO:
    try:
        return open_plain(path)
    except FileRefused as refused:
        problem = refused.problem
        raise BadInput("E385", f"cannot open the file: {problem.what}", where=problem.where, fix=problem.fix) from None


def _unpacked(file: FileIO, *, packed: bool) -> BufferedReader | gzip.GzipFile:
    return gzip.GzipFile(fileobj=file, mode="rb") if packed else BufferedReader(file)


def _decode(line: bytes, *, first: bool, where: str) -> str:
    try:
        text = line.decode("utf-8-sig" if first else "utf-8")  # a byte order mark may stand at the very start
    except UnicodeDecodeError as error:
        raise BadInput(
            "E385",
            f"not UTF-8 text: byte 0x{line[error.start]:02x} at place {error.start + 1} of the line",
            where=where,
            fix="convert the file first, for example: iconv -f LATIN1 -t UTF-8 IN > OUT",
        ) from error
    if "\x00" in text:
        raise BadInput("E385", "a zero byte in the text: this looks like a binary file", where=where, fix="give a text file in UTF-8")
    return text


def _paragraphs(path: Path) -> Iterator[str]:
    lines: list[str] = []
    length = 0
    for _, line in _lines(path):
        if line.strip():
            lines.append(line)
            length += len(line)
        if lines and (not line.strip() or length > LONGEST_TEXT):
            yield "".join(lines).strip()
            lines, length = [], 0
    if lines:
        yield "".join(lines).strip()


def _rows(path: Path, kind: str, *, chats: bool) -> Iterator[Document]:
    if kind == "jsonl":
        for where, row in _json_rows(path):
            yield checked_row(row, chats=chats, where=where)
        return
    try:
        yield from cast(Iterator[Document], confined(lambda: _parquet_rows(path, chats=chats), READING))
    except Exceeded as reason:
        fix = "no text does that; if this one does, write it as .jsonl"
        raise BadInput("E325", f"reading the parquet file was stopped: {reason}", where=str(path), fix=fix) from None


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = f"{error.msg}, at place {error.pos + 1} of the line" if isinstance(error, json.JSONDecodeError) else str(error)
            raise BadInput("E385", f"not JSON: {reason}", where=where, fix=_JSON_FIX) from error
        if not isinstance(row, dict):
            raise BadInput("E385", f"the line holds {_kind_of(row)}, not an object", where=where, fix=_JSON_FIX)
        yield where, row


def _parquet_rows(path: Path, *, chats: bool) -> Iterator[Document]:
    """Row by row, reading only the column that counts. Each row may repeat a value of megabytes that is stored once; a row costs 16 us."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise EnvironmentProblem(
            "E402", "reading .parquet needs pyarrow, which is missing", where=str(path), fix="pip install 'marlinctl[eval]', or give .jsonl"
        ) from error
    number = 0
    try:
        with _open(path) as plain, pq.ParquetFile(plain, buffer_size=1 << 20) as file:
            names = file.schema_arrow.names
            column = next((name for name in ("text", *(CHAT_COLUMNS if chats else ())) if name in names), None)
            if column is None:
                raise _no_text(names, chats=chats, where=str(path))
            for batch in file.iter_batches(batch_size=1, columns=[column], use_threads=False):
                for row in batch.to_pylist():
                    number += 1
                    yield checked_row(row, chats=chats, where=f"{path}, row {number}")
    except (pa.ArrowMemoryError, MemoryError):
        raise MemoryError from None
    except (pa.ArrowException, OSError, OverflowError) as error:
        reason = shown(str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise BadInput(
            "E385", f"cannot read the parquet file: {reason}", where=f"{path}, after row {number}", fix="copy or download the file again"
        ) from error


def checked_row(row: dict[str, Any], *, chats: bool, where: str) -> Document:
    """The text or chat of a row; BadInput E385 where it is neither, or longer than LONGEST_TEXT."""
    if chats and "text" not in row:
        for column in CHAT_COLUMNS:
            if column in row:
                return _chat(row[column], where=f"{where}, {column}")
    if "text" not in row:
        raise _no_text(list(row), chats=chats, where=where)
    if not isinstance(row["text"], str):
        raise BadInput("E385", f"`text` is {_kind_of(row['text'])}, not a string", where=where, fix="write the text as a string")
    return _encodable(row["text"], where=where)


def _chat(turns: Any, *, where: str) -> Chat:
    """Turns as {"role", "content"}; ShareGPT's {"from", "value"} is renamed."""
    if not isinstance(turns, list) or not turns:
        raise BadInput("E385", f"a chat must be a list of turns, this is {_kind_of(turns)}", where=where, fix=_CHAT_FIX)
    chat: Chat = []
    for place, turn in enumerate(turns, start=1):
        if isinstance(turn, dict) and "from" in turn and "value" in turn:
            turn = {"role": ROLES.get(str(turn["from"]), turn["from"]), "content": turn["value"]}
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str) or not isinstance(turn.get("content"), str):
            raise BadInput("E385", f"turn {place} of the chat has no role and content", where=where, fix=_CHAT_FIX)
        chat.append({"role": _encodable(turn["role"], where=where), "content": _encodable(turn["content"], where=where)})
    return chat


def _encodable(text: str, *, where: str) -> str:
    """JSON may spell half of a surrogate pair (\\ud83d), which is not a character and which no tokenizer takes."""
    if len(text) > LONGEST_TEXT:
        raise BadInput("E385", f"a text is longer than {LONGEST_TEXT:,} characters", where=where, fix="divide it into several rows")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadInput(
            "E385", f"half a surrogate pair at place {error.start + 1} of the text", where=where, fix="write the text again as proper UTF-8"
        ) from error
    return text


_JSON_FIX = 'write one JSON object a line, as {"text": "..."}'
_CHAT_FIX = 'write turns as {"role": "user", "content": "..."}'


def _no_text(names: list[str], *, chats: bool, where: str) -> BadInput:
    wanted = ", ".join(("text", *CHAT_COLUMNS)) if chats else "text"
    listed = ", ".join(str(name)[:40] for name in names[:12]) or "none"
    return BadInput("E385", f"no field `{wanted}`; there are: {listed}", where=where, fix="rename the field that holds the text to `text`")


def _kind_of(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
