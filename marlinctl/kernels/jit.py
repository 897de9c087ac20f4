"""CUDA sources to machine code at first use, without a C++ compiler, and a cache of what came out.

A kernel is compiled by NVRTC, a library that torch's CUDA wheels bring together with its Python bindings, for one named
architecture and straight to machine code (a cubin): the driver never compiles anything. No GPU and no driver are needed for it.

    csrc/*.cu, *.cuh      ─┐
    -D of a configuration ─┼─► NVRTC ─► cubin ─► <folder>/<key>.cubin ─► the driver
    sm_90                 ─┘

The key is the SHA-256 of everything that decides the result: all sources, the flags, the architecture and the version of
NVRTC. So an entry never becomes wrong, and nothing has to be deleted when a source changes. An entry begins with the SHA-256
of the rest; one that does not match is compiled again. It is written under a temporary name, flushed to disk and renamed, so
two processes at once both succeed and whoever reads sees a whole entry or none. The folder belongs to its user alone (mode
0700): machine code out of a folder that others may write is theirs, not ours.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

SOURCES = Path(__file__).parent / "csrc"
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_90a")  # 90a: 90 with wgmma, which newer architectures do not have
OPTIONS = ("--std=c++17",)
DIGEST_BYTES = hashlib.sha256().digest_size
LOG_LINES = 12  # of NVRTC's log in an error: the first mistake, mostly


class CompilerMissing(RuntimeError):
    """cuda-bindings or NVRTC is not installed, not whole, or cannot be loaded."""


class DriverTooOld(RuntimeError):
    """The driver knows an older major version of CUDA than NVRTC compiles for, so it may not load the machine code."""

    def __init__(self, known: tuple[int, int], made: str) -> None:
        super().__init__(f"the driver knows CUDA {known[0]}.{known[1]}, and the machine code would be made by NVRTC {made}")
        self.known, self.needed = known[0], int(made.partition(".")[0])  # major versions


class CompilationFailed(RuntimeError):
    """NVRTC refused a source. The message has the first lines of its log."""


def cubin(source: str, defines: Sequence[str], architecture: str, folder: Path) -> bytes:
    """The machine code of a source of csrc, from the cache in `folder`, or compiled and put there.

    Args:
        source: a file name in csrc, such as marlin_sm80.cu.
        defines: what -D is given, such as TOKENS=8, in a fixed order.
        architecture: one of ARCHITECTURES.
        folder: the cache; made if missing.

    Raises:
        CompilerMissing: the version of NVRTC is part of the key, so it must be there even for a cached entry.
        CompilationFailed: the source is not compiled without errors.
        PermissionError: the folder belongs to somebody else.
        OSError: the folder cannot be read or written.
    """
    nvrtc = _nvrtc()
    texts, flags, entry = _entry(nvrtc, source, defines, architecture, folder)
    known = _read(entry)
    if known is not None:
        return known
    code = _compile(nvrtc, source, texts, flags)
    _write(entry, code)
    return code


def cached(source: str, defines: Sequence[str], architecture: str, folder: Path) -> bool:
    """Whether `cubin` would find its answer in the cache. Raises what it raises, but for CompilationFailed."""
    return _read(_entry(_nvrtc(), source, defines, architecture, folder)[2]) is not None


def compiler_version() -> str:
    """NVRTC's, such as 13.0. CompilerMissing where there is none."""
    return nvrtc_version(_nvrtc())


def refuse_old_driver(known: tuple[int, int]) -> None:
    """DriverTooOld where `known`, the newest CUDA of the driver, is of an older major version than NVRTC. Newer minor versions load:
    https://docs.nvidia.com/deploy/cuda-compatibility/
    """
    made = compiler_version()
    if known[0] < int(made.partition(".")[0]):
        raise DriverTooOld(known, made)


def default_folder() -> Path:
    """The cache of a user: MARLINCTL_CACHE, else where caches lie by the XDG convention. Nothing is made."""
    if os.environ.get("MARLINCTL_CACHE"):
        return Path(os.environ["MARLINCTL_CACHE"]) / "kernels"
    home = os.environ.get("XDG_CACHE_HOME", "").strip()
    return (Path(home) if home else Path.home() / ".cache") / "marlinctl" / "kernels"


