"""Several real processes on the CPU (gloo), replicated and sharded: the result is that of one process, up to rounding."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file

from marlinctl.checkpoint.mask import open_masks
from marlinctl.distillation.agreement import checksum
from marlinctl.distillation.distributed import Processes, local, whole
from marlinctl.errors import UsageError
from marlinctl.system.console import Console
from marlinctl.system.processes import silence_if_second
from tests import forked
from tests.distillation.runs import write_text
from tests.pruned import prune, prune_and_quantize, read_all
from tests.test_architecture import ROOT
from tests.tiny import make_tiny

ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
# A script's own folder comes first on its path: the repository's must be named, beside what the person has there.
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
LAUNCHED = str(ROOT / "tests" / "distillation" / "launched.py")


def documented(path: Path) -> Path:
    """The configuration of docs/distill.md, for two processes of this machine and any free port: test runs may share it."""
    found = re.search(r"```yaml\n(# fsdp\.yaml.*?)```", (ROOT / "docs" / "distill.md").read_text("utf-8"), flags=re.DOTALL)
    assert found is not None
    text = found[1]
    for key, value in {"num_machines": 1, "num_processes": 2, "main_process_port": 0}.items():
        text, count = re.subn(rf"^{key}: .*$", f"{key}: {value}", text, flags=re.MULTILINE)
        assert count == 1
    path.write_text(re.sub(r"^main_process_ip: .*\n", "", text, flags=re.MULTILINE))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("processes")
    make_tiny(root / "teacher", tie_word_embeddings=True)
    prune(root / "teacher", root / "student")
    prune_and_quantize(root / "teacher", root / "packed")
    write_text(root / "text.txt")
    documented(root / "fsdp.yaml")
    return root


def command(place: Path, out: Path, *more: str, student: str = "student", tokens: int = 3072, device: str = "cpu") -> list[str]:
    return [
        "distill", str(place / student), str(out), "--teacher", str(place / "teacher"), "--json",
        "--data", str(place / "text.txt"), "--tokens", str(tokens), "--batch-tokens", "256", "--sequence-length", "32",
        "--learning-rate", "0.001", "--save-every", "5", "--device", device, "--dtype", "float32", *more,
    ]  # fmt: skip


def launcher(place: Path, how: str) -> list[str]:
    """Sharded processes have a transformers that leaves zeros in the second one, as 5.17 to 5.22 do."""
    if how == "sharded":
        return [*ACCELERATE, "--config_file", str(place / "fsdp.yaml"), LAUNCHED]
    return [*ACCELERATE, "--multi_gpu", "--num_processes", "2", "--main_process_port", "0", "-m", "marlinctl"]


def run(command: list[str], check: bool = False) -> subprocess.CompletedProcess[str]:
    """A fork has no use of a GPU, and the launcher starts processes of its own."""
    start = subprocess.run if "accelerate.commands.launch" in command or "cuda" in command else forked.run
    return start(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=200, check=check)


def processes(place: Path, how: str, arguments: list[str], out: IO[str], err: IO[str]) -> list[Any]:
    """Two of them with the variables that `accelerate launch` would give them, without the seconds that it takes to start."""
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        port = any_port.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if how == "sharded":
        asked, *_ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(place / "fsdp.yaml"), LAUNCHED]))
        shared |= {name: value for name, value in prepare_multi_gpu_env(asked).items() if name.startswith(("ACCELERATE_", "FSDP_"))}
    program = [LAUNCHED] if how == "sharded" else ["-m", "marlinctl"]
    return [
        forked.Popen(
            [sys.executable, *program, *arguments], cwd=ROOT, stdout=out, stderr=err, text=True,
            env=ENVIRONMENT | shared | {"RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in "01"
    ]  # fmt: skip


def launched(place: Path, how: str, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        codes = [job.wait(timeout=200) for job in processes(place, how, arguments, out, err)]
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(arguments, max(codes, key=abs), out.read(), err.read())


@pytest.fixture(scope="module")
def alone(place: Path) -> dict[str, Path]:
    """What one process makes of each student."""
    done = {}
    for student, mode in (("student", "full"), ("packed", "scales")):
        done[mode] = place / f"alone-{mode}"
        arguments = command(place, done[mode], "--mode", mode, "--micro-batch", "4", student=student)
        run([sys.executable, "-m", "marlinctl", *arguments], check=True)
    return done


@pytest.mark.parametrize(("how", "mode", "student"), [
    ("replicated", "full", "student"), pytest.param("sharded", "full", "student", marks=pytest.mark.slow), ("sharded", "scales", "packed"),
])  # fmt: skip
def test_two_processes_train_the_same_model(place: Path, tmp_path: Path, alone: dict[str, Path], how: str, mode: str, student: str) -> None:
    """If rows, gradients, counts or masks were shared out wrongly, two GPUs would train another model than one."""
    arguments = command(place, tmp_path / "out", "--mode", mode, "--micro-batch", "4", student=student)
    finished = run([*launcher(place, how), *arguments]) if (how, mode) == ("sharded", "full") else launched(place, how, arguments)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert finished.stderr.count("computes the same") == (2 if how == "sharded" else 0)  # said once for each model
    report = json.loads(finished.stdout)  # exactly one document: the second process is silent
    assert report["processes"] == 2
    expected = json.loads((alone[mode] / "marlinctl_report.json").read_text())
    assert report["held_out"]["before"] == pytest.approx(expected["held_out"]["before"], rel=1e-5)
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


@pytest.mark.parametrize("how", [pytest.param("replicated", marks=pytest.mark.slow), "sharded"])
def test_two_processes_renew_the_same_masks(place: Path, tmp_path: Path, how: str) -> None:
    """A mask of another process's rows, or one that two replicas disagree on, would be no mask of the weights beside it; and a state must
    hold the whole of it, because one process resumes what two began."""
    asked = ["--micro-batch", "4", "--mask", "renewed", "--mask-interval", "4", "--mask-decay", "0.3", "--learning-rate", "0.005"]
    run([sys.executable, "-m", "marlinctl", *command(place, tmp_path / "alone", *asked)], check=True)
    finished = launched(place, how, command(place, tmp_path / "out", *asked, "--keep-job"))
    assert finished.returncode == 0, finished.stderr[-3000:]
    report, expected = (json.loads((tmp_path / name / "marlinctl_report.json").read_text()) for name in ("out", "alone"))
    mask, wanted = report["training"]["mask"], expected["training"]["mask"]
    assert mask["renewals"] == wanted["renewals"] == 3 and wanted["changed"] > 0.01
    assert mask["changed"] == pytest.approx(wanted["changed"], rel=0.02)
    assert mask["pruned_norm"] == pytest.approx(wanted["pruned_norm"], rel=0.02, abs=1e-6)
    ours, theirs = read_all(tmp_path / "out"), read_all(tmp_path / "alone")
    held = load_file(tmp_path / "out.job" / "state-00000012.safetensors")
    with open_masks(tmp_path / "out") as masks:
        assert masks is not None
        for name in masks.layers:
            keep = masks.keep(name, *ours[f"{name}.weight"].shape)
            assert not ours[f"{name}.weight"][~keep].any()
            assert torch.equal(held[f"mask.{name}.weight"], ~keep), name
            assert float(((ours[f"{name}.weight"] == 0) != (theirs[f"{name}.weight"] == 0)).double().mean()) < 0.01, name


@pytest.mark.parametrize("start", ["two processes", pytest.param("accelerate launch", marks=pytest.mark.slow)])
def test_a_sharded_job_goes_on_alone(place: Path, tmp_path: Path, start: str) -> None:
    """A state is whole, whoever wrote it: begun by two sharded processes, stopped by SIGTERM, finished by one."""
    out = tmp_path / "out"
    arguments = command(place, out, "--micro-batch", "4", tokens=7680)
    with (tmp_path / "told").open("w+") as told, (tmp_path / "result").open("w") as result:
        if start == "two processes":
            jobs = processes(place, "sharded", arguments, result, told)
        else:
            whole_command = [*launcher(place, "sharded"), *arguments]
            jobs = [subprocess.Popen(whole_command, cwd=ROOT, env=ENVIRONMENT, stderr=told, stdout=result, start_new_session=True)]
        deadline = time.monotonic() + 150
        while not (tmp_path / "out.job" / "state.json").exists():
            assert jobs[0].poll() is None, (tmp_path / "told").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for job in jobs:
            job.send_signal(signal.SIGTERM) if start == "two processes" else os.killpg(job.pid, signal.SIGTERM)
        assert all(job.wait(timeout=100) != 0 for job in jobs)
    heard = (tmp_path / "told").read_text()
    assert "to resume: accelerate launch ... -m marlinctl resume" in heard, heard[-3000:]
    saved = json.loads((tmp_path / "out.job" / "state.json").read_text())["step"]
    assert 5 <= saved < 30
    finished = run([sys.executable, "-m", "marlinctl", *command(place, out, "--micro-batch", "4", "--resume", tokens=7680)])
    assert finished.returncode == 0, finished.stderr[-3000:]
    curve = json.loads(finished.stdout)["training"]["curve"]
    assert curve[-1]["step"] == 30 and [entry["step"] for entry in curve] == sorted({entry["step"] for entry in curve})
    assert curve[-1]["loss"] < 0.5 * curve[0]["loss"]


def test_an_error_is_told_once(place: Path, tmp_path: Path) -> None:
    """Every process finds the same mistake; a screen full of copies hides it."""
    words = [word for word in command(place, tmp_path / "out", "--sequence-length", "4096") if word != "--json"]
    finished = launched(place, "replicated", words)
    assert finished.returncode != 0
    assert finished.stderr.count("error: rows of 4096 tokens are longer than the model can read") == 1
    assert not (tmp_path / "out.job").exists()


def test_rows_that_cannot_be_shared_equally_are_refused(place: Path) -> None:
    """One process with fewer rows would wait for ever in the other's collective."""
    from marlinctl.planning.training_settings import check_sizes
    from tests.distillation.runs import recipe

    with pytest.raises(UsageError) as caught:
        check_sizes(recipe("self", batch_tokens=3 * 32).distill, {}, 2)
    assert caught.value.problems[0].fix == "--batch-tokens 128"


