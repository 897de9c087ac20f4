"""The folder of a running job: what is whole, what is newest, and who may use it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from marlinctl.distillation.job import JobFolder, State
from marlinctl.errors import BadInput, UsageError


def state(step: int) -> State:
    return State(
        step, {"weight.a": torch.full((3, 2), float(step)), "exp_avg.a": torch.ones(3, 2)}, {"curve": [{"step": step}], "seconds": 1.5}
    )


@pytest.fixture
def job(tmp_path: Path) -> JobFolder:
    folder = JobFolder(tmp_path / "out")
    folder.path.mkdir()
    folder.begin({"recipe": {"a": 1}})
    return folder


def test_the_newest_state_comes_back(job: JobFolder) -> None:
    """Losing a digit, a tensor or the curve would make the resumed job another job."""
    assert job.newest() is None
    for step in (5, 10):
        job.save(state(step))
    found = job.newest()
    assert found is not None and found.step == 10 and found.document == {"curve": [{"step": 10}], "seconds": 1.5}
    assert {name: tensor.tolist() for name, tensor in found.tensors.items()} == {
        name: tensor.tolist() for name, tensor in state(10).tensors.items()
    }
    assert [path.name for path in job.path.glob("state-*")] == ["state-00000010.safetensors"], "old states are a disk full of them"


@pytest.mark.parametrize("moment", ["tensors", "document"])
def test_a_state_that_was_killed_half_way_does_not_count(job: JobFolder, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever moment the power fails at, the state before must be there and whole."""
    job.save(state(5))

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"marlinctl.distillation.job.write_{moment}", fail)
    with pytest.raises(KeyboardInterrupt):
        job.save(state(10))
    found = job.newest()
    assert found is not None and found.step == 5 and float(found.tensors["weight.a"][0, 0]) == 5.0


def test_a_damaged_state_is_refused(job: JobFolder) -> None:
    """A truncated file must be an error that names it, not random weights."""
    job.save(state(5))
    path = job.path / "state-00000005.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(BadInput) as caught:
        job.newest()
    assert caught.value.error_id == "E374" and path.name in caught.value.problems[0].where
    (job.path / "state.json").write_text("{")
    with pytest.raises(BadInput):
        job.newest()


def test_differences_are_told_field_by_field(job: JobFolder) -> None:
    """`something differs` does not tell what to put back."""
    job.check({"recipe": {"a": 1}})
    with pytest.raises(UsageError) as caught:
        job.check({"recipe": {"a": 2, "b": "new"}})
    assert [problem.what for problem in caught.value.problems] == ["recipe.a was 1 and is now 2", "recipe.b was None and is now 'new'"]


def test_two_runs_cannot_share_a_folder(job: JobFolder) -> None:
    """Two writers of one state would leave a mixture."""
    with job.held(resume=True):
        with pytest.raises(UsageError, match="another run is at work"), JobFolder(job.path.with_name("out")).held(resume=True):
            pass
    with job.held(resume=True):
        pass


def test_a_folder_that_was_never_begun_is_no_obstacle(tmp_path: Path) -> None:
    """A run that is killed while it reads its text has nothing to go on with, and must not block the next one."""
    folder = JobFolder(tmp_path / "out")
    folder.path.mkdir()
    (folder.path / "lock").touch()
    with folder.held(resume=False):
        pass
    assert not folder.path.exists(), "and a run that is refused leaves nothing"
