"""When `resume` refuses: another model, recipe, format or text, another run at work, a folder of somebody else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from marlinctl.checkpoint import contents
from marlinctl.cli import main
from marlinctl.oneshot import run as job
from marlinctl.oneshot.sequential import SequentialPipeline
from tests.checkpoint.test_contents import NEVER_NEW, flip
from tests.jobs.test_kill import published
from tests.oneshot.stopping import ASKED, SIZES, blocks_solved, lines_of, quantize, stop_in
from tests.tiny import make_tiny


def refused(capfd: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> dict[str, Any]:
    capfd.readouterr()
    assert main([*arguments, "--json"]) == code
    error: dict[str, Any] = json.loads(capfd.readouterr().out)["error"]
    return error


def test_another_model_recipe_or_format_is_refused_field_by_field(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Half of the blocks of one model and half of another would be published as one."""
    shutil.copytree(place / "model", tmp_path / "model")
    out = tmp_path / "out"
    asked = ["quantize", str(tmp_path / "model"), *quantize(place, out)[2:]]
    assert stop_in(monkeypatch, 3, asked) == 130
    asked_for = tmp_path / "out.job" / "job.json"
    before = published(tmp_path / "out.job")

    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"rope_theta": 5000.0}))
    told = refused(capfd, "resume", str(out))
    assert told["id"] == "E286" and [problem["what"].split(" was ")[0] for problem in told["problems"]] == ["model.files.config.json"]
    shutil.copy(place / "model" / "config.json", tmp_path / "model" / "config.json")

    told = refused(capfd, *asked, "--resume", "--damping", "0.05")
    assert [problem["what"] for problem in told["problems"]] == ["recipe.quantize.damping was 'auto' and is now 0.05"]

    request = json.loads(asked_for.read_text())
    asked_for.write_text(json.dumps(request | {"format": 2}))
    told = refused(capfd, "resume", str(out))
    assert told["id"] == "E287" and "format 2" in told["problems"][0]["what"]
    asked_for.write_text(json.dumps(request))

    assert refused(capfd, *asked)["id"] == "E285"
    told = refused(capfd, "resume", str(out), "--from-block", "4")
    assert told["id"] == "E288" and told["problems"][0]["where"] == "--from-block"
    told = refused(capfd, "resume", str(tmp_path / "other"))
    assert told["id"] == "E287" and "no job" in told["problems"][0]["what"]
    shutil.copy(place / "model" / "config.json", tmp_path / "model" / "config.json")
    after = published(tmp_path / "out.job")
    changed = {k for k in after.keys() | before.keys() if after.get(k) != before.get(k)}
    merged = {k for k in changed if k.startswith("staged.whole/")}  # made of the pieces again, whoever continues
    assert changed - merged <= {"job.json"}, "a refusal changes nothing"
    assert main(["resume", str(out), "-q"]) == 0


def _next_training_checkpoint(model: Path) -> None:
    make_tiny(model.parent / "next", seed=1, **SIZES)
    shutil.copy(model.parent / "next" / "model.safetensors", model / "model.safetensors")


def _one_bit(model: Path) -> None:
    flip(model / "model.safetensors")


