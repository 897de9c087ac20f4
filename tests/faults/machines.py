"""GPUs, drivers and compilers that cannot be used: section F of the fault list. Kernels say what is missing; compressing goes on.

`STATES` puts the process that calls it into a state: what torch, libcuda, the package cuda-bindings and NVRTC answer there. Nothing of
marlinctl is replaced. Some states are real (NVRTC cut short, NVRTC without its second library), the others are played, so that a machine
without a GPU will do. States add up: a good GPU, and no compiler. tests/killing.py sets them in the fork, before the command runs.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import site
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.faults.commands import Command, asked

NVRTC = "libnvrtc.so.13"


def _no_gpu() -> None:
    import torch

    torch.cuda.is_available = lambda: False
    torch.cuda.device_count = lambda: 0
    _libcuda(None)


def _gpu(name: str, capability: tuple[int, int]) -> Callable[[], None]:
    """One that torch sees, with a driver that knows the CUDA of NVRTC. Nothing can be put on it."""

    def state() -> None:
        import torch
        from cuda.bindings import driver

        torch.cuda.is_available = lambda: True
        torch.cuda.device_count = lambda: 1
        torch.cuda.current_device = lambda: 0
        torch.cuda.get_device_name = lambda device=None: name
        torch.cuda.get_device_capability = lambda device=None: capability
        driver.cuDriverGetVersion = lambda: (driver.CUresult.CUDA_SUCCESS, 13000)

    return state


def _driver_too_old_for_torch() -> None:
    """Then torch sees no GPU at all."""
    import torch

    _no_gpu()
    torch.version.cuda = "13.0"
    _libcuda(11040)


def _driver_too_old_for_nvrtc() -> None:
    """torch is built for the CUDA of the driver, and a newer compiler was installed beside it."""
    from cuda.bindings import driver

    driver.cuDriverGetVersion = lambda: (driver.CUresult.CUDA_SUCCESS, 12080)


def _libcuda(version: int | None) -> None:
    """What `ctypes` finds under the name of the driver's library: one that knows CUDA `version` (12080 is 12.8), or none."""
    real = ctypes.CDLL

    def tell(number: Any) -> int:
        number._obj.value = version
        return 0

    def load(name: str, *more: Any, **options: Any) -> Any:
        if name != "libcuda.so.1":
            return real(name, *more, **options)
        if version is None:
            raise OSError("libcuda.so.1: cannot open shared object file: No such file or directory")
        return SimpleNamespace(cuDriverGetVersion=tell)

    ctypes.CDLL = load  # type: ignore[assignment, misc]


def _no_bindings() -> None:
    for name in [name for name in sys.modules if name.startswith("cuda.bindings")]:
        del sys.modules[name]
    sys.modules["cuda.bindings"] = None  # type: ignore[assignment]


def _no_nvrtc() -> None:
    import cuda.pathfinder

    def nowhere(name: str) -> None:
        raise cuda.pathfinder.DynamicLibNotFoundError(f"No such file: {NVRTC}\nlistdir: a hundred lines")

    cuda.pathfinder.load_nvidia_dynamic_lib = nowhere


def _nvrtc_cut_short() -> None:
    """As a full disk leaves it: the file is found before any other of its name, and is no library."""
    folder = Path(os.environ["MARLINCTL_CACHE"]) / "site-packages"  # the test's own, which goes away with it
    (folder / "nvidia/cu13/lib").mkdir(parents=True)
    (folder / "nvidia/cu13/lib" / NVRTC).write_bytes(b"\x7fELF")
    site.getsitepackages = lambda prefixes=None: [str(folder)]


def _nvrtc_alone() -> None:
    """Loaded from a folder where libnvrtc-builtins does not lie beside it. The bindings take the library that is loaded already."""
    import nvidia

    real = next(path for folder in nvidia.__path__ for path in Path(folder).glob(f"*/lib/{NVRTC}"))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / NVRTC).symlink_to(real)
        ctypes.CDLL(str(Path(folder) / NVRTC), mode=ctypes.RTLD_GLOBAL)


