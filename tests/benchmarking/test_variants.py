"""benchmarks/variants.py and what it runs, on a tiny model and a CPU: they are run for hours on rented GPUs, and must not fail there."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import calibration_tokens, other_tools, steps, variants
from benchmarks.variant_tables import tables
from tests import forked
from tests.tiny import make_tiny

TEXT = "The garden is behind the house. There is a well in the garden, and the water of the well is cold in the summer. "
# What runs here in place of other_tools.py: it hands on what int4 made.
TOOL = """
import json, pathlib, shutil, sys
model, tokens, out, *flags = sys.argv[1:]
assert json.loads(pathlib.Path(tokens).read_text())["ids"]
shutil.copytree(pathlib.Path(out).with_name("int4"), out)
record = {"seconds": 5, "peak_memory_bytes": 3 << 30, "peak_device_memory_bytes": 7 << 30, "flags": flags}
pathlib.Path(out + ".json").write_text(json.dumps(record))
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("variants")
    make_tiny(root / "model")
    (root / "text.jsonl").write_text("".join(json.dumps({"text": f"{number}. {TEXT * 4}"}) + "\n" for number in range(40)))
    return root


@pytest.fixture(scope="module")
def ran(files: Path) -> tuple[Path, str]:
    """int4, a tool that copies it, and a folder of somebody else, measured on one text."""
    (files / "tool.py").write_text(TOOL)
    printed: list[str] = []

    def run(command: list[str], **options: Any) -> Any:
        script = "other_tools.py" in command[1]
        return forked.run([command[0], str(files / "tool.py"), *command[2:]] if script else command, **options)

    words = [
        *(str(files / "model"), str(files / "work"), "--calibration", str(files / "text.jsonl"), "--samples", "80"),
        *("--sequence-length", "64", "--group-size", "64", "--text", f"web={files / 'text.jsonl'}", "--text-tokens", "200"),
        *(
            "--only",
            "int4,gptqmodel-best",
            "--other",
            f"gptqmodel={sys.executable}",
            "--folder",
            f"theirs={files / 'model'}",
            "--device",
            "cpu",
        ),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps.subprocess, "run", run)
        patch.setattr(sys, "argv", ["variants", *words])
        patch.setattr("builtins.print", lambda *shown, **_: printed.append(" ".join(map(str, shown))))
        code = variants.main()
    logs = "".join(log.read_text() for log in (files / "work" / "logs").iterdir())
    assert code == 0, logs
    return files / "work", printed[-1]


def cells(table: str, title: str) -> list[str]:
    return next([cell.strip() for cell in line.split("|")[2:-1]] for line in table.splitlines() if line.startswith(f"| {title} |"))


def test_one_command_measures_recipes_tools_and_given_folders(ran: tuple[Path, str]) -> None:
    """The table has what each lost and what making it took: a tool's memory from its own record, none of a folder that is only given."""
    _, table = ran
    ours, tool, theirs = (cells(table, title) for title in ("`int4`", "GPTQModel, best", "theirs"))
    assert float(ours[0]) > 0 and float(ours[1]) > 0.1 and ours[2] == "-"
    assert tool[1:3] == ["3.00", "7.00"]
    assert tool[3:] == ours[3:], "the same weights lose the same"
    assert theirs[:3] == ["-", "-", "-"] and theirs[3] == "0.0000 ± 0.0000"
    assert cells(table, "original")[4] == theirs[4], "the original's perplexity"


def test_a_tool_is_told_what_the_recipes_are_told(ran: tuple[Path, str]) -> None:
    record = json.loads((ran[0] / "models" / "gptqmodel-best.json").read_text())
    assert record["flags"] == ["--tool", "gptqmodel", "--group-size", "64", "--device", "cpu", "--dtype", "auto", "--best"]


def test_other_tools_get_the_tokens_of_marlinctl(ran: tuple[Path, str]) -> None:
    """The ids in the file are those of the run with the same flags: a comparison on other tokens would be none."""
    report = json.loads((ran[0] / "models" / "int4" / "marlinctl_report.json").read_text())
    tokens = json.loads((ran[0] / "tokens.json").read_text())
    assert tokens["sha256"] == report["calibration"]["sha256"]
    assert torch.tensor(tokens["ids"]).shape == (80, 64)


