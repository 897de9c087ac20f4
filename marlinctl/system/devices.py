"""Which device a run computes on, what it can multiply, and with how many threads."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from marlinctl.errors import EnvironmentProblem, UsageError

if TYPE_CHECKING:
    import torch

    from marlinctl.system.console import Console

_ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # read by torch 2.11 and 2.13 alike; where both are set, the first one
_SETTINGS = "expandable_segments:True,pinned_use_cuda_host_register:True,pinned_num_register_threads:8"


def check_name(device: str) -> None:
    """UsageError E202 for what names no device. Without torch."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", device, re.ASCII):
        raise UsageError("E202", f"unknown device {device}", where="--device", fix="give auto, cpu, cuda or cuda:N")


def choose_device(device: str) -> str:
    """`auto` resolved; a device that is not there is an error, not a slow surprise."""
    check_name(device)
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind = torch.device(device)
    if kind.type == "cuda" and (not torch.cuda.is_available() or (kind.index or 0) >= torch.cuda.device_count()):
        reason, cure = no_cuda()
        fix = f"give --device cpu, or {cure}" if cure else "give --device cpu"
        raise EnvironmentProblem("E420", f"there is no {device}: {reason}", where="--device", fix=fix)
    return device


def say_choice(asked: str, chosen: str, console: Console) -> None:
    """One line on what `--device auto` came to; nothing where the person said it."""
    if asked != "auto":
        return
    if chosen.startswith("cuda"):
        import torch

        console.say(f"computing on {chosen}, {torch.cuda.get_device_name(chosen)} (--device auto)")
    else:
        console.say(f"computing on the CPU: {no_cuda()[0]} (--device auto)")


def planned_device(device: str) -> str:
    """What `choose_device` will choose, without torch: for auto, cuda where nvidia-smi shows a GPU and torch is a build for one."""
    check_name(device)
    if device != "auto":
        return device
    from importlib.metadata import PackageNotFoundError, version

    try:
        without_cuda = version("torch").endswith("+cpu")
    except PackageNotFoundError:
        without_cuda = True
    return "cpu" if without_cuda or free_device_memory("cuda") is None else "cuda"


def no_cuda() -> tuple[str, str]:
    """Why torch offers no such CUDA device, and what would help; nothing helps where there is none."""
    import torch

    from marlinctl.system.driver import find_driver, no_gpu

    if torch.cuda.is_available():
        there = ", ".join(f"cuda:{index}" for index in range(torch.cuda.device_count()))
        return f"torch sees {there}", f"one of {there}"
    found = no_gpu(find_driver(), torch.version.cuda, os.environ.get("CUDA_VISIBLE_DEVICES"))
    return found.reason, found.fix


def forward_dtype(device: torch.device, asked: str) -> torch.dtype:
    """A forward pass runs in bfloat16 where the hardware multiplies it, else in float32, never in float16."""
    import torch

    if asked != "auto":
        dtype: torch.dtype = getattr(torch, asked)
        return dtype
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else cpu_has_bf16()
    return torch.bfloat16 if fast else torch.float32


def set_up_allocator(device: torch.device) -> None:
    """Set up torch's allocators of a CUDA device, in this process and its children, unless the user did.

    expandable_segments: a run allocates and frees matrices of many sizes, and fixed segments are left with holes that fit none: with two
    blocks of 4096 / 14336 torch held 13.39 GiB for 8.18 that were alive, and 10.18 with this (H200, torch 2.11, 2026-11-21).
    pinned_use_cuda_host_register: page-locked memory is taken by threads; the driver alone takes it page by page.

    The allocators read their environment once, when first asked for memory: to be called before that.
    """
    if device.type == "cuda" and not any(name in os.environ for name in _ALLOCATOR):
        os.environ[_ALLOCATOR[0]] = _SETTINGS


def limit_device_memory(device: torch.device, most: int | None) -> int:
    """Bytes of a CUDA device that this process may still take: what is free, or `most` where that is less, which torch then keeps to."""
    import torch

    free, total = torch.cuda.mem_get_info(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    torch.cuda.set_per_process_memory_fraction(1.0 if most is None else min(1.0, most / total), index)
    return free if most is None else min(free, most)


def forget_device_peaks(device: torch.device) -> None:
    """device_peaks counts from now on: what ran before in this process is not this run's."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def device_peaks(device: torch.device) -> dict[str, int | None]:
    """For a report: bytes of a CUDA device at the fullest moment, of tensors that were alive, and all that torch's allocator held for them.

    It gives back what it holds beyond the first before it fails, so the first decides whether a run fits. None on the CPU.
    """
    import torch

    on_cuda = device.type == "cuda"
    return {
        "peak_device_memory_bytes": torch.cuda.max_memory_allocated(device) if on_cuda else None,
        "peak_device_reserved_bytes": torch.cuda.max_memory_reserved(device) if on_cuda else None,
    }


def cpu_has_bf16() -> bool:
    """True where the processor itself multiplies bf16 (AVX512-BF16, AMX, Arm's BF16); elsewhere it is emulated, slower than fp32."""
    import torch

    abilities = torch.cpu.get_capabilities()
    return any(abilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def planned_dtype(device: str, asked: str) -> str:
    """What `forward_dtype` will choose, without torch: bfloat16 on a GPU, and where the processor names it."""
    if asked != "auto":
        return asked
    return "bfloat16" if device.startswith("cuda") or _processor_says_bf16() else "float32"


def _processor_says_bf16() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return False  # macOS: torch names no ability there either
    words = set(cpuinfo.read_text(errors="replace").split())
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


def has_matrix_units() -> bool:
    """Whether the processor has Intel's AMX for bfloat16."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.is_file() and "amx_bf16" in cpuinfo.read_text(errors="replace")


def free_device_memory(device: str) -> tuple[str, int] | None:
    """Name and free bytes of a CUDA device, as nvidia-smi says; None where there is none. No CUDA context is made."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return None
    index = device.partition(":")[2] or "0"
    command = [smi, f"--id={index}", "--query-gpu=name,memory.free", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        name, free = done.stdout.splitlines()[0].rsplit(",", 1)
        return name.strip(), int(free) << 20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Use this many CPU threads for the time being."""
    import torch

    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
