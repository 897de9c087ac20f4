"""`distill` from end to end on tiny models: three modes, every architecture, states, signals, and what is published."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from torch import Tensor

from marlinctl.checkpoint.mask import open_masks
from marlinctl.checkpoint.transformers_model import load_dense
from marlinctl.cli import main
from marlinctl.distillation import loop as loops
from marlinctl.distillation.state import DistillJob
from marlinctl.errors import BadInput, NumericalProblem, UsageError
from marlinctl.system.console import Console
from marlinctl.verify.run import verify
from tests import forked, zoo
from tests.checkpoint.test_contents import flip
from tests.distillation.runs import Crash, crash_after, distill, recipe, write_text
from tests.packed import edit_tensors, remake_manifest
from tests.pruned import prune, prune_and_quantize, read_all
from tests.test_architecture import ROOT
from tests.tiny import make_tiny


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """teacher, student (2:4), packed (2:4, ct) and a text; read only."""
    root = tmp_path_factory.mktemp("distill")
    make_tiny(root / "teacher")
    prune(root / "teacher", root / "student")
    prune_and_quantize(root / "teacher", root / "packed")
    write_text(root / "text.txt")
    return root


@pytest.fixture(scope="module")
def whole(place: Path) -> tuple[Path, dict[str, Any]]:
    """What run() publishes when nothing is changed, and its report; read only."""
    return place / "whole", run(place, place / "whole")


def run(place: Path, out: Path, *, student: str = "student", resume: bool = False, **changes: Any) -> dict[str, Any]:
    return distill(place / student, out, place / "teacher", recipe(place / "text.txt", **changes), resume=resume)


def assert_same_tensors(one: Path, other: Path) -> None:
    ours, theirs = read_all(one), read_all(other)
    assert ours.keys() == theirs.keys()
    differing = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not differing


def assert_obeys(folder: Path, keeps: dict[str, Tensor]) -> None:
    """The folder's masks are these, and nothing else is alive."""
    tensors = read_all(folder)
    with open_masks(folder) as masks:
        assert masks is not None and set(masks.layers) == set(keeps)
        for name, keep in keeps.items():
            assert torch.equal(masks.keep(name, *keep.shape), keep)
            assert not tensors[f"{name}.weight"][~keep].any()


# ---- the modes -----------------------------------------------------------------------------------------------------------------------


def test_full_mode_brings_the_student_nearer_and_keeps_its_mask(place: Path, tmp_path: Path) -> None:
    """If a step forgot the mask, the result would no longer be 2:4; if the gradient were wrong, it would not get nearer."""
    keeps = prune(place / "teacher", tmp_path / "again")
    report = run(place, tmp_path / "out", tokens=30 * 256)
    before, after = report["held_out"]["before"], report["held_out"]["after"]
    assert after["kl"] < 0.5 * before["kl"] and after["squarehead"] < 0.5 * before["squarehead"]
    assert report["training"]["curve"][-1]["loss"] < report["training"]["curve"][0]["loss"]
    assert_obeys(tmp_path / "out", keeps)
    assert verify(tmp_path / "out", source=None, load=True, console=Console.quiet()).format == "dense"
    moved, original = read_all(tmp_path / "out"), read_all(place / "student")
    assert {name for name in moved if torch.equal(moved[name], original[name])} == {"model.embed_tokens.weight", "lm_head.weight"}
    assert all(moved[name].dtype == original[name].dtype for name in moved)
    assert not list(tmp_path.glob("out.job*")) and not list(tmp_path.glob("out.tmp*"))


def test_the_card_names_the_original_on_the_hub(place: Path, tmp_path: Path) -> None:
    """A student of a local teacher would have no original and no licence on the hub."""
    settings: dict[str, Any] = {"base_model": "org/Tiny-1B", "license": "mit"}
    distill(place / "student", tmp_path / "out", place / "teacher", recipe(place / "text.txt", tokens=256), **settings)
    meta = ModelCard.load(tmp_path / "out" / "README.md").data
    assert (meta.base_model, meta.base_model_relation, meta.license) == ("org/Tiny-1B", "finetune", "mit")


