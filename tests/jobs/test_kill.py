"""Runs that are killed, or whose disk fails, at every step, and gone on with: the end must be that of a run left alone, byte for byte.

Each verb is a real process that gets a real SIGKILL (tests/killing.py). `make test` kills at some lines of the journal, by turns with half
of the line written and with all; `-m slow` at every line in both ways and at every call that changes the disk, and it lets every write,
fsync and rename fail.
docs/reliability.md has the counts.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests import killing
from tests.distillation.runs import write_text
from tests.killing import Ended
from tests.pruned import prune
from tests.runs import TEXT
from tests.tiny import make_tiny

APART = {"README.md", "marlinctl_report.json", "marlinctl_report.md", "marlinctl_report.html"}
SMALL = """
extends: {extends}
quantize: {{group_size: 32, refine: 0}}
calibration: {{source: {text}, samples: 2, sequence_length: 32, minimum_tokens: 32}}
distill: {{data: {words}, tokens: {tokens}, sequence_length: 32, batch_tokens: 128, micro_batch: 4, learning_rate: 0.01, save_every: 1}}
"""
VERBS = ("quantize", "head", "sparsify", "pack", "distill", "blockwise", "compress", "distilled")
STRIDES = {"compress": 5, "distilled": 7}  # of calls and writes: their stages are the other verbs, which have every one
# Every so many lines without `-m slow`: odd. `sparsify` writes its lines as `quantize` does, `blockwise` as `distill`.
QUICK = {"quantize": 1, "pack": 1, "distill": 5, "compress": 9}


class Place(NamedTuple):
    """What all runs read, what each verb is asked, and what it gives when it is left alone."""

    root: Path

    def arguments(self, verb: str, out: Path) -> list[str]:
        root = self.root
        walk = ["--recipe", f"{root}/int4.yaml", "--dtype", "float32", "--threads", "1"]
        sparse = ["--recipe", f"{root}/sparse.yaml", "--dtype", "float32", "--threads", "1", "--no-eval"]
        train = ["distill", f"{root}/student", f"{out}", "--teacher", f"{root}/model", "--device", "cpu", *walk]
        asked = {
            "quantize": ["quantize", f"{root}/model", f"{out}", "--drift-correction", "0.5", *walk],
            "head": ["quantize", f"{root}/model", f"{out}", "--include", "lm_head", *walk],
            "sparsify": ["sparsify", f"{root}/model", f"{out}", "--no-eval", *walk],
            "pack": ["pack", f"{root}/packed", f"{out}", "--format", "marlin", "--also", "gptq"],
            "distill": train,
            "blockwise": [*train, "--mode", "blockwise", "--tokens", "256"],
            "compress": ["compress", f"{root}/model", f"{out}", "--format", "marlin_24", "--also", "ct", *sparse],
            "distilled": ["compress", f"{root}/model", f"{out}", "--distill-tokens", "256", *sparse],
        }
        return [*asked[verb], "-q"]

    def run(self, arguments: list[str], *, at: str = "", n: int = 0) -> Ended:
        return killing.run(arguments, at=at, n=n)

    def whole(self, verb: str) -> dict[str, str]:
        """What a run that nobody disturbs publishes."""
        out = self.root / "whole" / verb / "out"
        if not out.exists():
            out.parent.mkdir(parents=True, exist_ok=True)
            ended = self.run(self.arguments(verb, out))
            assert ended.code == 0, ended.told
        return published(out.parent)


def published(folder: Path) -> dict[str, str]:
    """Digests of everything below a folder but cards, reports and logs."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in APART and path.suffix != ".log"]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("kill")
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    make_tiny(root / "model", **sizes)
    prune(root / "model", root / "student")
    (root / "text.txt").write_text(TEXT)
    write_text(root / "words.txt", 2000)
    for name, extends, tokens in (("int4", "int4", 384), ("sparse", "sparse-int4", 0)):
        given = {"extends": extends, "tokens": tokens, "text": root / "text.txt", "words": root / "words.txt"}
        (root / f"{name}.yaml").write_text(SMALL.format(**given))
    made = Place(root)
    ended = made.run(made.arguments("quantize", root / "packed"))
    assert ended.code == 0, ended.told
    return made


def go_on(place: Place, verb: str, out: Path) -> None:
    """`resume`, or the command again where the run died before it had noted what was asked for."""
    ended = place.run(["resume", str(out), "-q"])
    if ended.code == 2 and "no job to resume" in ended.told:
        if not out.exists():
            ended = place.run(place.arguments(verb, out))
            assert ended.code == 0, ended.told
        return
    assert ended.code == 0, ended.told


def steps(place: Place, verb: str, folder: Path, at: str, *more: str) -> int:
    """How many steps of a kind an undisturbed run has."""
    ended = place.run([*place.arguments(verb, folder / "out"), *more], at=at)
    assert ended.code == 0, ended.told
    return ended.steps


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


@pytest.mark.parametrize("verb", QUICK)
def test_killed_at_lines_of_the_journal(place: Place, tmp_path: Path, verb: str) -> None:
    """If a line spoke of something that is not on the disk, or something finished had no line, the resumed run would give other bytes."""
    every_line(place, verb, tmp_path, QUICK[verb])


