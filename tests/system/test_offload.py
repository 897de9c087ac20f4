"""Slots of activations: in files and on a device alike."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from marlinctl.errors import ResourceProblem
from marlinctl.system.offload import FileTensor, PinnedTensor, Scratch

CPU = torch.device("cpu")


@pytest.mark.parametrize("budget", [0, 1 << 20])
def test_what_is_written_is_read_back(budget: int, tmp_path: Path) -> None:
    """If a chunk landed at another place, a linear would be solved for other tokens' activations."""
    slot = Scratch(tmp_path, CPU, budget).tensor("a", (7, 5, 3), torch.bfloat16)
    expected = torch.randn(7, 5, 3).bfloat16()
    for part in (slice(4, 7), slice(0, 4)):
        slot[part] = expected[part]
    assert torch.equal(slot[0:7], expected)
    rows = torch.tensor([6, 0, 3])
    assert torch.equal(slot[rows], expected[rows])
    slot[rows] = expected[rows] * 2
    assert torch.equal(slot[3:4], expected[3:4] * 2) and torch.equal(slot[1:3], expected[1:3])
    assert isinstance(slot, FileTensor) == (budget == 0)


def test_a_slot_can_be_seen_in_two_shapes(tmp_path: Path) -> None:
    """If a second request gave other storage, the summed output of experts would be lost before it is replayed."""
    scratch = Scratch(tmp_path, CPU)
    flat = scratch.tensor("a", (6, 4), torch.float32).zero_()
    flat[2:3] = torch.ones(1, 4)
    assert torch.equal(scratch.tensor("a", (2, 3, 4), torch.float32)[0:1][0, 2], torch.ones(4))


def test_no_file_has_a_name(tmp_path: Path) -> None:
    """If scratch files had names, a killed run would leave gigabytes behind."""
    slot = Scratch(tmp_path, CPU).tensor("a", (1000, 1000), torch.float32)
    slot[0:1] = torch.ones(1, 1000)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_an_error_where_the_slot_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If blocks were not reserved, a full disk would end the job with SIGBUS, hours later and without a word."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(ResourceProblem, match="of disk") as caught:
        Scratch(tmp_path, CPU).tensor("a", (10, 10), torch.float32)
    assert caught.value.exit_code == 5


def test_page_locked_memory_is_counted_as_torch_rounds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, slots of 17 GiB would take 32 GiB each, and a run be killed that was given half of the free memory."""
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, **how: real(*shape, **how))
    scratch = Scratch(tmp_path, torch.device("cpu"), 0, 100)
    assert isinstance(scratch.tensor("a", (33,), torch.uint8), PinnedTensor)  # 64 of 100
    assert isinstance(scratch.tensor("b", (33,), torch.uint8), FileTensor)
    scratch.resident((32,), torch.uint8)  # 32 of the 36 that are left
    assert isinstance(scratch.tensor("c", (8,), torch.uint8), FileTensor)


def test_where_no_page_can_be_locked_the_disk_holds_activations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, a limit of locked memory (ulimit -l) would end a run that needs none."""
    real = torch.empty

    def refusing(*shape: object, pin_memory: bool = False, **how: object) -> torch.Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return real(*shape, **how)  # type: ignore[call-overload]

    monkeypatch.setattr(torch, "empty", refusing)
    scratch = Scratch(tmp_path, torch.device("cpu"), 0, 1 << 20)
    assert isinstance(scratch.tensor("a", (33,), torch.uint8), FileTensor) and scratch.resident((4,), torch.uint8).shape == (4,)


@pytest.mark.gpu
def test_what_fits_on_the_device_is_an_ordinary_tensor_there(tmp_path: Path) -> None:
    """If this failed, tokens would be gathered and scattered through the host; the device is named without its number here, as in a run."""
    slot = Scratch(tmp_path, torch.device("cuda"), 1 << 20, 1 << 20).tensor("a", (7, 5), torch.bfloat16)
    assert isinstance(slot, torch.Tensor) and slot.is_cuda


@pytest.mark.gpu
def test_page_locked_memory_comes_before_the_disk_and_holds_the_same(tmp_path: Path) -> None:
    """If this failed, the activations of a 70B beside a GPU of 40 GB would be read and written at the rate of a disk, or be others'."""
    scratch = Scratch(tmp_path, torch.device("cuda"), 0, 256)  # 210 bytes, of which torch makes 256
    slot = scratch.tensor("a", (7, 5, 3), torch.bfloat16)
    assert isinstance(slot, PinnedTensor) and isinstance(scratch.tensor("b", (7, 5, 3), torch.bfloat16), FileTensor)
    expected = torch.randn(7, 5, 3, device="cuda").bfloat16()
    for part in (slice(4, 7), slice(0, 4)):
        slot[part] = expected[part]
    assert slot[1:3].is_cuda and torch.equal(slot[0:7], expected)
    rows = torch.tensor([6, 0, 3])
    assert torch.equal(slot[rows], expected.cpu()[rows])
    slot[rows] = expected[rows.cuda()] * 2
    assert torch.equal(slot[3:4], expected[3:4] * 2) and torch.equal(slot[1:3], expected[1:3])
    assert not slot.zero_()[0:7].any()
