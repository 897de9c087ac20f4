"""Text for measuring and for calibrating: from a file, or from the Python that runs marlinctl.

    notes.txt  notes.txt.gz        the file is the text; as documents: one for every paragraph (blank lines divide them)
    rows.jsonl  rows.jsonl.gz      one JSON object a line: {"text": "..."}, or a chat: {"messages": [...]} / {"conversations": [...]}
    rows.parquet                   column `text`, or `messages` / `conversations`
    pythondoc                      pydoc_data.topics, the English prose behind help() that every CPython ships

Rows become one text by joining them with a blank line, which is how the published WikiText-2 perplexities are made.
`load_text` gives that one text with its SHA-256; `load_documents` gives the rows, and chats stay chats.

A data file is somebody else's: it may be binary, in another encoding, truncated, or hold one line of a gigabyte. Lines are read
one by one with an upper size, so a refusal names the line and costs no memory. Nothing in a file is ever run.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import platform
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from marlinctl.errors import BadInput, EnvironmentProblem, UsageError

PYTHONDOC = "pythondoc"
LONGEST_LINE = 64 * 2**20  # bytes; a document of 64 MiB is some 16 million tokens
KINDS = ".txt, .jsonl (both also as .gz), .parquet or the word pythondoc"
CHAT_COLUMNS = ("messages", "conversations")
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


def load_text(source: str) -> Text:
    """The whole of `source` as one text."""
    if source == PYTHONDOC:
        return _text(PYTHONDOC, "\n\n".join(_python_topics()), f"pydoc_data.topics of Python {platform.python_version()}")
    path, kind = _open_kind(source)
    if kind == "txt":
        return _text(path.name, "".join(line for _, line in _lines(path)), str(path))
    rows = [document for document in _rows(path, kind, chats=False) if isinstance(document, str)]
    return _text(path.name, "\n\n".join(rows), f"{path}, {len(rows):,} rows joined by blank lines")


def load_documents(source: str) -> list[Document]:
    """The documents of `source`, in file order, empty ones left out."""
    if source == PYTHONDOC:
        return [topic for topic in _python_topics() if topic.strip()]
    path, kind = _open_kind(source)
    documents = _paragraphs(path) if kind == "txt" else _rows(path, kind, chats=True)
    return [document for document in documents if not isinstance(document, str) or document.strip()]


def names_a_file(source: str) -> bool:
    """Whether a source of documents is a file here, there or not; else `org/name` is a data set on the hub."""
    return "/" not in source or Path(source).suffix in (".txt", ".jsonl", ".parquet", ".gz") or Path(source).expanduser().exists()


def check_text(source: str, *, chats: bool = False) -> None:
    """What load_text (with `chats`, load_documents) would refuse of the file's name, kind and first row. Reads no further than that."""
    if source == PYTHONDOC:
        return
    path, kind = _open_kind(source)
    rows: Iterator[Document] = _paragraphs(path) if kind == "txt" else _rows(path, kind, chats=chats)
    if next(rows, None) is None:
        raise BadInput("E380", "the text is empty", where=str(path), fix="give a file that holds text")


def _text(name: str, text: str, note: str) -> Text:
    if not text.strip():
        raise BadInput("E380", "the text is empty", where=note, fix="give a file that holds text")
    return Text(name, text, hashlib.sha256(text.encode("utf-8")).hexdigest(), note)