def test_what_is_measured_is_what_is_published(place: Path, whole: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """The report's held-out loss must belong to the rounded weights on disk, not to those in memory before rounding."""
    published, report = whole
    again = run(place, tmp_path / "more", student=str(published))
    assert again["held_out"]["before"] == pytest.approx(report["held_out"]["after"], rel=1e-6)


# At once: experts that are fused, with routers of other names, biases, tied heads, fused linears, norms that add one. The rest is slow.
QUICK = {
    ("mixtral", "scales"), ("qwen3_moe", "full"), ("llama", "full"), ("qwen2", "scales"), ("phi3", "full"), ("gemma3_text", "scales"),
    ("olmo2", "full"),
}  # fmt: skip
TRAINED = [
    pytest.param(name, mode, marks=() if (name, mode) in QUICK else pytest.mark.slow)
    for mode in ("full", "scales")
    for name in sorted(zoo.ZOO)
]


@pytest.mark.parametrize(("model_type", "mode"), TRAINED)
def test_every_architecture_is_trained(model_type: str, mode: str, tmp_path: Path) -> None:
    """Fused experts, biases, tied heads and renamed routers must find their way into the model and back to the checkpoint."""
    teacher = zoo.build(model_type, tmp_path / "teacher", dtype=torch.bfloat16)
    text = write_text(tmp_path / "text.txt")
    if mode == "full":
        keeps = prune(teacher, tmp_path / "student")
    else:
        prune_and_quantize(teacher, tmp_path / "student", group_size=32)
    report = distill(tmp_path / "student", tmp_path / "out", teacher, recipe(text, mode=mode, tokens=10 * 256))
    before, after = report["held_out"]["before"], report["held_out"]["after"]
    assert after["loss"] < before["loss"]
    moved, original = read_all(tmp_path / "out"), read_all(tmp_path / "student")
    assert moved.keys() == original.keys()
    same = {name for name in moved if torch.equal(moved[name], original[name])}
    if mode == "full":
        assert_obeys(tmp_path / "out", keeps)
        assert not [name for name in same if name.endswith("_proj.weight") or "norm" in name or ".w1." in name]
    else:
        assert not [name for name in original if name.endswith("weight_packed") and name not in same]
        assert not [name for name in same if name.endswith("weight_scale") or "norm" in name]
    model = load_dense(tmp_path / "out", dtype=torch.float32)
    assert bool(torch.isfinite(model(torch.arange(20).reshape(1, -1)).logits).all())


def test_scales_mode_leaves_codes_and_masks_alone(place: Path, tmp_path: Path) -> None:
    """Codes and masks are data: not a byte of them may change, and scales must be float16."""
    report = run(place, tmp_path / "out", student="packed", mode="scales", tokens=30 * 256, learning_rate=3e-3)
    assert report["held_out"]["after"]["loss"] < 0.9 * report["held_out"]["before"]["loss"]
    ours, theirs = read_all(tmp_path / "out"), read_all(place / "packed")
    for name in ours:
        if name.endswith("weight_scale"):
            assert ours[name].dtype == torch.float16 and not torch.equal(ours[name], theirs[name])
        elif "norm" in name:
            assert not torch.equal(ours[name], theirs[name])
        else:
            assert torch.equal(ours[name], theirs[name]), name
    mask = "marlinctl_mask.safetensors"
    assert (tmp_path / "out" / mask).read_bytes() == (place / "packed" / mask).read_bytes()
    assert verify(tmp_path / "out", source=None, load=True, console=Console.quiet()).format == "ct"


def test_scales_of_a_model_without_masks(place: Path, tmp_path: Path) -> None:
    """A plain 4-bit model is a student too, and gets no mask file."""
    prune_and_quantize(place / "teacher", tmp_path / "int4", mask=False)
    report = run(place, tmp_path / "out", student=str(tmp_path / "int4"), mode="scales")
    assert report["sparse_linears"] == 0 and report["held_out"]["after"]["loss"] < report["held_out"]["before"]["loss"]
    assert not (tmp_path / "out" / "marlinctl_mask.safetensors").exists()


def test_trained_norms_are_no_fault_of_the_folder(place: Path, tmp_path: Path) -> None:
    """Who verifies a trained model against its original would be told that norms are damaged, also after a second training or `pack`."""
    prune_and_quantize(place / "teacher", tmp_path / "int4", mask=False)
    run(place, tmp_path / "once", student=str(tmp_path / "int4"), mode="scales")
    run(place, tmp_path / "out", student=str(tmp_path / "once"), mode="scales", tokens=256)
    assert main(["pack", str(tmp_path / "out"), str(tmp_path / "marlin"), "--format", "marlin", "-q"]) == 0
    for folder in ("once", "out", "marlin"):
        assert main(["verify", str(tmp_path / folder), "--source", str(place / "teacher"), "--no-load", "-q"]) == 0


def test_scales_stay_exact_in_bfloat16(place: Path, tmp_path: Path) -> None:
    """Scales that a bfloat16 runtime held exactly before must be so afterwards, or it would compute with other weights."""

    def round_all(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if name.endswith("weight_scale"):
                tensors[name] = tensors[name].to(torch.bfloat16).to(torch.float16)

    prune_and_quantize(place / "teacher", tmp_path / "int4", mask=False)
    edit_tensors(tmp_path / "int4", round_all)
    remake_manifest(tmp_path / "int4")
    run(place, tmp_path / "out", student=str(tmp_path / "int4"), mode="scales")
    for name, tensor in read_all(tmp_path / "out").items():
        if name.endswith("weight_scale"):
            assert torch.equal(tensor.to(torch.bfloat16).to(torch.float16), tensor)


def test_a_found_pattern_is_kept_and_written(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A 2:4 model from elsewhere has no mask file: its zeros are the pattern, that is said, and the result carries the file."""
    keeps = prune(place / "teacher", tmp_path / "foreign", mask=False)
    arguments = ["distill", str(tmp_path / "foreign"), str(tmp_path / "out"), "--teacher", str(place / "teacher")]
    arguments += ["--data", str(place / "text.txt"), "--tokens", "512", "--batch-tokens", "256", "--sequence-length", "32"]
    assert main([*arguments, "--device", "cpu", "--dtype", "float32", "--json"]) == 0
    out, err = capsys.readouterr()
    assert "its 2:4 pattern is found from the zeros" in err
    assert_obeys(tmp_path / "out", keeps)
    document = json.loads(out)
    assert document["kind"] == "distill" and document["training"]["steps"] == 2 and document["sparse_linears"] == len(keeps)


def test_the_teacher_writes_the_text(place: Path, tmp_path: Path) -> None:
    """--data self must give the same rows each time, drawn with the seed alone."""
    digests = []
    for i in range(2):
        torch.manual_seed(i)
        report = distill(place / "student", tmp_path / f"out{i}", place / "teacher", recipe("self", tokens=2 * 256))
        digests.append(json.loads((tmp_path / f"out{i}" / "marlinctl_manifest.json").read_text())["data"]["sha256"])
    assert digests[0] == digests[1]
    assert report["data"]["how"] == "written by the teacher"


def test_cached_predictions_of_the_whole_vocabulary_train_the_same(place: Path, tmp_path: Path) -> None:
    """The cache must hold what the teacher says about exactly these rows; any shift or mix-up would train something else."""
    live = run(place, tmp_path / "live", squarehead=0.0)
    cached = run(place, tmp_path / "cached", squarehead=0.0, cache_logits=10**6)
    assert [entry["kl"] for entry in cached["training"]["curve"]] == pytest.approx(
        [entry["kl"] for entry in live["training"]["curve"]], rel=1e-4
    )
    ours, theirs = read_all(tmp_path / "cached"), read_all(tmp_path / "live")
    assert all((ours[name].float() - theirs[name].float()).abs().max() < 2e-3 for name in ours)


def test_a_small_cache_still_teaches(place: Path, tmp_path: Path) -> None:
    """Eight predictions a token must be enough to get nearer to the teacher's full predictions."""
    report = run(place, tmp_path / "out", squarehead=0.0, cache_logits=8, tokens=30 * 256)
    assert report["held_out"]["after"]["kl"] < 0.6 * report["held_out"]["before"]["kl"]


# ---- the same numbers, however it is run ---------------------------------------------------------------------------------------------


def test_two_runs_publish_the_same_bytes(place: Path, whole: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Anything drawn from a global generator, or dependent on time or place, could not be checked by anybody."""
    torch.manual_seed(3)
    torch.rand(5)
    run(place, tmp_path / "two")
    apart = {"README.md", "marlinctl_report.json", "marlinctl_report.md", "marlinctl_report.html"}
    for path in whole[0].iterdir():
        if path.name not in apart:
            assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_the_parts_of_a_step_decide_rounding_only(place: Path, tmp_path: Path) -> None:
    """If parts were averaged wrongly, --micro-batch would be a hidden setting of the learning rate."""
    curves = []
    for size in (8, 3):
        report = run(place, tmp_path / f"out{size}", micro_batch=size, squarehead=0.0, ce=0.5)
        curves.append([entry["loss"] for entry in report["training"]["curve"]])
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


def test_checkpointing_changes_memory_and_no_number(place: Path, whole: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Activations that are computed again must be the same ones, hidden states included."""
    run(place, tmp_path / "again", checkpointing=True)
    assert_same_tensors(whole[0], tmp_path / "again")


def test_bfloat16_products_train_too(place: Path, tmp_path: Path) -> None:
    """Weights are held in float32 under bfloat16 products: small steps must not be lost."""
    report = distill(place / "student", tmp_path / "out", place / "teacher", recipe(place / "text.txt"), dtype="bfloat16")
    assert report["dtype"] == "bfloat16"
    assert report["held_out"]["after"]["loss"] < 0.8 * report["held_out"]["before"]["loss"]


# ---- stopping and resuming -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "student"), [("full", "student"), ("scales", "packed")])
def test_a_resumed_job_ends_with_the_same_bits(
    place: Path, tmp_path: Path, mode: str, student: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, moments, step count, order of the data and learning rate must all come back; one of them lost gives another model."""
    whole = run(place, tmp_path / "whole", mode=mode, student=student)
    with monkeypatch.context() as patched:
        crash_after(patched, 8)
        with pytest.raises(Crash):
            run(place, tmp_path / "out", mode=mode, student=student)
    assert not (tmp_path / "out").exists()
    assert json.loads((tmp_path / "out.job" / "state.json").read_text())["step"] == 5
    resumed = run(place, tmp_path / "out", mode=mode, student=student, resume=True)
    assert_same_tensors(tmp_path / "whole", tmp_path / "out")
    assert resumed["held_out"] == whole["held_out"]
    assert [entry["loss"] for entry in resumed["training"]["curve"]] == [entry["loss"] for entry in whole["training"]["curve"]]
    assert not (tmp_path / "out.job").exists()


def test_a_failed_publish_does_not_cost_the_training(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk at the end must leave a state from which nothing is trained again."""
    with monkeypatch.context() as patched:
        patched.setattr("marlinctl.distillation.run.build", lambda *args, **kwargs: (_ for _ in ()).throw(Crash()))
        with pytest.raises(Crash):
            run(place, tmp_path / "out")
    crash_after(monkeypatch, 0)
    run(place, tmp_path / "out", resume=True)
    assert (tmp_path / "out" / "config.json").exists()


def test_a_job_goes_on_only_as_what_it_was(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another learning rate, text or student would mix two jobs into one model; every difference is told."""
    with monkeypatch.context() as patched:
        crash_after(patched, 6)
        with pytest.raises(Crash):
            run(place, tmp_path / "out")
    state = sorted(path.name for path in (tmp_path / "out.job").iterdir())
    other = write_text(tmp_path / "other.txt")
    other.write_text(other.read_text().upper())
    chosen = recipe(other, learning_rate=0.01)
    with pytest.raises(UsageError) as caught:
        distill(place / "student", tmp_path / "out", place / "teacher", chosen, resume=True)
    told = " ".join(problem.what for problem in caught.value.problems)
    assert caught.value.error_id == "E286"
    assert "recipe.learning_rate was 0.001 and is now 0.01" in told and "rows_sha256" in told and "recipe.data" in told
    with pytest.raises(UsageError, match="unfinished job"):
        run(place, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out.job").iterdir()) == state


@pytest.mark.parametrize("changed", ["student", "teacher"])
def test_other_weights_under_the_same_headers_are_refused(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    """The first half of a training would be towards one teacher, the other half towards another; which bit differs, no header says."""
    for name in ("student", "teacher"):
        shutil.copytree(place / name, tmp_path / name)
    chosen = recipe(place / "text.txt")
    with monkeypatch.context() as patched:
        crash_after(patched, 6)
        with pytest.raises(Crash):
            distill(tmp_path / "student", tmp_path / "out", tmp_path / "teacher", chosen)
    shard = next((tmp_path / changed).glob("model*.safetensors"))
    flip(shard)
    with pytest.raises(UsageError) as caught:
        distill(tmp_path / "student", tmp_path / "out", tmp_path / "teacher", chosen, resume=True)
    assert caught.value.error_id == "E286"
    assert [problem.what.split(" was ")[0] for problem in caught.value.problems] == [f"{changed}.shards.{shard.name}.sha256"]
    flip(shard)
    distill(tmp_path / "student", tmp_path / "out", tmp_path / "teacher", chosen, resume=True)


def test_a_teacher_that_changes_during_the_training_ends_it(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state that was trained towards two teachers would be gone on with."""
    shutil.copytree(place / "teacher", tmp_path / "teacher")
    step = loops.Loop.step

    def changing(self: loops.Loop, *given: Any) -> Any:
        if given[0] == 3:
            flip(next((tmp_path / "teacher").glob("model*.safetensors")))
        return step(self, *given)

    monkeypatch.setattr(loops.Loop, "step", changing)
    with pytest.raises(BadInput) as caught:
        distill(place / "student", tmp_path / "out", tmp_path / "teacher", recipe(place / "text.txt"))
    assert caught.value.error_id == "E306" and "teacher" in caught.value.problems[0].where
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.job" / "state.json").exists()


def test_text_that_the_teacher_wrote_is_kept(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing it again would take hours, and on a GPU give another text."""
    chosen = recipe("self", tokens=8 * 256)
    distill(place / "student", tmp_path / "whole", place / "teacher", chosen)
    with monkeypatch.context() as patched:
        crash_after(patched, 6)
        with pytest.raises(Crash):
            distill(place / "student", tmp_path / "out", place / "teacher", chosen)
    monkeypatch.delattr("marlinctl.distillation.rows.write_samples")
    distill(place / "student", tmp_path / "out", place / "teacher", chosen, resume=True)
    assert_same_tensors(tmp_path / "whole", tmp_path / "out")


def test_nothing_to_go_on_with_is_said(place: Path, tmp_path: Path) -> None:
    """--resume without a job must not begin one that the person takes for the old one."""
    with pytest.raises(UsageError, match="no job to resume"):
        run(place, tmp_path / "out", resume=True)
    assert not (tmp_path / "out.job").exists()


def test_a_loss_that_is_not_finite_stops_the_run(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN weights must never reach a state or a checkpoint."""
    monkeypatch.setattr(loops, "learning_rate", lambda *_: 1e30)
    with pytest.raises(NumericalProblem, match="not finite any more"):
        run(place, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.job" / "state.json").exists()


def command(place: Path, out: Path, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "marlinctl", "distill", str(place / "student"), str(out), "--teacher", str(place / "teacher"),
        "--data", str(place / "text.txt"), "--tokens", "7680", "--batch-tokens", "256", "--sequence-length", "32", "--micro-batch", "4",
        "--learning-rate", "0.001", "--save-every", "5", "--device", "cpu", "--dtype", "float32", *more,
    ]  # fmt: skip


def start(place: Path, out: Path) -> subprocess.Popen[str]:
    """A real process, which has saved its first state when this returns."""
    process = forked.Popen(command(place, out), cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 120
    while not DistillJob(out).path.joinpath("state.json").exists():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return process


def test_killed_and_interrupted_processes_go_on(place: Path, tmp_path: Path) -> None:
    """kill -9 in the middle of a run, then SIGTERM in the resumed one: the end must be that of a run left alone."""
    forked.run(command(place, tmp_path / "whole"), cwd=ROOT, check=True, capture_output=True)
    out = tmp_path / "out"
    killed = start(place, out)
    killed.kill()
    killed.communicate()
    assert not out.exists()
    state = DistillJob(out).path / "state.json"
    before = state.read_bytes()
    stopped = forked.Popen(command(place, out, "--resume"), cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while state.read_bytes() == before:
        assert stopped.poll() is None
        time.sleep(0.005)
    stopped.send_signal(signal.SIGTERM)
    _, told = stopped.communicate(timeout=120)
    assert stopped.returncode == 143, told
    assert f"to resume: marlinctl resume {out}" in told
    assert json.loads(state.read_text())["step"] < 30
    forked.run(command(place, out, "--resume"), cwd=ROOT, check=True, capture_output=True)
    assert_same_tensors(tmp_path / "whole", out)


def test_ctrl_c_saves_the_current_step(place: Path, tmp_path: Path) -> None:
    """Ctrl-C must cost no step that was computed, and end with exit code 130."""
    process = start(place, tmp_path / "out")
    os.kill(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 130, told
    saved = json.loads((tmp_path / "out.job" / "state.json").read_text())["step"]
    assert f"state after step {saved} of 30 is saved" in told
    assert not (tmp_path / "out").exists()


# ---- on GPUs -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(("mode", "student"), [("full", "student"), ("scales", "packed"), ("blockwise", "student")])
def test_cuda_trains_the_same_model(place: Path, tmp_path: Path, mode: str, student: str) -> None:
    """If the CUDA path read other rows, masked later or stepped otherwise, its losses would leave those of the CPU."""
    chosen = recipe(place / "text.txt", mode=mode, tokens=30 * 256)
    reports = {device: distill(place / student, tmp_path / device, place / "teacher", chosen, device=device) for device in ("cpu", "cuda")}
    for found, wanted in zip(*(reports[device]["training"]["curve"] for device in ("cuda", "cpu")), strict=True):
        assert found["loss"] == pytest.approx(wanted["loss"], rel=0.01)
    assert 0 < reports["cuda"]["peak_device_memory_bytes"] <= reports["cuda"]["peak_device_reserved_bytes"]
    ours, theirs = read_all(tmp_path / "cuda"), read_all(tmp_path / "cpu")
    assert all(torch.equal(ours[name] == 0, theirs[name] == 0) for name in ours if name.endswith("proj.weight"))


@pytest.mark.gpu
def test_a_job_resumed_on_cuda_ends_nearby(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused step keeps its counter on the device; a counter lost on resuming would show as a jump of the loss."""
    whole = distill(place / "student", tmp_path / "whole", place / "teacher", recipe(place / "text.txt"), device="cuda")
    with monkeypatch.context() as patched:
        crash_after(patched, 8)
        with pytest.raises(Crash):
            distill(place / "student", tmp_path / "out", place / "teacher", recipe(place / "text.txt"), device="cuda")
    resumed = distill(place / "student", tmp_path / "out", place / "teacher", recipe(place / "text.txt"), device="cuda", resume=True)
    assert resumed["held_out"]["after"]["loss"] == pytest.approx(whole["held_out"]["after"]["loss"], rel=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("launcher", [["--multi_gpu"], ["--use_fsdp", "--fsdp_version", "2"]], ids=["replicated", "sharded"])
def test_two_gpus_train_the_same_model(place: Path, tmp_path: Path, launcher: list[str]) -> None:
    """NCCL, devices of their own and shards on them: the losses must be those of one GPU."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    arguments = [word for word in command(place, tmp_path / "two")[1:] if word not in ("--device", "cpu")]
    launch = [sys.executable, "-m", "accelerate.commands.launch", *launcher, "--num_processes", "2", "--main_process_port", "0"]
    subprocess.run([*launch, *arguments], cwd=ROOT, check=True, capture_output=True)
    alone = [word for word in command(place, tmp_path / "one") if word not in ("--device", "cpu")]
    subprocess.run(alone, cwd=ROOT, check=True, capture_output=True)
    curves = [json.loads((tmp_path / name / "marlinctl_report.json").read_text())["training"]["curve"] for name in ("two", "one")]
    for found, wanted in zip(*curves, strict=True):
        assert found["loss"] == pytest.approx(wanted["loss"], rel=0.01)
