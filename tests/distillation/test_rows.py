"""Rows of tokens: what is read, what is held out, and which rows each step sees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from marlinctl.data.calibration import load_tokenizer
from marlinctl.distillation.rows import Rows, load_rows, rows_of_step
from marlinctl.planning.training_settings import rows_per_step, steps_of
from marlinctl.recipes.schema import Distill
from marlinctl.system.console import Console
from tests.distillation.runs import recipe, write_text
from tests.tiny import make_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("rows") / "model")


def never() -> torch.nn.Module:
    raise AssertionError("the teacher is loaded for `self` only")


def load(model: Path, source: Path, **changes: Any) -> tuple[Rows, Distill]:
    asked = recipe(source, **changes).distill
    return load_rows(asked, model, console=Console.quiet(), load_teacher=never), asked


def test_text_fills_every_row(model: Path, tmp_path: Path) -> None:
    """A position of padding is a position of wasted work, and the rows must be the text in order."""
    source = write_text(tmp_path / "text.txt", words=2400)
    rows, asked = load(model, source, tokens=4 * 256)
    ids = load_tokenizer(model)(source.read_text().strip(), add_special_tokens=False)["input_ids"]
    assert rows.ids.shape == (steps_of(asked) * rows_per_step(asked) + rows.held_out, 32)
    assert torch.equal(rows.ids.flatten(), torch.tensor(ids[: rows.ids.numel()]))
    assert bool(rows.counted.all()) and rows.held_out == 1 and rows.facts["passes"] == 1.0


def test_chats_are_padded_and_the_padding_is_not_counted(model: Path, tmp_path: Path) -> None:
    """A loss on padding would train the model to pad; end-of-turn tokens on the other hand must be learned."""
    chats = [[{"role": "user", "content": "What?"}, {"role": "assistant", "content": "This " * n}] for n in (1, 9, 2, 4)]
    source = tmp_path / "chats.jsonl"
    source.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    rows, _ = load(model, source, sequence_length=64, batch_tokens=128, tokens=256)
    tokenizer = load_tokenizer(model)
    for row, counted, chat in zip(rows.ids, rows.counted, chats, strict=True):
        expected = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False), add_special_tokens=False)["input_ids"][:64]
        assert row[counted].tolist() == expected
        assert (row[~counted] == tokenizer.pad_token_id).all()
        assert tokenizer.eos_token_id in row[counted]


def test_little_text_is_read_several_times_and_that_is_said(model: Path, tmp_path: Path) -> None:
    """A budget beyond the data must not end the run early, nor reach into the held-out rows."""
    rows, asked = load(model, write_text(tmp_path / "text.txt", words=600), tokens=100 * 256)
    assert rows.facts["passes"] > 1 and rows.held_out >= 1
    seen = torch.cat([rows_of_step(step, rows_per_step(asked), rows.trained, asked.seed) for step in range(steps_of(asked))])
    assert int(seen.max()) < rows.trained
    counts = torch.bincount(seen, minlength=rows.trained)
    assert int(counts.max()) - int(counts.min()) <= 1, "every row as often as any other"


def test_every_pass_reads_every_row_once_in_another_order() -> None:
    """An order that repeats, or a row that is left out, wastes data that somebody paid for."""
    per_step, trained = 8, 20
    stream = torch.cat([rows_of_step(step, per_step, trained, seed=3) for step in range(5)])
    first, second = stream[:trained].tolist(), stream[trained : 2 * trained].tolist()
    assert sorted(first) == sorted(second) == list(range(trained))
    assert first != second and first != sorted(first)
    again = torch.cat([rows_of_step(step, 4, trained, seed=3) for step in range(10)])
    assert torch.equal(again, stream), "steps of another size cut the same stream"
    assert not torch.equal(rows_of_step(0, per_step, trained, seed=4), stream[:per_step])


def test_the_order_draws_from_no_global_generator() -> None:
    """A resumed run has no random state: a step's rows must follow from its number."""
    torch.manual_seed(1)
    one = rows_of_step(7, 5, 100, seed=0)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(rows_of_step(7, 5, 100, seed=0), one)
    assert torch.equal(torch.get_rng_state(), state)
