"""`resume` as a person uses it: Ctrl-C, a full disk, a damaged file, another folder, going back."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from marlinctl.cli import main
from marlinctl.oneshot.sequential import SequentialPipeline
from marlinctl.planning.memory import CHUNK_TOKENS
from tests import forked
from tests.jobs.test_kill import published
from tests.oneshot.stopping import ASKED, PROGRAM, Stopped, blocks_solved, lines_of, quantize, stop_in
from tests.test_architecture import ROOT

# ---- signals -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "times", "code", "finished"),
    [(signal.SIGINT, 1, 130, 2), (signal.SIGTERM, 1, 143, 2), (signal.SIGINT, 2, 130, 1)],
    ids=["Ctrl-C", "SIGTERM", "Ctrl-C twice"],
)
def test_a_signal_lets_the_block_end_and_a_second_one_does_not(
    place: Path, tmp_path: Path, number: signal.Signals, times: int, code: int, finished: int
) -> None:
    """Ctrl-C would lose a block that took an hour, or could not be obeyed at once by who is in a hurry."""
    out = tmp_path / "out"
    process = forked.Popen(
        [sys.executable, "-c", PROGRAM, "1" if times == 1 else "60", *quantize(place, out)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "in block 1\n"
    process.send_signal(number)
    while "finishing the current block" not in process.stderr.readline():
        pass
    if times == 2:
        process.send_signal(number)
    _, told = process.communicate(timeout=120)
    assert process.returncode == code, told
    assert f"to resume: marlinctl resume {out}\n" in told and "interrupted: by" in told
    assert [line["step"] for line in lines_of(out)] == ["begun", *["block"] * finished]
    assert not out.exists()
    assert main(["resume", str(out), "-q"]) == 0
    assert published(tmp_path) == published(place / "whole")


# ---- resuming ------------------------------------------------------------------------------------------------------------------------


def test_finished_blocks_are_not_solved_again(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resume that starts over would give the right bytes and be of no use."""
    out = tmp_path / "out"
    assert stop_in(monkeypatch, 3, quantize(place, out)) == 130
    assert sorted(path.name for path in (tmp_path / "out.job" / "states").iterdir()) == ["00002.safetensors", "00003.safetensors"]
    assert blocks_solved(monkeypatch, ["resume", str(out), "-q"]) == (0, [3])
    assert published(tmp_path) == published(place / "whole")


