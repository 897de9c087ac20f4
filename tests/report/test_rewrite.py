"""`marlinctl report`: card and report of a published folder, rewritten from real runs; nothing else of the folder changes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from marlinctl.cli import main
from marlinctl.convert.repack import repack
from marlinctl.system.atomic import temporary_name
from tests.report import documents
from tests.runs import TEXT, digests
from tests.tiny import make_tiny

FLAGS = ["--calibration", "TEXT", "--samples", "8", "--sequence-length", "64", "--group-size", "32", "--dtype", "float32", "-q"]
OURS = ("README.md", "marlinctl_report.json", "marlinctl_report.md", "marlinctl_report.html")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """out and out-marlin by compress, with everything that it publishes."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "text.txt").write_text(TEXT)
    recipe = folder / "tiny.yaml"
    recipe.write_text("calibration:\n  minimum_tokens: 256\nevaluate:\n  tokens: 256\n  window: 64\n")
    make_tiny(folder / "tiny")
    (folder / "tiny" / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    flags = [str(folder / "text.txt") if flag == "TEXT" else flag for flag in FLAGS]
    arguments = ["compress", str(folder / "tiny"), str(folder / "out"), "--also", "marlin", "--recipe", str(recipe), *flags]
    assert main([*arguments, "--text", str(folder / "text.txt"), "--base-model", "org/Tiny"]) == 0
    return folder


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made / "out", tmp_path / "out")
    return tmp_path / "out"


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_compress_writes_all_four_beside_each_folder(made: Path) -> None:
    """Whoever gets only the folder gets the report, and each says what its own folder is."""
    for name, wanted in (("out", "compressed-tensors"), ("out-marlin", "MARLIN tiles")):
        page = (made / name / "marlinctl_report.html").read_text("utf-8")
        assert wanted in page and "KL divergence" in page and "model.layers.1.mlp.down_proj" in page and "mit" in page
        assert json.loads((made / name / "marlinctl_report.json").read_text())["schema_version"] == 1
        card = (made / name / "README.md").read_text("utf-8")
        assert ModelCard(card).data.get("base_model") == "org/Tiny" and f"\n# {name}\n" in card
        assert "\nlicense: mit\n" in card and "| Licence of the original | mit |" in card
        assert run("verify", made / name, "--no-load", "-q") == 0


def test_rewriting_gives_the_same_files_and_touches_no_other(out: Path) -> None:
    """If the run and `report` wrote different pages, one of them would be wrong; if weights moved, verify would fail."""
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for name in OURS[2:]:
        (out / name).write_text("spoiled")
    (out / "README.md").unlink()
    assert run("report", out, "-q") == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert run("verify", out, "--no-load", "-q") == 0