@pytest.mark.parametrize(("verb", "change"), [("quantize", _next_training_checkpoint), ("quantize", _one_bit), ("compress", _one_bit)])
def test_other_weights_under_the_same_headers_are_refused(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    verb: str, change: Callable[[Path], None],
) -> None:  # fmt: skip
    """The first blocks of one training checkpoint and the others of the next would be published as one model, and `verify` would find
    nothing wrong with it."""
    shutil.copytree(place / "model", tmp_path / "model")
    out = tmp_path / "out"
    more = ["--no-eval", "--format", "marlin"] if verb == "compress" else []
    asked = [verb, str(tmp_path / "model"), *quantize(place, out)[2:], *more]
    if verb == "quantize":
        assert stop_in(monkeypatch, 1, asked) == 130
    else:  # everything is computed, and the result would be compared with another original
        with monkeypatch.context() as patch:
            patch.setattr("marlinctl.compress.verify", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
            assert main(asked) == 130
    before = published(tmp_path / "out.job")
    change(tmp_path / "model")
    told = refused(capfd, "resume", str(out))
    assert told["id"] == "E286"
    assert [problem["what"].split(" was ")[0] for problem in told["problems"]] == ["model.shards.model.safetensors.sha256"]
    assert not out.exists() and published(tmp_path / "out.job") == before

    shutil.copy(place / "model" / "model.safetensors", tmp_path / "model" / "model.safetensors")
    assert main(["resume", str(out), "-q"]) == 0
    if verb == "quantize":
        assert published(tmp_path)["out/marlinctl_manifest.json"] == published(place / "whole")["out/marlinctl_manifest.json"]


def test_a_text_that_changed_between_two_stages_is_refused(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A model would be pruned with one text, and distilled or quantized with another, under the name of one file."""
    recipe = "extends: sparse-int4\ncalibration: {minimum_tokens: 32}\ndistill: {tokens: 1024, data: rows.txt}\n"
    (tmp_path / "mine.yaml").write_text(recipe)
    shutil.copy(place / "text.txt", tmp_path / "text.txt")
    shutil.copy(place / "text.txt", tmp_path / "rows.txt")
    monkeypatch.chdir(tmp_path)
    asked = ["compress", str(place / "model"), "out", "--recipe", "mine.yaml", "--calibration", "text.txt", *ASKED, "--no-eval"]

    def stopped(_model: str, _source: object, work: Path, *_: object) -> None:
        (work / "pruned").mkdir(exist_ok=True)
        raise KeyboardInterrupt

    monkeypatch.setattr("marlinctl.compress._interchange", stopped)
    assert main(asked) == 130
    for text, name in (("text.txt", "calibration"), ("rows.txt", "distillation")):
        whole = Path(text).read_text()
        Path(text).write_text(whole.upper())
        told = refused(capfd, "resume", "out")
        assert (told["id"], told["problems"][0]["what"].split(" was ")[0]) == ("E286", f"texts.{name}.sha256")
        Path(text).unlink()
        assert main(["resume", "out", "-q"]) == 130, "whether it is still needed, the stage knows"
        Path(text).write_text(whole)


def test_weights_that_nobody_touched_are_not_read_again(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run of a large model would spend its first minutes with reading what it knows."""
    monkeypatch.setattr(contents, "SETTLED_NS", NEVER_NEW)
    assert stop_in(monkeypatch, 2, quantize(place, tmp_path / "out")) == 130
    monkeypatch.setattr(contents, "_read_shard", None)
    assert main(["resume", str(tmp_path / "out"), "-q"]) == 0
    assert published(tmp_path) == published(place / "whole")


@pytest.mark.parametrize(("when", "finished"), [("in block 2", 2), ("before it is published", 4)])
def test_weights_that_change_during_a_run_are_not_published(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], when: str, finished: int
) -> None:
    """A download that goes on, or a training that saves again into the folder, would leave a mixture that nothing tells from a model."""
    shutil.copytree(place / "model", tmp_path / "model")
    out = tmp_path / "out"
    asked = ["quantize", str(tmp_path / "model"), *quantize(place, out)[2:]]
    run_block, verify = SequentialPipeline.run_block, job.verify_written

    def in_block(self: SequentialPipeline, block: Any, solve: Any) -> None:
        if block.index == 2:
            _one_bit(tmp_path / "model")
        run_block(self, block, solve)

    def at_the_end(*given: Any) -> None:
        verify(*given)
        _one_bit(tmp_path / "model")

    with monkeypatch.context() as patch:
        if when == "in block 2":
            patch.setattr(SequentialPipeline, "run_block", in_block)
        else:
            patch.setattr(job, "verify_written", at_the_end)
        capfd.readouterr()
        assert main([*asked, "--json"]) == 3
    told = json.loads(capfd.readouterr().out)["error"]
    assert told["id"] == "E306" and "model.safetensors" in told["problems"][0]["where"]
    assert not out.exists() and [line["step"] for line in lines_of(out)] == ["begun", *["block"] * finished]

    shutil.copy(place / "model" / "model.safetensors", tmp_path / "model" / "model.safetensors")
    assert blocks_solved(monkeypatch, ["resume", str(out), "-q"]) == (0, [*range(finished, 4)])
    assert published(tmp_path)["out/marlinctl_manifest.json"] == published(place / "whole")["out/marlinctl_manifest.json"]


def test_going_back_in_a_verb_without_blocks_is_refused(place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The number would be ignored in silence."""
    from marlinctl.jobs.journal import JobFolder, Request
    from marlinctl.system.console import Console

    def run() -> None:
        folder = JobFolder(tmp_path / "out")
        with folder.held(Request("pack", {}), resume=False, console=Console.quiet()):
            folder.begin({})
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        run()
    told = refused(capfd, "resume", str(tmp_path / "out"), "--from-block", "1")
    assert told["id"] == "E288" and "pack has none" in told["problems"][0]["what"]