def test_a_kept_job_and_paths_from_where_the_command_was_given(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths would be looked for where `resume` is typed; --keep-job would be forgotten on the way."""
    monkeypatch.chdir(place)
    asked = ["quantize", "model", str(tmp_path / "out"), "--recipe", "mine.yaml", "--calibration", "text.txt", *ASKED, "--keep-job"]
    assert stop_in(monkeypatch, 2, asked) == 130
    monkeypatch.chdir(tmp_path)
    (place / "text.txt").rename(place / "elsewhere.txt")  # its tokens are in the job
    try:
        assert main(["resume", "out", "-q"]) == 0
    finally:
        (place / "elsewhere.txt").rename(place / "text.txt")
    assert Path.cwd() == tmp_path
    assert [line["step"] for line in lines_of(tmp_path / "out")][-2:] == ["publishing", "published"]
    whole = published(place / "whole")
    found = {name: digest for name, digest in published(tmp_path).items() if name.startswith("out/") and name != "out/recipe.yaml"}
    differing = {name for name in found if found[name] != whole[name]}
    assert differing <= {"out/marlinctl_manifest.json", "out/config.json"}, (
        "the recipe says `text.txt` where the other names the whole path"
    )
    assert main(["resume", "out", "-q"]) == 0, "asked again, a published job is no error"


def test_a_job_that_was_moved_goes_on(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job copied to another disk or machine would look for its files where it was begun."""
    (tmp_path / "here").mkdir()
    assert stop_in(monkeypatch, 2, quantize(place, tmp_path / "here" / "out")) == 130
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    for path in [*(tmp_path / "there").rglob("*")]:
        os.utime(path, (0, 0))  # a clock that went back decides nothing
    shutil.rmtree(tmp_path / "here")
    assert blocks_solved(monkeypatch, ["resume", str(tmp_path / "there" / "out"), "-q"]) == (0, [2, 3])
    assert published(tmp_path / "there") == published(place / "whole")


@pytest.mark.parametrize(
    ("damaged", "solved", "said"),
    [
        ("staged/model-00003.safetensors", [2, 3], "damaged or missing"),
        ("states/00003.safetensors", [3], "kept up to block 2: 1 finished blocks run once more"),
        ("staged/model-00001.safetensors", [0, 1, 2, 3], "damaged or missing"),
        ("calibration.safetensors", [0, 1, 2, 3], "damaged or missing"),
    ],
)
def test_what_is_damaged_is_solved_again(
    place: Path, stopped: Stopped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: str, solved: list[int], said: str,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """One flipped bit in a finished block would be published, or would make the whole job worthless."""
    out = tmp_path / "out"
    stopped(3, out)
    path = tmp_path / "out.job" / damaged
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    assert blocks_solved(monkeypatch, ["resume", str(out)]) == (0, solved)
    assert said in capfd.readouterr().err
    assert published(tmp_path) == published(place / "whole")


@pytest.mark.parametrize(
    ("number", "change", "ends"),
    [
        (2, lambda line: line.pop("masks"), (0, [1, 2, 3])),  # the states that enter block 1 are gone by then: block 0 is replayed
        (3, lambda line: line["records"][0].update(shape=7), (0, [2, 3])),
        (0, lambda line: line.update(calibration=[]), (3, [])),
    ],
)
def test_a_line_that_was_changed_is_no_line(
    place: Path, stopped: Stopped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, change: Any, ends: tuple[int, list[int]]
) -> None:
    """Broken: a journal that somebody edited, or that a disk damaged, ends in a KeyError."""
    out = tmp_path / "out"
    stopped(3, out)
    lines = lines_of(out)
    change(lines[number])
    (tmp_path / "out.job" / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert blocks_solved(monkeypatch, ["resume", str(out)]) == ends


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"shape":', '"sha":'),
        ('"shape":[', '"shape":[7,'),
        ('"records":[', '"records":[7,'),
        ('"index":2', '"index":1'),
        ('"masks":', '"m":'),
    ],
)
def test_a_block_that_is_noted_in_another_form_is_solved_again(
    place: Path, stopped: Stopped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, after: str
) -> None:
    """A journal that was edited, or damaged so that it is JSON all the same, ended in a traceback after all blocks."""
    out = tmp_path / "out"
    stopped(3, out)
    journal = tmp_path / "out.job" / "journal.jsonl"
    *lines, last = journal.read_text().splitlines(keepends=True)
    assert '"index":2' in last and before in last
    journal.write_text("".join([*lines, last.replace(before, after, 1)]))
    assert blocks_solved(monkeypatch, ["resume", str(out), "-q"]) == (0, [2, 3])
    assert published(tmp_path) == published(place / "whole")


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (["arguments"], {}, "what was asked for"),
        (["arguments", "model"], ["x"], "model"),
        (["arguments", "options"], {"threads": "many"}, "threads"),
        (["arguments", "recipe"], {"name": 7}, "the recipe"),
        (["arguments", "measured"], {"gate": {"max_kl": "x"}}, "max_kl"),
    ],
)
def test_a_request_of_another_form_is_refused(
    place: Path,
    stopped: Stopped,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    path: list[str],
    value: object,
    told: str,
) -> None:
    """A job.json of another version, or edited by hand, ended as "this is a defect of marlinctl"."""
    out = tmp_path / "out"
    stopped(1, out)
    request = tmp_path / "out.job" / "job.json"
    document = json.loads(request.read_text())
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    request.write_text(json.dumps(document))
    capfd.readouterr()
    assert main(["resume", str(out), "-q"]) == 2
    assert told in capfd.readouterr().err and (tmp_path / "out.job" / "journal.jsonl").exists()


