"""Calibration tokens: what is read, what is cut, and what is not counted."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from marlinctl.data import tokens
from marlinctl.data.calibration import CalibrationSet, load_calibration, load_tokenizer
from marlinctl.errors import BadInput, HubProblem, UsageError
from marlinctl.recipes.schema import load_recipe, resolve
from marlinctl.system.console import Console
from tests.tiny import make_tiny

CHATS = [[{"role": "user", "content": "What is a garden?"}, {"role": "assistant", "content": "A place " * n}] for n in (3, 1, 9)]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_tiny(tmp_path / "model")


def calibrate(model: Path, source: Path | str, *, console: Console | None = None, **changes: Any) -> CalibrationSet:
    given = {
        "calibration.source": str(source),
        "calibration.samples": 3,
        "calibration.sequence_length": 40,
        "calibration.minimum_tokens": 10,
    }
    asked = resolve(load_recipe("int4"), given | {f"calibration.{key}": value for key, value in changes.items()})[0].calibration
    config = json.loads((model / "config.json").read_text())

    def never() -> torch.nn.Module:
        raise AssertionError("the model is loaded for `self` only")

    return load_calibration(asked, model, config, console=console or Console.quiet(), load_model=never)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_documents_are_joined_by_blank_lines_and_cut(model: Path, tmp_path: Path) -> None:
    """If documents were cut or joined otherwise, a comparison on the same tokens would not be one."""
    documents = [f"Document {i} says that rain falls in spring." for i in range(20)]
    source = write(tmp_path / "text.jsonl", [{"text": d} for d in documents])
    ids = load_tokenizer(model)("\n\n".join(documents), add_special_tokens=False)["input_ids"]
    assert torch.equal(calibrate(model, source).tokens.ids, torch.tensor(ids[:120]).reshape(3, 40))


def test_chats_go_through_the_template_and_padding_is_not_counted(model: Path, tmp_path: Path) -> None:
    """If special tokens or padding were counted, they would outweigh the words in every Hessian."""
    source = write(tmp_path / "chats.jsonl", [{"messages": chat} for chat in CHATS])
    found = calibrate(model, source, sequence_length=100)
    tokenizer = load_tokenizer(model)
    for row, counted, chat in zip(found.tokens.ids, found.tokens.counted, CHATS, strict=True):
        expected = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False), add_special_tokens=False)["input_ids"][:100]
        assert row[: len(expected)].tolist() == expected
        assert not counted[len(expected) :].any()
        special = set(tokenizer.all_special_ids)
        assert counted[: len(expected)].tolist() == [token not in special for token in expected]
    assert found.facts["tokens"]["counted"] == int(found.tokens.counted.sum()) < found.facts["tokens"]["got"]


def test_chats_that_are_cut_are_counted_and_told(model: Path, tmp_path: Path) -> None:
    """The ends of the longest conversations would be left out of the calibration, and nobody would know."""
    source = write(tmp_path / "chats.jsonl", [{"messages": chat} for chat in CHATS])
    tokenizer = load_tokenizer(model)
    lengths = [len(tokenizer(tokenizer.apply_chat_template(c, tokenize=False), add_special_tokens=False)["input_ids"]) for c in CHATS]
    length = min(lengths) + 1
    told = io.StringIO()
    facts = calibrate(model, source, console=Console(colour=False, stderr=told), sequence_length=length).facts
    assert facts["cut"] == sum(more > length for more in lengths) == 2
    assert f"warning: 2 chats are longer than --sequence-length and were cut to {length} tokens" in told.getvalue()
    assert calibrate(model, source, sequence_length=max(lengths)).facts["cut"] == 0


def test_chat_never_reads_chats_as_text(model: Path, tmp_path: Path) -> None:
    """If --chat never used the template all the same, base models would be calibrated on markup they never saw."""
    source = write(tmp_path / "chats.jsonl", [{"messages": chat} for chat in CHATS * 4])
    found = calibrate(model, source, chat="never")
    assert bool(found.tokens.counted.all()) and "cut" in found.facts["how"]


def test_chat_always_without_chats_is_refused(model: Path, tmp_path: Path) -> None:
    """If --chat always were ignored for plain text, the person would believe that the template was used."""
    source = write(tmp_path / "text.jsonl", [{"text": "rain " * 200}])
    with pytest.raises(UsageError, match="no chats"):
        calibrate(model, source, chat="always")


def test_too_little_text_names_asked_and_got(model: Path, tmp_path: Path) -> None:
    """If fewer samples were taken silently, Hessians would be worse than the recipe promises."""
    source = write(tmp_path / "text.jsonl", [{"text": "rain falls"}])
    with pytest.raises(BadInput, match="0 samples of 40 tokens are there, 3 were asked for"):
        calibrate(model, source)


def test_no_more_of_a_long_row_is_tokenized_than_the_samples_need(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A book as one row of 10 MB was tokenized whole, in a gigabyte of memory, for the first 120 tokens of it."""
    from marlinctl.data import calibration

    sentence = "The quick brown fox jumps over the lazy dog near the river bank. "
    source = write(tmp_path / "book.jsonl", [{"text": sentence * 160_000}])
    tokenizer = load_tokenizer(model)
    expected = tokenizer(sentence * 50, add_special_tokens=False)["input_ids"][:120]
    seen: list[int] = []

    class Counting:
        def __call__(self, text: str, **options: Any) -> Any:
            seen.append(len(text))
            return tokenizer(text, **options)

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

    monkeypatch.setattr(calibration, "load_tokenizer", lambda folder: Counting())
    assert calibrate(model, source).tokens.ids.flatten().tolist() == expected
    assert sum(seen) < 5000


