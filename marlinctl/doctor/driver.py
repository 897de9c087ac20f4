"""The NVIDIA driver and why torch sees no GPU, as lines of the doctor's answer."""

from __future__ import annotations

from collections.abc import Iterator

from marlinctl.doctor.result import Check
from marlinctl.system.driver import Driver, NoGpu


def driver(found: Driver) -> Iterator[Check]:
    known = f"CUDA {found.cuda[0]}.{found.cuda[1]}" if found.cuda is not None else ""
    if found.cuda is not None:
        yield Check("driver", "ok", f"{found.version or 'version unknown'}, knows {known}")
    elif found.version is not None:
        cure = "in a container: start it with --gpus all and the NVIDIA container toolkit; else reinstall the driver"
        yield Check("driver", "warn", f"kernel module {found.version} is loaded, and libcuda.so.1 is not found", cure)
    elif found.device:
        yield Check("driver", "warn", "an NVIDIA device is there, and no driver", "install NVIDIA's driver; without it the CPU is used")
    else:
        yield Check("driver", "ok", "no NVIDIA device and no driver: the CPU is used")


def gpu(found: NoGpu) -> Check:
    if not found.fix:
        return Check("gpu", "ok", "none: everything but the CUDA kernels runs on the CPU")
    return Check("gpu", "warn", found.reason, found.fix)