def test_processes_that_differ_do_not_train(place: Path) -> None:
    """Without these checks a run whose second process holds zeros, or another version of the files, trains to its end and is published."""
    finished = launched(place, "sharded", ["agreement", str(place / "student")])
    assert finished.returncode == 0, finished.stderr[-3000:]
    main, second = json.loads(finished.stdout.splitlines()[-1])
    for sound in ("sound weights", "sound shards", "not measured"):
        assert main[sound] == second[sound] == "passed"
    other = "E117 process 1 holds another student than process 0: 1 of 22 tensors not the same | student, model.norm.weight"
    assert main["other weights"] == other and second["other weights"] == "left with 1"
    assert main["shards of zeros"].startswith("E117 sharded, the student computes something else: a loss of ")
    assert second["shards of zeros"] == "left with 1"


def test_shards_are_gathered_in_bfloat16_and_kept_in_float32(place: Path) -> None:
    """Gathering float32 costs twice the bytes and a copy of every weight; a step on bfloat16 weights would round to nothing."""
    finished = launched(place, "sharded", ["gathering", str(place / "student")])
    assert finished.returncode == 0, finished.stderr[-3000:]
    for found in json.loads(finished.stdout.splitlines()[-1]):
        assert found["dtypes"] == {"weight": "torch.bfloat16", "stream": "torch.bfloat16"} and found["kept"] == ["torch.float32"]
        assert found["error"] < 2 * torch.finfo(torch.bfloat16).eps  # the sum of two is not rounded; products run in another order


