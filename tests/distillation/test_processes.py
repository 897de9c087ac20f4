"""Several real processes on the CPU (gloo), replicated and sharded: the result is that of one process, up to rounding."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from marlinctl.console import Console
from marlinctl.distillation.processes import Processes, local, silence_if_second, whole
from marlinctl.errors import UsageError
from tests.distillation.runs import write_text
from tests.pruned import prune, prune_and_quantize, read_all
from tests.test_architecture import ROOT
from tests.tiny import make_tiny

LAUNCH = {
    "replicated": ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"],
    "sharded": ["-m", "accelerate.commands.launch", "--use_fsdp", "--fsdp_version", "2", "--num_processes", "2"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("processes")
    make_tiny(root / "teacher", tie_word_embeddings=True)
    prune(root / "teacher", root / "student")
    prune_and_quantize(root / "teacher", root / "packed")
    write_text(root / "text.txt")
    return root


def command(place: Path, out: Path, *more: str, student: str = "student", tokens: int = 3072) -> list[str]:
    return [
        "-m", "marlinctl", "distill", str(place / student), str(out), "--teacher", str(place / "teacher"), "--json",
        "--data", str(place / "text.txt"), "--tokens", str(tokens), "--batch-tokens", "256", "--sequence-length", "32",
        "--learning-rate", "0.001", "--save-every", "5", "--device", "cpu", "--dtype", "float32", *more,
    ]  # fmt: skip


def launch(how: str, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    port = ["--main_process_port", "0"]  # any free one: test runs may share the machine
    return subprocess.run(
        [sys.executable, *LAUNCH[how], *port, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )


@pytest.fixture(scope="module")
def alone(place: Path) -> dict[str, Path]:
    """What one process makes of each student."""
    done = {}
    for student, mode in (("student", "full"), ("packed", "scales")):
        done[mode] = place / f"alone-{mode}"
        arguments = command(place, done[mode], "--mode", mode, "--micro-batch", "4", student=student)
        subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True)
    return done


@pytest.mark.parametrize(("how", "mode", "student"), [
    ("replicated", "full", "student"), ("sharded", "full", "student"), ("sharded", "scales", "packed"),
])  # fmt: skip
def test_two_processes_train_the_same_model(place: Path, tmp_path: Path, alone: dict[str, Path], how: str, mode: str, student: str) -> None:
    """If rows, gradients, counts or masks were shared out wrongly, two GPUs would train another model than one."""
    finished = launch(how, command(place, tmp_path / "out", "--mode", mode, "--micro-batch", "4", student=student))
    assert finished.returncode == 0, finished.stderr[-3000:]
    report = json.loads(finished.stdout)  # exactly one document: the second process is silent
    assert report["processes"] == 2
    expected = json.loads((alone[mode] / "marlinctl_report.json").read_text())
    for found, wanted in zip(report["training"]["curve"], expected["training"]["curve"], strict=True):
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-3)
    ours, theirs = read_all(tmp_path / "out"), read_all(alone[mode])
    assert ours.keys() == theirs.keys()
    for name in ours:
        if not ours[name].is_floating_point():
            assert torch.equal(ours[name], theirs[name]), name
        else:  # float16 on disk: half a unit in the last place of weights below 1, and of norms above it
            assert (ours[name].double() - theirs[name].double()).abs().max() <= 2e-3, name
    for file in ("marlinctl_mask.safetensors", "config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (alone[mode] / file).read_bytes()
    assert not (tmp_path / "out.job").exists()


def test_a_sharded_job_goes_on_alone(place: Path, tmp_path: Path, alone: dict[str, Path]) -> None:
    """A state is whole, whoever wrote it: begun by two sharded processes, stopped by SIGTERM, finished by one."""
    out = tmp_path / "out"
    arguments = [sys.executable, *LAUNCH["sharded"], "--main_process_port", "0", *command(place, out, "--micro-batch", "4", tokens=25600)]
    process = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True)
    deadline = time.monotonic() + 150
    while not (tmp_path / "out.job" / "state.json").exists():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    _, told = process.communicate(timeout=100)
    assert process.returncode != 0 and "to go on: accelerate launch ... -m marlinctl resume" in told, told[-3000:]
    saved = json.loads((tmp_path / "out.job" / "state.json").read_text())["step"]
    assert 5 <= saved < 100
    finished = subprocess.run(
        [sys.executable, *command(place, out, "--micro-batch", "4", "--resume", tokens=25600)],
        cwd=ROOT, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-3000:]
    curve = json.loads(finished.stdout)["training"]["curve"]
    assert curve[-1]["step"] == 100 and [entry["step"] for entry in curve] == sorted({entry["step"] for entry in curve})
    assert curve[-1]["loss"] < 0.5 * curve[0]["loss"]


def test_an_error_is_told_once(place: Path, tmp_path: Path) -> None:
    """Every process finds the same mistake; a screen full of copies hides it."""
    finished = launch("replicated", [word for word in command(place, tmp_path / "out", "--sequence-length", "4096") if word != "--json"])
    assert finished.returncode != 0
    assert finished.stderr.count("error: rows of 4096 tokens are longer than the model can read") == 1
    assert not (tmp_path / "out.job").exists()


def test_rows_that_cannot_be_shared_equally_are_refused(place: Path) -> None:
    """One process with fewer rows would wait for ever in the other's collective."""
    from marlinctl.distillation.settings import check_sizes
    from tests.distillation.runs import recipe

    with pytest.raises(UsageError) as caught:
        check_sizes(recipe("self", batch_tokens=3 * 32).distill, {}, 2)
    assert caught.value.problems[0].fix == "--batch-tokens 128"


@pytest.mark.parametrize(
    "given", [{"FSDP_VERSION": "1"}, {}, {"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}], ids=["version 1", "none", "offload"]
)
def test_other_ways_of_sharding_are_refused(given: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch configuration that is not followed must not be ignored in silence."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for key, value in given.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UsageError) as caught:
        Processes("cpu")
    assert caught.value.error_id == "E289"


def test_one_process_needs_nobody() -> None:
    """Without a launcher everything is whole and local, and nothing waits."""
    processes = Processes("cpu")
    assert processes.main and processes.count == 1 and not processes.sharded
    value = torch.arange(6.0).reshape(2, 3)
    assert whole(value) is value and local(value) is value
    assert torch.equal(processes.spread(value, value), value) and torch.equal(processes.share_tensor(value), value)
    assert processes.largest(3) == 3 and processes.share("x") == "x" and processes.main_first(lambda: 5) == 5


@pytest.mark.parametrize(("rank", "silent"), [("0", False), ("1", True), (None, False)])
def test_only_the_main_process_talks(
    rank: str | None, silent: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two results on stdout are no JSON document; an error of the second process must still be seen."""
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    console = Console(colour=False)
    silence_if_second(console)
    console.say("story")
    console.warn("careful")
    console.error("broken")
    console.result("done", {})
    console.close()
    out, err = capsys.readouterr()
    assert out == ("" if silent else "done\n")
    assert ("story" in err, "careful" in err, "broken" in err) == (not silent, not silent, True)
