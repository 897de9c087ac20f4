"""marlinctl/data/rows.py: which rows are texts and chats, and how many may be neither."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from marlinctl.data.rows import RowCount
from marlinctl.data.text import check_text, documents, load_text
from marlinctl.errors import BadInput

ALPACA = {"instruction": "Add the numbers.", "input": "1 and 2", "output": "3"}
TURNS = [{"role": "user", "content": "Add the numbers.\n\n1 and 2"}, {"role": "assistant", "content": "3"}]
SHARED = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
GOOD = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def lines(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_alpaca_is_a_chat_of_two_turns(tmp_path: Path) -> None:
    """Alpaca would be refused, or its `input` would be lost."""
    plain = {"instruction": "Say hello.", "input": "", "output": "Hello"}
    said = [{"role": "user", "content": "Say hello."}, {"role": "assistant", "content": "Hello"}]
    without = {"instruction": "Say hello.", "output": "Hello"}
    assert list(documents(lines(tmp_path / "a.jsonl", [ALPACA, plain, without]))) == [TURNS, said, said]
    pq.write_table(pa.Table.from_pylist([{"id": 1, **ALPACA}]), tmp_path / "a.parquet")
    assert list(documents(str(tmp_path / "a.parquet"))) == [TURNS]


def test_content_in_parts(tmp_path: Path) -> None:
    """OpenAI's newer form of a message would be a bad row; a picture would be read as its address."""
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, {"role": "assistant", "content": "Hello"}]
    assert list(documents(lines(tmp_path / "a.jsonl", [{"messages": parts}]))) == [GOOD]
    picture = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    with pytest.raises(BadInput, match="turn 1 of the chat has no role and content"):
        list(documents(lines(tmp_path / "b.jsonl", [{"messages": picture}])))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("indent", [None, 1])
def test_json_arrays(tmp_path: Path, indent: int | None, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """ShareGPT and Alpaca are published as one JSON array, with line ends or without; an element would be lost where a chunk ends."""
    from marlinctl.data import text

    monkeypatch.setattr(text, "_CHUNK", 7)
    rows = [{"conversations": SHARED}, ALPACA, {"text": "Grüße"}]
    data = f"\ufeff{json.dumps(rows, indent=indent, ensure_ascii=False)}\n".encode()
    path = tmp_path / ("a.json.gz" if packed else "a.json")
    path.write_bytes(gzip.compress(data) if packed else data)
    assert list(documents(str(path))) == [GOOD, TURNS, "Grüße"]
    assert load_text(lines(tmp_path / "lines.json", [{"text": "one"}, {"text": "two"}])).text == "one\n\ntwo"


@pytest.mark.parametrize(
    ("data", "said", "where"),
    [
        (b'[\n{"text": "a"},\n{"text": }]', "not a JSON array", "line 3"),
        (b'[{"text": "a"},\n', "it has no end", "line 2"),
        (b'[{"text": "a"},\n5]', "the element holds a number", "line 2"),
        (b'[{"text": "\xff"}]', "not UTF-8", "byte 0"),
        (b"[" * 100_000, "not a JSON array", "line 1"),
    ],
)
def test_bad_arrays(tmp_path: Path, data: bytes, said: str, where: str) -> None:
    """A damaged array would end in a traceback, or without the place."""
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(BadInput, match=said) as caught:
        list(documents(str(tmp_path / "a.json")))
    assert caught.value.error_id == "E385" and where in caught.value.problems[0].where


def test_bad_rows_are_skipped_and_counted(tmp_path: Path) -> None:
    """One damaged row of a thousand would end the run, or rows would vanish without a word."""
    rows: list[Any] = [{"conversations": SHARED}] * 30
    rows[0], rows[10], rows[20] = {"conversations": []}, "{not json", {"body": "a"}
    source = lines(tmp_path / "a.jsonl", rows)
    check_text(source, chats=True)
    count = RowCount(source)
    assert list(documents(source, count)) == [GOOD] * 27
    count.require()
    facts = count.facts()
    assert (facts["read"], facts["skipped"]) == (30, 3)
    assert [line.split(":")[0] for line in facts["first"]] == ["line 1, conversations", "line 11", "line 21"]


def test_too_many_bad_rows_are_refused(tmp_path: Path) -> None:
    """A model would be calibrated on the few rows that a wrong file happens to have in the right form; reading would not end early."""
    source = lines(tmp_path / "a.jsonl", [{"text": "a"}] * 8 + [{"body": "b"}] * 5000)
    count = RowCount(source)
    with pytest.raises(BadInput, match="100 of 108 rows cannot be used, and at most 10% may be skipped") as caught:
        list(documents(source, count))
    assert [problem.where for problem in caught.value.problems] == [f"{source}, line {number}" for number in (9, 10, 11)]
    few = lines(tmp_path / "b.jsonl", [{"text": "a"}, {"body": "b"}])
    count = RowCount(few)
    assert list(documents(few, count)) == ["a"]
    with pytest.raises(BadInput, match="1 of 2 rows"):
        count.require()
    with pytest.raises(BadInput, match="no field"):
        check_text(lines(tmp_path / "c.jsonl", [{"body": "b"}] * 3), chats=True)
