"""What marlinctl 0.1.0 (cd6a5ea) left behind: its published folders load and verify, and its interrupted job continues.

tests/published_0_1 was written by it: a model of two blocks (hidden size 32), `quantize` of it, `pack` of that, `compress --recipe
sparse-int4` of it, and the job of a `quantize` that was stopped after its first block. Reports are left out, but for the JSON document.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from marlinctl.cli import main
from marlinctl.oneshot.documents import versions

FOLDER = Path(__file__).parent / "published_0_1"


@pytest.fixture
def left(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FOLDER, tmp_path / "left"))


def _told(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    document = json.loads(capsys.readouterr().out)
    assert isinstance(document, dict)
    return document


@pytest.mark.parametrize("name", ["whole", "whole-marlin", "sparse"])
def test_published_folders_still_verify(left: Path, name: str) -> None:
    """Broken: a format, the manifest or the mask cannot be read any more as they were written."""
    assert main(["verify", str(left / name), "--quiet"]) == 0


@pytest.mark.parametrize(("name", "fmt"), [("whole", "gptq"), ("whole-marlin", "ct"), ("sparse", "ct")])
def test_published_folders_are_still_repacked(left: Path, name: str, fmt: str) -> None:
    """Broken: `pack` refuses or changes a folder of an earlier version."""
    assert main(["pack", str(left / name), str(left / "again"), "--format", fmt, "--quiet"]) == 0
    assert main(["verify", str(left / "again"), "--quiet"]) == 0


def test_codes_are_the_same_after_a_way_through_the_native_format(left: Path) -> None:
    """Broken: what an earlier version packed to MARLIN does not unpack to the codes that it packed."""
    assert main(["pack", str(left / "whole-marlin"), str(left / "again"), "--format", "ct", "--quiet"]) == 0

    def tensors(folder: Path) -> dict[str, Any]:
        return {name: tensor for path in sorted(folder.glob("model*.safetensors")) for name, tensor in load_file(path).items()}

    ours, theirs = tensors(left / "again"), tensors(left / "whole")
    assert ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours)


def test_an_interrupted_job_is_continued(left: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Broken: a job that an earlier version began cannot be resumed, or loses the block that was finished."""
    job = left / "out.job"
    finished = load_file(job / "staged/model-00001.safetensors")
    request = json.loads((job / "job.json").read_text())
    request["folder"] = str(left)
    request["arguments"]["options"]["dtype"] = "bfloat16"  # as it was begun; "auto" is float32 on a CPU without bfloat16 products
    (job / "job.json").write_text(json.dumps(request))
    begun, *rest = (job / "journal.jsonl").read_text().splitlines()
    line = json.loads(begun)
    line["fingerprint"]["versions"] |= {key: value for key, value in versions().items() if key not in ("marlinctl", "algorithm")}
    (job / "journal.jsonl").write_text("\n".join([json.dumps(line), *rest]) + "\n")
    assert main(["resume", str(left / "out")]) == 0
    told = capsys.readouterr().err
    assert "1 of 2 blocks finished" in told and "warning: an earlier marlinctl began this job and noted no digests" in told
    published = load_file(left / "out" / "model.safetensors")
    assert finished and all(torch.equal(published[name], tensor) for name, tensor in finished.items())
    assert main(["verify", str(left / "out"), "--source", str(left / "model"), "--json", "--quiet"]) == 0
    assert _told(capsys)