def test_scores_of_this_folder_are_added(out: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Scores are often measured later, on a larger machine: card and report must take them, and only those of this very model."""
    scores = tmp_path / "scores.json"
    text = ["--text", made / "text.txt", "--tokens", "128", "--window", "32", "--dtype", "float32", "--out", scores, "-q"]
    assert run("eval", out, "--against", made / "tiny", *text) == 0
    assert run("report", out, "--scores", scores, "--json") == 0
    told = capsys.readouterr().out
    answer = json.loads(told[told.index("\n{\n") :])  # after the table of eval
    assert answer["report"]["evaluation"]["document"]["text"]["windows"] == 4
    assert "4 windows of 32 tokens" in (out / "marlinctl_report.html").read_text("utf-8")
    assert "4 windows of 32 tokens" in (out / "README.md").read_text("utf-8")
    assert run("report", out, "-q") == 0, "and they stay"
    assert "4 windows of 32 tokens" in (out / "marlinctl_report.md").read_text("utf-8")
    assert run("report", made / "out-marlin", "--scores", scores) == 2
    told = capsys.readouterr().err
    assert "explain E261" in told and "scores are of another model" in told
    unfinished = json.loads(scores.read_text()) | {"finished": False}
    scores.write_text(json.dumps(unfinished))
    assert run("report", out, "--scores", scores) == 2
    assert "not finished" in capsys.readouterr().err


def test_speeds_are_added(out: Path, tmp_path: Path) -> None:
    """bench runs on another machine, at another time."""
    (tmp_path / "bench.json").write_text(json.dumps(documents.bench()))
    assert run("report", out, "--bench", tmp_path / "bench.json", "-q") == 0
    page = (out / "marlinctl_report.html").read_text("utf-8")
    assert "Roofline" in page and "Some GPU" in page


def test_a_packed_copy_keeps_the_report(out: Path, tmp_path: Path) -> None:
    """The codes are the same, so their errors and scores are; the card of a packed model would otherwise know nothing."""
    repack(out, tmp_path / "gptq", format="gptq")
    page = (tmp_path / "gptq" / "marlinctl_report.html").read_text("utf-8")
    assert "GPTQ" in page and "KL divergence" in page and "marlinctl pack out gptq --format gptq" in page
    assert "| Licence of the original | mit |" in (tmp_path / "gptq" / "README.md").read_text("utf-8")
    assert run("report", tmp_path / "gptq", "-q") == 0
    assert run("verify", tmp_path / "gptq", "--no-load", "-q") == 0


def test_a_local_original_gets_its_name_on_the_hub(out: Path, tmp_path: Path) -> None:
    """The hub would link the copy to nothing, and show no licence, for all who keep their models in folders."""
    said = ["--base-model", "org/Tiny-1B", "--license", "llama3.1"]
    assert run("report", out, *said, "-q") == 0
    for folder in (out, tmp_path / "gptq", tmp_path / "gptq2"):
        if folder != out:
            assert run("pack", out, folder, "--format", "gptq", *(["--license", "mit"] if folder.name == "gptq2" else []), "-q") == 0
        meta = ModelCard.load(folder / "README.md").data
        assert (meta.base_model, meta.license) == ("org/Tiny-1B", "mit" if folder.name == "gptq2" else "llama3.1")
        assert run("report", folder, "-q") == 0 and ModelCard.load(folder / "README.md").data.base_model == "org/Tiny-1B", "and it stays"
        assert run("verify", folder, "--no-load", "-q") == 0
    for name in OURS:
        (out / name).unlink()
    assert run("pack", out, tmp_path / "foreign", "--format", "gptq", *said, "-q") == 0
    meta = ModelCard.load(tmp_path / "foreign" / "README.md").data
    assert (meta.base_model, meta.license) == ("org/Tiny-1B", "llama3.1"), "a foreign folder has no report"


@pytest.mark.parametrize("verb", ["compress", "quantize", "sparsify", "distill", "pack", "report"])
@pytest.mark.parametrize(
    ("flag", "value", "told"),
    [("--base-model", "./my/local/model", "id of the hub"), ("--license", "apache2", "apache-2.0"), ("--license", "proprietary", "other")],
)
def test_what_the_hub_would_not_take_is_refused_first(
    verb: str, flag: str, value: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The hub refuses the card at the upload, hours later."""
    arguments: dict[str, list[Any]] = {"report": ["x"], "distill": ["x", tmp_path / "out", "--teacher", "y"]}
    assert run(verb, *arguments.get(verb, ["x", tmp_path / "out"]), flag, value) == 2
    error = capsys.readouterr().err
    assert "E202" in error and told in error and list(tmp_path.iterdir()) == []


def test_the_python_of_a_card_runs(made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What a stranger copies first must work."""
    monkeypatch.chdir(made)
    for name in ("out", "out-marlin"):
        code = (made / name / "README.md").read_text("utf-8").split("```python\n")[1].split("```")[0]
        exec(compile(code, "card", "exec"), {})
        assert capsys.readouterr().out.startswith("The capital of France is")


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{}",
        b"[" * 10000,
        b'{"kind": "compress"}',
        b'{"kind": "compress", "layers": [{"name": "x"}]}',
        b'{"kind": "evaluation"}',
        b"\xff",
    ],
)
def test_a_damaged_report_is_refused_and_nothing_is_lost(out: Path, damage: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    """A traceback, or a half-written page over a good one."""
    (out / "marlinctl_report.json").write_bytes(damage)
    before = {name: (out / name).read_bytes() for name in OURS}
    assert run("report", out) == 3
    told = capsys.readouterr().err
    assert "explain E374" in told and "marlinctl_report.json" in told
    assert {name: (out / name).read_bytes() for name in OURS} == before


def test_packing_goes_on_without_a_damaged_report(out: Path, tmp_path: Path) -> None:
    """The report is not the model: a spoiled one must not keep a sound checkpoint from being packed."""
    (out / "marlinctl_report.json").write_text('{"kind": "compress", "bytes": 3}')
    repack(out, tmp_path / "gptq", format="gptq")
    assert not (tmp_path / "gptq" / "marlinctl_report.json").exists() and (tmp_path / "gptq" / "README.md").is_file()


def test_a_report_of_another_model_is_refused(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A report that was copied into the wrong folder would give a model somebody else's scores."""
    report: dict[str, Any] = json.loads((out / "marlinctl_report.json").read_text())
    report["layers"][0]["shape"] = [64, 64]
    (out / "marlinctl_report.json").write_text(json.dumps(report))
    assert run("report", out) == 3
    assert "another model" in capsys.readouterr().err


def test_a_folder_without_a_report(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A dense or foreign folder has no run to report."""
    assert run("report", made / "tiny") == 1
    told = capsys.readouterr().err
    assert "explain E101" in told and "there is no marlinctl_report.json" in told
    assert run("report", made / "out", "--bench", tmp_path / "missing.json") == 3
    told = capsys.readouterr().err
    assert "explain E374" in told and "missing.json" in told
    assert run("report", made / "out", "--scores", tmp_path / "missing.json") == 3
    assert "  fix: name the file that `marlinctl eval --out` wrote\n" in capsys.readouterr().err


def test_resume_of_what_is_complete_says_so(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever starts `resume` once too often would look for a job that was lost, and start the whole command again."""
    assert run("resume", made / "out") == 2
    told = capsys.readouterr().err
    assert "the output is complete" in told and "`marlinctl verify out`" in told


@pytest.mark.parametrize("verb", ["report", "verify", "inspect"])
def test_a_folder_that_is_not_there(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A misspelled path would look like a damaged folder, or like a check that said no (exit code 1)."""
    (tmp_path / "file.json").touch()
    for name in ("absent", "file.json"):
        assert run(verb, tmp_path / name) == 3
        assert "there is no such folder" in capsys.readouterr().err


def test_what_a_killed_rewrite_leaves_is_no_damage(out: Path) -> None:
    """`kill -9` in the middle of a rewrite would make a sound model fail its check."""
    left = out / temporary_name()
    left.write_text("half a pa")
    assert run("verify", out, "--no-load", "-q") == 0
    os.utime(left, (0, 0))  # long ago: no other `report` is writing it
    assert run("report", out, "-q") == 0 and not left.exists()


def test_links_in_the_place_of_its_files_are_not_followed(out: Path, tmp_path: Path) -> None:
    """A downloaded folder holds links with the names of our files, or of what earlier versions wrote first: `report` would write there."""
    precious, absent = tmp_path / "precious", tmp_path / "absent"
    precious.write_text("mine")
    before = {name: (out / name).read_bytes() for name in OURS}
    for name, target in (("README.md", precious), ("marlinctl_report.md", precious), ("marlinctl_report.html", absent)):
        (out / name).unlink()
        (out / name).symlink_to(target)
        (out / f"{name}.part").symlink_to(precious)
    assert run("report", out, "-q") == 0
    assert precious.read_text() == "mine" and not absent.exists()
    assert {name: (out / name).read_bytes() for name in OURS} == before and not any((out / name).is_symlink() for name in OURS)


def test_weights_are_not_touched(out: Path) -> None:
    """The digest of the manifest is the name of the model: adding scores must not change it."""
    before = digests(out)
    assert run("report", out, "-q") == 0
    assert digests(out) == before