@pytest.mark.parametrize("size", [7, 40, 1000])
def test_pieces_are_all_of_the_text_and_not_too_long(size: int) -> None:
    """A part of a long text would be lost or doubled where it is divided; texts that fit are divided as they always were."""
    from marlinctl.data.calibration import _pieces

    texts = ["one two three four", "", "x" * 95, "five six", "seven " * 30]
    pieces = list(_pieces(texts, size))
    assert "".join(piece for piece, _ in pieces) == "\n\n".join(texts)
    assert all(len(piece) <= 2 * size + 2 * len(texts) for piece, _ in pieces)
    assert pieces[-1][1]
    short = ["one two", "three", "four five six"]
    assert list(_pieces(short, 14)) == [("one two\n\nthree\n\n", True), ("four five six", True)]


TEMPLATES = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}x",
    "a power": "{{ 10 ** (10 ** 10) }}",
    "a long text": "{{ 'a' * 10 ** 10 }}",
    "doubling": "{% set ns = namespace(x='ab') %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_template_is_bounded(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chat template comes with the model and is a program: it could hold the run for ever, or take all memory."""
    from marlinctl.data import calibration

    bounds = calibration.Bounds
    monkeypatch.setattr(calibration, "Bounds", lambda memory, cpu, wait: bounds(memory=300 << 20, cpu=1, wait=3))
    model = make_tiny(tmp_path / "model", chat_template=TEMPLATES[name])
    source = write(tmp_path / "chats.jsonl", [{"messages": chat} for chat in CHATS])
    with pytest.raises(BadInput, match="chat template was stopped") as caught:
        calibrate(model, source)
    assert caught.value.error_id == "E325"


def test_a_tokenizer_is_tried_on_a_line(model: Path) -> None:
    """tokenizer.json may hold an expression that takes a second for every letter, and no Ctrl-C reaches it."""
    document = json.loads((model / "tokenizer.json").read_text())
    document["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    (model / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(BadInput, match="cannot read a line of text") as caught:
        load_tokenizer(model)
    assert caught.value.error_id == "E325"


def shared(question: str, *, first: str = "human") -> dict[str, Any]:
    return {"conversations": [{"from": first, "value": question}, {"from": "gpt", "value": "A place " * 9}]}


def test_sharegpt_rows_with_bad_ones_among_them(tmp_path: Path) -> None:
    """A damaged row, or one that the model's template refuses, would end the run, be read as something else, or go unsaid."""
    strict = (
        "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}"
    )
    model = make_tiny(tmp_path / "model", chat_template=strict)
    rows = [shared(f"What is garden {i}?") for i in range(40)]
    rows[0], rows[3], rows[5] = {"conversations": []}, shared("Be brief.", first="system"), {"conversations": [{"from": "human"}]}
    source = write(tmp_path / "chats.jsonl", rows)
    told = io.StringIO()
    found = calibrate(model, source, console=Console(colour=False, stderr=told), samples=30, sequence_length=60)
    tokenizer = load_tokenizer(model)
    good = [row for i, row in enumerate(rows) if i not in (0, 3, 5)]
    for ids, row in zip(found.tokens.ids, good[:30], strict=True):
        turns = [{"role": role, "content": turn["value"]} for role, turn in zip(("user", "assistant"), row["conversations"], strict=True)]
        expected = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False)["input_ids"][:60]
        assert ids[: len(expected)].tolist() == expected
    part = found.facts["parts"][0]
    assert (part["rows"]["read"], part["rows"]["skipped"], part["samples"]) == (33, 3, 30)
    warning = next(line for line in told.getvalue().splitlines() if "cannot be used" in line)
    assert "3 of 33 rows of chats.jsonl cannot be used and were skipped: line 1, conversations: a chat must be a list" in warning
    assert "line 4: the model's chat template refuses this chat (system, assistant): user first" in warning
    rows = [shared("Be brief.", first="system")] * 9
    with pytest.raises(UsageError, match=r"template refuses this chat .* \(3 of 3 rows") as caught:
        calibrate(model, write(tmp_path / "refused.jsonl", rows[:3]))
    assert caught.value.error_id == "E253"


