"""Text for measuring and for calibrating: from a file, or from the Python that runs marlinctl.

    notes.txt  notes.txt.gz        the file is the text; as documents: one for every paragraph (blank lines divide them)
    rows.jsonl  rows.jsonl.gz      one JSON object a line: {"text": "..."}, or a chat (data/rows.py)
    rows.json  rows.json.gz        an array of such objects, or such lines
    rows.parquet                   such columns
    pythondoc                      pydoc_data.topics, the English prose behind help() that every CPython ships

Rows become one text by joining them with a blank line, which is how the published WikiText-2 perplexities are made.
`load_text` gives that one text with its SHA-256; `documents` gives the rows one by one, and chats stay chats.

A data file is foreign: it may be binary, in another encoding, truncated, hold one line of a gigabyte, or unpack to a thousand
times its size. It is read as a stream, up to what is needed. Lines have an upper size, so a refusal names the line and costs no memory;
parquet, whose library unpacks as the file says, is read in a process of its own (system/confined.py). Nothing in a file is ever run.
"""

from __future__ import annotations

import codecs
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
from typing import Any

from marlinctl.data.rows import LONGEST_TEXT, Document, Item, RowCount, bad, columns_of, item_of, kind_of, no_column, usable
from marlinctl.errors import BadInput, EnvironmentProblem, UsageError, number_of
from marlinctl.system.confined import Bounds, Exceeded, confined
from marlinctl.system.files import FileRefused, open_plain, shown

PYTHONDOC = "pythondoc"
LONGEST_LINE = 16 << 20  # bytes; a row of 16 MiB is some 4 million tokens
MOST_UNPACKED = 100  # times the size of a .gz, beyond the first 64 MiB; text packs to a fifth, a log to a thirtieth
UNPACKED_FREELY = 64 << 20
MOST_BLANK = 1_000_000  # lines; a second of reading
READING = Bounds(memory=1 << 30, cpu=600, wait=120)  # of a parquet file
KINDS = ".txt, .jsonl, .json (all three also as .gz), .parquet or the word pythondoc"
_HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+(:.*)?", re.ASCII)  # org/name[:config][:split]
_CHUNK = 1 << 20  # bytes of an array that are read at a time
_BEFORE, _BETWEEN = re.compile(r"[\ufeff\s]*"), re.compile(r"[\s,]*")  # an array, and its elements


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
        text, note = "\n\n".join(parts), f"{path}, {number_of(len(parts), 'row')} joined by blank lines"
    return _text(path.name, text[:longest] if more else text, f"{note}, the first {longest:,} characters" if more else note)


def documents(source: str, count: RowCount | None = None) -> Iterator[Document]:
    """The documents of `source`, in file order, empty ones left out. Read as they are asked for: who has enough stops.

    With a count, rows that cannot be used are skipped and counted (data/rows.py), else they are BadInput E385. A paragraph of more than
    LONGEST_TEXT characters comes in several, divided where a line ends.
    """
    if source == PYTHONDOC:
        found: Iterable[Document] = _python_topics()
    else:
        path, kind = _open_kind(source)
        found = _paragraphs(path) if kind == "txt" else _rows(path, kind, chats=True, count=count)
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
    return Path(source).suffix in (".txt", ".jsonl", ".json", ".parquet", ".gz") or Path(source).exists()


def check_text(source: str, *, chats: bool = False) -> None:
    """What load_text would refuse of the file's name, kind and first row; with `chats`, what documents would, up to its first good row."""
    if source == PYTHONDOC:
        return
    path, kind = _open_kind(source)
    count = RowCount(str(path)) if chats else None
    rows: Iterator[Document] = _paragraphs(path) if kind == "txt" else _rows(path, kind, chats=chats, count=count)
    if next(rows, None) is None:
        if count is not None:
            count.require()
        raise BadInput("E393", "the text is empty", where=str(path), fix="give a file that holds text")


def _text(name: str, text: str, note: str) -> Text:
    if not text.strip():
        raise BadInput("E393", "the text is empty", where=note, fix="give a file that holds text")
    return Text(name, text, hashlib.sha256(text.encode("utf-8")).hexdigest(), note)


def _python_topics() -> list[str]:
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def _open_kind(source: str) -> tuple[Path, str]:
    """The path and its kind, from the name: txt, jsonl, json or parquet."""
    path = Path(source).expanduser()
    if not path.exists():
        raise UsageError("E240", f"no such text: {source}", where=str(path), fix=f"check the path; a text is {KINDS}")
    if not path.is_file():  # a FIFO or a device would make us wait for ever
        raise UsageError("E240", f"{source} is not a regular file", where=str(path), fix=f"give {KINDS}")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
        kinds = {".txt": "txt", ".jsonl": "jsonl", ".json": "json"}
    else:
        kinds = {".txt": "txt", ".jsonl": "jsonl", ".json": "json", ".parquet": "parquet"}
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
                raise _unpacks_too_far(where)
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
        raise _binary(where)
    return text


def _binary(where: str) -> BadInput:
    return BadInput("E385", "a zero byte in the text: this looks like a binary file", where=where, fix="give a text file in UTF-8")


