"""marlinctl/data/text.py: text in many files, and every way such a file can be wrong."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import platform
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from marlinctl.data import text as texts
from marlinctl.data.text import LONGEST_LINE, Document, load_text
from marlinctl.errors import BadInput, MarlinctlError, UsageError

ROWS = ["A first row.\nWith two lines.", "Grüße, 世界"]


def write(folder: Path, name: str, data: bytes) -> str:
    path = folder / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return str(path)


def documents(source: str) -> list[Document]:
    return list(texts.documents(source))


def jsonl(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_pythondoc_is_the_same_on_every_machine_with_this_python() -> None:
    """The default text would be another one than the Python version printed beside the figure says."""
    from pydoc_data.topics import topics

    text = load_text("pythondoc")
    assert text.text == "\n\n".join(topics[name] for name in sorted(topics))
    assert text.sha256 == hashlib.sha256(text.text.encode()).hexdigest()
    assert platform.python_version() in text.note
    assert len(documents("pythondoc")) == len(topics)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.parquet", "rows.txt", "rows.txt.gz"])
def test_every_kind_gives_the_same_text(tmp_path: Path, name: str) -> None:
    """Perplexity would depend on the container of a text; a byte order mark would become a token."""
    joined = "\n\n".join(ROWS)
    if name.endswith(".parquet"):
        source = str(tmp_path / name)
        pq.write_table(pa.table({"id": [1, 2], "text": ROWS}), source)
    else:
        source = write(tmp_path, name, b"\xef\xbb\xbf" + joined.encode() if ".txt" in name else jsonl(*({"text": row} for row in ROWS)))
    assert load_text(source).text == joined
    assert documents(source) == ROWS


def test_paragraphs_and_empty_rows(tmp_path: Path) -> None:
    """Calibration would get empty samples, or one sample holding the whole file."""
    source = write(tmp_path, "a.txt", b"one\ntwo\n\n\n \nthree\n")
    assert documents(source) == ["one\ntwo", "three"]
    assert load_text(source).text == "one\ntwo\n\n\n \nthree\n"
    assert documents(write(tmp_path, "b.jsonl", b"\n" + jsonl({"text": "  "}, {"text": "x"}))) == ["x"]


def test_chats_stay_chats(tmp_path: Path) -> None:
    """A model's chat template would never be applied, or be given names of roles that it does not know."""
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    shared = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    source = write(tmp_path, "c.jsonl", jsonl({"messages": turns}, {"conversations": shared}, {"text": "plain"}))
    assert documents(source) == [turns, turns, "plain"]
    parquet = tmp_path / "c.parquet"
    pq.write_table(pa.table({"messages": [turns, turns]}), parquet)
    assert documents(str(parquet)) == [turns, turns]