def test_texts_among_chats_are_counted(model: Path, tmp_path: Path) -> None:
    """If they were passed over without a word, a file that begins with one chat would calibrate with that chat alone."""
    rows: list[dict[str, Any]] = [{"messages": chat} for chat in CHATS * 10] + [{"text": "Rain falls in spring."}] * 2
    found = calibrate(model, write(tmp_path / "some.jsonl", [*rows[-2:], *rows]), samples=3, chat="always")
    assert found.facts["parts"][0]["rows"] == {"read": 5, "skipped": 0}
    found = calibrate(model, write(tmp_path / "few.jsonl", [rows[0], rows[-1], *rows[1:]]), samples=20)
    assert found.facts["parts"][0]["rows"]["skipped"] == 1
    with pytest.raises(BadInput, match=r"a text among chats \(2 of 3 rows") as caught:
        calibrate(model, write(tmp_path / "many.jsonl", [rows[0], *rows[-2:]]))
    assert caught.value.error_id == "E385" and "mixture" in caught.value.problems[0].fix


def test_a_sample_that_is_only_bos_is_refused(tmp_path: Path) -> None:
    """Samples of one token would never be full where the tokenizer puts one before every text: the run would not end."""
    model = make_tiny(tmp_path / "model")
    path = model / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    begins = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begins, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
    }
    path.write_text(json.dumps(tokenizer))
    source = write(tmp_path / "text.jsonl", [{"text": "Rain falls in spring."}] * 50)
    assert calibrate(model, source, samples=20, sequence_length=2).tokens.ids[:, 0].tolist() == [1] * 20
    with pytest.raises(UsageError, match="no room") as caught:
        calibrate(model, source, samples=20, sequence_length=1)
    assert caught.value.error_id == "E246"


def test_a_mixture_of_two_files(model: Path, tmp_path: Path) -> None:
    """Shares would not be kept, chats of a mixture would miss the template, or two runs of one seed would see other text."""
    web = write(tmp_path / "web.jsonl", [{"text": f"Document {i} says that rain falls in spring."} for i in range(300)])
    chat = write(tmp_path / "chat.json", [])
    chat.write_text(json.dumps([{"instruction": f"Where is garden {i}?", "output": "Here."} for i in range(50)]))
    mixture = f"{web}:0.75,{chat}:0.25"
    found = calibrate(model, mixture, samples=12)
    tokenizer = load_tokenizer(model)
    texts = [tokenizer.decode(ids) for ids in found.tokens.ids]
    chats = [text for text in texts if text.startswith("<|im_start|>user\nWhere is garden")]
    assert len(chats) == 3 and sum("says that rain" in text for text in texts) == 9
    assert [(part["share"], part["samples"]) for part in found.facts["parts"]] == [(0.75, 9), (0.25, 3)]
    assert {part["file_sha256"] for part in found.facts["parts"]} == {hashlib.sha256(path.read_bytes()).hexdigest() for path in (web, chat)}
    again, other = calibrate(model, mixture, samples=12), calibrate(model, mixture, samples=12, seed=1)
    assert torch.equal(again.tokens.ids, found.tokens.ids) and not torch.equal(other.tokens.ids, found.tokens.ids)
    with pytest.raises(BadInput, match=r"the share of 0\.75 asks for 75") as caught:
        calibrate(model, f"{chat}:0.25,{web}:0.75", samples=100, sequence_length=200)
    assert caught.value.error_id == "E393" and str(web) in caught.value.problems[0].where


def test_rows_of_the_hub_are_checked_like_those_of_a_file(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad row of a hub data set would end in a traceback, Alpaca's columns would be refused, a lost connection would be a defect."""
    import datasets

    rows: list[dict[str, Any]] = [{"instruction": f"Where is garden {i}?", "input": None, "output": "Here."} for i in range(30)]
    rows[2] = {"instruction": None, "input": None, "output": "Here."}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, **_: iter(rows))
    found = calibrate(model, "org/alpaca:train", samples=20)
    part = found.facts["parts"][0]
    assert (part["rows"]["read"], part["rows"]["skipped"]) == (21, 1) and "file_sha256" not in part
    assert part["rows"]["first"] == ["row 3: `instruction` is null, not a string"]

    def breaks(*_: Any, **__: Any) -> Any:
        yield rows[0]
        raise ConnectionError("lost")

    monkeypatch.setattr(datasets, "load_dataset", breaks)
    with pytest.raises(HubProblem, match="ConnectionError: lost") as caught:
        calibrate(model, "org/alpaca:train")
    assert caught.value.error_id == "E707" and "after row 1" in caught.value.problems[0].where
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: iter([{"body": "a"}]))
    with pytest.raises(BadInput, match="there are: body"):
        calibrate(model, "org/other")


def test_a_tokenizer_that_needs_a_package_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ "Copy tokenizer.json" does not help those whose model has none; where the package is there, the file itself is at fault."""
    folder = make_tiny(tmp_path / "model", tokenizer=False)
    (folder / "tokenizer.model").write_bytes(b"\n\x0c\n\x05<unk>\x15\x00\x00\x00\x00")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    for installed, fix in ((False, "pip install sentencepiece"), (True, "copy tokenizer.json")):
        monkeypatch.setattr(tokens, "find_spec", lambda name, installed=installed: installed or None)
        with pytest.raises(BadInput) as caught:
            load_tokenizer(folder)
        assert caught.value.error_id == "E314" and caught.value.problems[0].fix.startswith(fix)
