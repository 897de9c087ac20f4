"""States of a training in its job's folder: what is whole, and what is newest. tests/jobs/test_journal.py has the folder itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from marlinctl.distillation.state import DistillJob, State
from marlinctl.errors import BadInput
from marlinctl.jobs.journal import Request
from marlinctl.system.console import Console


def state(step: int) -> State:
    return State(
        step, {"weight.a": torch.full((3, 2), float(step)), "exp_avg.a": torch.ones(3, 2)}, {"curve": [{"step": step}], "seconds": 1.5}
    )


REQUEST = Request("distill", {})


@pytest.fixture
def job(tmp_path: Path) -> Iterator[DistillJob]:
    folder = DistillJob(tmp_path / "out")
    with folder.held(REQUEST, resume=False, console=Console.quiet()):
        folder.begin({"recipe": {"a": 1}})
        yield folder


def test_the_newest_state_comes_back(job: DistillJob) -> None:
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
def test_a_state_that_was_killed_half_way_does_not_count(job: DistillJob, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever moment the power fails at, the state before must be there and whole."""
    job.save(state(5))

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"marlinctl.distillation.state.write_{moment}", fail)
    with pytest.raises(KeyboardInterrupt):
        job.save(state(10))
    found = job.newest()
    assert found is not None and found.step == 5 and float(found.tensors["weight.a"][0, 0]) == 5.0


def test_a_damaged_state_is_refused(job: DistillJob) -> None:
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
