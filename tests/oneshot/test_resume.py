"""`resume` and `jobs` as a person uses them: Ctrl-C, a full disk, a damaged file, another folder, another model, going back."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from marlinctl.checkpoint import contents
from marlinctl.cli import main
from marlinctl.oneshot import run as job
from marlinctl.oneshot.sequential import SequentialPipeline
from marlinctl.planning.memory import CHUNK_TOKENS
from tests import forked
from tests.checkpoint.test_contents import NEVER_NEW, flip
from tests.jobs.test_kill import published
from tests.runs import TEXT
from tests.test_architecture import ROOT
from tests.tiny import make_tiny

SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 4}
ASKED = ["--group-size", "32", "--samples", "2", "--sequence-length", "32", "--refine", "0", "--dtype", "float32", "--threads", "1", "-q"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model, text, and what a run that nobody stopped publishes."""
    root = tmp_path_factory.mktemp("resume")
    make_tiny(root / "model", **SIZES)
    (root / "text.txt").write_text(TEXT)
    (root / "mine.yaml").write_text("extends: int4\ncalibration: {minimum_tokens: 32}\n")
    (root / "whole").mkdir()
    assert main(quantize(root, root / "whole" / "out")) == 0
    return root


def quantize(place: Path, out: Path, *more: str) -> list[str]:
    return [
        "quantize",
        str(place / "model"),
        str(out),
        "--recipe",
        f"{place}/mine.yaml",
        "--calibration",
        f"{place}/text.txt",
        *ASKED,
        *more,
    ]


def stop_in(monkeypatch: pytest.MonkeyPatch, index: int, arguments: list[str], error: type[BaseException] = KeyboardInterrupt) -> int:
    """Run, and stop when this block begins."""
    run_block = SequentialPipeline.run_block

    def stopping(self: SequentialPipeline, block: Any, solve: Any, *, replay: bool = False) -> None:
        if block.index == index:
            raise error
        run_block(self, block, solve, replay=replay)

    with monkeypatch.context() as patch:
        patch.setattr(SequentialPipeline, "run_block", stopping)
        return main(arguments)


def blocks_solved(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> tuple[int, list[int]]:
    """The exit code, and which blocks a run solves."""
    solved: list[int] = []
    run_block = SequentialPipeline.run_block

    def noting(self: SequentialPipeline, block: Any, solve: Any, *, replay: bool = False) -> None:
        if not replay:
            solved.append(block.index)
        run_block(self, block, solve, replay=replay)

    with monkeypatch.context() as patch:
        patch.setattr(SequentialPipeline, "run_block", noting)
        return main(arguments), solved


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out.with_name(out.name + ".job") / "journal.jsonl").read_text().splitlines()]


# ---- signals -------------------------------------------------------------------------------------------------------------------------

PROGRAM = """
import sys, time
from marlinctl.cli import main
from marlinctl.oneshot.sequential import SequentialPipeline
run_block = SequentialPipeline.run_block
def slowly(self, block, solve):
    if block.index == 1:
        print("in block 1", flush=True)
        end = time.monotonic() + float(sys.argv[1])
        while time.monotonic() < end:
            time.sleep(0.01)
    run_block(self, block, solve)
SequentialPipeline.run_block = slowly
sys.exit(main(sys.argv[2:]))
"""


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
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: str, solved: list[int], said: str,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """One flipped bit in a finished block would be published, or would make the whole job worthless."""
    out = tmp_path / "out"
    assert stop_in(monkeypatch, 3, quantize(place, out)) == 130
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
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, change: Any, ends: tuple[int, list[int]]
) -> None:
    """Broken: a journal that somebody edited, or that a disk damaged, ends in a KeyError."""
    out = tmp_path / "out"
    assert stop_in(monkeypatch, 3, quantize(place, out)) == 130
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
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, after: str
) -> None:
    """A journal that was edited, or damaged so that it is JSON all the same, ended in a traceback after all blocks."""
    out = tmp_path / "out"
    assert stop_in(monkeypatch, 3, quantize(place, out)) == 130
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
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    path: list[str],
    value: object,
    told: str,
) -> None:
    """A job.json of another version, or edited by hand, ended as "this is a defect of marlinctl"."""
    out = tmp_path / "out"
    assert stop_in(monkeypatch, 1, quantize(place, out)) == 130
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
    assert "e590" in told and "--sequence-length" in told and "and more lines" not in told and "Traceback" not in told
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
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str, back_to: int, solved: list[int],
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """--from-block would keep what it shall drop, or start from hidden states of another block."""
    out = tmp_path / "out"
    assert stop_in(monkeypatch, 3, quantize(place, out)) == 130
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


