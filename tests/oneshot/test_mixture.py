"""A mixture of two files from the command line to what is published, stopped and resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from marlinctl.cli import main
from tests.jobs.test_kill import published
from tests.oneshot.stopping import quantize, stop_in


def test_a_mixture_end_to_end(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A resumed run would read another mixture than it was begun with, or the report would not say what was mixed."""
    web, chat = tmp_path / "web.jsonl", tmp_path / "chat.jsonl"
    web.write_text("".join(json.dumps({"text": f"Document {i} says that rain falls in spring."}) + "\n" for i in range(200)))
    turns = [{"from": "human", "value": "Where is the garden?"}, {"from": "gpt", "value": "Behind the house, where it always was."}]
    chat.write_text("".join(json.dumps({"conversations": turns if i != 2 else []}) + "\n" for i in range(20)))
    mixture = ["--calibration", f"{web}:0.5,{chat}:0.5", "--samples", "4"]
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    assert main(quantize(place, tmp_path / "whole" / "out", *mixture)) == 0
    out = tmp_path / "stopped" / "out"
    assert stop_in(monkeypatch, 2, quantize(place, out, *mixture)) == 130

    before = chat.read_text()
    chat.write_text(before.upper())
    capsys.readouterr()
    assert main(["resume", str(out)]) == 2
    assert "chat.jsonl is not the file any more that the job was begun with" in capsys.readouterr().err
    chat.write_text(before)
    web.unlink()  # its tokens are in the job
    assert main(["resume", str(out), "-q"]) == 0
    assert published(tmp_path / "stopped") == published(tmp_path / "whole")

    parts = json.loads((out / "marlinctl_report.json").read_text())["calibration"]["parts"]
    mixed = [(Path(part["source"]).name, part["share"], part["samples"]) for part in parts]
    assert mixed == [("web.jsonl", 0.5, 2), ("chat.jsonl", 0.5, 2)]
    noted = json.loads((out / "marlinctl_manifest.json").read_text())
    assert [part["source"] for part in noted["calibration"]["parts"]] == ["web.jsonl", "chat.jsonl"]
    assert str(tmp_path) not in json.dumps(noted)
    assert "50% of it, 2 samples: chat.jsonl" in (out / "marlinctl_report.md").read_text()
    assert "web.jsonl:0.5, chat.jsonl:0.5: 4 samples" in (out / "README.md").read_text()


def test_a_mixture_that_is_none_is_refused_first(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A part that is missing, or a share that is none, would show after the model was fetched and read."""
    text = place / "text.txt"
    for source, said in ((f"{text}:0.5,{tmp_path}/no.jsonl:0.5", "no such text"), (f"{text}:0.5,self:0.5", "cannot be a part")):
        assert main(quantize(place, tmp_path / "out", "--calibration", source)) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out.job").exists()