@pytest.mark.parametrize("verb", [*QUICK, pytest.param("sparsify", marks=pytest.mark.slow)])
def test_a_job_is_kept_on_demand_and_is_over(place: Place, tmp_path: Path, verb: str) -> None:
    """--keep-job would be ignored by a verb, or `resume` would do finished work again; the next run with this OUT must not be refused."""
    out = tmp_path / "out"
    assert place.run([*place.arguments(verb, out), "--keep-job"]).code == 0
    whole = place.whole(verb)

    def result() -> dict[str, str]:
        return {name: digest for name, digest in published(tmp_path).items() if not name.startswith("out.job/")}

    journal = (tmp_path / "out.job" / "journal.jsonl").read_text().splitlines()
    assert json.loads(journal[-1]) == {"step": "published"} and result() == whole
    assert place.run(["resume", str(out), "-q"]).code == 0
    assert result() == whole
    assert place.run([*place.arguments(verb, out), "--overwrite"]).code == 0
    assert published(tmp_path) == whole, "and without --keep-job nothing is left of either"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("at", ["half", "after"])
def test_killed_at_every_line_of_the_journal(place: Place, tmp_path: Path, verb: str, at: str) -> None:
    """The same for every verb, each line torn, and each line whole."""
    every_line(place, verb, tmp_path, 1, at)


def every_line(place: Place, verb: str, tmp_path: Path, stride: int, always: str = "") -> None:
    whole = place.whole(verb)
    count = steps(place, verb, fresh(tmp_path / "count"), "after")
    assert count >= 3
    for n in range(1, count + 1, stride):
        at = always or ("half", "after")[n % 2]
        folder = fresh(tmp_path / "run")
        ended = place.run(place.arguments(verb, folder / "out"), at=at, n=n)
        assert ended.code == -9, (at, n, ended.told)
        go_on(place, verb, folder / "out")
        assert published(folder) == whole, f"killed {at} line {n} of {count}"
    print(f"{verb}: killed at {len(range(1, count + 1, stride))} of {count} lines, {always or 'half and after'}")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("verb", VERBS)
def test_killed_at_every_call(place: Place, tmp_path: Path, verb: str) -> None:
    """The same for every moment between two calls that change the disk, and twice in a row, with an old output that is to be replaced."""
    whole = place.whole(verb)
    old = place.whole("pack" if verb != "pack" else "quantize")
    template = fresh(tmp_path / "template")
    shutil.copytree(place.root / "whole" / ("pack" if verb != "pack" else "quantize") / "out", template / "out")
    count = steps(place, verb, Path(shutil.copytree(template, tmp_path / "count")), "calls", "--overwrite")
    which = range(1, count + 1, STRIDES.get(verb, 1))
    for n in which:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        folder = Path(shutil.copytree(template, tmp_path / "run"))
        arguments = [*place.arguments(verb, folder / "out"), "--overwrite"]
        ended = place.run(arguments, at="calls", n=n)
        assert ended.code == -9, (n, ended.told)
        there = {name: digest for name, digest in published(folder).items() if name.startswith("out/")}
        aside = list(folder.glob("out.job/out.old-*"))
        assert there in ([old_part(old), old_part(whole)] if not aside or (folder / "out").exists() else [{}]), f"call {n} left a mixture"
        if (folder / "out.job" / "job.json").exists():
            again = place.run(["resume", str(folder / "out"), "-q"], at="calls", n=7)  # killed once more, early
            if again.code == -9:
                assert place.run(["resume", str(folder / "out"), "-q"]).code == 0 or not (folder / "out.job" / "job.json").exists()
        elif there != old_part(whole):
            ended = place.run(arguments)
            assert ended.code == 0, ended.told
        found = {name: digest for name, digest in published(folder).items() if ".job/" not in name}
        assert found == whole, f"killed at call {n} of {count}"
    print(f"{verb}: killed at {len(which)} of {count} calls")


def old_part(files: dict[str, str]) -> dict[str, str]:
    return {name: digest for name, digest in files.items() if name.startswith("out/")}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("verb", VERBS)
def test_every_write_fails_once(place: Place, tmp_path: Path, verb: str) -> None:
    """A full disk at any moment: exit 5, the old output or the new one is whole, and when there is room again the run goes on."""
    whole = place.whole(verb)
    count = steps(place, verb, fresh(tmp_path / "count"), "writes")
    which = range(1, count + 1, STRIDES.get(verb, 1))
    every_write(place, verb, tmp_path, whole, which)
    print(f"{verb}: {len(which)} of {count} writes failed")


def test_some_writes_fail(place: Place, tmp_path: Path) -> None:
    """The same with a sample of the writes of the shortest run and of the longest, so that every change is tried."""
    for verb, stride in (("pack", 41), ("head", 131)):
        count = steps(place, verb, fresh(tmp_path / "count"), "writes")
        assert count > 50
        every_write(place, verb, tmp_path, place.whole(verb), range(1, count + 1, stride))


def every_write(place: Place, verb: str, tmp_path: Path, whole: dict[str, str], which: range) -> None:
    for n in which:
        folder = fresh(tmp_path / "run")
        ended = place.run(place.arguments(verb, folder / "out"), at="writes", n=n)
        if ended.code == 0:  # what failed was no part of the result: a note for people, or cleaning up
            assert {k: v for k, v in published(folder).items() if ".job/" not in k} == whole
            continue
        assert ended.code == 5, (n, ended.told)
        assert "error: " in ended.told and "  fix: " in ended.told
        there = {name: digest for name, digest in published(folder).items() if ".job/" not in name}
        assert there in ({}, whole), f"write {n} failed, and something else was published"  # whole: the last line of the log failed
        go_on(place, verb, folder / "out")
        assert published(folder) == whole, f"write {n} of {which.stop - 1} failed"
