"""The scan for NaN, infinity and zeros: every dtype, every place, and what it costs."""

from __future__ import annotations

import math
import time
from collections.abc import Collection
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from marlinctl.checkpoint import contents, finite
from marlinctl.checkpoint.contents import read_contents
from marlinctl.checkpoint.reader import Checkpoint, open_checkpoint
from marlinctl.errors import NumericalProblem
from marlinctl.system.console import Console

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def checkpoint(folder: Path, **tensors: torch.Tensor) -> Checkpoint:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return open_checkpoint(folder)


def scan(folder: Checkpoint, names: Collection[str], for_4_bits: Collection[str] = ()) -> None:
    read_contents(folder, Console.quiet(), scan=names, for_4_bits=for_4_bits).require_finite()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(0, 0, 0), (2, 1, 3), (4, 2, 6)])
def test_one_bad_number_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, value: float, place: tuple[int, ...]
) -> None:
    """A NaN or an infinity would slip through, or be named at the wrong place."""
    monkeypatch.setattr(contents, "CHUNK_BYTES", 64)  # the tensor spans several chunks, the last one is short
    bad = torch.randn(5, 3, 7).to(dtype)
    bad[place] = value
    if place != (4, 2, 6):
        bad[4, 2, 6] = math.nan  # the first one counts
    folder = checkpoint(tmp_path, good=torch.randn(9, 9).to(dtype), bad=bad)
    with pytest.raises(NumericalProblem) as caught:
        scan(folder, folder.tensors)
    (problem,) = caught.value.problems
    assert problem.what == f"bad{list(place)} is {value}"
    assert f"byte {folder.tensors['bad'].begin + ((place[0] * 3 + place[1]) * 7 + place[2]) * bad.itemsize}" in problem.where


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_largest_and_smallest_numbers_are_finite(tmp_path: Path, dtype: torch.dtype) -> None:
    """A weight at the edge of its dtype, a denormal or a minus zero would be called damaged."""
    info = torch.finfo(dtype)
    edges = torch.tensor([info.max, info.min, info.tiny, -info.tiny / 4, -0.0, 0.0], dtype=torch.float64).to(dtype)
    scan(checkpoint(tmp_path, edges=edges), ["edges"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_weights_that_4_bits_cannot_hold_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """A scale beyond float16 would be cut off in silence, and the linear published as something else."""
    monkeypatch.setattr(contents, "CHUNK_BYTES", 64)
    edge = torch.ones(6, 9, dtype=dtype)
    edge[1, 1] = -finite.LARGEST_IN_4_BITS
    large = edge.clone()
    large[2, 5], large[5, 0] = -2e6, 3e6
    folder = checkpoint(tmp_path, edge=edge, large=large, free=large.clone())
    scan(folder, folder.tensors, for_4_bits={"edge"})
    with pytest.raises(NumericalProblem) as caught:
        scan(folder, folder.tensors, for_4_bits={"edge", "large"})
    assert caught.value.error_id == "E604"
    assert [problem.what.split(";")[0] for problem in caught.value.problems] == [f"large[2, 5] is {float(large[2, 5]):.4g}"]


def test_every_bad_tensor_is_named_and_integers_are_skipped(tmp_path: Path) -> None:
    """Only the first damaged tensor would be told, or packed integers would be read as floats."""
    folder = checkpoint(
        tmp_path,
        a=torch.tensor([1.0, math.nan]),
        b=torch.tensor(math.inf),
        c=torch.full((8,), -1, dtype=torch.int32),
        empty=torch.empty(0, 3),
    )
    with pytest.raises(NumericalProblem) as caught:
        scan(folder, ["a", "b", "c", "empty"])
    assert [p.what for p in caught.value.problems] == ["a[1] is nan", "b[] is inf"]
    assert caught.value.exit_code == 6


def test_speed(tmp_path: Path) -> None:
    """The preflight of a large model would take as long as its quantization. (Scan and SHA-256 make about 1.05 GB/s of processor time.)"""
    size = 64 << 20
    folder = checkpoint(tmp_path, weights=torch.zeros(size // 2, dtype=torch.float16))
    best = math.inf
    for _ in range(5):
        started = time.process_time()  # not the wall: other processes may want the cores
        scan(folder, ["weights"])
        best = min(best, time.process_time() - started)
    assert size / best > 3e8