# ---- refusals ------------------------------------------------------------------------------------------------------------------------


def refused(capfd: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> dict[str, Any]:
    capfd.readouterr()
    assert main([*arguments, "--json"]) == code
    error: dict[str, Any] = json.loads(capfd.readouterr().out)["error"]
    return error


def test_another_model_recipe_or_format_is_refused_field_by_field(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Half of the blocks of one model and half of another would be published as one."""
    shutil.copytree(place / "model", tmp_path / "model")
    out = tmp_path / "out"
    asked = ["quantize", str(tmp_path / "model"), *quantize(place, out)[2:]]
    assert stop_in(monkeypatch, 3, asked) == 130
    asked_for = tmp_path / "out.job" / "job.json"
    before = published(tmp_path / "out.job")

    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"rope_theta": 5000.0}))
    told = refused(capfd, "resume", str(out))
    assert told["id"] == "E286" and [problem["what"].split(" was ")[0] for problem in told["problems"]] == ["model.files.config.json"]
    shutil.copy(place / "model" / "config.json", tmp_path / "model" / "config.json")

    told = refused(capfd, *asked, "--resume", "--damping", "0.05")
    assert [problem["what"] for problem in told["problems"]] == ["recipe.quantize.damping was 0.01 and is now 0.05"]

    request = json.loads(asked_for.read_text())
    asked_for.write_text(json.dumps(request | {"format": 2}))
    told = refused(capfd, "resume", str(out))
    assert told["id"] == "E287" and "format 2" in told["problems"][0]["what"]
    asked_for.write_text(json.dumps(request))

    assert refused(capfd, *asked)["id"] == "E285"
    told = refused(capfd, "resume", str(out), "--from-block", "4")
    assert told["id"] == "E288" and told["problems"][0]["where"] == "--from-block"
    told = refused(capfd, "resume", str(tmp_path / "other"))
    assert told["id"] == "E287" and "no job" in told["problems"][0]["what"]
    shutil.copy(place / "model" / "config.json", tmp_path / "model" / "config.json")
    after = published(tmp_path / "out.job")
    assert {k for k in after.keys() | before.keys() if after.get(k) != before.get(k)} <= {"job.json"}, "a refusal changes nothing"
    assert main(["resume", str(out), "-q"]) == 0


def _next_training_checkpoint(model: Path) -> None:
    make_tiny(model.parent / "next", seed=1, **SIZES)
    shutil.copy(model.parent / "next" / "model.safetensors", model / "model.safetensors")


def _one_bit(model: Path) -> None:
    flip(model / "model.safetensors")


@pytest.mark.parametrize(("verb", "change"), [("quantize", _next_training_checkpoint), ("quantize", _one_bit), ("compress", _one_bit)])
def test_other_weights_under_the_same_headers_are_refused(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    verb: str, change: Callable[[Path], None],
) -> None:  # fmt: skip
    """The first blocks of one training checkpoint and the others of the next would be published as one model, and `verify` would find
    nothing wrong with it."""
    shutil.copytree(place / "model", tmp_path / "model")
    out = tmp_path / "out"
    more = ["--no-eval", "--format", "marlin"] if verb == "compress" else []
    asked = [verb, str(tmp_path / "model"), *quantize(place, out)[2:], *more]
    if verb == "quantize":
        assert stop_in(monkeypatch, 1, asked) == 130
    else:  # everything is computed, and the result would be compared with another original
        with monkeypatch.context() as patch:
            patch.setattr("marlinctl.compress.verify", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
            assert main(asked) == 130
    before = published(tmp_path / "out.job")
    change(tmp_path / "model")
    told = refused(capfd, "resume", str(out))
    assert told["id"] == "E286"
    assert [problem["what"].split(" was ")[0] for problem in told["problems"]] == ["model.shards.model.safetensors.sha256"]
    assert not out.exists() and published(tmp_path / "out.job") == before

    shutil.copy(place / "model" / "model.safetensors", tmp_path / "model" / "model.safetensors")
    assert main(["resume", str(out), "-q"]) == 0
    if verb == "quantize":
        assert published(tmp_path)["out/marlinctl_manifest.json"] == published(place / "whole")["out/marlinctl_manifest.json"]


def test_a_text_that_changed_between_two_stages_is_refused(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A model would be pruned with one text, and distilled or quantized with another, under the name of one file."""
    recipe = "extends: sparse-int4\ncalibration: {minimum_tokens: 32}\ndistill: {tokens: 1024, data: rows.txt}\n"
    (tmp_path / "mine.yaml").write_text(recipe)
    shutil.copy(place / "text.txt", tmp_path / "text.txt")
    shutil.copy(place / "text.txt", tmp_path / "rows.txt")
    monkeypatch.chdir(tmp_path)
    asked = ["compress", str(place / "model"), "out", "--recipe", "mine.yaml", "--calibration", "text.txt", *ASKED, "--no-eval"]

    def stopped(_model: str, _source: object, work: Path, *_: object) -> None:
        (work / "pruned").mkdir(exist_ok=True)
        raise KeyboardInterrupt

    monkeypatch.setattr("marlinctl.compress._interchange", stopped)
    assert main(asked) == 130
    for text, name in (("text.txt", "calibration"), ("rows.txt", "distillation")):
        whole = Path(text).read_text()
        Path(text).write_text(whole.upper())
        told = refused(capfd, "resume", "out")
        assert (told["id"], told["problems"][0]["what"].split(" was ")[0]) == ("E286", f"texts.{name}.sha256")
        Path(text).unlink()
        assert main(["resume", "out", "-q"]) == 130, "whether it is still needed, the stage knows"
        Path(text).write_text(whole)


def test_weights_that_nobody_touched_are_not_read_again(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run of a large model would spend its first minutes with reading what it knows."""
    monkeypatch.setattr(contents, "SETTLED_NS", NEVER_NEW)
    assert stop_in(monkeypatch, 2, quantize(place, tmp_path / "out")) == 130
    monkeypatch.setattr(contents, "_read_shard", None)
    assert main(["resume", str(tmp_path / "out"), "-q"]) == 0
    assert published(tmp_path) == published(place / "whole")


@pytest.mark.parametrize(("when", "finished"), [("in block 2", 2), ("before it is published", 4)])
def test_weights_that_change_during_a_run_are_not_published(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], when: str, finished: int
) -> None:
    """A download that goes on, or a training that saves again into the folder, would leave a mixture that nothing tells from a model."""
    shutil.copytree(place / "model", tmp_path / "model")
    out = tmp_path / "out"
    asked = ["quantize", str(tmp_path / "model"), *quantize(place, out)[2:]]
    run_block, verify = SequentialPipeline.run_block, job._verify_written

    def in_block(self: SequentialPipeline, block: Any, solve: Any) -> None:
        if block.index == 2:
            _one_bit(tmp_path / "model")
        run_block(self, block, solve)

    def at_the_end(*given: Any) -> None:
        verify(*given)
        _one_bit(tmp_path / "model")

    with monkeypatch.context() as patch:
        if when == "in block 2":
            patch.setattr(SequentialPipeline, "run_block", in_block)
        else:
            patch.setattr(job, "_verify_written", at_the_end)
        capfd.readouterr()
        assert main([*asked, "--json"]) == 3
    told = json.loads(capfd.readouterr().out)["error"]
    assert told["id"] == "E306" and "model.safetensors" in told["problems"][0]["where"]
    assert not out.exists() and [line["step"] for line in lines_of(out)] == ["begun", *["block"] * finished]

    shutil.copy(place / "model" / "model.safetensors", tmp_path / "model" / "model.safetensors")
    assert blocks_solved(monkeypatch, ["resume", str(out), "-q"]) == (0, [*range(finished, 4)])
    assert published(tmp_path)["out/marlinctl_manifest.json"] == published(place / "whole")["out/marlinctl_manifest.json"]


def test_going_back_in_a_verb_without_blocks_is_refused(place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The number would be ignored in silence."""
    from marlinctl.jobs.journal import JobFolder, Request
    from marlinctl.system.console import Console

    def run() -> None:
        folder = JobFolder(tmp_path / "out")
        with folder.held(Request("pack", {}), resume=False, console=Console.quiet()):
            folder.begin({})
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        run()
    told = refused(capfd, "resume", str(tmp_path / "out"), "--from-block", "1")
    assert told["id"] == "E288" and "pack has none" in told["problems"][0]["what"]


# ---- jobs ----------------------------------------------------------------------------------------------------------------------------


def test_jobs_are_listed_and_removed(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What fills the disk would not be found, or the wrong thing would be removed."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert stop_in(monkeypatch, 3, quantize(place, tmp_path / "a" / "b" / "out")) == 130
    assert stop_in(monkeypatch, 1, ["compress", *quantize(place, tmp_path / "a" / "whole")[1:], "--no-eval"]) == 130
    capfd.readouterr()
    assert main(["jobs", "ls", str(tmp_path), "--json"]) == 0
    found = {Path(job["path"]).name: job for job in json.loads(capfd.readouterr().out)["jobs"]}
    assert {name: (job["verb"], job["stage"], job["blocks"]) for name, job in found.items()} == {
        "out.job": ("quantize", "3 blocks finished", 3),
        "whole.job": ("compress", "ct: 1 blocks finished", 1),
    }
    on_disk = sum(path.stat().st_size for path in (tmp_path / "a" / "b" / "out.job").rglob("*") if path.is_file())
    assert found["out.job"]["size"] == on_disk and found["out.job"]["running"] is None and 0 <= found["out.job"]["age"] < 300

    told = refused(capfd, "jobs", "rm", str(tmp_path / "a" / "whole"))
    assert told["id"] == "E202" and told["problems"][0]["fix"] == "add --yes"
    assert refused(capfd, "jobs", "rm", str(tmp_path / "nothing"), "--yes")["id"] == "E287"
    told = refused(capfd, "jobs", "ls", str(tmp_path / "nothing"))
    assert told["id"] == "E240" and told["problems"][0]["where"].endswith("nothing")
    assert main(["jobs", "rm", str(tmp_path / "a" / "whole"), str(tmp_path / "a" / "b" / "out.job"), "--yes"]) == 0
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_dir()) == ["a", "b"]
    capfd.readouterr()
    assert main(["jobs", "ls", str(tmp_path)]) == 0
    assert capfd.readouterr().out == f"no jobs below {tmp_path}\n"


def test_only_jobs_of_ours_are_removed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Any folder called X.job with any job.json in it would be deleted, and what a link of that name leads to."""
    theirs = tmp_path / "x.job"
    theirs.mkdir()
    (theirs / "job.json").write_text('{"queue": "long"}')
    (theirs / "thesis.tex").write_text("mine")
    (tmp_path / "link.job").symlink_to(theirs)
    for name in ("x", "x.job", "link", "link.job"):
        told = refused(capfd, "jobs", "rm", str(tmp_path / name), "--yes")
        assert told["id"] == "E224", name
    for name in ("x", "link"):
        assert refused(capfd, "resume", str(tmp_path / name))["id"] == "E224"
    assert sorted(path.name for path in theirs.iterdir()) == ["job.json", "thesis.tex"]
    capfd.readouterr()
    assert main(["jobs", "ls", str(tmp_path)]) == 0
    assert capfd.readouterr().out == f"no jobs below {tmp_path}\n"


def test_a_job_at_work_is_shown_and_not_removed(place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Removing the folder under a running process would break it hours in."""
    out = tmp_path / "out"
    process = forked.Popen(
        [sys.executable, "-c", PROGRAM, "60", *quantize(place, out)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "in block 1\n"
        assert main(["jobs", "ls", str(tmp_path), "--json"]) == 0
        (job,) = json.loads(capfd.readouterr().out)["jobs"]
        assert job["running"]["pid"] == process.pid and job["blocks"] == 1
        assert refused(capfd, "jobs", "rm", str(out), "--yes", code=5)["id"] == "E503"
        told = refused(capfd, *quantize(place, out), code=5)
        assert told["id"] == "E503" and f"process {process.pid} on {os.uname().nodename}" in told["problems"][0]["what"]
    finally:
        process.kill()
        process.communicate()
    assert main(["jobs", "rm", str(out), "--yes"]) == 0
    assert not (tmp_path / "out.job").exists()
