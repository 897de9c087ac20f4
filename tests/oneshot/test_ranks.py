"""Several real processes on the CPU (gloo): the result is that of one, up to ties, and no process waits for one that is gone."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytest
import torch

from marlinctl.checkpoint.formats.registry import detect, read_linear
from marlinctl.checkpoint.reader import open_checkpoint
from marlinctl.cli import main
from marlinctl.errors import UsageError
from marlinctl.oneshot.ranks import require_samples
from marlinctl.oneshot.rows import own_rows
from marlinctl.system.processes import Processes
from tests import forked
from tests.oneshot.stopping import PROGRAM, SIZES
from tests.runs import TEXT
from tests.test_architecture import ROOT
from tests.tiny import make_tiny

ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
ASKED = ["--group-size", "32", "--samples", "7", "--sequence-length", "64", "--dtype", "float32", "--threads", "1", "--device", "cpu"]


@dataclass(frozen=True)
class Place:
    root: Path

    def command(self, verb: str, out: Path, *more: str, recipe: str = "int4", samples: int = 7) -> list[str]:
        asked = [word if word != "7" else str(samples) for word in ASKED]
        recipes = ["--recipe", f"{self.root}/{recipe}.yaml", "--calibration", f"{self.root}/text.txt"]
        return [verb, str(self.root / "model"), str(out), *recipes, *asked, *more]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("ranks")
    make_tiny(root / "model", **SIZES)
    (root / "text.txt").write_text(TEXT)
    (root / "int4.yaml").write_text("extends: int4\ncalibration: {minimum_tokens: 32}\n")
    sparse = "sparsify: {pattern: '2:4', ls_iterations: 8}\n"
    (root / "sparse.yaml").write_text(f"extends: sparse-int4\n{sparse}calibration: {{minimum_tokens: 32}}\ndistill: {{tokens: 0}}\n")
    return Place(root)


def start(count: int, arguments: list[str], out: IO[str], err: IO[str], program: list[str] | None = None) -> list[Any]:
    """With the variables that a launcher would give them, without the seconds that it takes to start."""
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        port = any_port.getsockname()[1]
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        forked.Popen(
            [sys.executable, *(program or ["-m", "marlinctl"]), *arguments], cwd=ROOT, stdout=out, stderr=err, text=True,
            env=ENVIRONMENT | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(count)
    ]  # fmt: skip


def run(folder: Path, count: int, arguments: list[str]) -> tuple[list[int], str, str]:
    """Exit codes, stdout and stderr."""
    with (folder / "stdout").open("w+") as out, (folder / "stderr").open("w+") as err:
        codes = [job.wait(timeout=100) for job in start(count, arguments, out, err)]
    return codes, (folder / "stdout").read_text(), (folder / "stderr").read_text()


def differing(ours: Path, theirs: Path) -> tuple[int, int]:
    """How many of all codes are others."""
    apart = total = 0
    with open_checkpoint(ours) as a, open_checkpoint(theirs) as b:
        mine, other = detect(a.config, a.tensors), detect(b.config, b.tensors)
        assert mine.layers.keys() == other.layers.keys() and a.tensors.keys() == b.tensors.keys()
        for name in mine.layers:
            x, y = read_linear(a, mine, name), read_linear(b, other, name)
            apart += int((x.codes != y.codes).sum())
            total += x.codes.numel()
    return apart, total


@pytest.mark.parametrize(("count", "verb", "recipe"), [(2, "quantize", "int4"), (3, "quantize", "int4"), (2, "sparsify", "sparse")])
def test_the_result_is_that_of_one_process(place: Place, tmp_path: Path, count: int, verb: str, recipe: str) -> None:
    """If samples, sums or rows were spread wrongly, several GPUs would make another model than one. Seven samples divide by neither."""
    more = ["--bits", "4", "--no-eval"] if verb == "sparsify" else []
    assert main([*place.command(verb, tmp_path / "alone", *more, "-q", recipe=recipe)]) == 0
    codes, told, heard = run(tmp_path, count, place.command(verb, tmp_path / "out", *more, "--json", recipe=recipe))
    assert codes == [0] * count, heard[-3000:]
    report = json.loads(told)  # exactly one document
    assert report["processes"] == count
    alone = json.loads((tmp_path / "alone" / "marlinctl_report.json").read_text())
    assert [layer["tokens"] for layer in report["layers"]] == [layer["tokens"] for layer in alone["layers"]]
    for ours, theirs in zip(report["layers"], alone["layers"], strict=True):
        assert ours["name"] == theirs["name"] and ours["error"] == pytest.approx(theirs["error"], rel=2e-2)
    apart, total = differing(tmp_path / "out", tmp_path / "alone")
    assert apart <= 2e-3 * total, f"{apart} of {total}"
    assert not (tmp_path / "out.job").exists()