def test_two_sharded_processes_train_in_bfloat16(place: Path, tmp_path: Path, alone: dict[str, Path]) -> None:
    """The check of sharded against whole models must allow for the rounding of what runs between blocks, and the training must go down."""
    arguments = [*command(place, tmp_path / "out", "--micro-batch", "4"), "--dtype", "bfloat16"]
    finished = launched(place, "sharded", arguments)
    assert finished.returncode == 0, finished.stderr[-3000:]
    report = json.loads(finished.stdout)
    expected = json.loads((alone["full"] / "marlinctl_report.json").read_text())
    for when in ("before", "after"):
        assert report["held_out"][when]["loss"] == pytest.approx(expected["held_out"][when]["loss"], rel=0.05)
    assert report["held_out"]["after"]["loss"] < 0.8 * report["held_out"]["before"]["loss"]
    assert len(report["peaks"]) == 2 and report["peaks"][0]["peak_memory_bytes"] == report["peak_memory_bytes"]
    assert 0 < report["training"]["seconds_per_step"] < report["training"]["seconds"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.bool])
def test_a_checksum_sees_values_and_their_rows(dtype: torch.dtype) -> None:
    """Every word counts, those that fill no 8 bytes too; equal tensors must not be told apart by how they lie in memory."""
    for shape in ((6, 16), (5, 3), (7,), (2, 3, 8), ()):
        tensor = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 40).to(dtype)
        assert checksum(tensor) == checksum(tensor.clone()) == checksum(tensor.t().contiguous().t() if tensor.dim() == 2 else tensor)
        for i in range(tensor.numel()):
            other = tensor.clone()
            other.view(-1)[i] = ~other.view(-1)[i] if dtype == torch.bool else other.view(-1)[i] + 1
            assert checksum(other) != checksum(tensor)
    rows = torch.arange(32).reshape(2, 16).to(dtype)
    rows[0] = 0
    assert checksum(rows) != checksum(rows.flip(0))
    assert checksum(torch.empty(0, 8, dtype=dtype)) == 0


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_two_gpus_train_what_one_trains(place: Path, tmp_path: Path) -> None:
    """NCCL, real shards in device memory and the copies between host and device are not what gloo on a CPU does."""
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two CUDA devices, torch sees {torch.cuda.device_count()}")
    told = {}
    for how, start in {
        "alone": [sys.executable, "-m", "marlinctl"], "replicated": launcher(place, "replicated"), "sharded": launcher(place, "sharded"),
    }.items():  # fmt: skip
        finished = run([*start, *command(place, tmp_path / how, "--micro-batch", "4", device="cuda")])
        assert finished.returncode == 0, finished.stderr[-3000:]
        told[how] = json.loads(finished.stdout)
    for how in ("replicated", "sharded"):
        assert told[how]["processes"] == 2
        for when, rel in (("before", 1e-4), ("after", 1e-2)):
            assert told[how]["held_out"][when] == pytest.approx(told["alone"]["held_out"][when], rel=rel)


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