def test_a_disk_that_is_full_costs_nothing_that_was_finished(place: Path, tmp_path: Path) -> None:
    """RLIMIT_FSIZE fails inside write(), as a full disk does: exit 5, and with room the run goes on behind its last block."""
    out = tmp_path / "out"
    program = textwrap.dedent(
        """
        import resource, signal, sys
        from marlinctl.cli import main
        from marlinctl.checkpoint.writer import StagedCheckpoint
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        copy = StagedCheckpoint.copy_tensors
        def full(self, *rest):
            resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, resource.RLIM_INFINITY))
            copy(self, *rest)
        StagedCheckpoint.copy_tensors = full
        sys.exit(main(sys.argv[1:]))
        """
    )
    done = forked.run([sys.executable, "-c", program, *quantize(place, out)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 5 and "the disk is full" in done.stderr, done.stderr
    assert f"to resume: marlinctl resume {out}" in done.stderr and not out.exists()
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 9_000
    assert main(["resume", str(out), "-q"]) == 0
    assert published(tmp_path) == published(place / "whole")


def full_gpu(monkeypatch: pytest.MonkeyPatch, times: int, arguments: list[str]) -> tuple[int, list[int]]:
    """Run, and let the device's memory run out in the middle of block 2, so often. The exit code, and the tokens in flight of each walk."""
    run_block, made, steps, left = SequentialPipeline.run_block, SequentialPipeline.__init__, [], [times]

    def filling(self: SequentialPipeline, block: Any, solve: Any) -> None:
        def solving(*given: Any) -> Any:
            result = solve(*given)
            if block.index == 2 and left[0]:
                left[0] -= 1
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nand more lines")
            return result

        run_block(self, block, solving)

    def noting(self: SequentialPipeline, *given: Any, **named: Any) -> None:
        steps.append(named["chunk_tokens"])
        made(self, *given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(SequentialPipeline, "run_block", filling)
        patch.setattr(SequentialPipeline, "__init__", noting)
        return main(arguments), steps


def test_a_gpu_that_is_full_is_asked_once_more_with_less(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A moment in which another process had the memory would end a job of ten hours; and half a block must not be in the result."""
    assert full_gpu(monkeypatch, 1, quantize(place, tmp_path / "out")) == (0, [CHUNK_TOKENS, CHUNK_TOKENS // 2])
    assert "Tried to allocate 9 GiB.; once more from block 2" in capfd.readouterr().err
    assert published(tmp_path) == published(place / "whole")


def test_a_gpu_that_stays_full_is_an_error_and_the_job_is_kept(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Without the setting to change, and without the finished blocks, a person would begin again and fail again."""
    out = tmp_path / "out"
    assert full_gpu(monkeypatch, 2, quantize(place, out))[0] == 5
    told = capfd.readouterr().err
    assert "explain E590" in told and "--sequence-length" in told and "and more lines" not in told and "Traceback" not in told
    assert blocks_solved(monkeypatch, ["resume", str(out), "-q"]) == (0, [2, 3])
    assert published(tmp_path) == published(place / "whole")


def test_memory_that_runs_out_costs_nothing_that_was_finished(place: Path, tmp_path: Path) -> None:
    """RLIMIT_AS refuses memory as a small container does: exit 5, not a traceback, and with more of it the run goes on."""
    out = tmp_path / "out"
    program = textwrap.dedent(
        """
        import resource, sys
        from pathlib import Path
        from marlinctl.cli import main
        from marlinctl.oneshot.sequential import SequentialPipeline
        run_block = SequentialPipeline.run_block
        def starved(self, block, solve):
            if block.index == 2:
                used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
                self.hidden = self.hidden.repeat(1, 1, 1 << 16)  # a gigabyte
            run_block(self, block, solve)
        SequentialPipeline.run_block = starved
        sys.exit(main(sys.argv[1:]))
        """
    )
    done = forked.run([sys.executable, "-c", program, *quantize(place, out)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 5 and "memory ran out" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert len([line for line in lines_of(out) if line["step"] == "block"]) == 2
    assert "layers.1.mlp.down_proj" in (tmp_path / "out.log").read_text(), "the log shows the last layer"
    assert main(["resume", str(out), "-q"]) == 0
    assert published(tmp_path) == published(place / "whole")


# ---- going back ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "back_to", "solved"),
    [("--from-block", 2, [2, 3]), ("--redo-from", 2, [2, 3]), ("--from-block", 1, [1, 2, 3]), ("--from-block", 0, [0, 1, 2, 3])],
)
def test_blocks_are_solved_again_on_demand(
    place: Path, stopped: Stopped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str, back_to: int, solved: list[int],
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """--from-block would keep what it must drop, or start from hidden states of another block."""
    out = tmp_path / "out"
    stopped(3, out)
    capfd.readouterr()
    assert blocks_solved(monkeypatch, ["resume", str(out), flag, str(back_to)]) == (0, solved)
    told = capfd.readouterr().err
    assert ("kept up to block 0: 1 finished blocks run once more" in told) == (back_to == 1)
    assert told.count("--redo-from is called --from-block now") == (flag == "--redo-from")
    assert published(tmp_path) == published(place / "whole")


def test_going_back_in_a_compress(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--from-block must reach the walk inside, finished or not, and everything made from it."""
    asked = ["compress", *quantize(place, tmp_path / "out")[1:], "--format", "marlin", "--no-eval"]
    assert stop_in(monkeypatch, 3, asked) == 130
    assert blocks_solved(monkeypatch, ["resume", str(tmp_path / "out"), "--from-block", "2", "-q"]) == (0, [2, 3])
    first = published(tmp_path)
    shutil.rmtree(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr("marlinctl.compress.verify", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(asked) == 130
    assert blocks_solved(monkeypatch, ["resume", str(tmp_path / "out"), "--from-block", "3", "-q"]) == (0, [0, 1, 2, 3])
    assert published(tmp_path) == first
