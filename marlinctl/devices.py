"""Which device a run computes on, and what it can multiply."""

from __future__ import annotations

from marlinctl.errors import EnvironmentProblem, UsageError


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


def cpu_has_bf16() -> bool:
    """True where the processor itself multiplies bf16 (AVX512-BF16, AMX, Arm's BF16); elsewhere it is emulated, slower than fp32."""
    import torch

    abilities = torch.cpu.get_capabilities()
    return any(abilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
