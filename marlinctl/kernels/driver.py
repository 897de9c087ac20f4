"""The CUDA driver, through the bindings of torch's CUDA wheels, imported when it is first called; its answers as values or exceptions."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from marlinctl.kernels import jit


def driver() -> ModuleType:
    """cuda.bindings.driver; jit.CompilerMissing where it is not installed."""
    global _module
    if _module is None:
        try:
            from cuda.bindings import driver as module
        except ImportError as error:
            raise jit.CompilerMissing(f"the package cuda-bindings cannot be imported: {error}") from error
        _module = module
    return _module


_module: ModuleType | None = None


def done_all(result: tuple[Any, ...]) -> list[Any]:
    """What a driver call gives, or its error as an exception."""
    status, *values = result
    if int(status) != 0:
        raise RuntimeError(f"the CUDA driver reports {status.name}")
    return values


def done(result: tuple[Any, ...]) -> Any:
    """The first of what a driver call gives; None for a call that gives nothing."""
    values = done_all(result)
    return values[0] if values else None