def _unpacks_too_far(where: str) -> BadInput:
    what = f"the file unpacks to more than {MOST_UNPACKED} times its size"
    return BadInput("E325", what, where=where, fix="no text does that; if this one does, unpack it first (gunzip)")


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


def _rows(path: Path, kind: str, *, chats: bool, count: RowCount | None = None) -> Iterator[Document]:
    if kind != "parquet":
        as_array = kind == "json" and _is_array(path)
        yield from usable(_array_items(path, chats=chats) if as_array else _line_items(path, chats=chats), count)
        return
    try:
        yield from usable(confined(lambda: _parquet_items(path, chats=chats), READING), count)
    except Exceeded as reason:
        fix = "no text does that; if this one does, write it as .jsonl"
        raise BadInput("E325", f"reading the parquet file was stopped: {reason}", where=str(path), fix=fix) from None


def _line_items(path: Path, *, chats: bool) -> Iterator[Item]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = f"{error.msg}, at place {error.pos + 1} of the line" if isinstance(error, json.JSONDecodeError) else str(error)
            yield bad(f"not JSON: {reason}", where=where, fix=_JSON_FIX)
            continue
        yield _item(row, "line", chats=chats, where=where)


def _item(row: Any, place: str, *, chats: bool, where: str) -> Item:
    if not isinstance(row, dict):
        return bad(f"the {place} holds {kind_of(row)}, not an object", where=where, fix=_JSON_FIX)
    return item_of(row, chats=chats, where=where)


def _is_array(path: Path) -> bool:
    """By its first sign. Many files of that name hold a JSON object a line."""
    for chunk in _chunks(path):
        if start := chunk.removeprefix("\ufeff").lstrip():
            return start[0] == "["
    return False


def _array_items(path: Path, *, chats: bool) -> Iterator[Item]:
    """The elements of a JSON array one by one, of which no more is in memory than one element and a chunk.

    BadInput E385 where it cannot be parsed as JSON: unlike a line, an element that cannot be read has no end behind which to continue.
    """
    decoder = json.JSONDecoder()
    chunks = _chunks(path)
    text, at, line, opened = "", 0, 1, False
    while True:
        gap = (_BETWEEN if opened else _BEFORE).match(text, at)
        assert gap is not None  # it matches nothing too
        line += text.count("\n", at, gap.end())
        at = gap.end()
        if not opened and at < len(text):
            opened, at = True, at + 1
            continue
        if text.startswith("]", at):
            return
        where = f"{path}, line {line}"
        try:
            row, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            left = len(text) - at
            chunk = next(chunks, "") if isinstance(error, ValueError) and left <= LONGEST_LINE else ""
            if chunk:
                text, at = text[at:] + chunk, 0
                continue
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            if not left:
                reason = "it has no end"
            elif left > LONGEST_LINE:
                reason = f"no element ends within {LONGEST_LINE >> 20} MiB: {reason}"
            raise BadInput("E385", f"not a JSON array: {reason}", where=where, fix=_JSON_FIX) from error
        yield _item(row, "element", chats=chats, where=where)
        line += text.count("\n", at, end)
        at = end


def _chunks(path: Path) -> Iterator[str]:
    """The text of a file in pieces, checked for encoding, binary junk and how much it unpacks to."""
    packed = path.suffix.lower() == ".gz"
    decoder = codecs.getincrementaldecoder("utf-8")()
    unpacked = 0
    with _open(path) as plain, _unpacked(plain, packed=packed) as file:
        most = max(UNPACKED_FREELY, MOST_UNPACKED * os.fstat(plain.fileno()).st_size)
        while True:
            where = f"{path}, after byte {unpacked}"
            try:
                data = file.read(_CHUNK)
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                fix = "convert the file first, for example: iconv -f LATIN1 -t UTF-8 IN > OUT"
                raise BadInput("E385", "not UTF-8 text", where=where, fix=fix) from error
            except (OSError, EOFError, zlib.error) as error:
                raise BadInput("E385", f"cannot read the file: {error}", where=where, fix="copy or download the file again") from error
            if not data:
                return
            unpacked += len(data)
            if packed and unpacked > most:
                raise _unpacks_too_far(where)
            if "\x00" in text:
                raise _binary(where)
            yield text


def _parquet_items(path: Path, *, chats: bool) -> Iterator[Item]:
    """Row by row, reading only the columns that count. Each row may repeat a value of megabytes that is stored once; a row costs 16 us."""
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
            columns = columns_of(names, chats=chats)
            if not columns:
                raise no_column(names, chats=chats, where=str(path))
            for batch in file.iter_batches(batch_size=1, columns=columns, use_threads=False):
                for row in batch.to_pylist():
                    number += 1
                    yield item_of(row, chats=chats, where=f"{path}, row {number}")
    except (pa.ArrowMemoryError, MemoryError):
        raise MemoryError from None
    except (pa.ArrowException, OSError, OverflowError) as error:
        reason = shown(str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise BadInput(
            "E385", f"cannot read the parquet file: {reason}", where=f"{path}, after row {number}", fix="copy or download the file again"
        ) from error


_JSON_FIX = 'write one JSON object a line, as {"text": "..."}'