def test_chats_are_refused_as_tokens_for_other_tools(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding would be calibration for a tool that does not know of it."""
    turns = [{"role": "user", "content": "Where is the well?"}, {"role": "assistant", "content": "In the garden."}]
    (files / "chats.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 4)
    words = [str(files / "model"), str(files / "chats.jsonl"), str(files / "chats.json"), "--samples", "4", "--sequence-length", "128"]
    monkeypatch.setattr(sys, "argv", ["calibration_tokens", *words])
    with pytest.raises(SystemExit, match="give text, not chats"):
        calibration_tokens.main()
    assert not (files / "chats.json").exists()


def document(samples: list[float], stderr: float = 0.01) -> dict[str, Any]:
    """A results file of one task, `arc_easy`."""
    score = {"value": sum(samples) / len(samples), "stderr": stderr}
    task = {"metrics": {"acc": {"value": 0.1, "stderr": 0.1}, "acc_norm": score}, "samples": {"acc": [], "acc_norm": samples}}
    return {"finished": True, "names": ["arc_easy"], "model": {"tasks": {"arc_easy": task}, "groups": {}}}


def test_answers_that_change_are_counted_though_the_score_stays(tmp_path: Path) -> None:
    """Two of four answers changed, one each way: the difference is zero, the flips are a half."""
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "dense.tasks.json").write_text(json.dumps(document([1.0, 0.0, 1.0, 0.0])))
    (tmp_path / "results" / "int4.tasks.json").write_text(json.dumps(document([0.0, 1.0, 1.0, 0.0])))
    table = tables(tmp_path, {"int4": "int4"}, [], {})
    assert table.splitlines()[0] == "|  | arc_easy (acc_norm) |"
    assert cells(table, "original") == ["50.0 ± 1.0"]
    assert cells(table, "int4") == ["50.0 ± 1.0 (+0.0 ± 40.8; 50.0)"]


def test_a_group_counts_the_documents_of_all_its_tasks(tmp_path: Path) -> None:
    """MMLU's difference and flips are over all subjects; a metric that does not count documents has no flips."""
    (tmp_path / "results").mkdir()
    for name, moved in (("dense", 0.0), ("int4", 1.0)):
        leaves = {
            "a": {"metrics": {"acc": {}}, "samples": {"acc": [1.0 - moved, 0.0]}},
            "b": {"metrics": {"acc": {}}, "samples": {"acc": [1.0, 1.0]}},
            "f1": {"metrics": {"f1": {"value": 0.5, "stderr": None}}, "samples": {"f1": [0.5, 0.25 + moved / 2]}},
        }
        groups = {"mmlu": {"tasks": ["a", "b"], "metrics": {"acc": {"value": 0.75 - moved / 4, "stderr": 0.2}}}}
        results = {"finished": True, "names": ["mmlu", "f1"], "model": {"tasks": leaves, "groups": groups}}
        (tmp_path / "results" / f"{name}.tasks.json").write_text(json.dumps(results))
    mmlu, f1 = cells(tables(tmp_path, {"int4": "int4"}, [], {}), "int4")
    assert mmlu == "50.0 ± 20.0 (-25.0 ± 25.0; 25.0)"
    assert f1 == "50.0 (+25.0 ± 25.0)"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--other", "awq=python"], "--other awq: one of llm-compressor"),
        (["--only", "int4,int5"], "--only int5: of int4"),
        (["--folder", "int4=somewhere"], "the name of a variant"),
        (["--folder", "somewhere"], "NAME=VALUE is needed"),
    ],
)
def test_a_wrong_name_is_refused_before_hours_of_work(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        variants.arguments(["model", "work", "--calibration", "text.jsonl", *flags])
    assert said in capsys.readouterr().err


def test_a_tool_is_given_every_token_and_its_folder_becomes_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """auto-round writes OUT/NAME-w4g64: what is read later is OUT. Its record has the settings of --best with what --option changed."""
    seen: dict[str, Any] = {}

    class AutoRound:
        def __init__(self, model: Any, tokenizer: Any, **given: Any) -> None:
            seen.update(given)

        def quantize_and_save(self, out: str, format: str) -> None:
            (Path(out) / "model-w4g64").mkdir(parents=True)
            (Path(out) / "model-w4g64" / "config.json").write_text(format)

    module = ModuleType("auto_round")
    module.AutoRound = AutoRound  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "auto_round", module)
    monkeypatch.setattr(other_tools, "load", lambda chosen: (None, None))
    rows = torch.arange(20 * 16).reshape(20, 16).tolist()
    chosen = SimpleNamespace(out=tmp_path / "out", best=True, group_size=64, device="cpu")
    found = other_tools.auto_round(chosen, rows, {"seed": "7"})  # type: ignore[arg-type]
    assert torch.cat([batch["input_ids"] for batch in seen["dataset"]]).tolist() == rows
    assert (seen["nsamples"], seen["seqlen"], seen["iters"], seen["seed"], seen["group_size"]) == (20, 16, 1000, 7, 64)
    assert found == {"settings": {"iters": 1000, "batch_size": 8, "seed": 7}}
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / "config.json").read_text() == "auto_gptq"


@pytest.mark.parametrize(("tool", "flag"), [("llm-compressor", "--best"), ("gptqmodel", "--sparse")])
def test_a_tool_refuses_what_it_does_not_have(tool: str, flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["other_tools", "model", "tokens.json", "out", "--tool", tool, flag])
    with pytest.raises(SystemExit):
        other_tools.arguments()


def test_a_missing_gpu_is_said_before_a_tool_takes_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """llm-compressor does so by itself: the seconds of a CPU would stand in a column of a GPU."""
    monkeypatch.setattr(other_tools, "gpus", lambda: 0)
    monkeypatch.setattr(sys, "argv", ["other_tools", "model", "tokens.json", "out", "--tool", "llm-compressor", "--device", "cuda"])
    with pytest.raises(SystemExit, match="finds no GPU"):
        other_tools.main()
