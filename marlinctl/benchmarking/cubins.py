"""Machine code of the kernels for the tool: where it is kept, and what is said when it cannot be made.

kernels/jit.py compiles and caches; it knows neither the cache folder of the user nor the errors of the command line. Both
are added here. The entries lie in `kernels` below the cache folder, beside downloads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from marlinctl.errors import EnvironmentProblem
from marlinctl.kernels import jit
from marlinctl.system.driver import OLDEST_DRIVER


def kernel_cubin(source: str, defines: Sequence[str], architecture: str, cache_dir: Path | None) -> bytes:
    """The machine code of a source of kernels/csrc; `cache_dir` None is MARLINCTL_CACHE or the user's cache folder."""
    folder = kernel_folder(cache_dir)
    with telling(folder, f"{source} for {architecture}"):
        return jit.cubin(source, defines, architecture, folder)


def kernel_folder(cache_dir: Path | None) -> Path:
    """Where the machine code lies. None is where the operators look for it."""
    return jit.default_folder() if cache_dir is None else cache_dir / "kernels"


@contextmanager
def telling(folder: Path, where: str) -> Iterator[None]:
    """What compiling and loading raise, as errors of the command line: E403, E490."""
    try:
        yield
    except jit.CompilerMissing as error:
        fix = "install a CUDA build of torch, which brings both, or pip install cuda-bindings nvidia-cuda-nvrtc"
        fix += " (with --force-reinstall where they are there and damaged)"
        raise EnvironmentProblem("E403", str(error), where="compiling a CUDA kernel", fix=fix) from error
    except jit.CompilationFailed as error:
        fix = "use the versions of torch and nvidia-cuda-nvrtc in constraints.txt; if that does not help, report these lines"
        raise EnvironmentProblem("E403", str(error), where=where, fix=fix) from error
    except jit.DriverTooOld as error:
        newest = OLDEST_DRIVER.get(error.needed, "of a newer branch")
        fix = f"install driver {newest} or newer, or cuda-bindings and NVRTC of CUDA {error.known}, as a torch built for it brings them"
        raise EnvironmentProblem("E403", str(error), where=where, fix=fix) from error
    except OSError as error:
        fix = "name another place with --cache-dir or MARLINCTL_CACHE"
        what = f"the cache of compiled kernels cannot be used: {error.strerror or error}"
        raise EnvironmentProblem("E490", what, where=str(folder), fix=fix) from error
