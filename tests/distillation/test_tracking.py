"""`distill --tracker`: what reaches TensorBoard and wandb, that a resumed job continues its run, and what is refused first.

The packages are no dependency, so their trackers have stand-ins here with accelerate's interface. With TensorBoard installed, its own files
are read too.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from marlinctl.cli import main
from marlinctl.distillation import blockwise, tracking
from marlinctl.distillation import loop as loops
from marlinctl.errors import EnvironmentProblem
from tests.distillation.runs import Crash, crash_after, distill, recipe, write_text
from tests.pruned import prune
from tests.tiny import make_tiny


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tracking")
    make_tiny(root / "teacher")
    prune(root / "teacher", root / "student")
    write_text(root / "text.txt")
    return root


class Recorded:
    """A tracker that keeps what it is given."""

    runs: list[Recorded] = []  # noqa: RUF012 - emptied by the fixture

    def __init__(self, run_name: str, folder: Path | None = None, **settings: Any) -> None:
        self.name, self.folder, self.settings = run_name, folder, settings
        self.config: dict[str, Any] | None = None
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = False

    def start(self) -> None:
        self.runs.append(self)

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config = values

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True

    def at(self, name: str) -> list[int]:
        return [step for step, values in self.logged if name in values]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    monkeypatch.setattr("accelerate.tracking.TensorBoardTracker", Recorded)
    monkeypatch.setattr("accelerate.tracking.WandBTracker", Recorded)
    monkeypatch.setattr(tracking, "find_spec", lambda name: SimpleNamespace(origin=name))
    monkeypatch.setattr(Recorded, "runs", [])
    return Recorded.runs


def run(place: Path, out: Path, tracker: str, *, resume: bool = False, offline: bool = False, **changes: Any) -> dict[str, Any]:
    chosen = recipe(place / "text.txt", **changes)
    return distill(place / "student", out, place / "teacher", chosen, resume=resume, tracker=tracker, offline=offline)


def test_losses_speed_and_held_out_divergence_are_logged(place: Path, tmp_path: Path, recorded: list[Recorded]) -> None:
    """A curve without the learning rate, or one that never meets text it was not trained on, explains nothing."""
    report = run(place, tmp_path / "out", "tensorboard")
    (tracker,) = recorded
    steps = report["training"]["steps"]
    assert tracker.finished and tracker.folder == tmp_path / "out.tensorboard"
    assert tracker.config is not None and tracker.config["learning_rate"] == 1e-3
    assert tracker.at("held_out/kl") == tracker.at("held_out/loss") == [0, steps]
    assert tracker.at("train/loss") == [row["step"] for row in report["training"]["curve"]]
    last = [values for _, values in tracker.logged if "train/loss" in values][-1]
    assert last.keys() >= {"train/loss", "train/kl", "train/learning_rate", "train/tokens_per_second"}
    assert last["train/loss"] == report["training"]["curve"][-1]["loss"] and last["train/tokens_per_second"] > 0
    assert dict(tracker.logged[-1][1])["held_out/kl"] == report["held_out"]["after"]["kl"]


@pytest.mark.parametrize("name", ["tensorboard", pytest.param("wandb", marks=pytest.mark.slow)])
def test_a_resumed_job_continues_its_run(
    name: str, place: Path, tmp_path: Path, recorded: list[Recorded], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two halves of one training as two runs cannot be laid over another one."""
    with monkeypatch.context() as patched:
        crash_after(patched, 8)
        with pytest.raises(Crash):
            run(place, tmp_path / "out", name)
    assert recorded[0].finished, "what was logged before a crash must reach the disk"
    run(place, tmp_path / "out", name, resume=True)
    first, second = recorded
    assert second.config is None and second.at("train/loss") == [10, 12] and second.at("held_out/kl") == [12]
    if name == "wandb":
        assert (first.name, first.settings["resume"]) == ("marlinctl", "allow")
        assert first.settings["id"] == second.settings["id"] and re.fullmatch(r"[\w-]+", first.settings["id"])
    else:
        assert first.name == second.name and "purge_step" not in first.settings
        assert second.settings["purge_step"] == 6, "the state is that of step 5; what was logged behind it is repeated"
    run(place, tmp_path / "other", name)
    assert recorded[2].settings.get("id", recorded[2].name) != first.settings.get("id", first.name), "another job is another run"


def test_offline_stays_offline(place: Path, tmp_path: Path, recorded: list[Recorded]) -> None:
    """--offline promises that nothing leaves the machine."""
    run(place, tmp_path / "out", "wandb", offline=True, tokens=256)
    assert recorded[0].settings["mode"] == "offline"


def test_blocks_are_logged_one_after_the_other(place: Path, tmp_path: Path, recorded: list[Recorded]) -> None:
    """Steps that begin again with each block would be dropped by wandb."""
    report = run(place, tmp_path / "out", "wandb", mode="blockwise", tokens=2048)
    (tracker,) = recorded
    steps = [step for step, _ in tracker.logged]
    assert steps == sorted(steps) and tracker.at("train/loss") == [row["step"] for row in report["training"]["curve"]]
    assert len(tracker.at("held_out/block_error")) == len(report["training"]["blocks"]) == 2
    assert {"train/block", "train/learning_rate", "train/tokens_per_second"} <= {key for _, values in tracker.logged for key in values}


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
@pytest.mark.parametrize("found", [None, SimpleNamespace(origin=None)], ids=["nothing", "a folder of that name"])
def test_a_missing_package_is_named_before_a_model_is_read(
    name: str, found: Any, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Found out after the models were loaded, it costs minutes; a folder `wandb`, which wandb leaves, is no package."""
    monkeypatch.setattr(tracking, "find_spec", lambda _: found)
    monkeypatch.setattr("marlinctl.distillation.run.open_models", lambda *_: pytest.fail("a model was read"))
    arguments = ["distill", str(place / "student"), str(tmp_path / "out"), "--teacher", str(place / "teacher"), "--tokens", "1000000"]
    assert main([*arguments, "--device", "cpu", "--tracker", name]) == 4
    error = capsys.readouterr().err
    assert f"pip install 'marlinctl[{name}]'" in error and "E402" in error and list(tmp_path.iterdir()) == []


def test_a_tracker_that_does_not_start_ends_the_run_first(
    place: Path, tmp_path: Path, recorded: list[Recorded], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a login wandb raises; hours of training without a curve are not what was asked for."""

    def no_login(_: Recorded) -> None:
        raise RuntimeError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(Recorded, "start", no_login)
    monkeypatch.setattr("marlinctl.distillation.run.open_models", lambda *_: pytest.fail("a model was read"))
    with pytest.raises(EnvironmentProblem, match="No API key configured") as raised:
        run(place, tmp_path / "out", "wandb")
    assert raised.value.error_id == "E406"
    assert not (tmp_path / "out.job").exists()


def test_without_a_tracker_nothing_is_kept(place: Path, tmp_path: Path) -> None:
    """Most runs have none."""
    distill(place / "student", tmp_path / "out", place / "teacher", recipe(place / "text.txt", tokens=256))
    assert not (tmp_path / "out.tensorboard").exists()
    assert loops.untracked is blockwise.untracked is tracking.untracked


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="needs tensorboard: pip install 'marlinctl[tensorboard]'")
def test_tensorboard_reads_the_files(place: Path, tmp_path: Path) -> None:
    """accelerate's tracker or TensorBoard's writer may change."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(place, tmp_path / "out", "tensorboard", tokens=512)
    (folder,) = (tmp_path / "out.tensorboard").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [event.step for event in events.Scalars("held_out/kl")] == [0, 2]
