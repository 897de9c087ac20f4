"""marlinctl/doctor/driver.py: files as Linux shows them, and libraries that are no libcuda."""

from __future__ import annotations

from pathlib import Path

import pytest

from marlinctl.doctor.driver import driver, gpu
from marlinctl.system.driver import Driver, find_driver, no_gpu

NONE = "libmarlinctl-none.so.1"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_device_is_found_on_the_bus(tmp_path: Path) -> None:
    """If this failed, a GPU without a driver would look like a machine without a GPU, or a sound chip like a GPU."""
    bus = tmp_path / "sys/bus/pci/devices"
    write(bus / "0000:01:00.0/vendor", "0x8086\n")
    write(bus / "0000:01:00.0/class", "0x030000\n")  # an Intel GPU
    write(bus / "0000:02:00.1/vendor", "0x10de\n")
    write(bus / "0000:02:00.1/class", "0x040300\n")  # the sound of an NVIDIA card
    assert find_driver(tmp_path, NONE) == Driver(False, None, None)
    write(bus / "0000:02:00.0/vendor", "0x10de\n")
    write(bus / "0000:02:00.0/class", "0x030200\n")
    assert find_driver(tmp_path, NONE).device


def test_a_container_has_device_files(tmp_path: Path) -> None:
    """If this failed, a container, which may not see the bus, would seem to have no GPU."""
    write(tmp_path / "dev/nvidiactl", "")
    assert not find_driver(tmp_path, NONE).device
    write(tmp_path / "dev/nvidia0", "")
    assert find_driver(tmp_path, NONE).device


@pytest.mark.parametrize(
    ("file", "text", "version"),
    [
        ("sys/module/nvidia/version", "580.65.06\n", "580.65.06"),
        (
            "proc/driver/nvidia/version",
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.124.06  Release Build\n",
            "570.124.06",
        ),
    ],
)
def test_the_version_of_the_kernel_module(tmp_path: Path, file: str, text: str, version: str) -> None:
    """If this failed, a line about a driver that is too old could not name it."""
    write(tmp_path / file, text)
    assert find_driver(tmp_path, NONE).version == version


def test_a_library_that_is_no_libcuda(tmp_path: Path) -> None:
    """If this failed, a stub or a broken file in place of libcuda would end the doctor with a traceback."""
    write(tmp_path / "libcuda.so.1", "not a library")
    assert find_driver(tmp_path, str(tmp_path / "libcuda.so.1")).cuda is None
    assert find_driver(tmp_path, "libc.so.6").cuda is None


@pytest.mark.parametrize(
    ("found", "status", "said"),
    [
        (Driver(True, "580.65.06", (13, 0)), "ok", "580.65.06, knows CUDA 13.0"),
        (Driver(False, None, None), "ok", "no NVIDIA device"),
        (Driver(True, None, None), "warn", "no driver"),
        (Driver(True, "580.65.06", None), "warn", "libcuda.so.1 is not found"),
    ],
)
def test_what_is_said(found: Driver, status: str, said: str) -> None:
    """If this failed, a container started without its GPU would be called sound, or a laptop without one would be warned."""
    (check,) = driver(found)
    assert check.status == status and said in check.found


@pytest.mark.parametrize(
    ("found", "built_for", "visible", "status", "said"),
    [
        (Driver(False, None, None), None, None, "ok", "none"),
        (Driver(True, "580.65.06", (13, 0)), None, None, "warn", "built without CUDA"),
        (Driver(True, None, None), "13.0", None, "warn", "no driver"),
        (Driver(True, "535.183.01", (12, 2)), "13.0", None, "warn", "driver 535.183.01 knows CUDA 12.2, and torch is built for 13.0"),
        (Driver(True, "580.65.06", (13, 0)), "13.0", "-1", "warn", "CUDA_VISIBLE_DEVICES='-1'"),
        (Driver(True, "580.65.06", (13, 0)), "13.0", "", "warn", "CUDA_VISIBLE_DEVICES=''"),
        (Driver(True, "580.65.06", (13, 0)), "12.8", None, "warn", "torch sees no device"),
        (Driver(True, "580.65.06", (13, 0)), "13.0", "0,1", "warn", "torch sees no device"),
    ],
)
def test_why_there_is_no_gpu(found: Driver, built_for: str | None, visible: str | None, status: str, said: str) -> None:
    """If this failed, the reason would be guessed wrong, and the cure would be for another illness."""
    check = gpu(no_gpu(found, built_for, visible))
    assert check.status == status and said in check.found
    if "535" in said:
        assert "580" in check.cure
