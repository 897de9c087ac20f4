"""The teacher's answers: live ones are those of the model, cached ones are the same, and a cache that was begun is continued."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from marlinctl.checkpoint.transformers_model import load_dense
from marlinctl.distillation import teacher as subject
from marlinctl.distillation.distributed import Processes
from marlinctl.distillation.losses import Weights
from marlinctl.distillation.rows import Rows
from marlinctl.distillation.state import DistillJob
from marlinctl.system.console import Console
from tests.tiny import make_tiny

WEIGHTS = Weights(0.0, 0.0, 1.0, 1.7)
K = 5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    return load_dense(make_tiny(tmp_path_factory.mktemp("teacher") / "model"), dtype=torch.float32)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DistillJob:
    monkeypatch.setattr(subject, "CACHE_ROWS", 4)
    folder = DistillJob(tmp_path / "out")
    folder.path.mkdir()
    return folder


def some_rows(count: int = 10) -> Rows:
    ids = torch.randint(3, 280, (count, 12), generator=torch.Generator().manual_seed(0))
    return Rows(ids, torch.ones_like(ids, dtype=torch.bool), 1, {})


def write(model: torch.nn.Module, rows: Rows, job: DistillJob) -> None:
    subject.write_cache(model, rows, K, WEIGHTS, 3, job, Processes("cpu"), Console.quiet())


def test_cached_rows_are_those_of_the_model(model: torch.nn.Module, job: DistillJob) -> None:
    """A row that is off by one, in whatever order it is asked for, would teach the answers to another text."""
    rows = some_rows()
    write(model, rows, job)
    assert sorted(path.name for path in job.path.iterdir()) == [f"teacher-0000{i}.safetensors" for i in range(3)]
    wanted = torch.tensor([9, 0, 5, 4])
    with subject.Cached(job) as cached, torch.no_grad():
        top = cached(wanted, rows.ids[wanted]).top
        assert top is not None and top.ids.shape == (4, 12, K)
        p = (model(input_ids=rows.ids[wanted]).logits.double() / WEIGHTS.temperature).softmax(-1)
    assert torch.equal(top.ids, p.topk(K, -1).indices)
    torch.testing.assert_close(top.logp.double().exp(), p.topk(K, -1).values, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(top.rest.double().exp(), 1 - p.topk(K, -1).values.sum(-1), rtol=1e-5, atol=1e-7)


def test_finished_files_of_a_killed_run_are_kept(model: torch.nn.Module, job: DistillJob) -> None:
    """A pass over a billion tokens must not begin again because of its last file."""
    rows = some_rows()
    write(model, rows, job)
    first, last = job.path / "teacher-00000.safetensors", job.path / "teacher-00002.safetensors"
    contents = last.read_bytes()
    last.unlink()
    before = first.stat().st_mtime_ns
    write(model, rows, job)
    assert first.stat().st_mtime_ns == before and last.read_bytes() == contents


def test_a_live_teacher_gives_what_is_asked_for(model: torch.nn.Module) -> None:
    """Hidden states begin after the first block; what no loss wants is not computed; nothing has a gradient."""
    ids = some_rows().ids[:2]
    both = subject.live(model, Weights(0.0, 1.0, 1.0, 1.0))(torch.arange(2), ids)
    with torch.no_grad():
        out = model(input_ids=ids, output_hidden_states=True)
    assert len(both.hidden) == 2 and all(torch.equal(a, b) for a, b in zip(both.hidden, out.hidden_states[1:], strict=True))
    assert both.logits is not None and torch.equal(both.logits, out.logits) and not both.logits.requires_grad
    assert subject.live(model, Weights(1.0, 0.0, 0.0, 1.0))(torch.arange(2), ids).logits is None
    assert not subject.live(model, Weights(0.0, 0.0, 1.0, 1.0))(torch.arange(2), ids).hidden