def sources() -> dict[str, str]:
    """Every file of csrc by its name; they include each other by these names."""
    return {path.name: path.read_text("utf-8") for path in sorted(SOURCES.glob("*.cu*"))}


def flags_for(defines: Sequence[str], architecture: str) -> tuple[str, ...]:
    if architecture not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {architecture!r}, known are {', '.join(ARCHITECTURES)}")
    return (f"--gpu-architecture={architecture}", *OPTIONS, *(f"-D{define}" for define in defines))


def cache_key(texts: dict[str, str], flags: Sequence[str], source: str, version: str) -> str:
    """SHA-256 of everything that decides the machine code; JSON keeps its parts apart."""
    return hashlib.sha256(json.dumps([version, source, list(flags), sorted(texts.items())]).encode()).hexdigest()


def nvrtc_version(nvrtc: ModuleType) -> str:
    """Such as 13.0."""
    try:
        _, major, minor = _checked(nvrtc, nvrtc.nvrtcVersion())
    except RuntimeError as error:  # the library is looked for at the first call
        raise CompilerMissing(f"the library NVRTC cannot be loaded: {str(error).splitlines()[0]}") from error
    return f"{major}.{minor}"


def _entry(
    nvrtc: ModuleType, source: str, defines: Sequence[str], architecture: str, folder: Path
) -> tuple[dict[str, str], tuple[str, ...], Path]:
    """All sources, the flags, and the file of the cache that belongs to them."""
    texts, flags = sources(), flags_for(defines, architecture)
    return texts, flags, _private(folder) / f"{cache_key(texts, flags, source, nvrtc_version(nvrtc))}.cubin"


def _nvrtc() -> ModuleType:
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise CompilerMissing(f"the package cuda-bindings cannot be imported: {error}") from error
    module: ModuleType = nvrtc
    return module


def _compile(nvrtc: ModuleType, source: str, texts: dict[str, str], flags: Sequence[str]) -> bytes:
    headers = [name for name in texts if name != source]
    contents = [texts[name].encode() for name in headers]
    names = [name.encode() for name in headers]
    _, program = _checked(nvrtc, nvrtc.nvrtcCreateProgram(texts[source].encode(), source.encode(), len(headers), contents, names))
    try:
        status, *_ = nvrtc.nvrtcCompileProgram(program, len(flags), [flag.encode() for flag in flags])
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = _filled(nvrtc, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).rstrip(b"\0").decode("utf-8", "replace")
            lines = [line for line in log.splitlines() if line.strip()][:LOG_LINES]
            if status == nvrtc.nvrtcResult.NVRTC_ERROR_BUILTIN_OPERATION_FAILURE:  # libnvrtc-builtins, a library of its own
                raise CompilerMissing(f"NVRTC {nvrtc_version(nvrtc)} is not whole: {lines[0] if lines else status.name}")
            what = f"NVRTC {nvrtc_version(nvrtc)} stopped at {source} ({' '.join(flags)}): {status.name}"
            raise CompilationFailed("\n".join([what, *lines]))
        return _filled(nvrtc, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _filled(nvrtc: ModuleType, size_of: Any, get: Any, program: Any) -> bytes:
    """What NVRTC writes into a buffer of the caller: its log, the machine code."""
    _, size = _checked(nvrtc, size_of(program))
    buffer = bytearray(size)
    _checked(nvrtc, get(program, buffer))
    return bytes(buffer)


def _checked(nvrtc: ModuleType, result: tuple[Any, ...]) -> tuple[Any, ...]:
    if result[0] != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"NVRTC reports {result[0].name}")
    return result


def _private(folder: Path) -> Path:
    """The folder, made if missing, readable and writable by its owner alone."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to user {status.st_uid}; machine code is only taken from a folder of one's own")
    if status.st_mode & 0o077:
        folder.chmod(0o700)
    return folder


def _read(entry: Path) -> bytes | None:
    """The machine code of an entry, or None where there is none or it is damaged."""
    try:
        data = entry.read_bytes()
    except FileNotFoundError:
        return None
    digest, code = data[:DIGEST_BYTES], data[DIGEST_BYTES:]
    return code if hashlib.sha256(code).digest() == digest else None


def _write(entry: Path, code: bytes) -> None:
    handle, name = tempfile.mkstemp(dir=entry.parent, prefix=".", suffix=".tmp")  # mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(code).digest() + code)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(entry)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