BAD = {
    "empty.txt": (b"\n \n", "E393", "the text is empty", ""),
    "latin.txt": ("fine\nGrüße\n".encode("latin-1"), "E385", "not UTF-8", "line 2"),
    "zero.txt": (b"ok\nok\n\x00\x01\n", "E385", "zero byte", "line 3"),
    "half.jsonl": (b'{"text": "\\ud83d"}\n', "E385", "surrogate", "line 1"),
    "bad.jsonl": (b'{"text": "a"}\n{"text": \n', "E385", "not JSON", "line 2"),
    "deep.jsonl": (b'{"text": "a"}\n' + b"[" * 100_000 + b"\n", "E385", "not JSON", "line 2"),
    "list.jsonl": (b'{"text": "a"}\n["a"]\n', "E385", "not an object", "line 2"),
    "cut.txt.gz": (b"", "E385", "cannot read the file", ", line "),
    "notgz.jsonl.gz": (b"", "E385", "cannot read the file", "line 1"),
    "junk.parquet": (b"PAR1 this is not parquet PAR1", "E385", "cannot read the parquet file", "junk.parquet"),
    "column.jsonl": (jsonl({"body": "a"}), "E385", "no field", "line 1"),
    "number.jsonl": (jsonl({"text": "a"}, {"text": 5}), "E385", "not a string", "line 2"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_name_the_line(tmp_path: Path, name: str) -> None:
    """The person would have to search a gigabyte for the bad line, or would get a traceback."""
    data, error_id, what, where = BAD[name]
    source = write(tmp_path, name, data)
    if name == "cut.txt.gz":
        Path(source).write_bytes(gzip.compress(b"some text\n" * 100)[:-12])
    if name == "notgz.jsonl.gz":
        Path(source).write_bytes(b'{"text": "not compressed"}\n')
    for load in (load_text, documents):
        if error_id == "E393" and load is documents:
            assert documents(source) == []
            continue
        with pytest.raises(BadInput) as caught:
            load(source)
        assert caught.value.error_id == error_id and what in str(caught.value)
        assert where in caught.value.problems[0].where


def test_missing_column_lists_what_is_there(tmp_path: Path) -> None:
    """The person would not learn which name the text has in the file."""
    pq.write_table(pa.table({"page": ["x"]}), tmp_path / "w.parquet")
    with pytest.raises(BadInput, match="there are: page") as caught:
        load_text(str(tmp_path / "w.parquet"))
    assert caught.value.error_id == "E385"
    with pytest.raises(BadInput, match=r"text, messages, conversations"):
        documents(write(tmp_path, "x.jsonl", jsonl({"a": 1})))


@pytest.mark.parametrize(
    "chat", [[], "hello", [{"role": "user"}], [{"role": "user", "content": ["parts"]}], [{"from": ["x"], "value": "y"}]], ids=repr
)
def test_malformed_chats(tmp_path: Path, chat: object) -> None:
    """A chat template would fail in the middle of calibration with an error about itself."""
    with pytest.raises(BadInput) as caught:
        documents(write(tmp_path, "c.jsonl", jsonl({"messages": chat})))
    assert caught.value.error_id == "E385"
    assert "line 1, messages" in caught.value.problems[0].where


def test_a_gigabyte_line_is_refused_in_bounded_memory(tmp_path: Path) -> None:
    """One line without an end would take all memory before anything is said."""
    path = tmp_path / "long.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "short"}\n')
        file.seek(2**30)  # a hole: the file takes no room on disk
        file.write(b"\n")
    tracemalloc.start()
    try:
        with pytest.raises(BadInput, match="longer than 16 MiB") as caught:
            load_text(str(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert caught.value.error_id == "E385"
    assert "line 2" in caught.value.problems[0].where
    assert peak < 4 * LONGEST_LINE


def test_paths_that_are_no_text(tmp_path: Path) -> None:
    """A FIFO would hang the run; a misspelled path or an unknown kind would be read as something else."""
    fifo = tmp_path / "pipe.txt"
    os.mkfifo(fifo)
    cases = [(str(fifo), "not a regular file"), (str(tmp_path), "not a regular file"), (str(tmp_path / "no.txt"), "no such text")]
    cases += [(write(tmp_path, "a.csv", b"x"), "what kind of text"), (write(tmp_path, "noname", b"x"), "what kind of text")]
    for source, what in cases:
        with pytest.raises(UsageError, match=what) as caught:
            load_text(source)
        assert caught.value.error_id == "E240"
        if what == "no such text":
            assert caught.value.problems[0].fix.startswith("check the path"), "a typing error, most often"


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package the person would get an ImportError instead of the name of what to install."""
    source = write(tmp_path, "a.parquet", b"x")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(MarlinctlError) as caught:
        load_text(source)
    assert (caught.value.error_id, caught.value.exit_code) == ("E402", 4)


def rss_and_answer(program: str, *arguments: str) -> tuple[float, str]:
    """Peak resident memory in MiB and what was printed, of a process of its own and its children."""
    import subprocess
    import sys

    measured = (
        "import re, resource, sys\nfrom pathlib import Path\nfrom marlinctl.errors import MarlinctlError\n"
        "from marlinctl.data import text as texts\n"
        f"try:\n    {program}\nexcept MarlinctlError as error:\n    print(error.error_id, error)\n"
        "own = int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"  # ru_maxrss begins with our own
        "print(max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) / 1024)"
    )
    done = subprocess.run([sys.executable, "-c", measured, *arguments], capture_output=True, text=True, check=True, timeout=100)
    *said, peak = done.stdout.splitlines()
    return float(peak), "\n".join(said)


@pytest.fixture(scope="module")
def bombs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small files that unpack to gigabytes."""
    folder = tmp_path_factory.mktemp("bombs")
    one = pa.array(["a" * 13_000_000])
    repeated = pa.table({"text": pa.DictionaryArray.from_arrays(pa.array([0] * 256, pa.int32()), one)})
    pq.write_table(repeated, folder / "repeated.parquet", compression="brotli")
    turns = pa.array([[{"role": "user", "content": "x"}] * 2_000_000])
    pq.write_table(pa.table({"messages": turns}), folder / "turns.parquet", compression="zstd")
    row = json.dumps({"text": "a" * 10_000_000}).encode() + b"\n"
    packed = gzip.compress(row)
    (folder / "rows.jsonl.gz").write_bytes(packed * 40)  # gzip files in a row are one
    (folder / "blank.jsonl.gz").write_bytes(gzip.compress(b"\n" * 20_000_000) * 3)
    return {path.name: path for path in folder.iterdir()}


def test_who_has_enough_does_not_unpack_the_rest(bombs: dict[str, Path]) -> None:
    """600 bytes of parquet took 3.3 GB, and 13 MB of jsonl.gz 4.6 GB, for the first row of them."""
    assert bombs["repeated.parquet"].stat().st_size < 1000
    assert bombs["rows.jsonl.gz"].stat().st_size < 1_000_000
    for name in ("repeated.parquet", "rows.jsonl.gz"):
        peak, said = rss_and_answer("print(len(next(texts.documents(sys.argv[1]))))", str(bombs[name]))
        assert said in ("13000000", "10000000")
        assert peak < 400, name


def test_what_unpacks_beyond_reason_is_refused(bombs: dict[str, Path]) -> None:
    """The whole of such a file would take all memory, or minutes of nothing but blank lines."""
    less = "texts.READING = texts.Bounds(400 << 20, 600, 120)"
    for name, said in (("turns.parquet", "memory"), ("rows.jsonl.gz", "100 times"), ("blank.jsonl.gz", "blank lines")):
        peak, found = rss_and_answer(f"{less}; print(sum(1 for _ in texts.documents(sys.argv[1])))", str(bombs[name]))
        assert found.startswith("E325") and said in found, (name, found)
        assert peak < 700, name


def test_a_text_for_measuring_is_its_beginning(tmp_path: Path, bombs: dict[str, Path]) -> None:
    """`eval --text` would hold a corpus of any size in memory for 20,480 tokens of it; a text of ordinary size must stay whole."""
    whole = write(tmp_path, "a.txt", b"some words\n" * 1000)
    assert len(load_text(whole).text) == 11_000
    cut = load_text(whole, longest=100)
    assert cut.text == ("some words\n" * 1000)[:100] and "the first 100 characters" in cut.note
    assert cut.sha256 == hashlib.sha256(cut.text.encode()).hexdigest()
    rows = write(tmp_path, "a.jsonl", jsonl(*({"text": f"row {i:04d}"} for i in range(1000))) + b"not json\n")
    assert load_text(rows, longest=100).text == "\n\n".join(f"row {i:04d}" for i in range(13))[:100]
    peak, said = rss_and_answer("print(len(texts.load_text(sys.argv[1]).text))", str(bombs["rows.jsonl.gz"]))
    assert said == str(texts.LONGEST_TEXT) and peak < 400


def test_a_corpus_without_blank_lines_is_read_as_it_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence a line and no blank line is one paragraph, of any number of gigabytes."""
    monkeypatch.setattr(texts, "LONGEST_TEXT", 1000)
    path = tmp_path / "a.txt"
    path.write_text("one sentence\n" * 200)
    parts = documents(str(path))
    assert len(parts) == 3 and "\n".join(str(part) for part in parts) == ("one sentence\n" * 200).strip()
