"""Blocks that are written while the next ones are computed, and blocks that are replayed because their states were not kept."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from marlinctl.cli import main
from marlinctl.oneshot import commits as committing
from marlinctl.oneshot.commits import Commits, Pace
from marlinctl.oneshot.reading import Reader
from marlinctl.system.phases import Phases
from tests import zoo
from tests.jobs.test_kill import published
from tests.oneshot.stopping import blocks_solved, stop_in
from tests.runs import TEXT
from tests.tiny import make_tiny

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread of a GPU without one."""

    @contextmanager
    def stream(_: Any) -> Iterator[None]:
        yield

    event = SimpleNamespace(record=lambda _: None)
    for name, value in {
        "Event": lambda: event,
        "Stream": lambda _: SimpleNamespace(wait_event=lambda _: None),
        "stream": stream,
        "current_stream": lambda _: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)


def test_blocks_are_written_in_their_order_and_a_few_may_wait(thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, the journal would have holes, or all codes of a model would pile up in the GPU's memory before a slow disk."""
    monkeypatch.setattr(committing, "QUEUED_BLOCKS", 2)
    written: list[int] = []
    gate = threading.Event()

    def write(index: int) -> None:
        gate.wait()
        written.append(index)

    with Commits(CUDA) as commits:
        commits.submit(lambda: write(0))
        commits.submit(lambda: write(1))
        assert not bool(commits.idle)  # mypy would take the bare property for False ever after
        third = threading.Thread(target=lambda: commits.submit(lambda: write(2)))
        third.start()
        third.join(0.2)
        assert third.is_alive(), "a third block does not wait for the disk"
        gate.set()
        third.join()
        commits.wait()
        assert commits.idle
    assert written == [0, 1, 2]


def test_large_blocks_wait_by_their_size(thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, eight blocks of a large model would take the memory that its solves need."""
    monkeypatch.setattr(committing, "QUEUED_BYTES", 100)
    gate, submitted = threading.Event(), threading.Event()

    def more() -> None:
        commits.submit(lambda: None, 60)
        submitted.set()

    with Commits(CUDA) as commits:
        commits.submit(gate.wait, 60)  # type: ignore[arg-type]
        second = threading.Thread(target=more)
        second.start()
        assert not submitted.wait(0.2)
        gate.set()
        second.join()
    with Commits(CUDA) as commits:
        commits.submit(lambda: None, 10**12)  # one may be larger


def test_a_signal_while_the_last_blocks_are_written_begins_no_more(thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, a thread would write into the job's folder after its lock was released, beside the run that resumes it."""
    written: list[int] = []
    begun, gate = threading.Event(), threading.Event()

    def write(index: int) -> None:
        begun.set()
        gate.wait()
        written.append(index)

    def run() -> None:
        with Commits(CUDA) as commits:
            for index in range(5):
                commits.submit(lambda index=index: write(index))  # type: ignore[misc]
            begun.wait()
            shutdown, calls = commits._pool.shutdown, []  # type: ignore[union-attr]

            def interrupted(**how: bool) -> None:
                calls.append(how)
                if len(calls) == 1:
                    gate.set()
                    raise KeyboardInterrupt
                shutdown(**how)

            monkeypatch.setattr(commits._pool, "shutdown", interrupted)

    with pytest.raises(KeyboardInterrupt):
        run()
    assert written in ([0], [0, 1])  # what had begun
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("commits")]


@pytest.mark.parametrize("when", ["submit", "wait", "end"])
def test_nothing_is_written_behind_what_failed(thread: None, when: str) -> None:
    """If this failed, a full disk would leave a journal in which a block is missing, or go unnoticed."""
    written: list[int] = []
    entered = threading.Event()

    def fail() -> None:
        entered.wait()
        raise OSError(28, "No space left on device")

    def run() -> None:
        with Commits(CUDA) as commits:
            commits.submit(fail)
            commits.submit(lambda: written.append(1))
            entered.set()
            if when == "wait":
                commits.wait()
            while when == "submit":
                commits.submit(lambda: written.append(2))

    with pytest.raises(OSError, match="No space left"):
        run()
    assert not written


def test_an_error_of_the_pipeline_is_the_one_that_is_told(thread: None) -> None:
    """What is whole is written before the error leaves; an error of the writing does not hide it."""
    written: list[int] = []

    def run() -> None:
        with Commits(CUDA) as commits:
            commits.submit(lambda: written.append(0))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert written == [0]


def test_a_cpu_writes_at_once() -> None:
    """A thread would take the solver's cores, and kills between two calls would not be those that are tested."""
    with Commits(CPU) as commits:
        names: list[str] = []
        commits.submit(lambda: names.append(threading.current_thread().name))
        assert names == [threading.main_thread().name] and commits.idle


def test_states_take_a_tenth_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(committing.time, "monotonic", lambda: now[0])
    pace = Pace(int(0.5e9))  # a second on a slow disk
    now[0] = 9.0
    assert not bool(pace.due)  # mypy would take the bare property for False ever after
    now[0] = 11.0
    assert pace.due
    with pace.timed():
        now[0] = 14.0  # it took three
    now[0] = 43.0
    assert not bool(pace.due)
    now[0] = 45.0
    assert pace.due and not pace.overdue
    now[0] = 75.0
    assert pace.overdue


def test_a_phase_inside_of_another_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("marlinctl.system.phases.time.monotonic", lambda: now[0])
    phases = Phases()
    with phases("forward"):
        now[0] = 1.0
        with phases("solve"):
            now[0] = 4.0
        now[0] = 4.5
    assert phases.seconds() == {"forward": 1.5, "solve": 3.0}


def test_tensors_that_are_expected_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, a block's weights would be read twice, or those of an earlier block be taken for another's."""
    read: list[str] = []

    def slow(name: str) -> Tensor:
        read.append(name)
        return torch.tensor([ord(name), len(read)])

    with Reader(SimpleNamespace(read=slow, rows=None), torch.device("cpu"), ahead=True) as reader:  # type: ignore[arg-type]
        reader.expect(["a", "b"])
        reader.expect(["b"])
        assert [int(reader.read(name)[1]) for name in "aba"] == [1, 2, 3]
    assert read == ["a", "b", "a"]


def test_tensors_that_are_expected_twice_are_read_once_and_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, drift correction would read every linear from the disk twice, or a block that is tried again get old weights."""
    read: list[str] = []

    def slow(name: str) -> Tensor:
        read.append(name)
        return torch.tensor([ord(name), len(read)])

    with Reader(SimpleNamespace(read=slow, rows=None), torch.device("cpu"), ahead=True) as reader:  # type: ignore[arg-type]
        reader.expect(["a"], reads=2)
        assert [int(reader.read("a")[1]) for _ in range(3)] == [1, 1, 2]
        reader.expect(["a"], reads=2)
        reader.forget()
        assert int(reader.read("a")[1]) == len(read)


# Replays


REPLAYED = {  # verb, flags
    "drift correction": ("quantize", ["--group-size", "32", "--drift-correction", "0.5"]),
    "experts": ("quantize", ["--group-size", "32"]),
    "experts with drift correction": ("quantize", ["--group-size", "32", "--drift-correction", "0.5"]),
    "pruned, 16-bit": ("sparsify", ["--no-eval"]),
    "pruned, 4-bit, one linear skipped": (
        "sparsify",
        ["--no-eval", "--bits", "4", "--group-size", "32", "--skip", "model.layers.0.mlp.up_proj"],
    ),
}


def stop_and_resume(
    place: Path, monkeypatch: pytest.MonkeyPatch, verb: str, flags: list[str], *, last: int, between: Callable[[Path], object]
) -> None:
    """Publish the model of `place` with and without a stop before block `last`: equal bytes. between: called with the job's folder."""
    (place / "text.txt").write_text(TEXT)
    (place / "mine.yaml").write_text("extends: int4\ncalibration: {minimum_tokens: 32}\n")
    inputs = ["--recipe", str(place / "mine.yaml"), "--calibration", str(place / "text.txt")]
    for name in ("whole", "stopped"):
        (place / name).mkdir()
    asked = {name: [verb, str(place / "model"), str(place / name / "out"), *inputs, "-q", *flags] for name in ("whole", "stopped")}
    assert main(asked["whole"]) == 0
    assert stop_in(monkeypatch, last, asked["stopped"]) == 130
    between(place / "stopped" / "out.job")
    assert blocks_solved(monkeypatch, ["resume", str(place / "stopped" / "out"), "-q"]) == (0, [last])
    assert published(place / "stopped") == published(place / "whole")


QUICK = ("experts with drift correction", "pruned, 4-bit, one linear skipped")  # each has what the others have


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in REPLAYED])
def test_a_replay_ends_where_the_run_would_have(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, a run resumed without kept states would solve the rest of the model for other inputs."""
    if "experts" in kind:
        zoo.build("qwen3_moe", tmp_path / "model")
    else:
        make_tiny(tmp_path / "model", num_hidden_layers=3)
    verb, flags = REPLAYED[kind]
    size = ["--samples", "2", "--sequence-length", "32", "--dtype", "float32", "--threads", "1"]
    last = 1 if "experts" in kind else 2
    stop_and_resume(tmp_path, monkeypatch, verb, [*size, *flags], last=last, between=lambda job: shutil.rmtree(job / "states"))


@pytest.mark.gpu
@pytest.mark.parametrize("keeps", [False, True], ids=["replayed", "kept"])
@pytest.mark.parametrize("verb", ["quantize", "sparsify"])
def test_a_stopped_run_on_a_gpu_goes_on_to_the_same_bytes(verb: str, keeps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, a job that was killed on a GPU would publish another model than one that was left alone."""
    make_tiny(tmp_path / "model", num_hidden_layers=4, dtype=torch.bfloat16)
    monkeypatch.setattr(Pace, "due", keeps)
    flags = ["--samples", "4", "--sequence-length", "64", "--device", "cuda", "--deterministic"]
    flags += ["--drift-correction", "0.5"] if verb == "quantize" else ["--no-eval"]

    def look(job: Path) -> None:
        assert ((job / "states").is_dir() and any((job / "states").iterdir())) == keeps

    stop_and_resume(tmp_path, monkeypatch, verb, flags, last=3, between=look)
