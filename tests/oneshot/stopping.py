"""Small runs that are stopped before a block, and what the next run solves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from marlinctl.cli import main
from marlinctl.oneshot.sequential import SequentialPipeline

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 4,
}  # fmt: skip
ASKED = ["--group-size", "32", "--samples", "2", "--sequence-length", "32", "--refine", "0", "--dtype", "float32", "--threads", "1", "-q"]
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

    def stopping(self: SequentialPipeline, block: Any, solve: Any, *, replay: bool = False, **more: Any) -> None:
        if block.index == index:
            raise error
        run_block(self, block, solve, replay=replay, **more)

    with monkeypatch.context() as patch:
        patch.setattr(SequentialPipeline, "run_block", stopping)
        return main(arguments)


class Stopped:
    """Runs of one command that stopped when a block began, each computed once and copied: a job may be moved."""

    def __init__(self, root: Path, *more: str) -> None:
        self.root, self.more = root, more

    def __call__(self, index: int, out: Path) -> None:
        folder = self.root / f"stopped in {index}{' '.join(self.more)}"
        if not folder.exists():
            folder.mkdir()
            with pytest.MonkeyPatch.context() as patch:
                assert stop_in(patch, index, quantize(self.root, folder / out.name, *self.more)) == 130
        shutil.copytree(folder, out.parent, dirs_exist_ok=True)


def blocks_solved(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> tuple[int, list[int]]:
    """The exit code, and which blocks a run solves."""
    solved: list[int] = []
    run_block = SequentialPipeline.run_block

    def noting(self: SequentialPipeline, block: Any, solve: Any, *, replay: bool = False, **more: Any) -> None:
        if not replay:
            solved.append(block.index)
        run_block(self, block, solve, replay=replay, **more)

    with monkeypatch.context() as patch:
        patch.setattr(SequentialPipeline, "run_block", noting)
        return main(arguments), solved


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out.with_name(out.name + ".job") / "journal.jsonl").read_text().splitlines()]