STATES: dict[str, Callable[[], None]] = {
    "no GPU": _no_gpu,
    "sm_70": _gpu("Tesla V100-SXM2-16GB", (7, 0)),
    "sm_90": _gpu("NVIDIA H100 80GB HBM3", (9, 0)),
    "a driver too old for torch": _driver_too_old_for_torch,
    "a driver too old for NVRTC": _driver_too_old_for_nvrtc,
    "no cuda-bindings": _no_bindings,
    "no NVRTC": _no_nvrtc,
    "NVRTC cut short": _nvrtc_cut_short,
    "NVRTC without its builtins": _nvrtc_alone,
}


def _bench(text: str, *states: str, more: tuple[str, ...] = ()) -> Command:
    return Command(lambda root: ["bench", *more], 4, text, machine=states)


def _on_cuda(text: str, *states: str, device: str = "cuda") -> Command:
    return Command(lambda root: asked(root, "--device", device), 4, text, machine=states)


_BUILD = ("--build", "--arch", "sm_80", "--only", "m8n128k256x4")
_MODEL = ("--model", "packed")
_NO_BINDINGS, _NO_NVRTC = "the package cuda-bindings cannot be imported", f"NVRTC cannot be loaded: No such file: {NVRTC}"

MACHINES: dict[str, Command] = {
    "no GPU: bench": _bench("this machine has no GPU", "no GPU"),
    "no GPU: bench --model": _bench("this machine has no GPU", "no GPU", more=_MODEL),
    "no GPU: quantize --device cuda": _on_cuda("no cuda: this machine has no GPU", "no GPU"),
    "one GPU: quantize --device cuda:1": _on_cuda("torch sees cuda:0", "sm_90", device="cuda:1"),
    "sm_70: bench": _bench("8.0 to 12.x, and Tesla V100-SXM2-16GB (cuda:0) has 7.0", "sm_70"),
    "sm_70: bench --model": _bench("(cuda:0) has 7.0", "sm_70", more=_MODEL),
    "sm_70: bench --build": _bench("--arch sm_80", "sm_70", more=("--build",)),
    "a driver too old for torch: bench": _bench("knows CUDA 11.4, and torch is built for 13.0", "a driver too old for torch"),
    "a driver too old for torch: quantize --device cuda": _on_cuda("install driver 580 or newer", "a driver too old for torch"),
    "a driver too old for NVRTC: bench": _bench("the driver knows CUDA 12.8", "sm_90", "a driver too old for NVRTC"),
    "no cuda-bindings: bench": _bench(_NO_BINDINGS, "sm_90", "no cuda-bindings"),
    "no cuda-bindings: bench --build": _bench(_NO_BINDINGS, "no cuda-bindings", more=_BUILD),
    "no NVRTC: bench": _bench(_NO_NVRTC, "sm_90", "no NVRTC"),
    "no NVRTC: bench --build": _bench(_NO_NVRTC, "no NVRTC", more=_BUILD),
    "NVRTC cut short: bench": _bench(f"{NVRTC}: file too short", "sm_90", "NVRTC cut short"),
    "NVRTC cut short: bench --build": _bench(f"{NVRTC}: file too short", "NVRTC cut short", more=_BUILD),
    "NVRTC without its builtins: bench --build": _bench("libnvrtc-builtins.so", "NVRTC without its builtins", more=_BUILD),
}  # fmt: skip


def _compressed(root: Path) -> list[str]:
    """All the way to native tiles, which are read before they are published: by a kernel where there is one, else by the emulator."""
    from tests.tiny import make_tiny

    shutil.rmtree(root / "model")
    make_tiny(root / "model", hidden_size=64, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1)
    _, model, out, *more = asked(root, "--device", "cpu")
    return ["compress", model, out, *more, "--also", "marlin", "--no-eval"]


# In each of these states a model is compressed all the same: where there is a GPU, it must be asked for a kernel, and told to have none.
STILL_WORKS: dict[str, Command] = {
    f"{state}: compress": Command(_compressed, 0, '"by": "emulator"', machine=(*beside, state))
    for beside, states in (
        ((), ("no GPU", "sm_70", "a driver too old for torch", "NVRTC without its builtins")),
        (("sm_90",), ("a driver too old for NVRTC", "no cuda-bindings", "no NVRTC", "NVRTC cut short")),
    )
    for state in states
}
