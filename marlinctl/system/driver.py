"""Is there an NVIDIA device, and which driver serves it? Asked of the system alone, so that it is known when torch sees nothing.

    device    PCI vendor 10de, class 03 (display) under /sys; or a device file /dev/nvidia0, which containers have
    driver    its version from /sys/module/nvidia or /proc/driver/nvidia; the CUDA it knows from libcuda, which needs no device for that

A driver runs programs built for its own major version of CUDA and older ones:
https://docs.nvidia.com/deploy/cuda-compatibility/ (minor version compatibility: 13.x from driver 580 on, 12.x from 525 on).
"""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from pathlib import Path

OLDEST_DRIVER = {12: "525", 13: "580"}  # major version of CUDA -> major version of the driver


@dataclass(frozen=True, slots=True)
class Driver:
    device: bool  # NVIDIA hardware, by PCI or device file
    version: str | None  # of the kernel module, such as 580.65.06
    cuda: tuple[int, int] | None  # the newest CUDA that libcuda knows; None: there is no libcuda that loads


def find_driver(root: Path = Path("/"), library: str = "libcuda.so.1") -> Driver:
    """root: where /sys, /proc and /dev lie."""
    return Driver(_device(root), _version(root), _cuda(library))


@dataclass(frozen=True, slots=True)
class NoGpu:
    """Why torch sees no GPU."""

    reason: str
    fix: str  # empty where the machine has none


def no_gpu(found: Driver, built_for: str | None, visible: str | None) -> NoGpu:
    """built_for: the CUDA of torch's wheel; visible: CUDA_VISIBLE_DEVICES."""
    there = found.device or found.cuda is not None
    if not there:
        return NoGpu("this machine has no GPU", "")
    if built_for is None:
        cure = "install the CUDA wheel of torch (pytorch.org/get-started)"
        return NoGpu("torch is built without CUDA, so it does not see the GPU", cure)
    if found.cuda is None:
        return NoGpu("there is one, and no driver that torch could ask", "install NVIDIA's driver")
    major = int(built_for.partition(".")[0])
    if found.cuda[0] < major:
        driver = f"driver {found.version or 'of unknown version'} knows CUDA {found.cuda[0]}.{found.cuda[1]}"
        cure = f"install driver {OLDEST_DRIVER.get(major, 'of a newer branch')} or newer, or a torch built for CUDA {found.cuda[0]}"
        return NoGpu(f"{driver}, and torch is built for {built_for}", cure)
    if visible is not None and not visible.strip("-1, "):
        return NoGpu(f"hidden by CUDA_VISIBLE_DEVICES={visible!r}", "unset CUDA_VISIBLE_DEVICES to use the GPU")
    return NoGpu("driver and torch belong together, yet torch sees no device", "see nvidia-smi and the kernel's log (dmesg)")


def _device(root: Path) -> bool:
    if any((root / "dev").glob("nvidia[0-9]*")):
        return True
    for folder in (root / "sys/bus/pci/devices").glob("*"):
        if _text(folder / "vendor") == "0x10de" and _text(folder / "class").startswith("0x03"):
            return True
    return False


def _version(root: Path) -> str | None:
    named = _text(root / "sys/module/nvidia/version") or _text(root / "proc/driver/nvidia/version")
    found = re.search(r"\d{3}\.\d+(\.\d+)?", named)
    return found[0] if found else None


def _cuda(library: str) -> tuple[int, int] | None:
    number = ctypes.c_int(0)
    try:
        if ctypes.CDLL(library).cuDriverGetVersion(ctypes.byref(number)) != 0:
            return None
    except (OSError, AttributeError):  # not there, not for this machine, or not a libcuda
        return None
    return number.value // 1000, number.value % 1000 // 10


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return ""
