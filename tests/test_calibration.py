"""Calibration tokens: what is read, what is cut, and what is not counted."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from marlinctl.calibration import CalibrationSet, load_calibration, load_tokenizer
from marlinctl.console import Console
from marlinctl.errors import BadInput, UsageError
from marlinctl.recipe import load_recipe, resolve
from tests.tiny import make_tiny

CHATS = [[{"role": "user", "content": "What is a garden?"}, {"role": "assistant", "content": "A place " * n}] for n in (3, 1, 9)]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_tiny(tmp_path / "model")


def calibrate(model: Path, source: Path, *, console: Console | None = None, **changes: Any) -> CalibrationSet:
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
    beyond = [more - length for more in lengths if more > length]
    told = io.StringIO()
    facts = calibrate(model, source, console=Console(colour=False, stderr=told), sequence_length=length).facts
    assert len(beyond) == 2 and facts["cut"] == {"samples": 2, "tokens": sum(beyond)}
    assert f"warning: 2 chats are longer than --sequence-length {length} and were cut; {sum(beyond)} tokens" in told.getvalue()
    assert calibrate(model, source, sequence_length=max(lengths)).facts["cut"] == {"samples": 0, "tokens": 0}


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
