"""Which device a run computes on, what it can multiply, and with how many threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from marlinctl.errors import EnvironmentProblem, UsageError

if TYPE_CHECKING:
    import torch


def choose_device(device: str) -> str:
    """`auto` resolved; a device that is not there is an error, not a slow surprise."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device)
    except RuntimeError as error:
        raise UsageError("E248", f"unknown device {device}", where="--device", fix="give auto, cpu, cuda or cuda:N") from error
    if kind.type == "cuda" and (not torch.cuda.is_available() or (kind.index or 0) >= torch.cuda.device_count()):
        raise EnvironmentProblem(
            "E401", f"there is no {device} on this machine", where="--device", fix="give --device cpu, or check the driver with nvidia-smi"
        )
    return device


def forward_dtype(device: torch.device, asked: str) -> torch.dtype:
    """A forward pass runs in bfloat16 where the hardware multiplies it, else in float32, never in float16."""
    import torch

    if asked != "auto":
        dtype: torch.dtype = getattr(torch, asked)
        return dtype
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else cpu_has_bf16()
    return torch.bfloat16 if fast else torch.float32


def cpu_has_bf16() -> bool:
    """True where the processor itself multiplies bf16 (AVX512-BF16, AMX, Arm's BF16); elsewhere it is emulated, slower than fp32."""
    import torch

    abilities = torch.cpu.get_capabilities()
    return any(abilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


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