def _python_topics() -> list[str]:
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def _open_kind(source: str) -> tuple[Path, str]:
    """The path and its kind, told by the name: txt, jsonl or parquet."""
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
        raise UsageError("E241", f"what kind of text is {path.name}? Its name does not say", where=str(path), fix=f"give {KINDS}")
    return path, kind


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line with its newline), each checked for size, encoding and binary junk."""
    with _open_bytes(path) as file:
        number = 0
        while True:
            number += 1
            where = f"{path}, line {number}"
            try:
                line = file.readline(LONGEST_LINE + 1)
            except (OSError, EOFError, zlib.error) as error:  # a damaged .gz, or the disk
                raise BadInput("E384", f"cannot read the file: {error}", where=where, fix="copy or download the file again") from error
            if not line:
                return
            if len(line) > LONGEST_LINE:
                raise BadInput(
                    "E383",
                    f"a line is longer than {LONGEST_LINE >> 20} MiB",
                    where=where,
                    fix="split the text into lines; a file without line ends is most often not text",
                )
            yield number, _decode(line, first=number == 1, where=where)


def _open_bytes(path: Path) -> BufferedReader | gzip.GzipFile:
    try:
        return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")
    except OSError as error:
        raise BadInput("E384", f"cannot open the file: {error.strerror}", where=str(path), fix="check the file's permissions") from error


def _decode(line: bytes, *, first: bool, where: str) -> str:
    try:
        text = line.decode("utf-8-sig" if first else "utf-8")  # a byte order mark may stand at the very start
    except UnicodeDecodeError as error:
        raise BadInput(
            "E381",
            f"not UTF-8 text: byte 0x{line[error.start]:02x} at place {error.start + 1} of the line",
            where=where,
            fix="convert the file first, for example: iconv -f LATIN1 -t UTF-8 IN > OUT",
        ) from error
    if "\x00" in text:
        raise BadInput("E381", "a zero byte in the text: this looks like a binary file", where=where, fix="give a text file in UTF-8")
    return text


def _paragraphs(path: Path) -> Iterator[str]:
    lines: list[str] = []
    for _, line in _lines(path):
        if line.strip():
            lines.append(line)
        elif lines:
            yield "".join(lines).strip()
            lines = []
    if lines:
        yield "".join(lines).strip()


def _rows(path: Path, kind: str, *, chats: bool) -> Iterator[Document]:
    rows = _json_rows(path) if kind == "jsonl" else _parquet_rows(path, chats=chats)
    for where, row in rows:
        yield _document(row, chats=chats, where=where)


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = f"{error.msg}, at place {error.pos + 1} of the line" if isinstance(error, json.JSONDecodeError) else str(error)
            raise BadInput("E382", f"not JSON: {reason}", where=where, fix=_JSON_FIX) from error
        if not isinstance(row, dict):
            raise BadInput("E382", f"the line holds {_kind_of(row)}, not an object", where=where, fix=_JSON_FIX)
        yield where, row


def _parquet_rows(path: Path, *, chats: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Row by row, in batches, reading only the column that counts."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise EnvironmentProblem(
            "E402", "reading .parquet needs pyarrow, which is missing", where=str(path), fix="pip install 'marlinctl[eval]', or give .jsonl"
        ) from error
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            column = next((name for name in ("text", *(CHAT_COLUMNS if chats else ())) if name in names), None)
            if column is None:
                raise _no_text(names, chats=chats, where=str(path))
            for batch in file.iter_batches(batch_size=256, columns=[column]):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadInput(
            "E384", f"cannot read the parquet file: {reason}", where=f"{path}, after row {number}", fix="copy or download the file again"
        ) from error


def _document(row: dict[str, Any], *, chats: bool, where: str) -> Document:
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
        chat.append({"role": turn["role"], "content": _encodable(turn["content"], where=where)})
    return chat


def _encodable(text: str, *, where: str) -> str:
    """JSON may spell half of a surrogate pair (\\ud83d), which is no character and which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadInput(
            "E381", f"half a surrogate pair at place {error.start + 1} of the text", where=where, fix="write the text again as proper UTF-8"
        ) from error
    return text


_JSON_FIX = 'write one JSON object a line, as {"text": "..."}'
_CHAT_FIX = 'write turns as {"role": "user", "content": "..."}'


def _no_text(names: list[str], *, chats: bool, where: str) -> BadInput:
    wanted = ", ".join(("text", *CHAT_COLUMNS)) if chats else "text"
    shown = ", ".join(str(name)[:40] for name in names[:12]) or "none"
    return BadInput("E385", f"no field `{wanted}`; there are: {shown}", where=where, fix="rename the field that holds the text to `text`")


def _kind_of(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
