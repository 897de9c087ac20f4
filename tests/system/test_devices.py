"""What a run asks of torch on a GPU, as far as it can be told without one. Choosing a device: tests/evaluation/test_run.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from marlinctl.oneshot import open
from marlinctl.oneshot.open import Options, open_model
from marlinctl.system import devices
from marlinctl.system.console import Console
from tests import forked
from tests.oneshot.test_run import recipe
from tests.runs import TEXT
from tests.tiny import make_tiny

CUDAS, GENERIC = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"
SETTINGS = "expandable_segments:True,pinned_use_cuda_host_register:True,pinned_num_register_threads:8"


@pytest.mark.parametrize(
    ("device", "users", "expected"),
    [
        ("cuda", {}, {CUDAS: SETTINGS}),
        ("cuda:1", {}, {CUDAS: SETTINGS}),
        ("cuda", {CUDAS: "max_split_size_mb:100"}, {CUDAS: "max_split_size_mb:100"}),
        ("cuda", {GENERIC: "expandable_segments:False"}, {GENERIC: "expandable_segments:False"}),
        ("cuda", {GENERIC: ""}, {GENERIC: ""}),
        ("cpu", {}, {}),
    ],
)
def test_a_run_on_a_gpu_lets_segments_grow_unless_the_user_decided(
    device: str, users: dict[str, str], expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it were not set, a run would hold half as much again as it uses; set after the first allocation, nobody would read it."""
    for name in (CUDAS, GENERIC):
        monkeypatch.setenv(name, "put back in the end")
        monkeypatch.delenv(name)
    for name, value in users.items():
        monkeypatch.setenv(name, value)
    seen = []

    def forward_dtype(*_: object) -> torch.dtype:  # the first that makes a context on the GPU
        seen.append({name: os.environ[name] for name in (CUDAS, GENERIC) if name in os.environ})
        return torch.float32

    monkeypatch.setattr(open, "choose_device", lambda asked: asked)
    monkeypatch.setattr(open, "forward_dtype", forward_dtype)
    (tmp_path / "text.txt").write_text(TEXT)
    model = make_tiny(tmp_path / "model")
    opened = open_model(str(model), tmp_path / "out", recipe(tmp_path / "text.txt"), Options(device=device), Console())
    assert opened.device == torch.device(device)
    assert seen == [expected]
    assert {name: os.environ[name] for name in (CUDAS, GENERIC) if name in os.environ} == expected


@pytest.mark.parametrize(
    ("names", "read"), [((CUDAS,), "max_split_size_mb"), ((GENERIC,), "garbage_collect"), ((CUDAS, GENERIC), "max_split_size_mb")]
)
def test_torch_reads_these_names_after_its_import(names: tuple[str, ...], read: str) -> None:
    """If torch read other names, or read them when it is imported, what is set would have no effect, and the user's would be overruled."""
    refused = {CUDAS: "max_split_size_mb:1", GENERIC: "garbage_collection_threshold:7"}
    program = f"""
import os, torch
os.environ.update({ {name: refused[name] for name in names}!r})
torch._C._accelerator_setAllocatorSettings("expandable_segments:False")
"""
    environment = {key: value for key, value in os.environ.items() if key not in (CUDAS, GENERIC)}
    done = forked.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1 and read in done.stderr.splitlines()[-1], done.stderr[-2000:]


def test_memory_that_is_alive_and_memory_that_is_kept_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """If reports called what the allocator keeps the peak, `plan` would look wrong by a half, and two verbs would mean two things."""
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 818)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 1339)
    assert devices.device_peaks(torch.device("cuda")) == {"peak_device_memory_bytes": 818, "peak_device_reserved_bytes": 1339}
    assert set(devices.device_peaks(torch.device("cpu")).values()) == {None}


@pytest.mark.gpu
def test_a_process_keeps_to_the_device_memory_that_it_was_given() -> None:
    """If this failed, --device-memory 40GiB would be a wish, and the other program on the GPU be the one that runs out."""
    device = torch.device("cuda")
    try:
        assert devices.limit_device_memory(device, 1 << 30) == 1 << 30
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(2 << 30, dtype=torch.uint8, device=device)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, torch.cuda.current_device())
